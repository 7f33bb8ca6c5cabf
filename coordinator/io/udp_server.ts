// A UDP socket that serves many askers on one address, the same on both runtimes: our own, since node:dgram makes an
// array, an object and (on Deno) a promise for every message, and the collector's pauses become the 99th percentile. It
// receives into one buffer by the FFI and waits on a thread of the runtime's pool. It knows nothing of what the messages
// say.
import { Buffer } from 'node:buffer';
import { setImmediate as othersFirst, setTimeout as sleep } from 'node:timers/promises';
import {
  AF_INET,
  check,
  EFD_CLOEXEC,
  EFD_NONBLOCK,
  ERRNO,
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

export interface UdpOptions {
  readonly address: Ipv4;
  /** 0 takes a free one. */
  readonly port: number;
  /** Octets of the largest message; longer ones are cut. */
  readonly messageMax: number;
  /** Octets that may wait in the kernel, which gives at most net.core.rmem_max; its own default when left out. */
  readonly kernelBytes?: number | undefined;
}

export interface UdpServer {
  readonly port: number;
  /**
   * Begins to receive; once. The message is the callee's only until it returns: what stays must be copied. A source
   * port of 0 (RFC 768 allows it) is one that nothing can be sent to.
   */
  receive(onMessage: (message: Buffer, address: Ipv4, port: number) => void, onError: () => void): void;
  /** What cannot be sent is a lost datagram and told to `onError`. The message is the caller's again at once. */
  send(message: Buffer, address: Ipv4, port: number): void;
  /** Resolves when the port is free again. Repeating it is harmless. */
  close(): Promise<void>;
}

/** Messages taken before timers and other sockets have their turn: about a millisecond of answers. */
const TURN_MAX = 64;
/** An answer over UDP: RFC 1035 §4.2.1 with RFC 6891's 16-bit size. */
const SEND_MAX = 65_535;
/** How long a thread of the pool waits at a time: a process that ends without closing waits for its threads. */
const WAIT_MS = 1_000;
/** How long a socket that fails is left alone. */
const FAILED_WAIT_MS = 100;

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
      await system.pollAside(polls.pointer, 2, WAIT_MS);
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
