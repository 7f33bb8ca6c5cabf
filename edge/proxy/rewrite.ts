// Changes addresses, ports and TTL of a packet in place and keeps its checksums right by difference. It refuses to
// decide anything.
import type { Bytes } from '../../src/wire/bytes.ts';
import { adjust, difference, fold, sum32 } from '../../src/wire/checksum.ts';
import { ICMP } from '../../src/wire/icmp.ts';
import { IPV4, PROTOCOL } from '../../src/wire/ipv4.ts';
import { TCP } from '../../src/wire/tcp.ts';
import { UDP } from '../../src/wire/udp.ts';

/** How much of the transport header is there, and what its checksum field holds. */
export const TRANSPORT = {
  /** A later fragment: no header. */
  none: 0,
  /** A whole checksum. */
  full: 1,
  /** The pseudo-header's sum only, not complemented: the device will finish it (virtio NEEDS_CSUM). */
  partial: 2,
} as const;
export type Transport = (typeof TRANSPORT)[keyof typeof TRANSPORT];

export interface Rewrite {
  source: number;
  target: number;
  /** Source and target port; for an ICMP echo the identifier is in `sourcePort`. */
  sourcePort: number;
  targetPort: number;
  /** Taken off the TTL. */
  ttl: number;
}

/** `transportAt` is the offset of the transport header; with TRANSPORT.none it is not touched. */
export function rewrite(
  bytes: Bytes,
  offset: number,
  transportAt: number,
  kind: Transport,
  to: Rewrite,
): void {
  const { view, u8 } = bytes;
  const was = sum32(view.getUint32(offset + IPV4.source)) + sum32(view.getUint32(offset + IPV4.target));
  const addresses = difference(was, sum32(to.source) + sum32(to.target));
  view.setUint32(offset + IPV4.source, to.source);
  view.setUint32(offset + IPV4.target, to.target);
  // TTL is the high octet of the word that it shares with the protocol.
  let header = addresses;
  if (to.ttl !== 0) {
    const ttl = u8[offset + IPV4.ttl]!;
    u8[offset + IPV4.ttl] = ttl - to.ttl;
    header = fold(header + difference(ttl << 8, (ttl - to.ttl) << 8));
  }
  view.setUint16(offset + IPV4.checksum, adjust(view.getUint16(offset + IPV4.checksum), header));
  if (kind === TRANSPORT.none) return;

  const protocol = u8[offset + IPV4.protocol];
  if (protocol === PROTOCOL.icmp) {
    const id = view.getUint16(transportAt + ICMP.id);
    if (id === to.sourcePort) return;
    view.setUint16(transportAt + ICMP.id, to.sourcePort);
    const at = transportAt + ICMP.checksum;
    view.setUint16(at, adjust(view.getUint16(at), difference(id, to.sourcePort)));
    return;
  }
  const at = transportAt + (protocol === PROTOCOL.tcp ? TCP.checksum : UDP.checksum);
  const ports = view.getUint16(transportAt) + view.getUint16(transportAt + 2);
  view.setUint16(transportAt, to.sourcePort);
  view.setUint16(transportAt + 2, to.targetPort);
  const field = view.getUint16(at);
  if (kind === TRANSPORT.partial) {
    view.setUint16(at, fold(field + addresses));
    return;
  }
  // A UDP checksum of 0 means that there is none (RFC 768), and stays so.
  if (protocol === PROTOCOL.udp && field === 0) return;
  const checksum = adjust(field, addresses + difference(ports, to.sourcePort + to.targetPort));
  view.setUint16(at, checksum === 0 && protocol === PROTOCOL.udp ? 0xffff : checksum);
}
