// Time that a test moves by hand: a monotonic clock, timers in order, and room for promises to settle between them.
import type { Time } from '../../coordinator/lease.ts';

export class VirtualTime implements Time {
  #now = 0;
  #timers: { atMs: number; run: () => void }[] = [];

  monotonicMs(): number {
    return this.#now;
  }
  after(ms: number, run: () => void): () => void {
    const timer = { atMs: this.#now + ms, run };
    this.#timers.push(timer);
    return () => {
      this.#timers = this.#timers.filter((other) => other !== timer);
    };
  }
  /** Runs every timer that falls due, in order, letting what it started settle. */
  advance(ms: number): Promise<void> {
    // Nothing here waits for the world: one turn of the event loop drains every promise that a timer moved.
    return this.#pass(ms, () => new Promise((resolve) => setImmediate(resolve)));
  }
  /** The same for a day of which little is asked: what a timer started may still go on when the next one is due. */
  coast(ms: number): Promise<void> {
    return this.#pass(ms, async () => {
      for (let i = 0; i < 16; i++) await undefined;
    });
  }

  async #pass(ms: number, drain: () => Promise<unknown>): Promise<void> {
    const end = this.#now + ms;
    await settle();
    for (;;) {
      await drain();
      const next = this.#timers.reduce<{ atMs: number; run: () => void } | undefined>(
        (first, timer) => (timer.atMs <= end && (!first || timer.atMs < first.atMs) ? timer : first),
        undefined,
      );
      if (next === undefined) break;
      this.#timers = this.#timers.filter((other) => other !== next);
      this.#now = Math.max(this.#now, next.atMs);
      next.run();
    }
    this.#now = end;
    await settle();
  }
}

/**
 * What a host takes for time: a monotonic clock that runs at `rate` beside the true one, and one for the date, which may
 * be set. Timers that run keep the rate they were armed with.
 */
export class HostClock implements Time {
  readonly #time: VirtualTime;
  #rate = 1;
  #sinceMs = 0;
  #monotonicMs = 0;
  #offsetMs: number;

  constructor(time: VirtualTime, dateMs = 1_800_000_000_000) {
    this.#time = time;
    this.#sinceMs = time.monotonicMs();
    this.#offsetMs = dateMs;
  }

  set rate(rate: number) {
    this.#monotonicMs = this.monotonicMs();
    this.#sinceMs = this.#time.monotonicMs();
    this.#rate = rate;
  }
  /** As a time server does that finds the date wrong. */
  step(ms: number): void {
    this.#offsetMs += ms;
  }

  readonly monotonicMs = (): number =>
    this.#monotonicMs + (this.#time.monotonicMs() - this.#sinceMs) * this.#rate;
  readonly wallMs = (): number => this.#offsetMs + this.monotonicMs();
  after(ms: number, run: () => void): () => void {
    // Whole milliseconds: what is due must be due by this clock, too.
    return this.#time.after(Math.ceil(ms / this.#rate), run);
  }
}

/** Lets every promise that can go on do so. */
export async function settle(): Promise<void> {
  for (let i = 0; i < 3; i++) await new Promise((resolve) => setImmediate(resolve));
}
