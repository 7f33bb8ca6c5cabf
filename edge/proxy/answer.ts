// Packets that the proxy itself says to an instance on this node: TCP resets and ICMP errors. Their source is the
// address that the app had dialled, because that is who it believes to talk to. Written into memory of its own, where
// they stay until `clear`.

import { ICMP_PER_SECOND } from '../../src/limits.ts';
import { type Bytes, newBytes } from '../../src/wire/bytes.ts';
import { finishIcmp, ICMP, ICMP_TYPE, isIcmpError } from '../../src/wire/icmp.ts';
import { FRAGMENT_MASK, headerLength, IPV4, PROTOCOL, writeIpv4 } from '../../src/wire/ipv4.ts';
import {
  finishTcp,
  TCP,
  TCP_ACK,
  TCP_FIN,
  TCP_RST,
  TCP_SYN,
  tcpHeaderLength,
  writeTcp,
} from '../../src/wire/tcp.ts';

/** Quoted at most: a header with options and 8 octets and then as much as fits 576 (RFC 1812 §4.3.2.3). */
const QUOTE_MAX = 576 - IPV4.size - ICMP.size;
const SLOT = 640;
export const ANSWERS_MAX = 256;
/** Room for a virtio header in front of each packet, and alignment of what follows. */
export const ANSWER_HEADROOM = 16;

export class Answers {
  readonly bytes: Bytes;
  count = 0;
  readonly at = new Int32Array(ANSWERS_MAX);
  readonly length = new Int32Array(ANSWERS_MAX);
  /** ICMP errors of this second, by whom they are for: an instance on this node. */
  readonly #made = new Map<number, number>();
  #secondMs = 0;

  constructor(bytes: Bytes = newBytes(ANSWERS_MAX * SLOT)) {
    this.bytes = bytes;
  }

  static get memory(): number {
    return ANSWERS_MAX * SLOT;
  }

  clear(): void {
    this.count = 0;
  }

  get full(): boolean {
    return this.count >= ANSWERS_MAX;
  }

  /** A reset from `source`:`sourcePort` to `target`:`targetPort`. False when there is no room. */
  reset(
    source: number,
    sourcePort: number,
    target: number,
    targetPort: number,
    sequence: number,
    acknowledgment: number,
    withAck: boolean,
  ): boolean {
    if (this.full) return false;
    const offset = this.count * SLOT + ANSWER_HEADROOM;
    const total = IPV4.size + TCP.size;
    writeIpv4(this.bytes, offset, { source, target, protocol: PROTOCOL.tcp, total });
    writeTcp(this.bytes, offset + IPV4.size, {
      source: sourcePort,
      target: targetPort,
      sequence,
      acknowledgment,
      flags: withAck ? TCP_RST | TCP_ACK : TCP_RST,
    });
    finishTcp(this.bytes, offset + IPV4.size, TCP.size, source, target);
    this.#add(offset, total);
    return true;
  }

  /** The reset that answers a segment of nobody's (RFC 9293 §3.10.7.1). A reset is never answered. */
  refuse(bytes: Bytes, offset: number): boolean {
    const { view, u8 } = bytes;
    const header = headerLength(bytes, offset);
    const at = offset + header;
    const flags = u8[at + TCP.flags]!;
    if ((flags & TCP_RST) !== 0) return false;
    const source = view.getUint32(offset + IPV4.source);
    const target = view.getUint32(offset + IPV4.target);
    const ports = [view.getUint16(at + TCP.source), view.getUint16(at + TCP.target)] as const;
    if ((flags & TCP_ACK) !== 0)
      return this.reset(
        target,
        ports[1],
        source,
        ports[0],
        view.getUint32(at + TCP.acknowledgment),
        0,
        false,
      );
    const data = view.getUint16(offset + IPV4.total) - header - tcpHeaderLength(bytes, at);
    const length = data + ((flags & TCP_SYN) !== 0 ? 1 : 0) + ((flags & TCP_FIN) !== 0 ? 1 : 0);
    const next = (view.getUint32(at + TCP.sequence) + length) >>> 0;
    return this.reset(target, ports[1], source, ports[0], 0, next, true);
  }

  /**
   * An ICMP error about the packet at `offset`, to its source. None about errors, later fragments (RFC 1812 §4.3.2.7),
   * or beyond the rate. `mtu` goes with "too big".
   */
  error(bytes: Bytes, offset: number, type: number, code: number, mtu: number, now: number): boolean {
    const { view, u8 } = bytes;
    if (this.full) return false;
    if ((view.getUint16(offset + IPV4.fragment) & FRAGMENT_MASK) !== 0) return false;
    const header = headerLength(bytes, offset);
    const protocol = u8[offset + IPV4.protocol]!;
    if (protocol === PROTOCOL.icmp) {
      const inner = u8[offset + header]!;
      if (isIcmpError(inner) || inner === ICMP_TYPE.redirect) return false;
    }
    if (now - this.#secondMs >= 1_000) {
      this.#made.clear();
      this.#secondMs = now;
    }
    const target = view.getUint32(offset + IPV4.source);
    const made = this.#made.get(target) ?? 0;
    if (made >= ICMP_PER_SECOND) return false;
    this.#made.set(target, made + 1);
    const quote = Math.min(view.getUint16(offset + IPV4.total), QUOTE_MAX);
    const at = this.count * SLOT + ANSWER_HEADROOM;
    const total = IPV4.size + ICMP.size + quote;
    writeIpv4(this.bytes, at, {
      source: view.getUint32(offset + IPV4.target),
      target,
      protocol: PROTOCOL.icmp,
      total,
      tos: 0xc0, // RFC 1812 §4.3.2.5: precedence 6
    });
    const icmp = at + IPV4.size;
    this.bytes.u8[icmp + ICMP.type] = type;
    this.bytes.u8[icmp + ICMP.code] = code;
    this.bytes.view.setUint32(icmp + ICMP.id, mtu);
    this.bytes.u8.set(u8.subarray(offset, offset + quote), icmp + ICMP.quote);
    finishIcmp(this.bytes, icmp, ICMP.size + quote);
    this.#add(at, total);
    return true;
  }

  #add(offset: number, length: number): void {
    this.at[this.count] = offset;
    this.length[this.count] = length;
    this.count++;
  }
}
