// Super-packets: cutting one into wire-sized packets and joining wire-sized packets into one, without touching a byte
// of payload. A cut gives a header per segment and says where its payload lies; a join gives one header and says which
// payloads follow. Offload formats are the kernel's (virtio_net_hdr), translated here into lengths.
import { SEGMENTS_MAX } from '../../src/limits.ts';
import { type Bytes, newBytes } from '../../src/wire/bytes.ts';
import { adjust, difference, finish, pseudoSum, sum } from '../../src/wire/checksum.ts';
import { FLAG_DF, headerLength, IPV4, PROTOCOL } from '../../src/wire/ipv4.ts';
import { TCP, TCP_ACK, TCP_CWR, TCP_FIN, TCP_PSH, tcpHeaderLength } from '../../src/wire/tcp.ts';
import { NEXT_IPV4, TUNNEL, writeTunnel } from '../../src/wire/tunnel.ts';
import { UDP } from '../../src/wire/udp.ts';

/** Tunnel header 8 + IPv4 at most 60 + TCP at most 60 = 128. */
export const HEADER_SLOT = 128;
/** A 65,535-byte packet in the smallest segments that we take: 65,495 / 64. */
export const CUT_MAX = 1024;
/** Header slots that may be in use at once: two packets of the smallest segments. */
export const HEADER_SLOTS = 2 * CUT_MAX;

/** Cuts super-packets. Their headers stay where they are until `release`. */
export class Cutter {
  readonly headers: Bytes;
  /** Segments of the last cut. */
  count = 0;
  /** Bytes of each segment's headers, the tunnel's included; the same for all of one cut. */
  headerLength = 0;
  readonly headerAt = new Int32Array(CUT_MAX);
  readonly bodyAt = new Int32Array(CUT_MAX);
  readonly bodyLength = new Int32Array(CUT_MAX);
  readonly #vni: number;
  /** Slots in use. */
  #used = 0;

  constructor(vni: number, headers: Bytes = newBytes(HEADER_SLOTS * HEADER_SLOT)) {
    this.#vni = vni;
    this.headers = headers;
  }

  static get memory(): number {
    return HEADER_SLOTS * HEADER_SLOT;
  }

  /** Header slots that are left. */
  get room(): number {
    return HEADER_SLOTS - this.#used;
  }

  /** What was cut so far is not needed any more. */
  release(): void {
    this.#used = 0;
  }

  /** Segments that a cut would make, 0 when the packet cannot be cut so. */
  segments(bytes: Bytes, offset: number, size: number): number {
    const payload = bytes.view.getUint16(offset + IPV4.total) - headersOf(bytes, offset);
    const count = Math.ceil(payload / size);
    return size > 0 && payload > 0 && count <= CUT_MAX ? count : 0;
  }

  /**
   * Cuts the TCP or UDP packet at `offset` into segments of `size` payload bytes. Header checksums and transport
   * checksums of all segments are right afterwards, whatever the packet's own held. False when it is no packet that can
   * be cut so, or there is no room.
   */
  cut(bytes: Bytes, offset: number, size: number): boolean {
    const { view, u8 } = bytes;
    const ip = headerLength(bytes, offset);
    const total = view.getUint16(offset + IPV4.total);
    const protocol = u8[offset + IPV4.protocol]!;
    const tcp = protocol === PROTOCOL.tcp;
    if (!tcp && protocol !== PROTOCOL.udp) return false;
    const transport = tcp ? tcpHeaderLength(bytes, offset + ip) : UDP.size;
    const header = ip + transport;
    const payload = total - header;
    const count = this.segments(bytes, offset, size);
    if (count === 0 || count > this.room) return false;

    const out = this.headers;
    const source = view.getUint32(offset + IPV4.source);
    const target = view.getUint32(offset + IPV4.target);
    const id = view.getUint16(offset + IPV4.id);
    const sequence = tcp ? view.getUint32(offset + ip + TCP.sequence) : 0;
    const flags = tcp ? u8[offset + ip + TCP.flags]! : 0;

    // The first header is the template: its sums are computed once, with the fields that vary at zero.
    const first = this.#take();
    writeTunnel(out, first, NEXT_IPV4, this.#vni);
    out.u8.set(u8.subarray(offset, offset + header), first + TUNNEL.size);
    const ipAt = first + TUNNEL.size;
    const transportAt = ipAt + ip;
    out.view.setUint16(ipAt + IPV4.total, 0);
    out.view.setUint16(ipAt + IPV4.id, 0);
    out.view.setUint16(ipAt + IPV4.checksum, 0);
    const ipSum = sum(out, ipAt, ip);
    if (tcp) {
      out.view.setUint32(transportAt + TCP.sequence, 0);
      out.u8[transportAt + TCP.flags] = 0;
      out.view.setUint16(transportAt + TCP.checksum, 0);
    } else {
      out.view.setUint16(transportAt + UDP.length, 0);
      out.view.setUint16(transportAt + UDP.checksum, 0);
    }
    const transportSum = pseudoSum(source, target, protocol, 0) + sum(out, transportAt, transport);
    const wire = TUNNEL.size + header;

    let done = 0;
    for (let i = 0; i < count; i++) {
      const at = i === 0 ? first : this.#take();
      const length = Math.min(size, payload - done);
      const bodyAt = offset + header + done;
      const last = i === count - 1;
      // Segment 0 is the template itself; every field that varies is written in every copy.
      if (i > 0) out.u8.copyWithin(at, first, first + wire);
      const segmentIp = at + TUNNEL.size;
      const segment = segmentIp + ip;
      const segmentTotal = header + length;
      const segmentId = (id + i) & 0xffff;
      out.view.setUint16(segmentIp + IPV4.total, segmentTotal);
      out.view.setUint16(segmentIp + IPV4.id, segmentId);
      out.view.setUint16(segmentIp + IPV4.checksum, finish(ipSum + segmentTotal + segmentId));
      const l4 = transport + length;
      let checksum = transportSum + l4 + sum(bytes, bodyAt, length);
      if (tcp) {
        const number = (sequence + done) >>> 0;
        let own = flags;
        if (!last) own &= ~(TCP_FIN | TCP_PSH);
        if (i > 0) own &= ~TCP_CWR;
        out.view.setUint32(segment + TCP.sequence, number);
        out.u8[segment + TCP.flags] = own;
        checksum += (number & 0xffff) + (number >>> 16) + own;
        out.view.setUint16(segment + TCP.checksum, finish(checksum));
      } else {
        out.view.setUint16(segment + UDP.length, l4);
        const folded = finish(checksum + l4);
        out.view.setUint16(segment + UDP.checksum, folded === 0 ? 0xffff : folded);
      }
      this.headerAt[i] = at;
      this.bodyAt[i] = bodyAt;
      this.bodyLength[i] = length;
      done += length;
    }
    this.count = count;
    this.headerLength = wire;
    return true;
  }

  #take(): number {
    return this.#used++ * HEADER_SLOT;
  }
}

/** Bytes of both headers; those of a packet that is neither TCP nor UDP are counted as UDP's. */
function headersOf(bytes: Bytes, offset: number): number {
  const ip = headerLength(bytes, offset);
  const tcp = bytes.u8[offset + IPV4.protocol] === PROTOCOL.tcp;
  return ip + (tcp ? tcpHeaderLength(bytes, offset + ip) : UDP.size);
}

/** Joins packets that lie in one buffer, in the order in which they came. */
export class Joiner {
  /** False where the TUN device takes no joined segments, or no joined datagrams (before Linux 6.2). */
  tcp = true;
  udp = true;
  /** Packets taken so far; 0 when nothing is open. */
  count = 0;
  /** Where the first packet lies: its header becomes the joined one's. */
  at = 0;
  headerLength = 0;
  /** Payload bytes per segment. */
  size = 0;
  protocol = 0;
  /** Length of the joined packet. */
  total = 0;
  readonly bodyAt = new Int32Array(SEGMENTS_MAX);
  readonly bodyLength = new Int32Array(SEGMENTS_MAX);
  #closed = false;
  #next = 0;
  #flags = 0;

  /** Opens with a packet whose IPv4 header is good; what cannot be joined stays alone. */
  open(bytes: Bytes, offset: number): void {
    const { view, u8 } = bytes;
    const ip = headerLength(bytes, offset);
    const total = view.getUint16(offset + IPV4.total);
    const protocol = u8[offset + IPV4.protocol]!;
    this.count = 1;
    this.at = offset;
    this.protocol = protocol;
    this.total = total;
    this.#closed = true;
    if (ip !== IPV4.size || (view.getUint16(offset + IPV4.fragment) & ~FLAG_DF) !== 0) return;
    const at = offset + ip;
    const rest = total - ip;
    if (protocol === PROTOCOL.tcp && this.tcp) {
      if (rest < TCP.size) return;
      const header = tcpHeaderLength(bytes, at);
      if (header < TCP.size || header >= rest) return;
      const flags = u8[at + TCP.flags]!;
      if ((flags & ~TCP_PSH) !== TCP_ACK) return;
      this.headerLength = ip + header;
      this.size = rest - header;
      this.#next = (view.getUint32(at + TCP.sequence) + this.size) >>> 0;
      this.#flags = flags;
    } else if (protocol === PROTOCOL.udp && this.udp) {
      if (rest <= UDP.size || view.getUint16(at + UDP.length) !== rest) return;
      if (view.getUint16(at + UDP.checksum) === 0) return;
      this.headerLength = ip + UDP.size;
      this.size = rest - UDP.size;
    } else return;
    if (!checksumHolds(bytes, offset, ip, total, protocol)) return;
    this.bodyAt[0] = offset + this.headerLength;
    this.bodyLength[0] = this.size;
    this.#closed = false;
  }

  /** Takes one more packet whose IPv4 header is good; false when it does not continue the open one. */
  add(bytes: Bytes, offset: number): boolean {
    if (this.#closed || this.count >= SEGMENTS_MAX) return false;
    const { view, u8 } = bytes;
    const first = this.at;
    const total = view.getUint16(offset + IPV4.total);
    const header = this.headerLength;
    const length = total - header;
    if (length <= 0 || length > this.size || this.total + length > 65_535) return false;
    // Version, header length and TOS; flags and fragment offset; TTL and protocol; both addresses.
    if (
      view.getUint16(offset) !== view.getUint16(first) ||
      view.getUint16(offset + IPV4.fragment) !== view.getUint16(first + IPV4.fragment) ||
      view.getUint16(offset + IPV4.ttl) !== view.getUint16(first + IPV4.ttl) ||
      view.getUint32(offset + IPV4.source) !== view.getUint32(first + IPV4.source) ||
      view.getUint32(offset + IPV4.target) !== view.getUint32(first + IPV4.target)
    )
      return false;
    const at = offset + IPV4.size;
    const firstAt = first + IPV4.size;
    if (view.getUint32(at) !== view.getUint32(firstAt)) return false; // ports
    let flags = 0;
    if (this.protocol === PROTOCOL.tcp) {
      flags = u8[at + TCP.flags]!;
      if ((flags & ~(TCP_PSH | TCP_FIN)) !== TCP_ACK) return false;
      if (view.getUint32(at + TCP.sequence) !== this.#next) return false;
      if (view.getUint32(at + TCP.acknowledgment) !== view.getUint32(firstAt + TCP.acknowledgment))
        return false;
      if (u8[at + TCP.offset] !== u8[firstAt + TCP.offset]) return false;
      if (view.getUint16(at + TCP.window) !== view.getUint16(firstAt + TCP.window)) return false;
      for (let i = IPV4.size + TCP.size; i < header; i += 4)
        if (view.getUint32(offset + i) !== view.getUint32(first + i)) return false;
    } else {
      if (view.getUint16(at + UDP.length) !== total - IPV4.size) return false;
      if (view.getUint16(at + UDP.checksum) === 0) return false;
    }
    if (!checksumHolds(bytes, offset, IPV4.size, total, this.protocol)) return false;
    this.bodyAt[this.count] = offset + header;
    this.bodyLength[this.count] = length;
    this.count++;
    this.total += length;
    this.#next = (this.#next + length) >>> 0;
    this.#flags |= flags;
    // A shorter segment or a FIN can only be the last. A push may come before it: it stays true of the whole, because
    // a receiver of "push" delivers all that it has (RFC 9293 §3.9.1).
    if (length < this.size || (flags & TCP_FIN) !== 0) this.#closed = true;
    return true;
  }

  /** Turns the first header into the joined one's: length, flags, and the pseudo-header's sum as checksum. */
  finish(bytes: Bytes): void {
    const { view, u8 } = bytes;
    const { at, total } = this;
    const was = view.getUint16(at + IPV4.total);
    view.setUint16(at + IPV4.total, total);
    view.setUint16(at + IPV4.checksum, adjust(view.getUint16(at + IPV4.checksum), difference(was, total)));
    partialChecksum(bytes, at);
    if (this.protocol === PROTOCOL.tcp) u8[at + IPV4.size + TCP.flags] = this.#flags;
    else view.setUint16(at + IPV4.size + UDP.length, total - IPV4.size);
  }
}

/** Puts the pseudo-header's sum where the checksum belongs, as virtio's NEEDS_CSUM wants it. */
export function partialChecksum(bytes: Bytes, offset: number): void {
  const { view, u8 } = bytes;
  const ip = headerLength(bytes, offset);
  const protocol = u8[offset + IPV4.protocol]!;
  const at = offset + ip + (protocol === PROTOCOL.tcp ? TCP.checksum : UDP.checksum);
  const length = view.getUint16(offset + IPV4.total) - ip;
  view.setUint16(
    at,
    pseudoSum(view.getUint32(offset + IPV4.source), view.getUint32(offset + IPV4.target), protocol, length),
  );
}

/** A packet joined into another loses its own checksum, so it must be right before. */
function checksumHolds(bytes: Bytes, offset: number, ip: number, total: number, protocol: number): boolean {
  const { view } = bytes;
  const length = total - ip;
  const pseudo = pseudoSum(
    view.getUint32(offset + IPV4.source),
    view.getUint32(offset + IPV4.target),
    protocol,
    length,
  );
  return finish(pseudo + sum(bytes, offset + ip, length)) === 0;
}
