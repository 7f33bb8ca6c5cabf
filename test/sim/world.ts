// Many nodes in one process on a simulated clock: each has the product's own Prober, Balancer and Turns; between them
// lies a network with the RTTs of a truth matrix, jitter, loss, one-way cuts and dead nodes. One seed, one trace.
// Nothing here waits: a simulated hour is as long as its events take.

import { Balancer, type Member } from '../../edge/balance.ts';
import { type Peer, Prober, type Status } from '../../edge/probe.ts';
import { ipv4 } from '../../src/addr.ts';
import { Turns } from '../../src/choose.ts';
import type { ServiceId } from '../../src/name.ts';
import type { Policy } from '../../src/policy.ts';
import { POLICIES } from '../../src/policy.ts';
import { Rng } from '../../src/rng.ts';
import type { Truth } from './truth.ts';

interface Event {
  readonly at: number;
  readonly order: number;
  readonly run: () => void;
}

/** A binary heap by time, then by order of entry. */
class Agenda {
  readonly #heap: Event[] = [];
  #order = 0;

  add(at: number, run: () => void): void {
    const heap = this.#heap;
    heap.push({ at, order: this.#order++, run });
    let i = heap.length - 1;
    while (i > 0) {
      const parent = (i - 1) >> 1;
      if (!before(heap[i]!, heap[parent]!)) break;
      [heap[i], heap[parent]] = [heap[parent]!, heap[i]!];
      i = parent;
    }
  }
  next(): Event | undefined {
    return this.#heap[0];
  }
  take(): void {
    const heap = this.#heap;
    const last = heap.pop();
    if (last === undefined || heap.length === 0) return;
    heap[0] = last;
    let i = 0;
    for (;;) {
      let least = i;
      for (const child of [2 * i + 1, 2 * i + 2])
        if (child < heap.length && before(heap[child]!, heap[least]!)) least = child;
      if (least === i) return;
      [heap[i], heap[least]] = [heap[least]!, heap[i]!];
      i = least;
    }
  }
}

function before(a: Event, b: Event): boolean {
  return a.at !== b.at ? a.at < b.at : a.order < b.order;
}

export interface WorldOptions {
  readonly truth: Truth;
  readonly seed: number;
  /** Share of packets lost, each way. */
  readonly loss?: number;
  /** Each packet takes up to this share longer than the truth says. */
  readonly jitter?: number;
}

const SUBNET_BASE = 0xac100000;
export const subnetOfIndex = (i: number) => ipv4(SUBNET_BASE + i * 64);

export class SimNode {
  readonly index: number;
  readonly name: string;
  readonly prober: Prober;
  readonly balancer: Balancer;
  readonly turns = new Map<string, Turns>();
  readonly weights = new Map<string, { instances: readonly number[]; weights: readonly number[] }>();
  /** Status changes that its prober told, with their time. */
  readonly statuses: { at: number; node: string; from: Status; to: Status }[] = [];
  readonly rng: Rng;
  alive = true;
  load: number | undefined = 0.1;
  liveLow = 0xffffffff;
  liveHigh = 0xffffffff;
  generation = 0;

  constructor(index: number, seed: number, nowMs: number) {
    this.index = index;
    this.name = `n${index}`;
    this.rng = new Rng(seed, index);
    this.prober = new Prober({ rng: this.rng, nonce: () => this.rng.u32(), nowMs });
    this.balancer = new Balancer(this.prober, {
      load: () => this.load,
      isUp: (ip) => ((this.liveLow >>> (ip & 31)) & 1) === 1,
    });
  }

  /** One new flow, as the packet loop chooses; undefined when nothing may be chosen. */
  pick(service: ServiceId, policy: Policy): number | undefined {
    const key = `${service} ${policy}`;
    const held = this.weights.get(key);
    if (held === undefined) return undefined;
    return held.instances[this.turns.get(key)!.pick(held.weights)];
  }
}

export class World {
  readonly truth: Truth;
  readonly nodes: SimNode[];
  readonly rng: Rng;
  now = 0;
  /** Packets lost because a test cut the way: `from>to`. */
  readonly cuts = new Set<string>();
  readonly #agenda = new Agenda();
  readonly #loss: number;
  readonly #jitter: number;
  readonly #members = new Map<ServiceId, Member[]>();

  constructor(options: WorldOptions) {
    this.truth = options.truth;
    this.#loss = options.loss ?? 0;
    this.#jitter = options.jitter ?? 0.02;
    this.rng = new Rng(options.seed, 1_000_003);
    this.nodes = options.truth.map((_, i) => new SimNode(i, options.seed, 0));
    for (const node of this.nodes) {
      const peers = this.nodes.filter((other) => other !== node).map((other) => this.peer(other.index));
      node.prober.setPeers(peers, 0);
      this.#drive(node);
    }
  }

  peer(i: number): Peer {
    const coordinate = this.nodes[i]!.prober.coordinate;
    return { node: `n${i}`, nodeIp: ipv4(0x0a4d0001 + i), ewp: 4790, subnet: subnetOfIndex(i), coordinate };
  }

  at(at: number, run: () => void): void {
    this.#agenda.add(at, run);
  }
  every(intervalMs: number, untilMs: number, run: () => void): void {
    const again = (): void => {
      run();
      if (this.now + intervalMs <= untilMs) this.at(this.now + intervalMs, again);
    };
    this.at(this.now + intervalMs, again);
  }

  run(untilMs: number): void {
    for (
      let event = this.#agenda.next();
      event !== undefined && event.at <= untilMs;
      event = this.#agenda.next()
    ) {
      this.#agenda.take();
      this.now = Math.max(this.now, event.at);
      event.run();
    }
    this.now = untilMs;
  }

  /** Instance k+1 of the service lives on node `placement[k]`; `followers` choose among them. */
  service(service: ServiceId, placement: readonly number[], followers: readonly number[]): void {
    const members = placement.map((node, k) => ({
      instance: k + 1,
      node: `n${node}`,
      local: false,
      namespaceIp: ipv4(subnetOfIndex(node) + 2 + (k % 60)),
    }));
    this.#members.set(service, members);
    for (const i of followers) {
      const node = this.nodes[i]!;
      node.balancer.setService(
        service,
        members.map((m) => ({ ...m, local: m.node === node.name })),
        this.now,
      );
      node.balancer.warm(service, this.now);
      node.prober.setFollowed(node.balancer.followed(this.now));
      this.#drive(node);
    }
  }

  /** A flow from a node; tells its prober, as the loop's report does. Returns the index of the node that was chosen. */
  flow(from: number, service: ServiceId, policy: Policy): number | undefined {
    const node = this.nodes[from]!;
    const instance = node.pick(service, policy);
    if (instance === undefined) return undefined;
    const chosen = this.#members.get(service)![instance - 1]!.node;
    if (chosen !== node.name) {
      node.prober.handleUse(chosen, this.now);
      this.#drive(node);
    }
    return Number(chosen.slice(1));
  }

  kill(i: number): void {
    this.nodes[i]!.alive = false;
  }
  revive(i: number): void {
    this.nodes[i]!.alive = true;
    this.#drive(this.nodes[i]!);
  }

  /** Digest of every status change and coordinate: equal on every runtime for one seed. */
  trace(): string {
    return this.nodes
      .map(
        (n) =>
          `${n.name} ${n.prober.counters.sent} ${n.statuses.map((s) => `${s.at.toFixed(3)} ${s.node} ${s.to}`)}`,
      )
      .join('\n');
  }

  /** Every input ends here: drain the outputs, arm the next deadline. */
  #drive(node: SimNode): void {
    if (!node.alive) return;
    for (let output = node.prober.poll(); output !== undefined; output = node.prober.poll()) {
      if (output.kind === 'send') {
        const { nonce } = output;
        const target = Number(output.node.slice(1));
        this.#send(node.index, target, () => this.#answer(target, node.index, nonce, this.now));
      } else {
        node.statuses.push({ at: this.now, node: output.node, from: output.from, to: output.to });
        node.balancer.reweigh(this.now);
      }
    }
    for (let output = node.balancer.poll(); output !== undefined; output = node.balancer.poll()) {
      if (output.kind !== 'weights') continue;
      for (const policy of POLICIES) {
        const key = `${output.service} ${policy}`;
        let turns = node.turns.get(key);
        if (turns === undefined) {
          turns = new Turns(new Rng(node.rng.u32(), node.index));
          node.turns.set(key, turns);
        }
        turns.replace(output.weights.instances);
        node.weights.set(key, {
          instances: output.weights.instances,
          weights: output.weights.weights[policy],
        });
      }
    }
    const at = Math.max(this.now, Math.min(node.prober.deadline().at, node.balancer.deadline().at));
    const generation = ++node.generation;
    this.at(at, () => {
      if (node.generation !== generation || !node.alive) return;
      node.prober.handleTimeout(this.now);
      node.balancer.handleTimeout(this.now);
      this.#drive(node);
    });
  }

  #answer(of: number, to: number, nonce: number, arrivedAt: number): void {
    const node = this.nodes[of]!;
    if (!node.alive) return;
    const { coordinate } = node.prober;
    const { load, liveLow, liveHigh } = node;
    const sentAt = arrivedAt - this.#lastDelay;
    this.#send(of, to, () => {
      const asker = this.nodes[to]!;
      if (!asker.alive) return;
      const rttMs = this.now - sentAt;
      asker.prober.handleAnswer(
        {
          nonce,
          rttMs,
          subnet: subnetOfIndex(of),
          coordinate,
          ...(load === undefined ? {} : { load }),
          liveLow,
          liveHigh,
        },
        this.now,
      );
      this.#drive(asker);
    });
  }

  #lastDelay = 0;
  #send(from: number, to: number, arrive: () => void): void {
    if (this.cuts.has(`${from}>${to}`) || this.rng.unit() < this.#loss) return;
    const delay = (this.truth[from]![to]! / 2) * (1 + this.#jitter * this.rng.unit());
    this.at(this.now + delay, () => {
      this.#lastDelay = delay;
      arrive();
    });
  }
}
