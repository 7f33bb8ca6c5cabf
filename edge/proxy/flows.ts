// The flow table: which instance each flow was given, found from either side. Bounded; the least recently used flow
// goes first. Expiry is a question asked with the time, never a timer. It refuses to look at packets.
//
// A flow has two faces:
//   dialled:  (protocol, namespace IP, port,      dialled address, remote port)   what the app says
//   wire:     (protocol, namespace IP, wire port, InstanceIP,      remote port)   what comes back
// Both enter and leave together. They differ in the port only where two flows would look alike on the wire.
import { LRUCache } from 'lru-cache';
import {
  FLOW_TOUCH_MS,
  ICMP_IDLE_MS,
  TCP_CLOSED_IDLE_MS,
  TCP_HALF_CLOSED_IDLE_MS,
  TCP_IDLE_MS,
  TCP_OPENING_IDLE_MS,
  TCP_RESET_IDLE_MS,
  UDP_IDLE_MS,
  UDP_ONEWAY_IDLE_MS,
} from '../../src/limits.ts';
import { PROTOCOL } from '../../src/wire/ipv4.ts';
import type { InstanceEntry } from './routes.ts';

/** Life of a flow. UDP and ICMP know the first two only. */
export const FLOW_STATE = { opening: 0, established: 1, halfClosed: 2, closed: 3, reset: 4 } as const;
export type FlowState = (typeof FLOW_STATE)[keyof typeof FLOW_STATE];

export class Flow {
  readonly protocol: number;
  /** Namespace IP of the instance here that dialled. */
  readonly local: number;
  readonly port: number;
  /** ServiceIP or InstanceIP that the app used. */
  readonly dialled: number;
  readonly remotePort: number;
  readonly wirePort: number;
  readonly instance: InstanceEntry;
  state: FlowState = FLOW_STATE.opening;
  finOut = false;
  finIn = false;
  /**
   * Sequence number behind the latest that the server sent, 0 before any: what the client expects next, or, when
   * something was lost, a number inside its window. It takes a RST at the first, and answers one at the second with an
   * ACK, which then meets the exact RST (RFC 5961 §3.2).
   */
  serverNext = 0;
  /** Next sequence number of the client, for a RST that must acknowledge. */
  clientNext = 0;
  usedMs: number;
  touchedMs: number;
  slot = -1;

  constructor(
    protocol: number,
    local: number,
    port: number,
    dialled: number,
    remotePort: number,
    wirePort: number,
    instance: InstanceEntry,
    now: number,
  ) {
    this.protocol = protocol;
    this.local = local;
    this.port = port;
    this.dialled = dialled;
    this.remotePort = remotePort;
    this.wirePort = wirePort;
    this.instance = instance;
    this.usedMs = now;
    this.touchedMs = now;
  }
}

/** A flow as a file can hold it. */
export interface FlowRecord {
  readonly state: FlowState;
  readonly protocol: number;
  readonly wirePort: number;
  readonly port: number;
  readonly remotePort: number;
  readonly local: number;
  readonly dialled: number;
  readonly instanceIp: number;
  /** Seconds since it was written: since it was made or last changed its state. */
  readonly ageS: number;
}

/** Is told of every flow that comes, changes its state, or goes. */
export interface FlowWatcher {
  put(flow: Flow): void;
  drop(slot: number): void;
}

/** Milliseconds of silence after which a flow in that state has ended. */
export function idleLimit(protocol: number, state: FlowState): number {
  if (protocol === PROTOCOL.icmp) return ICMP_IDLE_MS;
  if (protocol !== PROTOCOL.tcp) return state === FLOW_STATE.opening ? UDP_ONEWAY_IDLE_MS : UDP_IDLE_MS;
  switch (state) {
    case FLOW_STATE.opening:
      return TCP_OPENING_IDLE_MS;
    case FLOW_STATE.established:
      return TCP_IDLE_MS;
    case FLOW_STATE.halfClosed:
      return TCP_HALF_CLOSED_IDLE_MS;
    case FLOW_STATE.closed:
      return TCP_CLOSED_IDLE_MS;
    case FLOW_STATE.reset:
      return TCP_RESET_IDLE_MS;
  }
}

export function isStale(flow: Flow, now: number): boolean {
  return now - flow.usedMs > idleLimit(flow.protocol, flow.state);
}

/** Open addressing over five-tuples, value = slot. Deletion shifts back, so there are no tombstones. */
export class TupleIndex {
  readonly #mask: number;
  /** Four words of key and one of slot + 1, 0 when empty: memory that was never used is never touched. */
  readonly #cells: Int32Array;

  constructor(max: number) {
    let capacity = 16;
    while (capacity < max * 2) capacity *= 2;
    this.#mask = capacity - 1;
    this.#cells = new Int32Array(capacity * 5);
  }

  #home(local: number, remote: number, ports: number, protocol: number): number {
    let hash =
      Math.imul(local ^ protocol, 0x9e3779b1) ^ Math.imul(remote, 0x85ebca6b) ^ Math.imul(ports, 0xc2b2ae35);
    hash ^= hash >>> 15;
    hash = Math.imul(hash, 0x27d4eb2f);
    hash ^= hash >>> 13;
    return hash & this.#mask;
  }

  /** Slot, or -1. */
  find(local: number, remote: number, ports: number, protocol: number): number {
    const cells = this.#cells;
    const a = local | 0;
    const b = remote | 0;
    const c = ports | 0;
    for (let i = this.#home(a, b, c, protocol); ; i = (i + 1) & this.#mask) {
      const at = i * 5;
      const value = cells[at + 4]!;
      if (value === 0) return -1;
      if (cells[at] === a && cells[at + 1] === b && cells[at + 2] === c && cells[at + 3] === protocol)
        return value - 1;
    }
  }

  /** The key must be absent, and fewer than `max` present. */
  add(local: number, remote: number, ports: number, protocol: number, slot: number): void {
    const cells = this.#cells;
    const a = local | 0;
    const b = remote | 0;
    const c = ports | 0;
    let i = this.#home(a, b, c, protocol);
    while (cells[i * 5 + 4] !== 0) i = (i + 1) & this.#mask;
    const at = i * 5;
    cells[at] = a;
    cells[at + 1] = b;
    cells[at + 2] = c;
    cells[at + 3] = protocol;
    cells[at + 4] = slot + 1;
  }

  remove(local: number, remote: number, ports: number, protocol: number): void {
    const cells = this.#cells;
    const mask = this.#mask;
    const a = local | 0;
    const b = remote | 0;
    const c = ports | 0;
    let hole = this.#home(a, b, c, protocol);
    for (; ; hole = (hole + 1) & mask) {
      const at = hole * 5;
      if (cells[at + 4] === 0) return;
      if (cells[at] === a && cells[at + 1] === b && cells[at + 2] === c && cells[at + 3] === protocol) break;
    }
    for (let i = (hole + 1) & mask; cells[i * 5 + 4] !== 0; i = (i + 1) & mask) {
      const at = i * 5;
      const home = this.#home(cells[at]!, cells[at + 1]!, cells[at + 2]!, cells[at + 3]!);
      // It may move into the hole unless its home lies cyclically in (hole, i].
      if (((i - home) & mask) < ((i - hole) & mask)) continue;
      cells.copyWithin(hole * 5, at, at + 5);
      hole = i;
    }
    cells[hole * 5 + 4] = 0;
  }
}

function pair(port: number, remotePort: number): number {
  return (port << 16) | remotePort;
}

export class FlowTable {
  readonly max: number;
  evicted = 0;
  watcher: FlowWatcher | undefined;
  readonly #dialled: TupleIndex;
  readonly #wire: TupleIndex;
  readonly #slots: (Flow | undefined)[] = [];
  readonly #free: number[] = [];
  readonly #recent: LRUCache<number, Flow>;
  #swept = 0;
  #size = 0;

  constructor(max: number) {
    this.max = max;
    this.#dialled = new TupleIndex(max + 1);
    this.#wire = new TupleIndex(max + 1);
    this.#recent = new LRUCache<number, Flow>({
      max,
      dispose: (flow, _slot, reason) => {
        if (reason !== 'evict') return;
        this.evicted++;
        this.#drop(flow);
      },
    });
  }

  get size(): number {
    return this.#size;
  }

  byDialled(
    protocol: number,
    local: number,
    port: number,
    dialled: number,
    remotePort: number,
  ): Flow | undefined {
    const slot = this.#dialled.find(local, dialled, pair(port, remotePort), protocol);
    return slot < 0 ? undefined : this.#slots[slot];
  }

  byWire(
    protocol: number,
    local: number,
    wirePort: number,
    instanceIp: number,
    remotePort: number,
  ): Flow | undefined {
    const slot = this.#wire.find(local, instanceIp, pair(wirePort, remotePort), protocol);
    return slot < 0 ? undefined : this.#slots[slot];
  }

  /** Both faces must be free. */
  add(flow: Flow): void {
    const slot = this.#free.pop() ?? this.#slots.length;
    flow.slot = slot;
    this.#slots[slot] = flow;
    const { local, protocol, remotePort } = flow;
    this.#dialled.add(local, flow.dialled, pair(flow.port, remotePort), protocol, slot);
    this.#wire.add(local, flow.instance.instanceIp, pair(flow.wirePort, remotePort), protocol, slot);
    flow.instance.flows++;
    this.#size++;
    this.#recent.set(slot, flow);
    this.watcher?.put(flow);
  }

  setState(flow: Flow, state: FlowState): void {
    if (flow.state === state) return;
    flow.state = state;
    if (flow.slot >= 0) this.watcher?.put(flow);
  }

  remove(flow: Flow): void {
    if (flow.slot < 0) return;
    this.#recent.delete(flow.slot);
    this.#drop(flow);
  }

  /** Marks the flow as used; its place in the eviction order follows at a coarser grain. */
  use(flow: Flow, now: number): void {
    flow.usedMs = now;
    if (now - flow.touchedMs < FLOW_TOUCH_MS) return;
    flow.touchedMs = now;
    this.#recent.get(flow.slot);
  }

  /** Removes stale flows among the next `count` slots, and marks the peers of the others; returns how many went. */
  sweep(count: number, now: number): number {
    const total = this.#slots.length;
    let removed = 0;
    for (let i = Math.min(count, total); i > 0; i--) {
      if (this.#swept >= total) this.#swept = 0;
      const flow = this.#slots[this.#swept++];
      if (flow === undefined) continue;
      if (!isStale(flow, now)) {
        const { peer } = flow.instance;
        if (peer !== undefined && flow.state < FLOW_STATE.closed) peer.flowMs = now;
        continue;
      }
      this.remove(flow);
      removed++;
    }
    return removed;
  }

  /** Every flow, in no order; the table may lose the current one meanwhile. */
  *[Symbol.iterator](): IterableIterator<Flow> {
    for (const flow of this.#slots) if (flow !== undefined) yield flow;
  }

  #drop(flow: Flow): void {
    const { slot, local, protocol, remotePort } = flow;
    this.#dialled.remove(local, flow.dialled, pair(flow.port, remotePort), protocol);
    this.#wire.remove(local, flow.instance.instanceIp, pair(flow.wirePort, remotePort), protocol);
    flow.instance.flows--;
    this.watcher?.drop(slot);
    flow.slot = -1;
    this.#slots[slot] = undefined;
    this.#free.push(slot);
    this.#size--;
  }
}
