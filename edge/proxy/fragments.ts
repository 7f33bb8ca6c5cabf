// Later fragments carry no ports; they follow the decision that their datagram's first fragment met. Remembered by
// (source, target, identification, protocol) as the packet came; a ring, oldest out first. And the cutting of packets
// that may be fragmented (RFC 791 §3.2).
import { FRAGMENT_MS, FRAGMENT_TRACKS_MAX } from '../../src/limits.ts';
import type { Bytes } from '../../src/wire/bytes.ts';
import { FLAG_DF, FLAG_MF, FRAGMENT_MASK, finishIpv4, headerLength, IPV4 } from '../../src/wire/ipv4.ts';
import { TupleIndex } from './flows.ts';
import type { Peer } from './peers.ts';

export interface Track {
  source: number;
  target: number;
  id: number;
  protocol: number;
  newSource: number;
  newTarget: number;
  /** Undefined: to the TUN. */
  peer: Peer | undefined;
  untilMs: number;
}

export class Tracks {
  readonly #index: TupleIndex;
  readonly #ring: Track[] = [];
  #next = 0;

  constructor(seed: number) {
    this.#index = new TupleIndex(FRAGMENT_TRACKS_MAX, seed);
  }

  find(source: number, target: number, id: number, protocol: number, now: number): Track | undefined {
    const slot = this.#index.find(source, target, id, protocol);
    const track = slot < 0 ? undefined : this.#ring[slot];
    return track === undefined || now >= track.untilMs ? undefined : track;
  }

  note(
    source: number,
    target: number,
    id: number,
    protocol: number,
    newSource: number,
    newTarget: number,
    peer: Peer | undefined,
    now: number,
  ): void {
    const found = this.#index.find(source, target, id, protocol);
    const slot = found >= 0 ? found : this.#next;
    const old = this.#ring[slot];
    if (found < 0) {
      this.#next = (this.#next + 1) % FRAGMENT_TRACKS_MAX;
      if (old !== undefined) this.#index.remove(old.source, old.target, old.id, old.protocol);
      this.#index.add(source, target, id, protocol, slot);
    }
    const untilMs = now + FRAGMENT_MS;
    if (old === undefined)
      this.#ring[slot] = { source, target, id, protocol, newSource, newTarget, peer, untilMs };
    else Object.assign(old, { source, target, id, protocol, newSource, newTarget, peer, untilMs });
  }
}

/** Bytes that `cut` may write for a packet of 65,535 at the smallest MTU. */
export function cutMemory(total: number, mtu: number): number {
  return total + Math.ceil(total / (mtu - 68)) * 80;
}

/**
 * Cuts a packet without DF into fragments of at most `mtu` bytes, each aligned to 4 and with `headroom` bytes in front.
 * Calls back with offset and length in `out`. Options are copied into every fragment: those that must not be are
 * ignored by hosts (RFC 791 §3.1). False when the packet must not be cut.
 */
export function cutIntoFragments(
  bytes: Bytes,
  offset: number,
  mtu: number,
  out: Bytes,
  headroom: number,
  each: (at: number, length: number) => void,
): boolean {
  const { view } = bytes;
  const field = view.getUint16(offset + IPV4.fragment);
  if ((field & FLAG_DF) !== 0) return false;
  const header = headerLength(bytes, offset);
  const total = view.getUint16(offset + IPV4.total);
  const step = (mtu - header) & ~7;
  if (step < 8) return false;
  let at = headroom;
  for (let done = header; done < total; done += step) {
    const length = Math.min(step, total - done);
    if (at + header + length > out.u8.length) return false;
    out.u8.set(bytes.u8.subarray(offset, offset + header), at);
    out.u8.set(bytes.u8.subarray(offset + done, offset + done + length), at + header);
    out.view.setUint16(at + IPV4.total, header + length);
    const more = done + length < total || (field & FLAG_MF) !== 0;
    const place = (field & FRAGMENT_MASK) + ((done - header) >> 3);
    out.view.setUint16(at + IPV4.fragment, (more ? FLAG_MF : 0) | (place & FRAGMENT_MASK));
    finishIpv4(out, at);
    each(at, header + length);
    at += (header + length + headroom + 3) & ~3;
  }
  return true;
}
