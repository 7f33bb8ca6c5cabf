// UDP headers in place (RFC 768).
//
//   |          source port          |          target port          |
//   |            length             |           checksum            |
import type { Bytes } from './bytes.ts';
import { finish, pseudoSum, sum } from './checksum.ts';
import { PROTOCOL } from './ipv4.ts';

export const UDP = { source: 0, target: 2, length: 4, checksum: 6, size: 8 } as const;

/** True when `length` bytes at `offset` hold a header whose own length fits. */
export function checkUdp(bytes: Bytes, offset: number, length: number): boolean {
  if (length < UDP.size) return false;
  const own = bytes.view.getUint16(offset + UDP.length);
  return own >= UDP.size && own <= length;
}

/** Sets the checksum of a whole datagram anew; 0 is sent as 0xffff, because 0 means "none". */
export function finishUdp(
  bytes: Bytes,
  offset: number,
  length: number,
  source: number,
  target: number,
): void {
  bytes.view.setUint16(offset + UDP.checksum, 0);
  const checksum = finish(pseudoSum(source, target, PROTOCOL.udp, length) + sum(bytes, offset, length));
  bytes.view.setUint16(offset + UDP.checksum, checksum === 0 ? 0xffff : checksum);
}

/** Writes a header with checksum 0. */
export function writeUdp(bytes: Bytes, offset: number, source: number, target: number, length: number): void {
  bytes.view.setUint16(offset + UDP.source, source);
  bytes.view.setUint16(offset + UDP.target, target);
  bytes.view.setUint16(offset + UDP.length, length);
  bytes.view.setUint16(offset + UDP.checksum, 0);
}
