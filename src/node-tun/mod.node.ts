// The system calls of a packet loop on Node, by koffi.
import koffi from 'koffi';
import type { Pointer, Region, System } from './types.ts';

export * from './linux.ts';
export * from './tun.ts';
export type { Pointer, Region, System } from './types.ts';

const libc = koffi.load('libc.so.6');

/** Pointers are numbers here: koffi passes them fastest, and 47 bits fit. */
type Call<Arguments extends number[]> = (...args: Arguments) => number;
type One = [number];
type Two = [number, number];
type Three = [number, number, number];
type Four = [number, number, number, number];
type Five = [number, number, number, number, number];

// koffi knows no ssize_t: `long` is as wide on every 64-bit Linux.
function define<Arguments extends number[]>(prototype: string): Call<Arguments> {
  return libc.func(prototype) as unknown as Call<Arguments>;
}

const raw = {
  open: define<Three>('int open(uintptr_t, int, int)'),
  close: define<One>('int close(int)'),
  read: define<Three>('long read(int, uintptr_t, uint64_t)'),
  write: define<Three>('long write(int, uintptr_t, uint64_t)'),
  readv: define<Three>('long readv(int, uintptr_t, int)'),
  writev: define<Three>('long writev(int, uintptr_t, int)'),
  ioctl: define<Three>('int ioctl(int, uint64_t, uintptr_t)'),
  poll: define<Three>('int poll(uintptr_t, uint64_t, int)'),
  schedYield: define<[]>('int sched_yield()'),
  eventfd: define<Two>('int eventfd(uint32_t, int)'),
  socket: define<Three>('int socket(int, int, int)'),
  bind: define<Three>('int bind(int, uintptr_t, uint32_t)'),
  connect: define<Three>('int connect(int, uintptr_t, uint32_t)'),
  listen: define<Two>('int listen(int, int)'),
  accept: define<Three>('int accept(int, uintptr_t, uintptr_t)'),
  setsockopt: define<Five>('int setsockopt(int, int, int, uintptr_t, uint32_t)'),
  getsockopt: define<Five>('int getsockopt(int, int, int, uintptr_t, uintptr_t)'),
  getsockname: define<Three>('int getsockname(int, uintptr_t, uintptr_t)'),
  sendmsg: define<Three>('long sendmsg(int, uintptr_t, int)'),
  recvmsg: define<Three>('long recvmsg(int, uintptr_t, int)'),
  sendmmsg: define<Four>('int sendmmsg(int, uintptr_t, uint32_t, int)'),
};

const pollAside = libc.func('int poll(uintptr_t, uint64_t, int)').async as unknown as (
  fds: number,
  count: number,
  timeoutMs: number,
  done: (error: Error | null, result: number) => void,
) => void;

const ok = (result: number): number => (result < 0 ? -koffi.errno() : result);
const at = (pointer: Pointer): number => pointer as unknown as number;

function regionOf(bytes: Uint8Array<ArrayBuffer>): Region {
  const address = Number(koffi.address(bytes));
  return { bytes, address, pointer: address as unknown as Pointer };
}

export const system: System = {
  runtime: 'node',
  allocate: (length) => regionOf(new Uint8Array(new ArrayBuffer(length))),
  regionOf,
  pointerAt: (region, offset) => (region.address + offset) as unknown as Pointer,
  open: (path, flags, mode) => ok(raw.open(at(path), flags, mode)),
  close: (fd) => ok(raw.close(fd)),
  read: (fd, buffer, length) => ok(raw.read(fd, at(buffer), length)),
  write: (fd, buffer, length) => ok(raw.write(fd, at(buffer), length)),
  readv: (fd, iov, count) => ok(raw.readv(fd, at(iov), count)),
  writev: (fd, iov, count) => ok(raw.writev(fd, at(iov), count)),
  ioctl: (fd, request, argument) => ok(raw.ioctl(fd, request, at(argument))),
  ioctlValue: (fd, request, argument) => ok(raw.ioctl(fd, request, argument)),
  poll: (fds, count, timeoutMs) => ok(raw.poll(at(fds), count, timeoutMs)),
  pollAside: (fds, count, timeoutMs) =>
    new Promise((resolve) =>
      pollAside(at(fds), count, timeoutMs, (error, result) => resolve(error === null ? result : -1)),
    ),
  schedYield: () => raw.schedYield(),
  eventfd: (initial, flags) => ok(raw.eventfd(initial, flags)),
  socket: (domain, type, protocol) => ok(raw.socket(domain, type, protocol)),
  bind: (fd, address, length) => ok(raw.bind(fd, at(address), length)),
  connect: (fd, address, length) => ok(raw.connect(fd, at(address), length)),
  listen: (fd, backlog) => ok(raw.listen(fd, backlog)),
  accept: (fd) => ok(raw.accept(fd, 0, 0)),
  setsockopt: (fd, level, name, value, length) => ok(raw.setsockopt(fd, level, name, at(value), length)),
  getsockopt: (fd, level, name, value, length) => ok(raw.getsockopt(fd, level, name, at(value), at(length))),
  getsockname: (fd, address, length) => ok(raw.getsockname(fd, at(address), at(length))),
  sendmsg: (fd, message, flags) => ok(raw.sendmsg(fd, at(message), flags)),
  recvmsg: (fd, message, flags) => ok(raw.recvmsg(fd, at(message), flags)),
  sendmmsg: (fd, messages, count, flags) => ok(raw.sendmmsg(fd, at(messages), count, flags)),
};
