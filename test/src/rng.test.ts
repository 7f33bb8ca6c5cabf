import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Rng } from '../../src/rng.ts';

test('Rng.u32 gives the first round of the PCG reference demo (seed 42, stream 54)', () => {
  const rng = new Rng(42, 54);
  assert.equal(
    Array.from({ length: 6 }, () => rng.u32()),
    [0xa15c02b7, 0x7b47f409, 0xba1d3330, 0x83d2f293, 0xbfa4784b, 0xcbed606e],
  );
});

/** The same generator in 64-bit arithmetic: slow and obviously right. */
function* twin(seed: number, stream: number): Generator<number> {
  const mask = (1n << 64n) - 1n;
  const increment = ((BigInt(stream) << 1n) | 1n) & mask;
  let state = 0n;
  const next = (): number => {
    const old = state;
    state = (old * 6364136223846793005n + increment) & mask;
    const word = (((old >> 18n) ^ old) >> 27n) & 0xffffffffn;
    const turn = old >> 59n;
    return Number(((word >> turn) | (word << (-turn & 31n))) & 0xffffffffn);
  };
  next();
  state = (state + BigInt(seed)) & mask;
  next();
  for (;;) yield next();
}

test('Rng.u32 equals 64-bit arithmetic for 200 seeds and streams', () => {
  for (let i = 0; i < 200; i++) {
    const seed = (i * 0x9e3779b9) >>> 0;
    const stream = (i * 0x85ebca6b) >>> 0;
    const rng = new Rng(seed, stream);
    const slow = twin(seed, stream);
    for (let k = 0; k < 50; k++) assert.is(rng.u32(), slow.next().value, `seed ${seed} draw ${k}`);
  }
});

test('Rng.below is uniform within five deviations and never leaves its range', () => {
  const rng = new Rng(1);
  const counts = new Array<number>(7).fill(0);
  for (let i = 0; i < 70_000; i++) counts[rng.below(7)]!++;
  for (const count of counts) assert.ok(Math.abs(count - 10_000) < 5 * Math.sqrt(10_000), String(counts));
});

test('Rng.jitter stays within its spread and Rng.normal has mean 0, deviation 1', () => {
  const rng = new Rng(2);
  let sum = 0;
  let squares = 0;
  for (let i = 0; i < 20_000; i++) {
    const value = rng.jitter(1000, 0.1);
    assert.ok(value >= 900 && value < 1100);
    const normal = rng.normal();
    sum += normal;
    squares += normal * normal;
  }
  assert.ok(Math.abs(sum / 20_000) < 0.05);
  assert.ok(Math.abs(squares / 20_000 - 1) < 0.05);
});

test.run();
