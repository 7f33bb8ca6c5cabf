// Outgoing tunnel datagrams, gathered without copying and sent with as few system calls as there can be: datagrams of
// one size to one node become one UDP_SEGMENT send, several of those one sendmmsg. Order per node is kept. It refuses
// to know what the datagrams hold.
import {
  CMSG,
  CMSG_SPACE_4,
  ERRNO,
  IOVEC_SIZE,
  MMSGHDR_SIZE,
  MSGHDR,
  POLLFD,
  POLLOUT,
  type Region,
  SOCKADDR_IN,
  SOL_UDP,
  type System,
  UDP_SEGMENT,
  writeAddress,
  writeSockaddr,
} from 'node-tun';
import { SEGMENTS_MAX, SEND_BYTES_MAX } from '../../src/limits.ts';
import type { Peer } from '../proxy/peers.ts';
import { COUNT, DROP } from '../proxy/verdict.ts';

const RUNS_MAX = 64;
/** A header and a body per segment. */
const IOVECS_PER_RUN = SEGMENTS_MAX * 2;
/** How long a full socket buffer may hold up the loop. */
const FULL_WAIT_MS = 5;

export class Batch {
  readonly #sys: System;
  readonly #fd: number;
  readonly #counters: Float64Array;
  readonly #messages: Region;
  readonly #messagesView: DataView;
  readonly #iovecs: Region;
  readonly #iovecsView: DataView;
  readonly #names: DataView;
  readonly #controls: DataView;
  readonly #poll: Region;
  readonly #pollView: DataView;
  /** Per run. */
  readonly #peers: (Peer | undefined)[] = new Array<Peer | undefined>(RUNS_MAX).fill(undefined);
  readonly #size = new Int32Array(RUNS_MAX);
  readonly #packets = new Int32Array(RUNS_MAX);
  readonly #bytes = new Int32Array(RUNS_MAX);
  readonly #vectors = new Int32Array(RUNS_MAX);
  runs = 0;
  /** False where the kernel knows no UDP_SEGMENT. */
  readonly #segmenting: boolean;
  /** The way to that peer takes no joined datagrams; told once for each. */
  onRefused: (peer: Peer) => void = () => {};
  /** A datagram may have been larger than the path to that peer; true when it was. */
  onTooBig: (peer: Peer) => boolean = () => false;

  constructor(sys: System, fd: number, segmenting: boolean, counters: Float64Array) {
    this.#sys = sys;
    this.#fd = fd;
    this.#counters = counters;
    this.#segmenting = segmenting;
    this.#messages = sys.allocate(RUNS_MAX * MMSGHDR_SIZE);
    this.#messagesView = new DataView(this.#messages.bytes.buffer);
    this.#iovecs = sys.allocate(RUNS_MAX * IOVECS_PER_RUN * IOVEC_SIZE);
    this.#iovecsView = new DataView(this.#iovecs.bytes.buffer);
    const names = sys.allocate(RUNS_MAX * SOCKADDR_IN.size);
    this.#names = new DataView(names.bytes.buffer);
    const controls = sys.allocate(RUNS_MAX * CMSG_SPACE_4);
    this.#controls = new DataView(controls.bytes.buffer);
    this.#poll = sys.allocate(POLLFD.size);
    this.#pollView = new DataView(this.#poll.bytes.buffer);
    for (let run = 0; run < RUNS_MAX; run++) {
      const at = run * MMSGHDR_SIZE;
      writeAddress(this.#messagesView, at + MSGHDR.name, names.address + run * SOCKADDR_IN.size);
      this.#messagesView.setUint32(at + MSGHDR.nameLength, SOCKADDR_IN.size, true);
      writeAddress(
        this.#messagesView,
        at + MSGHDR.iov,
        this.#iovecs.address + run * IOVECS_PER_RUN * IOVEC_SIZE,
      );
      writeAddress(this.#messagesView, at + MSGHDR.control, controls.address + run * CMSG_SPACE_4);
      const control = run * CMSG_SPACE_4;
      this.#controls.setUint32(control + CMSG.length, CMSG.data + 2, true);
      this.#controls.setInt32(control + CMSG.level, SOL_UDP, true);
      this.#controls.setInt32(control + CMSG.type, UDP_SEGMENT, true);
    }
  }

  /** One datagram for a peer, of one piece, or of two when `bodyLength` is not 0. The memory must stay until `flush`. */
  add(peer: Peer, address: number, length: number, bodyAddress: number, bodyLength: number): void {
    const size = length + bodyLength;
    let run = peer.run;
    if (run >= 0 && (size > this.#size[run]! || this.#bytes[run]! + size > SEND_BYTES_MAX)) run = -1;
    if (run < 0) {
      if (this.runs >= RUNS_MAX) this.flush(this.#now);
      run = this.runs++;
      peer.run = this.#segmenting && peer.joined ? run : -1;
      this.#peers[run] = peer;
      this.#size[run] = size;
      this.#packets[run] = 0;
      this.#bytes[run] = 0;
      this.#vectors[run] = 0;
    }
    const view = this.#iovecsView;
    let vector = this.#vectors[run]!;
    let at = (run * IOVECS_PER_RUN + vector) * IOVEC_SIZE;
    view.setUint32(at, address % 2 ** 32, true);
    view.setUint32(at + 4, address / 2 ** 32, true);
    view.setUint32(at + 8, length, true);
    view.setUint32(at + 12, 0, true);
    vector++;
    if (bodyLength > 0) {
      at += IOVEC_SIZE;
      view.setUint32(at, bodyAddress % 2 ** 32, true);
      view.setUint32(at + 4, bodyAddress / 2 ** 32, true);
      view.setUint32(at + 8, bodyLength, true);
      view.setUint32(at + 12, 0, true);
      vector++;
    }
    this.#vectors[run] = vector;
    this.#bytes[run]! += size;
    const packets = this.#packets[run]! + 1;
    this.#packets[run] = packets;
    // A shorter datagram can only be a run's last.
    if (size < this.#size[run]! || packets >= SEGMENTS_MAX) peer.run = -1;
  }

  /** Time of the packets at hand, for peers whose learned address may have aged. */
  #now = 0;

  flush(now: number): void {
    this.#now = now;
    const runs = this.runs;
    if (runs === 0) return;
    const messages = this.#messagesView;
    for (let run = 0; run < runs; run++) {
      const peer = this.#peers[run]!;
      peer.run = -1;
      peer.sentMs = now;
      const at = run * MMSGHDR_SIZE;
      writeSockaddr(this.#names, run * SOCKADDR_IN.size, peer.targetIp(now), peer.targetPort(now));
      messages.setUint32(at + MSGHDR.iovLength, this.#vectors[run]!, true);
      const many = this.#packets[run]! > 1;
      messages.setUint32(at + MSGHDR.controlLength, many ? CMSG_SPACE_4 : 0, true);
      if (many) this.#controls.setUint16(run * CMSG_SPACE_4 + CMSG.data, this.#size[run]!, true);
    }
    this.runs = 0;
    let sent = 0;
    let waited = false;
    while (sent < runs) {
      const result = this.#sys.sendmmsg(
        this.#fd,
        this.#sys.pointerAt(this.#messages, sent * MMSGHDR_SIZE),
        runs - sent,
        0,
      );
      this.#counters[COUNT.tunnel_sends]!++;
      if (result > 0) {
        for (let i = 0; i < result; i++) this.#count(sent + i);
        sent += result;
        continue;
      }
      const errno = -result;
      if (errno === ERRNO.EINTR) continue;
      if ((errno === ERRNO.EAGAIN || errno === ERRNO.ENOBUFS) && !waited) {
        waited = true;
        this.#pollView.setInt32(POLLFD.fd, this.#fd, true);
        this.#pollView.setInt16(POLLFD.events, POLLOUT, true);
        this.#sys.poll(this.#poll.pointer, 1, FULL_WAIT_MS);
        continue;
      }
      this.#fail(sent, errno);
      sent++;
    }
  }

  #count(run: number): void {
    this.#counters[COUNT.to_tunnel_packets]! += this.#packets[run]!;
    this.#counters[COUNT.to_tunnel_bytes]! += this.#bytes[run]!;
  }

  #fail(run: number, errno: number): void {
    const packets = this.#packets[run]!;
    const peer = this.#peers[run]!;
    // A run too large for its path is EMSGSIZE, and EINVAL where UDP_SEGMENT is judged first (Linux before 6.14). EIO:
    // the device has no checksum offload, which UDP_SEGMENT needs (udp(7)).
    const joined = packets > 1 && (errno === ERRNO.EIO || errno === ERRNO.EINVAL);
    const tooBig = (errno === ERRNO.EMSGSIZE || errno === ERRNO.EINVAL) && this.onTooBig(peer);
    if (joined && !tooBig && peer.joined) {
      peer.joined = false;
      this.onRefused(peer);
    }
    const reason =
      errno === ERRNO.ENETUNREACH || errno === ERRNO.EHOSTUNREACH || errno === ERRNO.ENETDOWN
        ? DROP.send_unreachable
        : errno === ERRNO.EAGAIN || errno === ERRNO.ENOBUFS
          ? DROP.send_full
          : errno === ERRNO.EMSGSIZE || tooBig
            ? DROP.too_big
            : DROP.send_failed;
    this.#counters[reason]! += packets;
  }
}
