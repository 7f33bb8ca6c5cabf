// The flow table: which instance each flow was given, found from either side. Bounded: when it is full the instance that
// has most gives one up, first what has ended, then what was never answered, then what was used least recently. Expiry
// is a question asked with the time, never a timer. It refuses to look at packets.
//
// A flow has two faces:
//   dialled:  (protocol, namespace IP, port,      dialled address, remote port)   what the app says
//   wire:     (protocol, namespace IP, wire port, InstanceIP,      remote port)   what comes back
// Both enter and leave together. They differ in the port only where two flows would look alike on the wire.
import { assert } from '../../src/assert.ts';
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
  /** Place in the table, -1 outside of it. */
  slot = -1;
  /** Neighbours in its list of the table, and whose list that is. */
  before: Flow | undefined;
  after: Flow | undefined;
  owner: Owner | undefined;

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
  /** Seconds since it was last used, to FLOW_AGE_S. */
  readonly ageS: number;
}

/** Is told of every flow that comes, changes its state, goes on being used, or goes. */
export interface FlowWatcher {
  put(flow: Flow): void;
  use(flow: Flow): void;
  drop(slot: number): void;
}

/** What an instance's flows are to eviction; a list each, the least recently used first. */
const CLASS = { ended: 0, opening: 1, live: 2 } as const;
const CLASSES = 3;

function classOf(state: FlowState): number {
  if (state >= FLOW_STATE.closed) return CLASS.ended;
  return state === FLOW_STATE.opening ? CLASS.opening : CLASS.live;
}

/** An instance here that has flows. */
class Owner {
  readonly local: number;
  flows = 0;
  ended = 0;
  readonly first = new Array<Flow | undefined>(CLASSES).fill(undefined);
  readonly last = new Array<Flow | undefined>(CLASSES).fill(undefined);

  constructor(local: number) {
    this.local = local;
  }

  /** The flow that it gives up first. */
  get victim(): Flow | undefined {
    return this.first[CLASS.ended] ?? this.first[CLASS.opening] ?? this.first[CLASS.live];
  }

  push(flow: Flow): void {
    const kind = classOf(flow.state);
    const last = this.last[kind];
    flow.owner = this;
    flow.before = last;
    flow.after = undefined;
    if (last === undefined) this.first[kind] = flow;
    else last.after = flow;
    this.last[kind] = flow;
    this.flows++;
    if (kind === CLASS.ended) this.ended++;
  }

  /** Before the flow's state changes: its list follows from it. */
  pull(flow: Flow): void {
    const kind = classOf(flow.state);
    const { before, after } = flow;
    if (before === undefined) this.first[kind] = after;
    else before.after = after;
    if (after === undefined) this.last[kind] = before;
    else after.before = before;
    this.flows--;
    if (kind === CLASS.ended) this.ended--;
  }
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

/**
 * Open addressing over five-tuples, value = slot. Deletion shifts back, so there are no tombstones. The seed keeps those
 * who choose ports from choosing collisions.
 */
export class TupleIndex {
  readonly #mask: number;
  readonly #seed: number;
  /** Four words of key and one of slot + 1, 0 when empty: memory that was never used is never touched. */
  readonly #cells: Int32Array;

  constructor(max: number, seed: number) {
    let capacity = 16;
    while (capacity < max * 2) capacity *= 2;
    this.#mask = capacity - 1;
    this.#seed = seed | 0;
    this.#cells = new Int32Array(capacity * 5);
  }

  #home(local: number, remote: number, ports: number, protocol: number): number {
    // Each word is mixed into what the seed has made of those before it (the rounds of MurmurHash3).
    let hash = Math.imul(this.#seed ^ ports, 0xcc9e2d51);
    hash = Math.imul(hash ^ (hash >>> 15) ^ remote, 0x85ebca6b);
    hash = Math.imul(hash ^ (hash >>> 13) ^ local ^ protocol, 0xc2b2ae35);
    hash ^= hash >>> 16;
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
  /** By namespace IP; at most as many as instances here. */
  readonly #owners = new Map<number, Owner>();
  #swept = 0;
  #size = 0;

  constructor(max: number, seed = 0) {
    this.max = max;
    this.#dialled = new TupleIndex(max + 1, seed);
    this.#wire = new TupleIndex(max + 1, ~seed);
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
    assert(
      this.byDialled(flow.protocol, flow.local, flow.port, flow.dialled, flow.remotePort) === undefined &&
        this.byWire(flow.protocol, flow.local, flow.wirePort, flow.instance.instanceIp, flow.remotePort) ===
          undefined,
      'one flow per face',
    );
    if (this.#size >= this.max) this.#evict();
    const slot = this.#free.pop() ?? this.#slots.length;
    flow.slot = slot;
    this.#slots[slot] = flow;
    const { local, protocol, remotePort } = flow;
    this.#dialled.add(local, flow.dialled, pair(flow.port, remotePort), protocol, slot);
    this.#wire.add(local, flow.instance.instanceIp, pair(flow.wirePort, remotePort), protocol, slot);
    flow.instance.flows++;
    if (flow.dialled === flow.instance.instanceIp) flow.instance.dialled++;
    this.#size++;
    let owner = this.#owners.get(local);
    if (owner === undefined) {
      owner = new Owner(local);
      this.#owners.set(local, owner);
    }
    owner.push(flow);
    this.watcher?.put(flow);
  }

  setState(flow: Flow, state: FlowState): void {
    if (flow.state === state) return;
    const { owner } = flow;
    owner?.pull(flow);
    flow.state = state;
    owner?.push(flow);
    if (flow.slot >= 0) this.watcher?.put(flow);
  }

  remove(flow: Flow): void {
    if (flow.slot >= 0) this.#drop(flow);
  }

  /** Marks the flow as used; its place in the eviction order follows at a coarser grain. */
  use(flow: Flow, now: number): void {
    flow.usedMs = now;
    if (now - flow.touchedMs < FLOW_TOUCH_MS) return;
    flow.touchedMs = now;
    const { owner } = flow;
    if (owner === undefined) return;
    owner.pull(flow);
    owner.push(flow);
    this.watcher?.use(flow);
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
        if (flow.state >= FLOW_STATE.closed) continue;
        const { peer, service } = flow.instance;
        service.flowMs = now;
        if (peer !== undefined) peer.flowMs = now;
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

  /** Room for one: of the instance that has most among those with ended flows, else of the one that has most. */
  #evict(): void {
    let ended: Owner | undefined;
    let most: Owner | undefined;
    for (const owner of this.#owners.values()) {
      if (owner.ended > 0 && owner.flows > (ended?.flows ?? 0)) ended = owner;
      if (owner.flows > (most?.flows ?? 0)) most = owner;
    }
    const victim = (ended ?? most)?.victim;
    if (victim === undefined) return;
    this.evicted++;
    this.#drop(victim);
  }

  #drop(flow: Flow): void {
    const { slot, local, protocol, remotePort } = flow;
    this.#dialled.remove(local, flow.dialled, pair(flow.port, remotePort), protocol);
    this.#wire.remove(local, flow.instance.instanceIp, pair(flow.wirePort, remotePort), protocol);
    flow.instance.flows--;
    if (flow.dialled === flow.instance.instanceIp) flow.instance.dialled--;
    const owner = flow.owner!;
    owner.pull(flow);
    flow.owner = undefined;
    flow.before = undefined;
    flow.after = undefined;
    if (owner.flows === 0) this.#owners.delete(owner.local);
    this.watcher?.drop(slot);
    flow.slot = -1;
    this.#slots[slot] = undefined;
    this.#free.push(slot);
    this.#size--;
  }
}
