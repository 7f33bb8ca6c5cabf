// What crosses between nodes: VXLAN-GPE in UDP (draft-ietf-nvo3-vxlan-gpe §3), and our control frames under a
// next-protocol value of our own. It refuses to know sockets.
//
//    0                   1                   2                   3
//   |0 0 V V I P B O|          reserved             | next protocol |      I = VNI valid, P = next protocol present
//   |                      VNI                      |   reserved    |
//
// A control frame follows the same header; offsets from the frame's first octet:
//   |  kind |         0                             |    8
//   |                     token                     |   12   chosen by the asker, returned as it came
//   |                     subnet                    |   16   base of the sender's subnet: which node speaks
//   |                     target                    |   20   base of the receiver's subnet, 0 when it is not known
//   |              stamp (8 octets)                 |   24   microseconds, the sender's own; grows
//   |       proof (16 octets)                       |   32   HMAC-SHA-256 under the secret of all the rest, cut
//   |       status, only in an answer to a probe    |   48   carried, not looked into (probe.ts)
import { PROBE_STATUS_BYTES_MAX } from '../limits.ts';
import type { Bytes } from './bytes.ts';

export const TUNNEL = { flags: 0, next: 3, vni: 4, size: 8 } as const;
/** I and P, version 0. */
export const TUNNEL_FLAGS = 0x0c;
/** Next protocol: IPv4 (draft §3.2). */
export const NEXT_IPV4 = 1;
/** Next protocol of control frames: from the range that the draft leaves for experiments. */
export const NEXT_CONTROL = 0xfe;

export const FRAME = { ipv4: 1, control: 2, short: -1, flags: -2, vni: -3, next: -4 } as const;
export type Frame = (typeof FRAME)[keyof typeof FRAME];

export function writeTunnel(bytes: Bytes, offset: number, next: number, vni: number): void {
  bytes.view.setUint32(offset, (TUNNEL_FLAGS << 24) | next);
  bytes.view.setUint32(offset + TUNNEL.vni, vni << 8);
}

/** What kind of frame `length` bytes at `offset` are. Reserved fields are ignored on receipt (draft §3.1). */
export function readTunnel(bytes: Bytes, offset: number, length: number, vni: number): Frame {
  if (length < TUNNEL.size) return FRAME.short;
  if (bytes.u8[offset + TUNNEL.flags] !== TUNNEL_FLAGS) return FRAME.flags;
  if (bytes.view.getUint32(offset + TUNNEL.vni) >>> 8 !== vni) return FRAME.vni;
  const next = bytes.u8[offset + TUNNEL.next]!;
  return next === NEXT_IPV4 ? FRAME.ipv4 : next === NEXT_CONTROL ? FRAME.control : FRAME.next;
}

/** Offsets from the frame's first octet, the tunnel header included. */
export const CONTROL = {
  kind: 8,
  token: 12,
  subnet: 16,
  target: 20,
  stamp: 24,
  proof: 32,
  size: 48,
} as const;
export const CONTROL_PROOF_BYTES = 16;
/** hello asks for a helloBack, probe for a probeBack; all of them keep a NAT's mapping alive. */
export const CONTROL_KIND = { hello: 1, helloBack: 2, probe: 3, probeBack: 4 } as const;

export interface Control {
  readonly kind: number;
  readonly token: number;
  readonly subnet: number;
  readonly target: number;
  readonly stampUs: number;
}

/** Writes a whole control frame but for its proof. */
export function writeControl(bytes: Bytes, offset: number, vni: number, control: Control): void {
  writeTunnel(bytes, offset, NEXT_CONTROL, vni);
  const { view } = bytes;
  view.setUint32(offset + CONTROL.kind, control.kind << 24);
  view.setUint32(offset + CONTROL.token, control.token);
  view.setUint32(offset + CONTROL.subnet, control.subnet);
  view.setUint32(offset + CONTROL.target, control.target);
  view.setUint32(offset + CONTROL.stamp, Math.floor(control.stampUs / 2 ** 32));
  view.setUint32(offset + CONTROL.stamp + 4, control.stampUs % 2 ** 32);
}

/** Undefined when the kind is unknown or the length wrong: only an answer to a probe may have anything behind its proof,
 *  up to PROBE_STATUS_BYTES_MAX, which leaves room for a newer version's status. */
export function readControl(bytes: Bytes, offset: number, length: number): Control | undefined {
  if (length < CONTROL.size || length > CONTROL.size + PROBE_STATUS_BYTES_MAX) return undefined;
  const { view } = bytes;
  const kind = view.getUint32(offset + CONTROL.kind) >>> 24;
  if (kind < CONTROL_KIND.hello || kind > CONTROL_KIND.probeBack) return undefined;
  if (length > CONTROL.size && kind !== CONTROL_KIND.probeBack) return undefined;
  return {
    kind,
    token: view.getUint32(offset + CONTROL.token),
    subnet: view.getUint32(offset + CONTROL.subnet),
    target: view.getUint32(offset + CONTROL.target),
    stampUs: view.getUint32(offset + CONTROL.stamp) * 2 ** 32 + view.getUint32(offset + CONTROL.stamp + 4),
  };
}
