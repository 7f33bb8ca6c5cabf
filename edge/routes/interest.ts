// What this node must know about: services that its instances are or declare in `needs` (pinned), and services that
// were asked for by name or by packet (used). A pure bookkeeper: it says what to begin and what to end, and ends
// nothing while the store is away, because then nothing that is forgotten could be learned again.
import type { ServiceId } from '../../src/name.ts';

export interface InterestLimits {
  /** A service that nothing used for so long is no longer followed. */
  readonly idleMs: number;
  /** The same for a service that turned out not to exist. */
  readonly negativeMs: number;
  readonly max: number;
}

export class Interest {
  readonly #limits: InterestLimits;
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

  /** Somebody asked for it. `begin`: it must be followed from now on; `end`: what makes room for it, if anything. */
  use(service: ServiceId, nowMs: number): { readonly begin: boolean; readonly end: ServiceId | undefined } {
    const begin = !this.has(service);
    this.#touch(service, nowMs);
    if (!begin || this.size <= this.#limits.max) return { begin, end: undefined };
    for (const oldest of this.#used.keys())
      if (!this.#pinned.has(oldest) && oldest !== service) {
        this.#used.delete(oldest);
        return { begin, end: oldest };
      }
    return { begin, end: undefined };
  }

  /**
   * What to stop following now. `live`: whether the store is there; `exists`: whether a service was found;
   * `busy`: whether something that does not ask (a flow) still uses it.
   */
  expire(
    nowMs: number,
    live: boolean,
    exists: (service: ServiceId) => boolean,
    busy: (service: ServiceId) => boolean = () => false,
  ): ServiceId[] {
    if (!live) return [];
    const ended: ServiceId[] = [];
    for (const [service, lastMs] of this.#used) {
      const idleMs = nowMs - lastMs;
      // Oldest first: from the first one that is younger than the shorter limit on, none can have expired.
      if (idleMs < Math.min(this.#limits.negativeMs, this.#limits.idleMs)) break;
      if (idleMs < (exists(service) ? this.#limits.idleMs : this.#limits.negativeMs)) continue;
      if (!this.#pinned.has(service) && busy(service)) continue;
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
