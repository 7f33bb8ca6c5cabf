// Who spoke with whom by InstanceIP. Nothing is translated by it; it answers two questions: may this instance answer
// although the asker is outside its needs, and would a new flow look like this one on the wire. Bounded, oldest out
// first; losing an entry costs one packet of the asker.

import { ICMP_IDLE_MS, TCP_HALF_CLOSED_IDLE_MS, UDP_IDLE_MS } from '../../src/limits.ts';
import { PROTOCOL } from '../../src/wire/ipv4.ts';
import { TupleIndex } from './flows.ts';

export class Contacts {
  readonly #index: TupleIndex;
  readonly #keys: Int32Array;
  readonly #usedMs: Float64Array;
  /** 1: the instance here spoke first. */
  readonly #dialled: Uint8Array;
  readonly #max: number;
  #next = 0;

  constructor(max: number, seed: number) {
    this.#max = max;
    this.#index = new TupleIndex(max, seed);
    this.#keys = new Int32Array(max * 4);
    this.#usedMs = new Float64Array(max).fill(Number.NEGATIVE_INFINITY);
    this.#dialled = new Uint8Array(max);
  }

  /** Slot of a fresh contact, marked as used now; -1 when there is none. */
  find(
    protocol: number,
    local: number,
    port: number,
    instanceIp: number,
    remotePort: number,
    now: number,
  ): number {
    const slot = this.#index.find(local, instanceIp, (port << 16) | remotePort, protocol);
    if (slot < 0) return -1;
    if (now - this.#usedMs[slot]! > idle(protocol)) {
      this.#remove(slot);
      return -1;
    }
    this.#usedMs[slot] = now;
    return slot;
  }

  /** True when it was noted within that time; it is not marked as used. */
  has(
    protocol: number,
    local: number,
    port: number,
    instanceIp: number,
    remotePort: number,
    withinMs: number,
    now: number,
  ): boolean {
    const slot = this.#index.find(local, instanceIp, (port << 16) | remotePort, protocol);
    return slot >= 0 && now - this.#usedMs[slot]! <= withinMs;
  }

  isDialled(slot: number): boolean {
    return this.#dialled[slot] === 1;
  }

  note(
    protocol: number,
    local: number,
    port: number,
    instanceIp: number,
    remotePort: number,
    dialled: boolean,
    now: number,
  ): void {
    const ports = (port << 16) | remotePort;
    let slot = this.#index.find(local, instanceIp, ports, protocol);
    if (slot < 0) {
      slot = this.#next;
      this.#next = (this.#next + 1) % this.#max;
      if (this.#usedMs[slot]! !== Number.NEGATIVE_INFINITY) this.#remove(slot);
      this.#index.add(local, instanceIp, ports, protocol, slot);
      const at = slot * 4;
      this.#keys[at] = local;
      this.#keys[at + 1] = instanceIp;
      this.#keys[at + 2] = ports;
      this.#keys[at + 3] = protocol;
    }
    this.#dialled[slot] = dialled ? 1 : 0;
    this.#usedMs[slot] = now;
  }

  /** Forgets what an instance here did: its rights have changed, or it is gone. */
  forget(local: number): void {
    for (let slot = 0; slot < this.#max; slot++)
      if (this.#usedMs[slot] !== Number.NEGATIVE_INFINITY && this.#keys[slot * 4] === (local | 0))
        this.#remove(slot);
  }

  #remove(slot: number): void {
    const at = slot * 4;
    this.#index.remove(this.#keys[at]!, this.#keys[at + 1]!, this.#keys[at + 2]!, this.#keys[at + 3]!);
    this.#usedMs[slot] = Number.NEGATIVE_INFINITY;
  }
}

function idle(protocol: number): number {
  if (protocol === PROTOCOL.tcp) return TCP_HALF_CLOSED_IDLE_MS;
  return protocol === PROTOCOL.icmp ? ICMP_IDLE_MS : UDP_IDLE_MS;
}
