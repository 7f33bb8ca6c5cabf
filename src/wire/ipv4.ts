// IPv4 headers in place (RFC 791). `checkIpv4` looks once; after it no accessor can leave the packet.
//
//    0                   1                   2                   3
//   |version|  ihl  |      tos      |         total length          |
//   |        identification         |flags|     fragment offset     |
//   |      ttl      |   protocol    |           checksum            |
//   |                            source                             |
//   |                            target                             |
import type { Bytes } from './bytes.ts';
import { finish, sum } from './checksum.ts';

export const IPV4 = {
  tos: 1,
  total: 2,
  id: 4,
  fragment: 6,
  ttl: 8,
  protocol: 9,
  checksum: 10,
  source: 12,
  target: 16,
  size: 20,
} as const;
export const PROTOCOL = { icmp: 1, tcp: 6, udp: 17 } as const;
export const FLAG_DF = 0x4000;
export const FLAG_MF = 0x2000;
export const FRAGMENT_MASK = 0x1fff;

/** Why a packet is no IPv4 packet; 0 when it is one. */
export const IPV4_FAULT = { none: 0, short: 1, version: 2, header: 3, length: 4, checksum: 5 } as const;
export type Ipv4Fault = (typeof IPV4_FAULT)[keyof typeof IPV4_FAULT];

/** True header, whole packet present: `length` bytes lie at `offset`; trailing bytes are allowed. */
export function checkIpv4(bytes: Bytes, offset: number, length: number): Ipv4Fault {
  if (length < IPV4.size) return IPV4_FAULT.short;
  const first = bytes.u8[offset]!;
  if (first >> 4 !== 4) return IPV4_FAULT.version;
  const header = (first & 15) << 2;
  if (header < IPV4.size || header > length) return IPV4_FAULT.header;
  const total = bytes.view.getUint16(offset + IPV4.total);
  if (total < header || total > length) return IPV4_FAULT.length;
  if (sum(bytes, offset, header) !== 0xffff) return IPV4_FAULT.checksum;
  return IPV4_FAULT.none;
}

export function headerLength(bytes: Bytes, offset: number): number {
  return (bytes.u8[offset]! & 15) << 2;
}

/** Sets the header checksum anew. */
export function finishIpv4(bytes: Bytes, offset: number): void {
  bytes.view.setUint16(offset + IPV4.checksum, 0);
  bytes.view.setUint16(offset + IPV4.checksum, finish(sum(bytes, offset, headerLength(bytes, offset))));
}

export interface Ipv4Fields {
  readonly source: number;
  readonly target: number;
  readonly protocol: number;
  /** Header and payload, bytes. */
  readonly total: number;
  readonly ttl?: number;
  readonly tos?: number;
  readonly id?: number;
  /** Flags and fragment offset as one field. */
  readonly fragment?: number;
}

/** Writes a 20-byte header with its checksum. */
export function writeIpv4(bytes: Bytes, offset: number, fields: Ipv4Fields): void {
  const { view, u8 } = bytes;
  u8[offset] = 0x45;
  u8[offset + IPV4.tos] = fields.tos ?? 0;
  view.setUint16(offset + IPV4.total, fields.total);
  view.setUint16(offset + IPV4.id, fields.id ?? 0);
  view.setUint16(offset + IPV4.fragment, fields.fragment ?? FLAG_DF);
  u8[offset + IPV4.ttl] = fields.ttl ?? 64;
  u8[offset + IPV4.protocol] = fields.protocol;
  view.setUint32(offset + IPV4.source, fields.source);
  view.setUint32(offset + IPV4.target, fields.target);
  finishIpv4(bytes, offset);
}
