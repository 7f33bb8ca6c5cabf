// ICMP in place (RFC 792), with the packet that an error quotes.
//
//   |     type      |     code      |           checksum            |
//   |        identifier / 0         |    sequence / next-hop MTU    |
//   |      echo data, or the quoted packet: header + 8 octets …     |
import type { Bytes } from './bytes.ts';
import { finish, sum } from './checksum.ts';

export const ICMP = { type: 0, code: 1, checksum: 2, id: 4, sequence: 6, mtu: 6, quote: 8, size: 8 } as const;
export const ICMP_TYPE = {
  echoReply: 0,
  unreachable: 3,
  quench: 4,
  redirect: 5,
  echo: 8,
  timeExceeded: 11,
  parameter: 12,
} as const;
/** Codes of `unreachable`: RFC 792, RFC 1191 (4), RFC 1812 §5.2.7.1 (13). */
export const UNREACHABLE = { host: 1, port: 3, tooBig: 4, prohibited: 13 } as const;

/** True for the types that quote a packet. A redirect never crosses the overlay. */
export function isIcmpError(type: number): boolean {
  return (
    type === ICMP_TYPE.unreachable ||
    type === ICMP_TYPE.quench ||
    type === ICMP_TYPE.timeExceeded ||
    type === ICMP_TYPE.parameter
  );
}

/** Sets the checksum of a whole message anew. */
export function finishIcmp(bytes: Bytes, offset: number, length: number): void {
  bytes.view.setUint16(offset + ICMP.checksum, 0);
  bytes.view.setUint16(offset + ICMP.checksum, finish(sum(bytes, offset, length)));
}
