// The real clock and its timers, and waiting for something no longer than a while.
import { TIMER_MS_MAX } from '../../src/limits.ts';
import type { Clock, Timers } from '../ports.ts';

export const systemClock: Clock = {
  monotonicMs: () => performance.now(),
  wallMs: () => Date.now(),
};

export const systemTimers: Timers = {
  after: (ms, callback) => {
    const timer = setTimeout(callback, Math.min(ms, TIMER_MS_MAX));
    return () => clearTimeout(timer);
  },
};

/** True when the promise is fulfilled in time with anything but false. */
export async function within(wait: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(resolve, ms, false);
  });
  try {
    return await Promise.race([wait.then((told) => told !== false), late]);
  } catch {
    return false;
  } finally {
    clearTimeout(timer);
  }
}
