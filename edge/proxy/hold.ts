// Packets that wait: a fragment for its datagram's first, a packet for its route. A fixed number of fixed slots; a packet
// beyond them is not held, a fragment takes the place of the oldest one: fragments overtake each other by moments, and
// those that wait for long wait in vain. Copies, which come back exactly as they were when they came.
import {
  FRAGMENT_MS,
  FRAGMENTS_HELD_MAX,
  PACKET_HELD_BYTES,
  PACKET_HELD_MS,
  PACKETS_HELD_MAX,
} from '../../src/limits.ts';
import { type Bytes, newBytes } from '../../src/wire/bytes.ts';
import { IPV4 } from '../../src/wire/ipv4.ts';

/** Room for tunnel and virtio headers in front of each. */
export const HOLD_HEADROOM = 16;
const SLOTS = PACKETS_HELD_MAX + FRAGMENTS_HELD_MAX;

export interface Held {
  readonly at: number;
  length: number;
  /** True: from the bridge; false: from the tunnel, from that endpoint. */
  leaving: boolean;
  outerIp: number;
  outerPort: number;
  state: 'free' | 'route' | 'fragment' | 'due';
  /** Address whose route it waits for. */
  address: number;
  /** Datagram that it belongs to. */
  source: number;
  target: number;
  id: number;
  protocol: number;
  untilMs: number;
}

export class Hold {
  readonly bytes: Bytes;
  readonly #slots: Held[];
  readonly #slotBytes: number;
  /** Slots in use; when 0 nothing is searched. */
  waiting = 0;
  due = 0;
  /** Fragments that made room for others. */
  displaced = 0;
  #fragments = 0;

  /** For packets of a network with that MTU. */
  constructor(mtu: number, bytes: Bytes = newBytes(Hold.memory(mtu))) {
    this.bytes = bytes;
    this.#slotBytes = slotBytes(mtu);
    this.#slots = Array.from({ length: SLOTS }, (_, i) => ({
      at: i * this.#slotBytes + HOLD_HEADROOM,
      length: 0,
      leaving: true,
      outerIp: 0,
      outerPort: 0,
      state: 'free' as const,
      address: 0,
      source: 0,
      target: 0,
      id: 0,
      protocol: 0,
      untilMs: 0,
    }));
  }

  static memory(mtu: number): number {
    return SLOTS * slotBytes(mtu);
  }

  /** A slot with a copy of the packet, for the caller to fill in; undefined when it cannot be held. */
  take(
    bytes: Bytes,
    offset: number,
    length: number,
    state: 'route' | 'fragment',
    now: number,
  ): Held | undefined {
    if (length > this.#slotBytes - HOLD_HEADROOM) return undefined;
    if (state === 'fragment') this.#makeRoom(bytes.view.getUint32(offset + IPV4.source));
    else if (this.waiting - this.#fragments >= PACKETS_HELD_MAX) return undefined;
    const held = this.#slots.find((slot) => slot.state === 'free');
    if (held === undefined) return undefined;
    this.bytes.u8.set(bytes.u8.subarray(offset, offset + length), held.at);
    held.length = length;
    held.state = state;
    held.untilMs = now + (state === 'route' ? PACKET_HELD_MS : FRAGMENT_MS);
    this.waiting++;
    if (state === 'fragment') this.#fragments++;
    return held;
  }

  /** Lets go of the oldest fragment: of that source when it has its share, of any when all slots are taken. */
  #makeRoom(source: number): void {
    let own = 0;
    let oldest: Held | undefined;
    let oldestOwn: Held | undefined;
    if (this.#fragments > 0)
      for (const held of this.#slots) {
        if (held.state !== 'fragment') continue;
        if (oldest === undefined || held.untilMs < oldest.untilMs) oldest = held;
        if (held.source !== source) continue;
        own++;
        if (oldestOwn === undefined || held.untilMs < oldestOwn.untilMs) oldestOwn = held;
      }
    const full = this.#fragments >= FRAGMENTS_HELD_MAX ? oldest : undefined;
    const goes = own >= FRAGMENTS_HELD_MAX / 4 ? oldestOwn : full;
    if (goes === undefined) return;
    this.displaced++;
    this.free(goes);
  }

  /**
   * The address has no owner: gives each packet from the bridge that waited for its route, and lets go of it. Those from
   * the tunnel wait on: whoever sent them has just come, and nobody here is to be told.
   */
  giveUp(address: number, each: (held: Held) => void): void {
    if (this.waiting === 0) return;
    for (const held of this.#slots)
      if (held.state === 'route' && held.leaving && held.address === address) {
        each(held);
        this.free(held);
      }
  }

  /** A route for the address has come: its packets are due. */
  routeCame(address: number): void {
    if (this.waiting === 0) return;
    for (const held of this.#slots) if (held.state === 'route' && held.address === address) this.#ready(held);
  }

  firstCame(source: number, target: number, id: number, protocol: number): void {
    if (this.#fragments === 0) return;
    for (const held of this.#slots)
      if (
        held.state === 'fragment' &&
        held.source === source &&
        held.target === target &&
        held.id === id &&
        held.protocol === protocol
      )
        this.#ready(held);
  }

  /** A packet that may go on now; give it back with `free`. In the order in which they came, mostly. */
  next(): Held | undefined {
    return this.due === 0 ? undefined : this.#slots.find((slot) => slot.state === 'due');
  }

  free(held: Held): void {
    if (held.state === 'due') this.due--;
    if (held.state === 'fragment') this.#fragments--;
    held.state = 'free';
    this.waiting--;
  }

  /** Gives each that waited too long, and lets go of it. */
  expire(now: number, each: (held: Held) => void): void {
    if (this.waiting === 0) return;
    for (const held of this.#slots) {
      if ((held.state !== 'fragment' && held.state !== 'route') || now < held.untilMs) continue;
      each(held);
      this.free(held);
    }
  }

  #ready(held: Held): void {
    if (held.state === 'fragment') this.#fragments--;
    held.state = 'due';
    this.due++;
  }
}

function slotBytes(mtu: number): number {
  return Math.max(PACKET_HELD_BYTES, (mtu + HOLD_HEADROOM + 3) & ~3);
}
