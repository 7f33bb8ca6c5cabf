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
  put(flows: FlowTable, flow: number): void;
  use(flow: number): void;
  drop(flow: number): void;
}

/** What an instance's flows are to eviction; a list each, the least recently used first. */
const CLASS = { ended: 0, opening: 1, live: 2 } as const;
const CLASSES = 3;
/** Whose FIN was seen. */
const FIN_OUT = 1;
const FIN_IN = 2;

function classOf(state: number): number {
  if (state >= FLOW_STATE.closed) return CLASS.ended;
  return state === FLOW_STATE.opening ? CLASS.opening : CLASS.live;
}

/** No flow, where one is asked for. */
const NONE = -1;

/** An instance here that has flows. */
class Owner {
  readonly local: number;
  flows = 0;
  ended = 0;
  /** By class: the flows at both ends of its list, or NONE. */
  readonly first = new Array<number>(CLASSES).fill(NONE);
  readonly last = new Array<number>(CLASSES).fill(NONE);

  constructor(local: number) {
    this.local = local;
  }

  /** The flow that it gives up first. */
  get victim(): number {
    return this.first.find((flow) => flow !== NONE) ?? NONE;
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

/**
 * A flow is a number: its slot in these columns, from `open` to `remove`; later another one may have it. Columns and no
 * objects, because what comes and goes by the hundred in a second is garbage that a runtime's old generation grows by.
 * They are read by everybody and written here, but for the sequence numbers.
 */
export class FlowTable {
  readonly max: number;
  evicted = 0;
  watcher: FlowWatcher | undefined;
  /** 0: a free slot. */
  readonly protocol: Uint8Array;
  /** FLOW_STATE. */
  readonly state: Uint8Array;
  /** Namespace IP of the instance here that dialled. */
  readonly local: Uint32Array;
  readonly port: Uint16Array;
  /** ServiceIP or InstanceIP that the app used. */
  readonly dialled: Uint32Array;
  readonly remotePort: Uint16Array;
  readonly wirePort: Uint16Array;
  /**
   * Sequence number behind the latest that the server sent, 0 before any: what the client expects next, or, when
   * something was lost, a number inside its window. It takes a RST at the first, and answers one at the second with an
   * ACK, which then meets the exact RST (RFC 5961 §3.2).
   */
  readonly serverNext: Uint32Array;
  /** Next sequence number of the client, for a RST that must acknowledge. */
  readonly clientNext: Uint32Array;
  /** FIN seen: OUT, IN. */
  readonly #fins: Uint8Array;
  readonly #usedMs: Float64Array;
  /** When it last went to the end of its list. */
  readonly #touchedMs: Float64Array;
  readonly #instances: (InstanceEntry | undefined)[] = [];
  /** Neighbours in its list of its owner, or NONE; of a free slot: the next free one. */
  readonly #before: Int32Array;
  readonly #after: Int32Array;
  #free = NONE;
  /** Slots that were ever used; memory behind them was never touched. */
  #slots = 0;
  readonly #dialledIndex: TupleIndex;
  readonly #wireIndex: TupleIndex;
  /** By namespace IP; at most as many as instances here. */
  readonly #owners = new Map<number, Owner>();
  #swept = 0;
  #size = 0;

  constructor(max: number, seed = 0) {
    this.max = max;
    this.protocol = new Uint8Array(max);
    this.state = new Uint8Array(max);
    this.local = new Uint32Array(max);
    this.port = new Uint16Array(max);
    this.dialled = new Uint32Array(max);
    this.remotePort = new Uint16Array(max);
    this.wirePort = new Uint16Array(max);
    this.serverNext = new Uint32Array(max);
    this.clientNext = new Uint32Array(max);
    this.#fins = new Uint8Array(max);
    this.#usedMs = new Float64Array(max);
    this.#touchedMs = new Float64Array(max);
    this.#before = new Int32Array(max);
    this.#after = new Int32Array(max);
    this.#dialledIndex = new TupleIndex(max, seed);
    this.#wireIndex = new TupleIndex(max, ~seed);
  }

  get size(): number {
    return this.#size;
  }

  /** The flow, or -1. */
  byDialled(protocol: number, local: number, port: number, dialled: number, remotePort: number): number {
    return this.#dialledIndex.find(local, dialled, pair(port, remotePort), protocol);
  }

  /** The flow, or -1. */
  byWire(protocol: number, local: number, wirePort: number, instanceIp: number, remotePort: number): number {
    return this.#wireIndex.find(local, instanceIp, pair(wirePort, remotePort), protocol);
  }

  /** The instance that it was given. */
  instance(flow: number): InstanceEntry {
    return this.#instances[flow]!;
  }

  /** A new flow; both faces must be free. */
  open(
    protocol: number,
    local: number,
    port: number,
    dialled: number,
    remotePort: number,
    wirePort: number,
    instance: InstanceEntry,
    now: number,
    state: FlowState = FLOW_STATE.opening,
  ): number {
    assert(
      this.byDialled(protocol, local, port, dialled, remotePort) === NONE &&
        this.byWire(protocol, local, wirePort, instance.instanceIp, remotePort) === NONE,
      'one flow per face',
    );
    if (this.#size >= this.max) this.#evict();
    let flow = this.#free;
    if (flow === NONE) flow = this.#slots++;
    else this.#free = this.#after[flow]!;
    this.protocol[flow] = protocol;
    this.state[flow] = state;
    this.local[flow] = local;
    this.port[flow] = port;
    this.dialled[flow] = dialled;
    this.remotePort[flow] = remotePort;
    this.wirePort[flow] = wirePort;
    this.serverNext[flow] = 0;
    this.clientNext[flow] = 0;
    this.#fins[flow] = 0;
    this.#usedMs[flow] = now;
    this.#touchedMs[flow] = now;
    this.#instances[flow] = instance;
    this.#dialledIndex.add(local, dialled, pair(port, remotePort), protocol, flow);
    this.#wireIndex.add(local, instance.instanceIp, pair(wirePort, remotePort), protocol, flow);
    instance.flows++;
    if (dialled === instance.instanceIp) instance.dialled++;
    this.#size++;
    let owner = this.#owners.get(local);
    if (owner === undefined) {
      owner = new Owner(local);
      this.#owners.set(local, owner);
    }
    this.#push(owner, flow);
    this.watcher?.put(this, flow);
    return flow;
  }

  setState(flow: number, state: FlowState): void {
    if (this.state[flow] === state) return;
    const owner = this.#owner(flow);
    this.#pull(owner, flow);
    this.state[flow] = state;
    this.#push(owner, flow);
    this.watcher?.put(this, flow);
  }

  /** A FIN or RST of its TCP was seen, going out of this node's instance or in. */
  close(flow: number, out: boolean, fin: boolean, reset: boolean): void {
    if (fin) this.#fins[flow]! |= out ? FIN_OUT : FIN_IN;
    const closed = reset || this.#fins[flow] === (FIN_OUT | FIN_IN);
    this.setState(flow, closed ? FLOW_STATE.closed : FLOW_STATE.halfClosed);
  }

  /** Ends it for its client, who is told; it stays for its stragglers. */
  reset(flow: number, now: number): void {
    this.setState(flow, FLOW_STATE.reset);
    this.#usedMs[flow] = now;
  }

  isStale(flow: number, now: number): boolean {
    return now - this.#usedMs[flow]! > idleLimit(this.protocol[flow]!, this.state[flow] as FlowState);
  }

  /** Marks the flow as used; its place in the eviction order follows at a coarser grain. */
  use(flow: number, now: number): void {
    this.#usedMs[flow] = now;
    if (now - this.#touchedMs[flow]! < FLOW_TOUCH_MS) return;
    this.#touchedMs[flow] = now;
    const owner = this.#owner(flow);
    this.#pull(owner, flow);
    this.#push(owner, flow);
    this.watcher?.use(flow);
  }

  /** Removes stale flows among the next `count` slots, and marks the peers of the others; returns how many went. */
  sweep(count: number, now: number): number {
    const total = this.#slots;
    let removed = 0;
    for (let i = Math.min(count, total); i > 0; i--) {
      if (this.#swept >= total) this.#swept = 0;
      const flow = this.#swept++;
      if (this.protocol[flow] === 0) continue;
      if (!this.isStale(flow, now)) {
        if (this.state[flow]! >= FLOW_STATE.closed) continue;
        const { peer, service } = this.instance(flow);
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
  *[Symbol.iterator](): IterableIterator<number> {
    for (let flow = 0; flow < this.#slots; flow++) if (this.protocol[flow] !== 0) yield flow;
  }

  remove(flow: number): void {
    const protocol = this.protocol[flow]!;
    assert(protocol !== 0, 'a flow is removed once');
    const instance = this.instance(flow);
    const local = this.local[flow]!;
    const dialled = this.dialled[flow]!;
    const remotePort = this.remotePort[flow]!;
    this.#dialledIndex.remove(local, dialled, pair(this.port[flow]!, remotePort), protocol);
    this.#wireIndex.remove(local, instance.instanceIp, pair(this.wirePort[flow]!, remotePort), protocol);
    instance.flows--;
    if (dialled === instance.instanceIp) instance.dialled--;
    const owner = this.#owner(flow);
    this.#pull(owner, flow);
    if (owner.flows === 0) this.#owners.delete(local);
    this.watcher?.drop(flow);
    this.protocol[flow] = 0;
    this.#instances[flow] = undefined;
    this.#after[flow] = this.#free;
    this.#free = flow;
    this.#size--;
  }

  /** Room for one: of the instance that has most among those with ended flows, else of the one that has most. */
  #evict(): void {
    let ended: Owner | undefined;
    let most: Owner | undefined;
    for (const owner of this.#owners.values()) {
      if (owner.ended > 0 && owner.flows > (ended?.flows ?? 0)) ended = owner;
      if (owner.flows > (most?.flows ?? 0)) most = owner;
    }
    const from = ended ?? most;
    if (from === undefined) return;
    this.evicted++;
    this.remove(from.victim);
  }

  #owner(flow: number): Owner {
    return this.#owners.get(this.local[flow]!)!;
  }

  #push(owner: Owner, flow: number): void {
    const kind = classOf(this.state[flow]!);
    const last = owner.last[kind]!;
    this.#before[flow] = last;
    this.#after[flow] = NONE;
    if (last === NONE) owner.first[kind] = flow;
    else this.#after[last] = flow;
    owner.last[kind] = flow;
    owner.flows++;
    if (kind === CLASS.ended) owner.ended++;
  }

  /** Before the flow's state changes: its list follows from it. */
  #pull(owner: Owner, flow: number): void {
    const kind = classOf(this.state[flow]!);
    const before = this.#before[flow]!;
    const after = this.#after[flow]!;
    if (before === NONE) owner.first[kind] = after;
    else this.#after[before] = after;
    if (after === NONE) owner.last[kind] = before;
    else this.#before[after] = before;
    owner.flows--;
    if (kind === CLASS.ended) owner.ended--;
  }
}
