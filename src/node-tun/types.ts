// What mod.node.ts and mod.deno.ts both export: memory that the kernel can be pointed at, and the system calls of a
// packet loop. A call returns what the system call returns, or the negated errno; nothing here throws on errno and
// nothing allocates per call.

/** An address as the runtime's FFI wants it. Never invent one: take it from a Region. */
export type Pointer = { readonly __brand: 'Pointer' };

/** Memory that does not move. It lives as long as `bytes` is referenced. */
export interface Region {
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** Address of `bytes[0]`, exact: user addresses have at most 47 bits. */
  readonly address: number;
  /** The same for a call's argument. */
  readonly pointer: Pointer;
}

export interface System {
  /** Which FFI stands behind the calls, for people. */
  readonly runtime: 'node' | 'deno';
  allocate(length: number): Region;
  /** The region that these bytes are; they must fill their buffer, and it must not move or be resized. */
  regionOf(bytes: Uint8Array<ArrayBuffer>): Region;
  /** Pointer into a region. Make it once, not per packet. */
  pointerAt(region: Region, offset: number): Pointer;
  open(path: Pointer, flags: number, mode: number): number;
  close(fd: number): number;
  read(fd: number, buffer: Pointer, length: number): number;
  write(fd: number, buffer: Pointer, length: number): number;
  readv(fd: number, iov: Pointer, count: number): number;
  writev(fd: number, iov: Pointer, count: number): number;
  ioctl(fd: number, request: number, argument: Pointer): number;
  /** For requests whose argument is a number, such as TUNSETOFFLOAD. */
  ioctlValue(fd: number, request: number, argument: number): number;
  poll(fds: Pointer, count: number, timeoutMs: number): number;
  /**
   * The same on a thread of the runtime's pool, which it keeps until it returns: for a loop that shares its own thread.
   * Its errno is lost: -1 stands for any. The memory must stay until it is settled; it does not reject.
   */
  pollAside(fds: Pointer, count: number, timeoutMs: number): Promise<number>;
  /** Lets others of this core run first. */
  schedYield(): number;
  eventfd(initial: number, flags: number): number;
  socket(domain: number, type: number, protocol: number): number;
  bind(fd: number, address: Pointer, length: number): number;
  connect(fd: number, address: Pointer, length: number): number;
  listen(fd: number, backlog: number): number;
  /** The peer's address is not asked for. */
  accept(fd: number): number;
  setsockopt(fd: number, level: number, name: number, value: Pointer, length: number): number;
  getsockopt(fd: number, level: number, name: number, value: Pointer, length: Pointer): number;
  getsockname(fd: number, address: Pointer, length: Pointer): number;
  sendmsg(fd: number, message: Pointer, flags: number): number;
  recvmsg(fd: number, message: Pointer, flags: number): number;
  sendmmsg(fd: number, messages: Pointer, count: number, flags: number): number;
}
