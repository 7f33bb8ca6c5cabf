// A budget for each of many callers, so that one cannot use up what is there for all: so much at once, and so much
// more every second. Pure; a caller that is forgotten for want of room has its whole budget again.
import { assert } from './assert.ts';

export interface BudgetLimits {
  /** At once, after a pause. */
  readonly burst: number;
  readonly perS: number;
  /** Callers that are remembered; the one that was heard least lately is forgotten. */
  readonly callersMax: number;
}

export class Budgets {
  readonly #limits: BudgetLimits;
  /** What is left and since when, in order of last use. */
  readonly #spent = new Map<number | string, { left: number; atMs: number }>();

  constructor(limits: BudgetLimits) {
    assert(limits.burst >= 1 && limits.perS > 0 && limits.callersMax >= 1, 'a budget gives something');
    this.#limits = limits;
  }

  /** Takes one from the caller's budget; false when nothing is left. */
  take(caller: number | string, nowMs: number): boolean {
    const { burst, perS, callersMax } = this.#limits;
    const held = this.#spent.get(caller) ?? { left: burst, atMs: nowMs };
    this.#spent.delete(caller);
    this.#spent.set(caller, held);
    held.left = Math.min(burst, held.left + ((nowMs - held.atMs) * perS) / 1_000);
    held.atMs = nowMs;
    if (this.#spent.size > callersMax) this.#spent.delete(this.#spent.keys().next().value!);
    if (held.left < 1) return false;
    held.left--;
    return true;
  }
}
