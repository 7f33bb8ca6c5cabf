import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { DENO_HEAP_FLAGS } from '../../../coordinator/io/heap.ts';

/** A process in which a million objects live for a moment each; the largest that its generations became, MB. */
function peak(bounded: boolean): { young: number; old: number } {
  const heap = new URL('../../../coordinator/io/heap.ts', import.meta.url).href;
  const program = `
    import { getHeapSpaceStatistics } from 'node:v8';
    import { boundHeap } from ${JSON.stringify(heap)};
    if (${bounded}) boundHeap();
    const kept = new Map();
    const peak = { young: 0, old: 0 };
    for (let i = 0; i < 4e6; i++) {
      kept.set(i, { i, list: [i] });
      kept.delete(i - 50_000);
      if (i % 20_000 !== 0) continue;
      for (const space of getHeapSpaceStatistics()) {
        const which = { new_space: 'young', old_space: 'old' }[space.space_name];
        if (which !== undefined) peak[which] = Math.max(peak[which], space.physical_space_size / 2 ** 20);
      }
    }
    console.log(JSON.stringify(peak));`;
  const deno = process.versions['deno'] !== undefined;
  // From standard input on Deno, whose `eval` has no flags of V8.
  const argv = deno
    ? ['run', '-A', '--quiet', ...(bounded ? [DENO_HEAP_FLAGS] : []), '-']
    : ['--disable-warning=ExperimentalWarning', '--input-type=module', '-'];
  const { stdout, stderr } = spawnSync(process.execPath, argv, {
    input: program,
    encoding: 'utf8',
    cwd: fileURLToPath(new URL('../../..', import.meta.url)),
  });
  assert.match(stdout, '{', stderr);
  return JSON.parse(stdout);
}

test('a bounded heap does not grow by what lives for a moment', () => {
  const free = peak(false);
  const bounded = peak(true);
  const text = JSON.stringify({ free, bounded });
  assert.ok(bounded.young <= 10 && bounded.young < free.young, text);
  // On Deno the first limit of the old generation is V8's guess, which later ones follow: an agent shows it, not this.
  if (process.versions['deno'] === undefined) assert.ok(bounded.old < free.old * 0.75, text);
});

test('deno task agent has the flags', () => {
  const { tasks } = JSON.parse(readFileSync(new URL('../../../deno.json', import.meta.url), 'utf8'));
  assert.match(tasks.agent, DENO_HEAP_FLAGS);
});

test.run();
