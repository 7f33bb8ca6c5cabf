// From what is known of nodes to what the packet path chooses by: per followed service one set of weights, worked out
// anew when a node's status changes and twice a second, handed out only when choices would differ. Also the words of
// `edgeway explain`. Sans-I/O; it measures nothing (probe.ts) and picks nothing (Turns in src/choose.ts).
import type { Ipv4 } from '../src/addr.ts';
import { alike, type Candidate, costMs, type Health, shares, Weigher, type Weights } from '../src/choose.ts';
import type { ServiceId } from '../src/name.ts';
import type { Policy } from '../src/policy.ts';
import type { Deadline } from '../src/time.ts';
import type { Prober } from './probe.ts';

/** How often weights follow RTT and load. */
export const REWEIGH_MS = 500;
/** Shares of flows that differ by less are the same: no command for noise. */
const TOLERANCE = 0.02;

/** A service that was used, or that an instance here needs, is warm for so long: its nodes are watched and its
 *  weights follow them. The others are weighed when their routes change, and then in rotation. */
export const WARM_MS = 600_000;
/** A service whose name was asked for is warm for so long: what is measured then stands longer (RTT_FRESH_MS). */
export const EXPECTED_MS = 30_000;
/** Cold services weighed per round: 10,000 of them take 50 s. */
const COLD_PER_ROUND = 100;

/** An instance of a followed service. */
export interface Member {
  readonly instance: number;
  readonly node: string;
  readonly local: boolean;
  readonly namespaceIp: Ipv4;
}

export type BalanceOutput =
  | { readonly kind: 'weights'; readonly service: ServiceId; readonly weights: Weights }
  /** Its node, another one, says since now that this instance is dead or unhealthy. */
  | { readonly kind: 'down'; readonly service: ServiceId; readonly instance: number };

/** One candidate as `explain` shows it. */
export interface Explained {
  readonly instance: number;
  readonly node: string;
  readonly local: boolean;
  readonly health: Health;
  /** One line: why its health is what it is. */
  readonly reason: string;
  readonly rttMs?: number;
  readonly confirmed: boolean;
  readonly load?: number;
  readonly costMs?: number;
  /** Share of new flows that it gets now, 0…1. */
  readonly share: number;
}

export interface Explanation {
  readonly policy: Policy;
  readonly why: string;
  readonly candidates: readonly Explained[];
}

interface Entry {
  members: readonly Member[];
  readonly knownSince: Map<number, number>;
  /** Instances elsewhere that are down. */
  readonly down: Set<number>;
  readonly weigher: Weigher;
  /** By use or need. */
  warmUntil: number;
  /** By a question about its name. */
  expectedUntil: number;
  sent: Weights | undefined;
  last: Weights | undefined;
}

/** What the balancer needs to know of this node itself. */
export interface Own {
  /** Load of this node, as in Candidate; undefined until measured. */
  load(): number | undefined;
  /** False when a local instance is dead or fails its health check. */
  isUp(namespaceIp: Ipv4): boolean;
}

export class Balancer {
  readonly #prober: Prober;
  readonly #own: Own;
  readonly #services = new Map<ServiceId, Entry>();
  readonly #outputs: BalanceOutput[] = [];
  #nextAt = Number.NEGATIVE_INFINITY;
  #rotation = this.#services.entries();

  constructor(prober: Prober, own: Own) {
    this.#prober = prober;
    this.#own = own;
  }

  /** All instances of a service; its weights are due at once. */
  setService(service: ServiceId, members: readonly Member[], nowMs: number): void {
    let entry = this.#services.get(service);
    if (entry === undefined) {
      entry = {
        members,
        knownSince: new Map(),
        down: new Set(),
        weigher: new Weigher(),
        warmUntil: Number.NEGATIVE_INFINITY,
        expectedUntil: Number.NEGATIVE_INFINITY,
        sent: undefined,
        last: undefined,
      };
      this.#services.set(service, entry);
    }
    const before = new Map(entry.members.map((m) => [m.instance, m]));
    for (const instance of entry.knownSince.keys())
      if (!members.some((m) => m.instance === instance)) {
        entry.knownSince.delete(instance);
        entry.down.delete(instance);
      }
    for (const m of members) {
      const old = before.get(m.instance);
      const moved = old === undefined || old.node !== m.node || old.namespaceIp !== m.namespaceIp;
      if (moved || !entry.knownSince.has(m.instance)) entry.knownSince.set(m.instance, nowMs);
    }
    entry.members = members;
    this.#reweigh(service, entry, nowMs);
  }

  deleteService(service: ServiceId): void {
    this.#services.delete(service);
  }

  /** The service is used or needed. True when it was cold: whom to watch has changed. */
  warm(service: ServiceId, nowMs: number): boolean {
    const entry = this.#services.get(service);
    if (entry === undefined) return false;
    const cold = entry.warmUntil <= nowMs;
    entry.warmUntil = nowMs + WARM_MS;
    return cold;
  }

  /** Somebody asked for its name and may soon use it. */
  expect(service: ServiceId, nowMs: number): void {
    const entry = this.#services.get(service);
    if (entry !== undefined) entry.expectedUntil = nowMs + EXPECTED_MS;
  }

  /** Known, and neither used, needed nor expected. */
  isCold(service: ServiceId, nowMs: number): boolean {
    const entry = this.#services.get(service);
    return entry !== undefined && !isWarm(entry, nowMs);
  }

  /** Per warm service the nodes that host it, this one left out: what the prober follows. Those that are only expected
   *  come last: they take no watch from what is used. */
  followed(nowMs: number): Map<ServiceId, readonly string[]> {
    const result = new Map<ServiceId, readonly string[]>();
    const nodesOf = ({ members }: Entry) => [...new Set(members.filter((m) => !m.local).map((m) => m.node))];
    for (const [service, entry] of this.#services)
      if (entry.warmUntil > nowMs) result.set(service, nodesOf(entry));
    for (const [service, entry] of this.#services)
      if (entry.warmUntil <= nowMs && isWarm(entry, nowMs)) result.set(service, nodesOf(entry));
    return result;
  }

  has(service: ServiceId): boolean {
    return this.#services.has(service);
  }

  /** The health of an instance here has changed: that waits for no rotation, however cold the service. */
  reweighOne(service: ServiceId, nowMs: number): void {
    const entry = this.#services.get(service);
    if (entry !== undefined) this.#reweigh(service, entry, nowMs);
  }

  /** A node's status has changed. */
  reweigh(nowMs: number): void {
    for (const [service, entry] of this.#services)
      if (isWarm(entry, nowMs)) this.#reweigh(service, entry, nowMs);
  }

  /** Says all weights again, to a reader that knows none. */
  resend(nowMs: number): void {
    for (const [service, entry] of this.#services) {
      entry.sent = undefined;
      this.#reweigh(service, entry, nowMs);
    }
  }

  handleTimeout(nowMs: number): void {
    if (nowMs < this.#nextAt) return;
    this.#nextAt = nowMs + REWEIGH_MS;
    this.reweigh(nowMs);
    for (let n = 0; n < Math.min(COLD_PER_ROUND, this.#services.size); n++) {
      let next = this.#rotation.next();
      if (next.done) {
        this.#rotation = this.#services.entries();
        next = this.#rotation.next();
      }
      if (next.done) return;
      const [service, entry] = next.value;
      if (!isWarm(entry, nowMs)) this.#reweigh(service, entry, nowMs);
    }
  }

  poll(): BalanceOutput | undefined {
    return this.#outputs.shift();
  }

  deadline(): Deadline {
    return { at: this.#nextAt, why: 'reweigh' };
  }

  /** Why the policy chooses as it does now, without the candidates. */
  why(service: ServiceId, policy: Policy): string | undefined {
    return this.#services.get(service)?.last?.why[policy];
  }

  /** Undefined when the service is not followed here. */
  explain(service: ServiceId, policy: Policy, nowMs: number): Explanation | undefined {
    const entry = this.#services.get(service);
    if (entry?.last === undefined) return undefined;
    const share = shares(entry.last.weights[policy]);
    const candidates = entry.members.map((member, i) => {
      const { candidate, reason } = this.#candidate(entry, member, nowMs);
      const { health, confirmed, rttMs, load } = candidate;
      const cost = costMs(candidate);
      return {
        instance: member.instance,
        node: member.node,
        local: member.local,
        health,
        reason,
        confirmed,
        ...(rttMs === undefined ? {} : { rttMs }),
        ...(load === undefined ? {} : { load }),
        ...(Number.isFinite(cost) ? { costMs: cost } : {}),
        share: share[i] ?? 0,
      };
    });
    return { policy, why: entry.last.why[policy], candidates };
  }

  #reweigh(service: ServiceId, entry: Entry, nowMs: number): void {
    const candidates = entry.members.map((member) => this.#candidate(entry, member, nowMs).candidate);
    const fallen: number[] = [];
    for (const [i, { node, instance, local }] of entry.members.entries()) {
      if (candidates[i]!.health !== 'down' || local) {
        entry.down.delete(instance);
        continue;
      }
      // Its node is asked until it calls the instance well again.
      if (entry.warmUntil > nowMs) this.#prober.handleUse(node, nowMs);
      if (entry.down.has(instance)) continue;
      entry.down.add(instance);
      fallen.push(instance);
    }
    const weights = entry.weigher.weigh(candidates, nowMs);
    entry.last = weights;
    if (entry.sent === undefined || !alike(entry.sent, weights, TOLERANCE)) {
      entry.sent = weights;
      this.#outputs.push({ kind: 'weights', service, weights });
    }
    // Behind the weights: what is let go of is then chosen by them.
    for (const instance of fallen) this.#outputs.push({ kind: 'down', service, instance });
  }

  #candidate(entry: Entry, member: Member, nowMs: number): { candidate: Candidate; reason: string } {
    const { instance, node, local, namespaceIp } = member;
    if (local) {
      const up = this.#own.isUp(namespaceIp);
      const load = this.#own.load();
      return {
        candidate: {
          instance,
          local,
          health: up ? 'up' : 'down',
          rttMs: 0,
          confirmed: true,
          ...(load === undefined ? {} : { load }),
        },
        reason: up ? 'on this node' : 'on this node, dead or unhealthy',
      };
    }
    const view = this.#prober.view(node, nowMs);
    if (view === undefined)
      return {
        candidate: { instance, local, health: 'up', confirmed: false },
        reason: 'its node is not known yet',
      };
    const down = this.#prober.isDown(
      node,
      namespaceIp,
      entry.knownSince.get(instance) ?? Number.NEGATIVE_INFINITY,
    );
    const lost = view.status === 'suspect' || view.status === 'dead';
    const health: Health = down ? 'down' : lost ? 'suspect' : 'up';
    const ago =
      view.answeredAgoMs === undefined
        ? 'never answered'
        : `answered ${Math.round(view.answeredAgoMs)} ms ago`;
    return {
      candidate: {
        instance,
        local,
        health,
        confirmed: view.confirmed,
        ...(view.rttMs === undefined ? {} : { rttMs: view.rttMs }),
        ...(view.load === undefined ? {} : { load: view.load }),
      },
      reason: down ? 'its node says that it is dead or unhealthy' : `node ${view.status}, ${ago}`,
    };
  }
}

function isWarm({ warmUntil, expectedUntil }: Entry, nowMs: number): boolean {
  return warmUntil > nowMs || expectedUntil > nowMs;
}
