// The system calls of a packet loop on Deno, by Deno.dlopen.
import type { Pointer, Region, System } from './types.ts';

export * from './linux.ts';
export * from './tun.ts';
export type { Pointer, Region, System } from './types.ts';

type Symbols<Names extends string, Result = number> = Readonly<Record<Names, (...args: unknown[]) => Result>>;

/** The part of the Deno namespace that is used here, so that the tree type-checks without Deno's own types. */
interface DenoFfi {
  dlopen<Names extends string>(
    library: string,
    symbols: Record<Names, { parameters: string[]; result: string }>,
  ): { readonly symbols: Symbols<Names> };
  dlopen<Names extends string>(
    library: string,
    symbols: Record<Names, { parameters: string[]; result: string; nonblocking: true }>,
  ): { readonly symbols: Symbols<Names, Promise<number>> };
  readonly UnsafePointer: {
    of(bytes: Uint8Array): Pointer;
    value(pointer: Pointer): bigint | number;
    offset(pointer: Pointer, bytes: number): Pointer;
  };
  readonly UnsafePointerView: new (pointer: Pointer) => { getInt32(offset?: number): number };
}
const deno = (globalThis as unknown as { readonly Deno: DenoFfi }).Deno;

// 32-bit signatures throughout: 64-bit ones come back as BigInt and cost more. No call here moves 2 GiB.
const { symbols } = deno.dlopen('libc.so.6', {
  open: { parameters: ['pointer', 'i32', 'i32'], result: 'i32' },
  close: { parameters: ['i32'], result: 'i32' },
  read: { parameters: ['i32', 'pointer', 'u32'], result: 'i32' },
  write: { parameters: ['i32', 'pointer', 'u32'], result: 'i32' },
  readv: { parameters: ['i32', 'pointer', 'i32'], result: 'i32' },
  writev: { parameters: ['i32', 'pointer', 'i32'], result: 'i32' },
  ioctl: { parameters: ['i32', 'u32', 'pointer'], result: 'i32' },
  poll: { parameters: ['pointer', 'u32', 'i32'], result: 'i32' },
  sched_yield: { parameters: [], result: 'i32' },
  eventfd: { parameters: ['u32', 'i32'], result: 'i32' },
  socket: { parameters: ['i32', 'i32', 'i32'], result: 'i32' },
  bind: { parameters: ['i32', 'pointer', 'u32'], result: 'i32' },
  connect: { parameters: ['i32', 'pointer', 'u32'], result: 'i32' },
  listen: { parameters: ['i32', 'i32'], result: 'i32' },
  accept: { parameters: ['i32', 'pointer', 'pointer'], result: 'i32' },
  setsockopt: { parameters: ['i32', 'i32', 'i32', 'pointer', 'u32'], result: 'i32' },
  getsockopt: { parameters: ['i32', 'i32', 'i32', 'pointer', 'pointer'], result: 'i32' },
  getsockname: { parameters: ['i32', 'pointer', 'pointer'], result: 'i32' },
  sendmsg: { parameters: ['i32', 'pointer', 'i32'], result: 'i32' },
  recvmsg: { parameters: ['i32', 'pointer', 'i32'], result: 'i32' },
  sendmmsg: { parameters: ['i32', 'pointer', 'u32', 'i32'], result: 'i32' },
});
// The same function with a number where the other has a pointer.
const { symbols: byValue } = deno.dlopen('libc.so.6', {
  ioctl: { parameters: ['i32', 'u32', 'u32'], result: 'i32' },
});
// The same function off this thread.
const { symbols: aside } = deno.dlopen('libc.so.6', {
  poll: { parameters: ['pointer', 'u32', 'i32'], result: 'i32', nonblocking: true },
});
const { symbols: errnoSymbols } = deno.dlopen('libc.so.6', {
  __errno_location: { parameters: [], result: 'pointer' },
});

// errno belongs to a thread and this module is loaded once per thread, so its place is asked for once.
const errno = new deno.UnsafePointerView(errnoSymbols.__errno_location() as unknown as Pointer);
const ok = (result: number): number => (result < 0 ? -errno.getInt32() : result);

function regionOf(bytes: Uint8Array<ArrayBuffer>): Region {
  const pointer = deno.UnsafePointer.of(bytes);
  return { bytes, address: Number(deno.UnsafePointer.value(pointer)), pointer };
}

export const system: System = {
  runtime: 'deno',
  allocate: (length) => regionOf(new Uint8Array(new ArrayBuffer(length))),
  regionOf,
  pointerAt: (region, offset) => deno.UnsafePointer.offset(region.pointer, offset),
  open: (path, flags, mode) => ok(symbols.open(path, flags, mode)),
  close: (fd) => ok(symbols.close(fd)),
  read: (fd, buffer, length) => ok(symbols.read(fd, buffer, length)),
  write: (fd, buffer, length) => ok(symbols.write(fd, buffer, length)),
  readv: (fd, iov, count) => ok(symbols.readv(fd, iov, count)),
  writev: (fd, iov, count) => ok(symbols.writev(fd, iov, count)),
  ioctl: (fd, request, argument) => ok(symbols.ioctl(fd, request, argument)),
  ioctlValue: (fd, request, argument) => ok(byValue.ioctl(fd, request, argument)),
  poll: (fds, count, timeoutMs) => ok(symbols.poll(fds, count, timeoutMs)),
  pollAside: (fds, count, timeoutMs) => aside.poll(fds, count, timeoutMs),
  schedYield: () => symbols.sched_yield(),
  eventfd: (initial, flags) => ok(symbols.eventfd(initial, flags)),
  socket: (domain, type, protocol) => ok(symbols.socket(domain, type, protocol)),
  bind: (fd, address, length) => ok(symbols.bind(fd, address, length)),
  connect: (fd, address, length) => ok(symbols.connect(fd, address, length)),
  listen: (fd, backlog) => ok(symbols.listen(fd, backlog)),
  accept: (fd) => ok(symbols.accept(fd, null, null)),
  setsockopt: (fd, level, name, value, length) => ok(symbols.setsockopt(fd, level, name, value, length)),
  getsockopt: (fd, level, name, value, length) => ok(symbols.getsockopt(fd, level, name, value, length)),
  getsockname: (fd, address, length) => ok(symbols.getsockname(fd, address, length)),
  sendmsg: (fd, message, flags) => ok(symbols.sendmsg(fd, message, flags)),
  recvmsg: (fd, message, flags) => ok(symbols.recvmsg(fd, message, flags)),
  sendmmsg: (fd, messages, count, flags) => ok(symbols.sendmmsg(fd, messages, count, flags)),
};
