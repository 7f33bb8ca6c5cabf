// The load generator of the measurements, for what iperf3 does not measure: request and response times, the rate of
// small datagrams, new connections. It calls the kernel directly and blocks, so that it adds two to three microseconds
// per call and no event loop. One client, one server, one thread each.
//
//   serve PORT                              TCP: answers every byte with a byte; UDP: counts, and tells when asked
//   rr IP PORT SECONDS                      one connection, one byte there, one byte back
//   udp IP PORT PER_SECOND SECONDS BYTES    datagrams at an even rate; prints how many left and how many came
//   connect IP PORT SECONDS                 connections, one after the other: open, one byte each way, close
import process from 'node:process';
import {
  AF_INET,
  check,
  IPPROTO_TCP,
  POLLFD,
  POLLIN,
  SO_RCVBUF,
  SO_RCVBUFFORCE,
  SO_REUSEADDR,
  SOCK_DGRAM,
  SOCK_STREAM,
  SOCKADDR_IN,
  SOL_SOCKET,
  system as sys,
  TCP_NODELAY,
  writeAddress,
  writeSockaddr,
} from 'node-tun';
import { parseIpv4 } from '../src/addr.ts';
import { unwrap } from '../src/error.ts';

const memory = sys.allocate(65_536 + 256);
const view = new DataView(memory.bytes.buffer);
const buffer = sys.pointerAt(memory, 256);
const BUFFER = 65_536;
/** A datagram that begins so asks for the count and sets it back; its second octet tells the askings apart. */
const ASK = 0xa5;

function option(fd: number, level: number, name: number, value: number): number {
  view.setInt32(0, value, true);
  return sys.setsockopt(fd, level, name, memory.pointer, 4);
}

function open(type: number, ip: number, port: number, how: 'bind' | 'connect'): number {
  const fd = check('socket', sys.socket(AF_INET, type, 0));
  option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  if (type === SOCK_STREAM) option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  else if (option(fd, SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20) < 0) option(fd, SOL_SOCKET, SO_RCVBUF, 16 << 20);
  writeSockaddr(view, 0, ip, port);
  check(`${how} port ${port}`, sys[how](fd, memory.pointer, SOCKADDR_IN.size));
  return fd;
}

function say(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

function serve(port: number): never {
  const listener = open(SOCK_STREAM, 0, port, 'bind');
  check('listen', sys.listen(listener, 4096));
  const datagrams = open(SOCK_DGRAM, 0, port, 'bind');
  const fds = [listener, datagrams];
  const polls = sys.allocate(1024 * POLLFD.size);
  const pollsView = new DataView(polls.bytes.buffer);
  const MSG_DONTWAIT = 0x40;
  const vector = sys.allocate(64 + 256);
  const message = new DataView(vector.bytes.buffer);
  const address = memory.address + 256;
  // msghdr at 64: name at 160, one vector at 128
  writeAddress(message, 64, vector.address + 160);
  writeAddress(message, 64 + 16, vector.address + 128);
  message.setUint32(64 + 24, 1, true);
  writeAddress(message, 128, address);
  message.setUint32(128 + 8, BUFFER, true);
  const received = sys.pointerAt(vector, 64);
  let count = 0;
  let asked = -1;
  let said = 0;
  say({ ready: true });
  for (;;) {
    for (const [i, fd] of fds.entries()) {
      pollsView.setInt32(i * POLLFD.size, fd, true);
      pollsView.setInt16(i * POLLFD.size + POLLFD.events, POLLIN, true);
    }
    check('poll', sys.poll(polls.pointer, fds.length, -1));
    for (let i = fds.length - 1; i >= 0; i--) {
      if (pollsView.getInt16(i * POLLFD.size + POLLFD.revents, true) === 0) continue;
      const fd = fds[i]!;
      if (fd === listener) {
        const client = sys.accept(listener);
        if (client < 0) continue;
        option(client, IPPROTO_TCP, TCP_NODELAY, 1);
        fds.push(client);
      } else if (fd === datagrams) {
        for (;;) {
          message.setUint32(64 + 8, 16, true);
          const length = sys.recvmsg(datagrams, received, MSG_DONTWAIT);
          if (length < 0) break;
          if (memory.bytes[256] !== ASK) {
            count++;
            continue;
          }
          // The same asking again (an answer was lost) gets the same answer.
          if (memory.bytes[257] !== asked) {
            asked = memory.bytes[257]!;
            said = count;
            count = 0;
          }
          view.setUint32(258, said);
          message.setUint32(128 + 8, 6, true);
          sys.sendmsg(datagrams, received, 0);
          message.setUint32(128 + 8, BUFFER, true);
        }
      } else {
        // One connection at a time has the floor for as long as it keeps talking.
        const length = sys.read(fd, buffer, BUFFER);
        if (length > 0) sys.write(fd, buffer, length);
        else {
          sys.close(fd);
          fds.splice(i, 1);
        }
      }
    }
  }
}

function percentile(sorted: Float64Array, share: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? 0;
}

function rr(ip: number, port: number, seconds: number): void {
  const fd = open(SOCK_STREAM, ip, port, 'connect');
  const times = new Float64Array(4_000_000);
  let count = 0;
  const begin = performance.now();
  let last = begin;
  while (last - begin < seconds * 1000 && count < times.length) {
    check('write', sys.write(fd, buffer, 1));
    if (check('read', sys.read(fd, buffer, 1)) !== 1) throw new Error('the server closed');
    const now = performance.now();
    times[count++] = (now - last) * 1000;
    last = now;
  }
  const sorted = times.subarray(0, count).sort();
  say({
    per_s: Math.round(count / ((last - begin) / 1000)),
    p50_us: Math.round(percentile(sorted, 0.5) * 10) / 10,
    p99_us: Math.round(percentile(sorted, 0.99) * 10) / 10,
    min_us: Math.round((sorted[0] ?? 0) * 10) / 10,
  });
  sys.close(fd);
}

function udp(ip: number, port: number, perSecond: number, seconds: number, size: number): void {
  const fd = open(SOCK_DGRAM, ip, port, 'connect');
  const total = Math.round(perSecond * seconds);
  const begin = performance.now();
  const limit = begin + seconds * 2000;
  let sent = 0;
  let refused = 0;
  // Even pace, in steps of up to 8 so that the clock costs little; a sender that cannot keep up stops at twice the time.
  for (let now = begin; sent < total && now < limit; now = performance.now()) {
    const due = Math.min(total, Math.ceil(((now - begin) / 1000) * perSecond));
    for (let n = Math.min(8, due - sent); n > 0; n--) {
      if (sys.write(fd, buffer, size) < 0) refused++;
      sent++;
    }
  }
  const elapsed = (performance.now() - begin) / 1000;
  // What is on its way may take a moment; then the count is asked for until an answer comes.
  memory.bytes[256] = ASK;
  memory.bytes[257] = Date.now() & 0xff;
  const polls = sys.allocate(POLLFD.size);
  const pollsView = new DataView(polls.bytes.buffer);
  pollsView.setInt32(0, fd, true);
  pollsView.setInt16(POLLFD.events, POLLIN, true);
  let received = -1;
  for (let tries = 0; tries < 20 && received < 0; tries++) {
    if (sys.poll(polls.pointer, 1, 100) > 0) {
      if (sys.read(fd, buffer, 64) === 6) received = view.getUint32(258);
      memory.bytes[256] = ASK;
      continue;
    }
    sys.write(fd, buffer, 6);
  }
  say({ sent: sent - refused, refused, received, per_s: Math.round((sent - refused) / elapsed) });
  sys.close(fd);
}

function connect(ip: number, port: number, seconds: number): void {
  let count = 0;
  const begin = performance.now();
  while (performance.now() - begin < seconds * 1000) {
    const fd = open(SOCK_STREAM, ip, port, 'connect');
    check('write', sys.write(fd, buffer, 1));
    check('read', sys.read(fd, buffer, 1));
    sys.close(fd);
    count++;
  }
  say({ per_s: Math.round(count / ((performance.now() - begin) / 1000)) });
}

const [mode, first, second, ...rest] = process.argv.slice(2);
const numbers = rest.map(Number);
if (mode === 'serve') serve(Number(first));
const ip = unwrap(parseIpv4(first ?? ''));
const port = Number(second);
if (mode === 'rr') rr(ip, port, numbers[0] ?? 3);
else if (mode === 'udp') udp(ip, port, numbers[0] ?? 10_000, numbers[1] ?? 3, numbers[2] ?? 64);
else if (mode === 'connect') connect(ip, port, numbers[0] ?? 3);
else throw new Error(`mode "${mode}" must be serve, rr, udp or connect`);
