// How an address's policy becomes an instance, in two steps. The control plane weighs (Weigher): per service and
// policy one weight per instance, from health, RTT and load, with hysteresis. The packet path takes turns (Turns):
// one pick per new flow in proportion to the weights, without allocation. Pure: time and seed are arguments.
// It refuses to measure anything and knows no addresses.
//
//   health  up        may be chosen
//           suspect   its node does not answer probes: passed over, and tried only when nothing else is left
//           down      known dead or unhealthy (its own agent says so): never chosen
import { POLICIES, type Policy } from './policy.ts';
import type { Rng } from './rng.ts';

export const HEALTHS = ['up', 'suspect', 'down'] as const;
export type Health = (typeof HEALTHS)[number];

/** What is known of one instance at this moment. */
export interface Candidate {
  readonly instance: number;
  /** On this node: its RTT is taken as 0 and it is naturally closest. */
  readonly local: boolean;
  readonly health: Health;
  /** Undefined: neither measured nor estimated. */
  readonly rttMs?: number;
  /** True when the RTT was measured by probes, false when coordinates estimate it. */
  readonly confirmed: boolean;
  /** Load of its node: demand per core, see slowdown(); undefined when it has not said. */
  readonly load?: number;
}

/** Two RTTs within this are a tie, and ties are spread. */
export const TIE_MS = 1;
/** A challenger must be better by this share and by TIE_MS to take over at once … The promise is 20 %: the rest is for
 *  the error of what is measured. */
export const HYSTERESIS = 0.15;
/** … or by TIE_MS alone for this long. */
export const SETTLE_MS = 5_000;
/** An RTT that only coordinates know counts for more than it says: their error is about this on bad truths. */
const ESTIMATE_SLACK = 1.5;
/** Mean time that an idle instance works on one request: the scale on which load competes with RTT. */
export const SERVICE_TIME_MS = 5;
/** No load beyond this makes a difference. */
const LOAD_WORST = 1_000;
/** Load that stands for "has not said". */
const LOAD_UNKNOWN = 0.5;
/** Load that all of a client's flows make on an instance at least: what spreads ties, about 1 ms wide at low load. */
const FLOW_LOAD_MIN = 0.2;
/** One correction of the shares, then time for its effect to be seen: loads are measured over a second and probed
 *  every second. Correcting sooner answers the past and swings. */
const ROUND_MS = 1_500;
/** Share of the way to the computed shares that one round goes. */
const STEP = 0.6;
/** An overloaded instance gets less than computed, by this factor at most: its load may not come from our flows. */
const OVERLOAD_CUT = 2;
/** An instance that was overloaded gets flows back by this factor a round, not at once. */
const RETURN_FACTOR = 1.3;
const RETURN_MS = 30_000;
/** Shares below this are nothing: a far instance gets no stray flows. Of many instances a tenth of an even share is. */
const SHARE_MIN = 0.01;
const EVEN_SHARE_MIN = 0.1;

/**
 * How much longer a request takes on a node of this load than on an idle one. Load is demand per core: below 1 the
 * share of time that the cores are busy (ρ), above 1 the runnable tasks per core. Mean response time of a queue under
 * processor sharing is S / (1 - ρ) (Kleinrock, Queueing Systems vol. 2, §4.4); past ρ = 0.9, where the formula's pole
 * lies, its tangent goes on, so that an overload of 3 is worse than one of 2.
 */
export function slowdown(load: number): number {
  return load <= 0.9 ? 1 / (1 - Math.max(load, 0)) : 10 + (load - 0.9) * 100;
}

/** Inverse of slowdown. */
function loadOf(slow: number): number {
  return slow <= 10 ? 1 - 1 / slow : 0.9 + (slow - 10) / 100;
}

/** Expected time of one request, ms: one round trip and the work. What `fastest` minimises. */
export function costMs(candidate: Pick<Candidate, 'local' | 'rttMs' | 'load'>): number {
  const rtt = candidate.local ? 0 : (candidate.rttMs ?? Number.POSITIVE_INFINITY);
  return rtt + SERVICE_TIME_MS * slowdown(Math.min(candidate.load ?? LOAD_UNKNOWN, LOAD_WORST));
}

/** Per policy one weight per candidate, in the candidates' order, and a sentence for people. */
export interface Weights {
  readonly instances: readonly number[];
  readonly weights: Readonly<Record<Policy, readonly number[]>>;
  readonly why: Readonly<Record<Policy, string>>;
}

/** Those that may be chosen: all that are up, or the suspects when nothing is up. */
function eligible(candidates: readonly Candidate[]): { pool: readonly Candidate[]; lastResort: boolean } {
  const up = candidates.filter((c) => c.health === 'up');
  if (up.length > 0) return { pool: up, lastResort: false };
  return { pool: candidates.filter((c) => c.health === 'suspect'), lastResort: true };
}

function rank(c: Candidate): number {
  if (c.rttMs === undefined) return Number.POSITIVE_INFINITY;
  return c.confirmed ? c.rttMs : c.rttMs * ESTIMATE_SLACK + TIE_MS;
}

/** One service's weights over time. Hysteresis is its only memory. */
export class Weigher {
  #anchor: number | undefined;
  /** Since when somebody has been better than the anchor, by more than a tie. */
  #challengedSince: number | undefined;
  readonly #fast = new Map<number, number>();
  #fastAt = Number.NEGATIVE_INFINITY;
  readonly #overloadedAt = new Map<number, number>();
  /** Times that closest changed its anchor although it could have stayed; for the counters. */
  switches = 0;

  weigh(candidates: readonly Candidate[], nowMs: number): Weights {
    const { pool, lastResort } = eligible(candidates);
    const note = lastResort && pool.length > 0 ? ' (no instance is up: suspects are tried)' : '';
    const closest = this.#closest(pool, nowMs);
    const fastest = this.#fastest(pool, nowMs);
    const chosen = new Set(pool.map((c) => c.instance));
    const weights: Record<Policy, number[]> = {
      roundrobin: candidates.map((c) => (chosen.has(c.instance) ? 1 : 0)),
      closest: candidates.map((c) => (closest.set.has(c.instance) ? 1 : 0)),
      fastest: candidates.map((c) => fastest.get(c.instance) ?? 0),
    };
    const none = 'no instance may be chosen';
    return {
      instances: candidates.map((c) => c.instance),
      weights,
      why: {
        roundrobin: pool.length === 0 ? none : `${pool.length} in turn${note}`,
        closest: pool.length === 0 ? none : `${closest.why}${note}`,
        fastest: pool.length === 0 ? none : `least RTT + ${SERVICE_TIME_MS} ms × slow-down by load${note}`,
      },
    };
  }

  #closest(pool: readonly Candidate[], nowMs: number): { set: ReadonlySet<number>; why: string } {
    const local = pool.filter((c) => c.local);
    if (local.length > 0) {
      this.#settle(undefined);
      return { set: new Set(local.map((c) => c.instance)), why: 'on this node' };
    }
    const best = pool.reduce<Candidate | undefined>(
      (least, c) => (least === undefined || rank(c) < rank(least) ? c : least),
      undefined,
    );
    if (best === undefined) return { set: new Set(), why: '' };
    if (rank(best) === Number.POSITIVE_INFINITY) {
      this.#settle(undefined);
      return { set: new Set(pool.map((c) => c.instance)), why: 'no RTT is known yet: all in turn' };
    }
    const anchor = pool.find((c) => c.instance === this.#anchor);
    const lead = anchor === undefined ? Number.POSITIVE_INFINITY : rank(anchor) - rank(best);
    if (anchor !== undefined && lead > TIE_MS) {
      this.#challengedSince ??= nowMs;
      const clear = lead > rank(best) * HYSTERESIS;
      if (!clear && nowMs - this.#challengedSince < SETTLE_MS)
        return {
          set: new Set([anchor.instance]),
          why: `instance ${anchor.instance} is kept: ${best.instance} is better by less than ${HYSTERESIS * 100} %, and for less than ${SETTLE_MS / 1000} s`,
        };
      this.switches++;
    }
    this.#settle(best.instance);
    const limit = rank(best) + TIE_MS;
    const ties = pool.filter((c) => rank(c) <= limit);
    return {
      set: new Set(ties.map((c) => c.instance)),
      why: `lowest RTT${ties.length > 1 ? `, ${ties.length} within ${TIE_MS} ms in turn` : ''}${best.confirmed ? '' : ', estimated'}`,
    };
  }

  #settle(anchor: number | undefined): void {
    this.#anchor = anchor;
    this.#challengedSince = undefined;
  }

  /** Shares per instance; see equalise(). Between two rounds they stand, only the set of instances may change. */
  #fastest(pool: readonly Candidate[], nowMs: number): ReadonlyMap<number, number> {
    const same = pool.length === this.#fast.size && pool.every((c) => this.#fast.has(c.instance));
    if (same && nowMs - this.#fastAt < ROUND_MS) return this.#fast;
    const before = pool.map((c) => this.#fast.get(c.instance) ?? 0);
    const held = before.reduce((a, b) => a + b, 0);
    const old = before.map((share) => (held > 0 ? share / held : 0));
    const target = equalise(pool, old);
    const step = held > 0 && same ? STEP : 1;
    const least = Math.min(SHARE_MIN, EVEN_SHARE_MIN / pool.length);
    for (const instance of [...this.#overloadedAt.keys()])
      if (!pool.some((c) => c.instance === instance)) this.#overloadedAt.delete(instance);
    const next = pool.map((c, i) => {
      const load = c.load ?? LOAD_UNKNOWN;
      let share = old[i]! + (target[i]! - old[i]!) * step;
      if (load > 1) {
        this.#overloadedAt.set(c.instance, nowMs);
        share = Math.min(target[i]!, old[i]!) / Math.min(load, OVERLOAD_CUT);
      } else if (nowMs - (this.#overloadedAt.get(c.instance) ?? Number.NEGATIVE_INFINITY) < RETURN_MS)
        share = Math.min(share, old[i]! * RETURN_FACTOR + least);
      return share;
    });
    const sum = next.reduce((a, b) => a + b, 0);
    this.#fast.clear();
    for (const [i, c] of pool.entries()) {
      const share = sum > 0 ? next[i]! / sum : 1 / pool.length;
      this.#fast.set(c.instance, share < least ? 0 : share);
    }
    this.#fastAt = nowMs;
    return this.#fast;
  }
}

/**
 * The shares at which no flow would be faster elsewhere (Wardrop 1952, first principle): every instance that is used
 * costs the same, every other more. Load is taken to follow the flows: an instance's load is what this client's
 * share made of it, as if all clients did as this one does; that errs on the side of small corrections.
 */
function equalise(pool: readonly Candidate[], shares: readonly number[]): number[] {
  const loads = pool.map((c) => Math.min(c.load ?? LOAD_UNKNOWN, LOAD_WORST));
  const busy = pool.map((_, i) => i).filter((i) => shares[i]! > 0.1);
  const mean = busy.length === 0 ? 0 : busy.reduce((sum, i) => sum + loads[i]! / shares[i]!, 0) / busy.length;
  const perShare = pool.map((_, i) =>
    Math.max(FLOW_LOAD_MIN, shares[i]! > 0.1 ? loads[i]! / shares[i]! : mean),
  );
  const base = pool.map((_, i) => Math.max(0, loads[i]! - perShare[i]! * shares[i]!));
  const rtt = pool.map((c) => (c.local ? 0 : (c.rttMs ?? Number.POSITIVE_INFINITY)));
  if (!rtt.some(Number.isFinite)) return pool.map(() => 1 / pool.length);
  /** The share at which the instance costs `level`; 0 when it costs more already. */
  const at = (i: number, level: number): number => {
    const slow = (level - rtt[i]!) / SERVICE_TIME_MS;
    if (!(slow > 1)) return 0;
    return Math.max(0, (loadOf(slow) - base[i]!) / perShare[i]!);
  };
  let low = 0;
  let high = Math.max(...rtt.filter(Number.isFinite)) + SERVICE_TIME_MS * slowdown(LOAD_WORST);
  for (let k = 0; k < 50; k++) {
    const level = (low + high) / 2;
    let sum = 0;
    for (let i = 0; i < pool.length; i++) sum += at(i, level);
    if (sum < 1) low = level;
    else high = level;
  }
  const result = pool.map((_, i) => at(i, high));
  const sum = result.reduce((a, b) => a + b, 0);
  return result.map((share) => share / sum);
}

/**
 * Takes turns in proportion to weights: each candidate is due once per 1/weight of virtual time, at a random moment
 * within it. So counts never drift from their share by more than about one, the order does not repeat (two clients in
 * step do not share out the instances between them), and nodes that know nothing of each other do not walk in step.
 * Who comes new or back begins now: nothing is made up for, nobody is weighed twice (stride scheduling, Waldspurger
 * and Weihl 1995).
 */
export class Turns {
  readonly #rng: Rng;
  #instances: readonly number[] = [];
  #turn = new Float64Array(0);
  #due = new Float64Array(0);
  #now = 0;

  constructor(rng: Rng) {
    this.#rng = rng;
  }

  /** Replaces the list; those that stay keep their turns. */
  replace(instances: readonly number[]): void {
    const turn = new Float64Array(instances.length);
    const due = new Float64Array(instances.length);
    for (const [i, instance] of instances.entries()) {
      const old = this.#instances.indexOf(instance);
      turn[i] = old < 0 ? this.#now : this.#turn[old]!;
      due[i] = old < 0 ? this.#now + this.#rng.unit() : this.#due[old]!;
    }
    this.#instances = instances;
    this.#turn = turn;
    this.#due = due;
  }

  /** Index into the list, or -1 when every weight is 0. `weights` has the list's length. */
  pick(weights: ArrayLike<number>): number {
    const turn = this.#turn;
    const due = this.#due;
    const now = this.#now;
    let best = -1;
    let bestDue = 0;
    for (let i = 0; i < due.length; i++) {
      const weight = weights[i]!;
      if (!(weight > 0)) continue;
      // Away or nearly so until now: due within one turn from here, neither owed the past nor held to a far future.
      const stride = 1 / weight;
      if (turn[i]! + stride < now || due[i]! > now + 2 * stride) {
        turn[i] = now;
        due[i] = now + this.#rng.unit() * stride;
      }
      if (best < 0 || due[i]! < bestDue) {
        best = i;
        bestDue = due[i]!;
      }
    }
    if (best < 0) return -1;
    const stride = 1 / weights[best]!;
    if (bestDue > now) this.#now = bestDue;
    turn[best] = turn[best]! + stride;
    due[best] = turn[best]! + this.#rng.unit() * stride;
    return best;
  }
}

/** Share of new flows that each candidate gets, 0…1, in the weights' order. */
export function shares(weights: readonly number[]): number[] {
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((w) => (sum > 0 ? w / sum : 0));
}

/** True when two sets of weights would be chosen by alike: same instances, shares within `tolerance` and within a fifth
 *  of an even share. */
export function alike(a: Weights, b: Weights, tolerance: number): boolean {
  if (a.instances.length !== b.instances.length || a.instances.some((n, i) => n !== b.instances[i]))
    return false;
  const limit = Math.min(tolerance, 1 / (5 * a.instances.length));
  return POLICIES.every((policy) => {
    const before = shares(a.weights[policy]);
    return shares(b.weights[policy]).every((share, i) => {
      const old = before[i]!;
      return share > 0 === old > 0 && Math.abs(share - old) <= limit;
    });
  });
}
