// The runtime's monotonic clock and timers, as leases and roles take them.
import type { Time } from '../lease.ts';

export const systemTime: Time = {
  monotonicMs: () => performance.now(),
  after: (ms, run) => {
    const timer = setTimeout(run, ms);
    return () => clearTimeout(timer);
  },
};
