// How large the heap of a process grows that runs for months on a small host. Left alone, V8 sizes it for throughput: an
// agent of 20 MB of live objects under continuous change had 100 MB of young generation and let the old one grow to
// three times what lives before it looked. It decides nothing about what is kept.
import process from 'node:process';
import { setFlagsFromString } from 'node:v8';

/**
 * The young generation stays as it is, and the old one is collected when it is half as large again as what lived at the
 * last time, or 8 MB larger. V8 reads both whenever it would let one grow, so they may be set while it runs.
 */
const RUNNING = ['--semi-space-growth-factor=1', '--heap-growing-percent=50'];

/** The same for the command line of Deno, which takes V8's flags there and nowhere else. 4 MB: with 2 the p99 of names was
 *  longer, and V8's own limit won nothing. */
export const DENO_HEAP_FLAGS = '--v8-flags=--max-semi-space-size=4,--heap-growing-percent=50';

/** For the main thread and those that it starts later; before much is allocated. */
export function boundHeap(): void {
  if (process.versions['deno'] !== undefined) return;
  for (const flag of RUNNING) setFlagsFromString(flag);
}
