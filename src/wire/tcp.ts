// TCP headers in place (RFC 9293 §3.1).
//
//   |          source port          |          target port          |
//   |                        sequence number                        |
//   |                    acknowledgment number                      |
//   | offset|  rsvd |     flags     |            window             |
//   |           checksum            |            urgent             |
import type { Bytes } from './bytes.ts';
import { finish, pseudoSum, sum } from './checksum.ts';
import { PROTOCOL } from './ipv4.ts';

export const TCP = {
  source: 0,
  target: 2,
  sequence: 4,
  acknowledgment: 8,
  offset: 12,
  flags: 13,
  window: 14,
  checksum: 16,
  urgent: 18,
  size: 20,
} as const;
export const TCP_FIN = 0x01;
export const TCP_SYN = 0x02;
export const TCP_RST = 0x04;
export const TCP_PSH = 0x08;
export const TCP_ACK = 0x10;
export const TCP_URG = 0x20;
export const TCP_CWR = 0x80;

/** True when `length` bytes at `offset` hold a whole header. */
export function checkTcp(bytes: Bytes, offset: number, length: number): boolean {
  if (length < TCP.size) return false;
  const header = (bytes.u8[offset + TCP.offset]! >> 4) << 2;
  return header >= TCP.size && header <= length;
}

export function tcpHeaderLength(bytes: Bytes, offset: number): number {
  return (bytes.u8[offset + TCP.offset]! >> 4) << 2;
}

/** Sets the checksum of a whole segment anew. */
export function finishTcp(
  bytes: Bytes,
  offset: number,
  length: number,
  source: number,
  target: number,
): void {
  bytes.view.setUint16(offset + TCP.checksum, 0);
  bytes.view.setUint16(
    offset + TCP.checksum,
    finish(pseudoSum(source, target, PROTOCOL.tcp, length) + sum(bytes, offset, length)),
  );
}

export interface TcpFields {
  readonly source: number;
  readonly target: number;
  readonly sequence: number;
  readonly acknowledgment: number;
  readonly flags: number;
  readonly window?: number;
}

/** Writes a header without options; the checksum is left at 0. */
export function writeTcp(bytes: Bytes, offset: number, fields: TcpFields): void {
  const { view, u8 } = bytes;
  view.setUint16(offset + TCP.source, fields.source);
  view.setUint16(offset + TCP.target, fields.target);
  view.setUint32(offset + TCP.sequence, fields.sequence);
  view.setUint32(offset + TCP.acknowledgment, fields.acknowledgment);
  u8[offset + TCP.offset] = (TCP.size >> 2) << 4;
  u8[offset + TCP.flags] = fields.flags;
  view.setUint16(offset + TCP.window, fields.window ?? 0);
  view.setUint16(offset + TCP.checksum, 0);
  view.setUint16(offset + TCP.urgent, 0);
}
