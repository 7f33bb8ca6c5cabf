// The runtime's monotonic clock and timers, as leases and roles take them.
import { TIMER_MS_MAX } from '../../src/limits.ts';
import type { Time } from '../lease.ts';

export const systemTime: Time = {
  monotonicMs: () => performance.now(),
  after: (ms, run) => {
    const timer = setTimeout(run, Math.min(ms, TIMER_MS_MAX));
    return () => clearTimeout(timer);
  },
};
