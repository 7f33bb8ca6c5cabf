// What this node must know about: services that its instances are or declare in `needs` (pinned), and services that
// were asked for by name or by packet (used). A pure bookkeeper: it says what to begin and what to end, and ends
// nothing while the store is away, because then nothing that is forgotten could be learned again. No asker can make it
// forget what others use by asking for names that are new all the time.
import { Budgets } from '../../src/budget.ts';
import { INTEREST_ASKER_BURST, INTEREST_ASKER_PER_S, INTEREST_ASKERS_MAX } from '../../src/limits.ts';
import type { ServiceId } from '../../src/name.ts';

export interface InterestLimits {
  /** A service that nothing used for so long is no longer followed. */
  readonly idleMs: number;
  /** The same for a service that turned out not to exist. */
  readonly negativeMs: number;
  readonly max: number;
}

/** What becomes of a use. `end`: what makes room for it, if anything. */
export type Use =
  | { readonly kind: 'followed' }
  | { readonly kind: 'begin'; readonly end: ServiceId | undefined }
  /** There is no room while the store is away, or the asker wants too much that is new. */
  | { readonly kind: 'refused' };

export class Interest {
  readonly #limits: InterestLimits;
  readonly #budgets = new Budgets({
    burst: INTEREST_ASKER_BURST,
    perS: INTEREST_ASKER_PER_S,
    callersMax: INTEREST_ASKERS_MAX,
  });
  /** Last use by service; a Map in order of last use, oldest first. */
  readonly #used = new Map<ServiceId, number>();
  #pinned: ReadonlySet<ServiceId> = new Set();

  constructor(limits: InterestLimits) {
    this.#limits = limits;
  }

  get size(): number {
    let size = this.#used.size;
    for (const service of this.#pinned) if (!this.#used.has(service)) size++;
    return size;
  }
  has(service: ServiceId): boolean {
    return this.#used.has(service) || this.#pinned.has(service);
  }
  *services(): IterableIterator<ServiceId> {
    yield* this.#pinned;
    for (const service of this.#used.keys()) if (!this.#pinned.has(service)) yield service;
  }

  /** Replaces what instances here are or declare; returns what is new. What is no longer declared ends by idleness. */
  pin(services: ReadonlySet<ServiceId>, nowMs: number): ServiceId[] {
    const begin = [...services].filter((service) => !this.has(service));
    for (const service of this.#pinned) if (!services.has(service)) this.#touch(service, nowMs);
    this.#pinned = new Set(services);
    return begin;
  }

  /**
   * Somebody asked for it. `live`: whether the store is there; `exists`: whether a service was found; `asker`: whose
   * budget something new is taken from, if anybody's.
   */
  use(
    service: ServiceId,
    nowMs: number,
    live: boolean,
    exists: (service: ServiceId) => boolean,
    asker?: number,
  ): Use {
    if (this.has(service)) {
      this.#touch(service, nowMs);
      return { kind: 'followed' };
    }
    const full = this.size >= this.#limits.max;
    // With the store away nothing that makes room could be learned again.
    if ((full && !live) || !this.afford(asker, nowMs)) return { kind: 'refused' };
    const end = full ? this.#least(exists) : undefined;
    if (end !== undefined) this.#used.delete(end);
    this.#touch(service, nowMs);
    return { kind: 'begin', end };
  }

  /** Takes up what was followed before a restart, also beyond the bound: it is held already. */
  resume(service: ServiceId, nowMs: number): void {
    this.#touch(service, nowMs);
  }

  /** Takes one look-up from the budget of an asker; false when it has used it up. */
  afford(asker: number | undefined, nowMs: number): boolean {
    return asker === undefined || this.#budgets.take(asker, nowMs);
  }

  /** What can be spared: what does not exist before what does, and of these what was used longest ago. */
  #least(exists: (service: ServiceId) => boolean): ServiceId | undefined {
    let oldest: ServiceId | undefined;
    for (const service of this.#used.keys()) {
      if (this.#pinned.has(service)) continue;
      if (!exists(service)) return service;
      oldest ??= service;
    }
    return oldest;
  }

  /** What to stop following now. `live`: whether the store is there; `exists`: whether a service was found. */
  expire(nowMs: number, live: boolean, exists: (service: ServiceId) => boolean): ServiceId[] {
    if (!live) return [];
    const ended: ServiceId[] = [];
    for (const [service, lastMs] of this.#used) {
      const idleMs = nowMs - lastMs;
      // Oldest first: from the first one that is younger than the shorter limit on, none can have expired.
      if (idleMs < Math.min(this.#limits.negativeMs, this.#limits.idleMs)) break;
      if (idleMs < (exists(service) ? this.#limits.idleMs : this.#limits.negativeMs)) continue;
      this.#used.delete(service);
      if (!this.#pinned.has(service)) ended.push(service);
    }
    return ended;
  }

  #touch(service: ServiceId, nowMs: number): void {
    this.#used.delete(service);
    this.#used.set(service, nowMs);
  }
}
