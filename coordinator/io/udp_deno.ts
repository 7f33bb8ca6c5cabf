// UDP sockets on Deno; udp_node.ts is its twin. Chosen by the "#udp" import of package.json. A server's socket is our
// own: node:dgram makes a zeroed array, an object and a promise for every message there, and at 20,000 a second the
// collector's pauses are most of the 99th percentile (measured with 2.9.5: 4 to 6 ms, against 2 ms).
import { Buffer } from 'node:buffer';
import type { Socket } from 'node:dgram';
import { setImmediate as othersFirst, setTimeout as sleep } from 'node:timers/promises';
import {
  AF_INET,
  EFD_CLOEXEC,
  EFD_NONBLOCK,
  ERRNO,
  errnoName,
  IOVEC_SIZE,
  MSG_DONTWAIT,
  MSGHDR,
  POLLFD,
  POLLIN,
  type Region,
  SO_RCVBUF,
  SOCK_CLOEXEC,
  SOCK_DGRAM,
  SOCK_NONBLOCK,
  SOCKADDR_IN,
  SOL_SOCKET,
  system,
  writeAddress,
  writeSockaddr,
} from 'node-tun';
import { type Ipv4, ipv4 } from '../../src/addr.ts';
import type { UdpOptions, UdpServer } from './udp.ts';

/** Messages taken before timers and other sockets have their turn: about a millisecond of answers. */
const TURN_MAX = 64;
/** An answer over UDP: RFC 1035 §4.2.1 with RFC 6891's 16-bit size. */
const SEND_MAX = 65_535;
/** How long a socket that fails is left alone. */
const FAILED_WAIT_MS = 100;

/**
 * Sets how much a bound socket of node:dgram can take: messages of up to `messageMax` octets; longer ones are cut.
 * `kernelBytes` cannot be had there: Deno leaves the kernel's buffer at net.core.rmem_default.
 */
export function sizeReceives(socket: Socket, messageMax: number, _kernelBytes?: number): void {
  // What Deno calls the receive buffer is a new, zeroed array for every message, twice as large as what is asked for
  // (65,536 when nothing is): measured with 2.9.5, 30,000 messages take 386 MB at 1 MiB and 65 MB at 4 KiB.
  socket.setRecvBufferSize(messageMax >> 1);
}

/** One message on its way: its octets, the other side's address, and what the kernel is told about both. */
class Envelope {
  readonly bytes: Region;
  readonly header: Region;
  readonly #view: DataView;
  readonly #vector: DataView;
  readonly name: DataView;

  constructor(messageMax: number) {
    this.bytes = system.allocate(messageMax);
    const name = system.allocate(SOCKADDR_IN.size);
    const vector = system.allocate(IOVEC_SIZE);
    this.header = system.allocate(MSGHDR.size);
    this.name = new DataView(name.bytes.buffer);
    this.#vector = new DataView(vector.bytes.buffer);
    this.#view = new DataView(this.header.bytes.buffer);
    writeAddress(this.#vector, 0, this.bytes.address);
    writeAddress(this.#view, MSGHDR.name, name.address);
    writeAddress(this.#view, MSGHDR.iov, vector.address);
    this.#view.setUint32(MSGHDR.iovLength, 1, true);
    this.length = messageMax;
  }

  /** Octets to send, or room to receive. */
  set length(octets: number) {
    this.#vector.setUint32(8, octets, true);
    // A receive writes here how long the name was.
    this.#view.setUint32(MSGHDR.nameLength, SOCKADDR_IN.size, true);
  }
}

/** Rejects with an error whose `code` is the errno's name. */
export async function bindUdp(options: UdpOptions): Promise<UdpServer> {
  const fd = check('socket', system.socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  let wake = -1;
  try {
    const scratch = system.allocate(SOCKADDR_IN.size);
    const view = new DataView(scratch.bytes.buffer);
    if (options.kernelBytes !== undefined) {
      view.setInt32(0, options.kernelBytes, true);
      check('setsockopt', system.setsockopt(fd, SOL_SOCKET, SO_RCVBUF, scratch.pointer, 4));
    }
    writeSockaddr(view, 0, options.address, options.port);
    check('bind', system.bind(fd, scratch.pointer, SOCKADDR_IN.size));
    wake = check('eventfd', system.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    return serve(fd, wake, portOf(fd), options.messageMax);
  } catch (error) {
    system.close(fd);
    if (wake >= 0) system.close(wake);
    throw error;
  }
}

function serve(fd: number, wake: number, port: number, messageMax: number): UdpServer {
  const incoming = new Envelope(messageMax);
  const outgoing = new Envelope(SEND_MAX);
  const message = Buffer.from(incoming.bytes.bytes.buffer);
  const polls = system.allocate(2 * POLLFD.size);
  const pollsView = new DataView(polls.bytes.buffer);
  for (const [i, watched] of [fd, wake].entries()) {
    pollsView.setInt32(i * POLLFD.size + POLLFD.fd, watched, true);
    pollsView.setInt16(i * POLLFD.size + POLLFD.events, POLLIN, true);
  }
  let stopped = false;
  let failed = (): void => {};
  let running: Promise<void> | undefined;

  /** Takes what waits, at most a turn's; returns how many there were, or -1 when the socket failed. */
  function take(onMessage: (message: Buffer, address: Ipv4, port: number) => void): number {
    for (let taken = 0; taken < TURN_MAX; taken++) {
      incoming.length = messageMax;
      const length = system.recvmsg(fd, incoming.header.pointer, MSG_DONTWAIT);
      if (length === -ERRNO.EAGAIN || stopped) return taken;
      if (length === -ERRNO.EINTR) continue;
      if (length < 0) return -1;
      const { name } = incoming;
      onMessage(
        message.subarray(0, length),
        ipv4(name.getUint32(SOCKADDR_IN.address)),
        name.getUint16(SOCKADDR_IN.port),
      );
    }
    return TURN_MAX;
  }

  async function run(onMessage: (message: Buffer, address: Ipv4, port: number) => void): Promise<void> {
    while (!stopped) {
      await system.pollAside(polls.pointer, 2, -1);
      let taken = TURN_MAX;
      while (!stopped && taken === TURN_MAX) {
        taken = take(onMessage);
        if (taken === TURN_MAX) await othersFirst();
      }
      if (taken >= 0 || stopped) continue;
      failed();
      await sleep(FAILED_WAIT_MS);
    }
  }

  async function end(): Promise<void> {
    const one = system.allocate(8);
    one.bytes[0] = 1;
    system.write(wake, one.pointer, 8);
    await running;
    system.close(fd);
    system.close(wake);
  }

  let closed: Promise<void> | undefined;
  return {
    port,
    receive(onMessage, onError) {
      failed = onError;
      running = run(onMessage);
    },
    send(answer, address, to) {
      if (stopped || answer.length > SEND_MAX) return failed();
      outgoing.bytes.bytes.set(answer);
      outgoing.length = answer.length;
      writeSockaddr(outgoing.name, 0, address, to);
      if (system.sendmsg(fd, outgoing.header.pointer, MSG_DONTWAIT) < 0) failed();
    },
    close() {
      stopped = true;
      closed ??= end();
      return closed;
    },
  };
}

function portOf(fd: number): number {
  const name = system.allocate(SOCKADDR_IN.size);
  const length = system.allocate(4);
  new DataView(length.bytes.buffer).setUint32(0, SOCKADDR_IN.size, true);
  check('getsockname', system.getsockname(fd, name.pointer, length.pointer));
  return new DataView(name.bytes.buffer).getUint16(SOCKADDR_IN.port);
}

function check(call: string, result: number): number {
  if (result >= 0) return result;
  const code = errnoName(result);
  throw Object.assign(new Error(`${call}: ${code}`), { code });
}
