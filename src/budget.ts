// Budgets: so much at once, and so much more every second, for one use or for each of many callers, so that one cannot
// use up what is there for all. Pure; a caller that is forgotten for want of room has its whole budget again.
import { assert } from './assert.ts';

export interface BudgetLimits {
  /** At once, after a pause. */
  readonly burst: number;
  readonly perS: number;
  /** Callers that are remembered; the one that was heard least lately is forgotten. */
  readonly callersMax: number;
}

export class Budget {
  readonly #burst: number;
  readonly #perS: number;
  #left: number;
  #atMs = Number.NEGATIVE_INFINITY;

  constructor({ burst, perS }: Omit<BudgetLimits, 'callersMax'>) {
    assert(burst >= 1 && perS > 0, 'a budget gives something');
    this.#burst = burst;
    this.#perS = perS;
    this.#left = burst;
  }

  /** Takes one; false when nothing is left. */
  take(nowMs: number): boolean {
    this.#left = Math.min(this.#burst, this.#left + ((nowMs - this.#atMs) * this.#perS) / 1_000);
    this.#atMs = nowMs;
    if (this.#left < 1) return false;
    this.#left--;
    return true;
  }
}

export class Budgets {
  readonly #limits: BudgetLimits;
  /** In order of last use. */
  readonly #budgets = new Map<number | string, Budget>();

  constructor(limits: BudgetLimits) {
    assert(limits.callersMax >= 1, "a budget is somebody's");
    this.#limits = limits;
  }

  /** Takes one from the caller's budget; false when nothing is left. */
  take(caller: number | string, nowMs: number): boolean {
    const budget = this.#budgets.get(caller) ?? new Budget(this.#limits);
    this.#budgets.delete(caller);
    this.#budgets.set(caller, budget);
    if (this.#budgets.size > this.#limits.callersMax)
      this.#budgets.delete(this.#budgets.keys().next().value!);
    return budget.take(nowMs);
  }
}
