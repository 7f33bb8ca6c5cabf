import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { resyncPauseMs } from '../../../coordinator/etcd/client.ts';

test('resyncPauseMs doubles with each listing in vain up to its cap, and spreads over two thirds of it', () => {
  const at = (random: number) => [0, 1, 2, 3, 4, 50].map((vain) => Math.round(resyncPauseMs(vain, random)));
  assert.equal(at(0), [100, 200, 400, 800, 1_000, 1_000]);
  assert.equal(at(1), [300, 600, 1_200, 2_400, 3_000, 3_000]);
});

test.run();
