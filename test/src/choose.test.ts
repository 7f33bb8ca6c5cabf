import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  alike,
  type Candidate,
  costMs,
  SETTLE_MS,
  shares,
  slowdown,
  Turns,
  Weigher,
} from '../../src/choose.ts';
import { Rng } from '../../src/rng.ts';

const at = (instance: number, rttMs?: number, more: Partial<Candidate> = {}): Candidate => ({
  instance,
  local: false,
  health: 'up',
  confirmed: true,
  ...(rttMs === undefined ? {} : { rttMs }),
  ...more,
});
const members = (weights: readonly number[], candidates: readonly Candidate[]): number[] =>
  candidates.filter((_, i) => weights[i]! > 0).map((c) => c.instance);

function counts(turns: Turns, weights: readonly number[], picks: number): number[] {
  const seen = new Array<number>(weights.length).fill(0);
  for (let i = 0; i < picks; i++) seen[turns.pick(weights)]!++;
  return seen;
}

test('Turns.pick: equal weights stay within two of each other at every moment, for 1…20 instances', () => {
  for (let n = 1; n <= 20; n++) {
    const turns = new Turns(new Rng(n));
    turns.replace(Array.from({ length: n }, (_, i) => i + 1));
    const weights = new Array<number>(n).fill(1);
    const seen = new Array<number>(n).fill(0);
    for (let i = 0; i < 50 * n; i++) {
      seen[turns.pick(weights)]!++;
      assert.ok(Math.max(...seen) - Math.min(...seen) <= 2, `${n} instances, pick ${i}: ${seen}`);
    }
  }
});

test('Turns.pick: 3,000 flows from three nodes that know nothing of each other: each of three within 5 % of a third', () => {
  for (let seed = 0; seed < 20; seed++) {
    const sum = [0, 0, 0];
    for (let node = 0; node < 3; node++) {
      const turns = new Turns(new Rng(seed * 3 + node));
      turns.replace([1, 2, 3]);
      for (const [i, n] of counts(turns, [1, 1, 1], 1000).entries()) sum[i]! += n;
    }
    for (const n of sum) assert.ok(Math.abs(n - 1000) <= 50, String(sum));
  }
});

test('Turns.pick: 3,000 nodes that make one flow each do not all begin with the same instance', () => {
  const sum = [0, 0, 0];
  for (let node = 0; node < 3000; node++) {
    const turns = new Turns(new Rng(node));
    turns.replace([1, 2, 3]);
    sum[turns.pick([1, 1, 1])]!++;
  }
  for (const n of sum) assert.ok(Math.abs(n - 1000) < 5 * Math.sqrt(1000), String(sum));
});

test('Turns.pick: two clients in step do not share out the instances between them', () => {
  const turns = new Turns(new Rng(4));
  turns.replace([1, 2]);
  const first = [0, 0];
  for (let i = 0; i < 1000; i++) {
    first[turns.pick([1, 1])]!++;
    turns.pick([1, 1]);
  }
  for (const n of first) assert.ok(n > 350 && n < 650, String(first));
});

test('Turns.pick follows the weights within one percent of all picks', () => {
  const turns = new Turns(new Rng(5));
  turns.replace([1, 2, 3, 4]);
  const seen = counts(turns, [1, 0.5, 0.25, 0], 7000);
  assert.is(seen[3], 0);
  for (const [i, expected] of [4000, 2000, 1000].entries())
    assert.ok(Math.abs(seen[i]! - expected) < 70, String(seen));
});

test('Turns: who comes back or comes new makes up for nothing, and those that stayed notice nothing', () => {
  const turns = new Turns(new Rng(6));
  turns.replace([1, 2, 3]);
  counts(turns, [1, 1, 1], 300);
  counts(turns, [1, 1, 0], 2000);
  const back = counts(turns, [1, 1, 1], 30);
  for (const n of back) assert.ok(n >= 8 && n <= 12, String(back));
  turns.replace([2, 3, 9]);
  const grown = counts(turns, [1, 1, 1], 30);
  for (const n of grown) assert.ok(n >= 8 && n <= 12, String(grown));
});

test('Turns: a weight that was nearly nothing counts in full within two rounds once it is raised', () => {
  const turns = new Turns(new Rng(7));
  turns.replace([1, 2]);
  counts(turns, [1, 0.02], 500);
  const seen = counts(turns, [1, 1], 40);
  assert.ok(seen[1]! >= 17, String(seen));
});

test('Turns: constant churn keeps an even share (10,000 picks, an instance leaves or comes back every 10)', () => {
  const rng = new Rng(8);
  const turns = new Turns(new Rng(9));
  turns.replace([1, 2, 3, 4, 5]);
  const weights: number[] = [1, 1, 1, 1, 1];
  const seen = [0, 0, 0, 0, 0];
  const fair = [0, 0, 0, 0, 0];
  for (let i = 0; i < 10_000; i++) {
    if (i % 10 === 0) {
      const j = rng.below(5);
      weights[j] = 1 - weights[j]!;
      if (!weights.some((w) => w > 0)) weights[j] = 1;
    }
    const up = weights.filter((w) => w > 0).length;
    for (let j = 0; j < 5; j++) if (weights[j]! > 0) fair[j]! += 1 / up;
    seen[turns.pick(weights)]!++;
  }
  for (let j = 0; j < 5; j++)
    assert.ok(Math.abs(seen[j]! - fair[j]!) < 0.07 * fair[j]!, `${seen} against ${fair}`);
});

test('Turns.pick says -1 when nothing has a weight, and for an empty list', () => {
  const turns = new Turns(new Rng(1));
  assert.is(turns.pick([]), -1);
  turns.replace([1, 2]);
  assert.is(turns.pick([0, 0]), -1);
});

test('Weigher: roundrobin takes all that are up, suspects only when nothing is up, the dead never', () => {
  const weigher = new Weigher();
  const some = [at(1, 5), at(2, 5, { health: 'suspect' }), at(3, 5, { health: 'down' })];
  assert.equal(weigher.weigh(some, 0).weights.roundrobin, [1, 0, 0]);
  const none = [at(1, 5, { health: 'down' }), at(2, 5, { health: 'suspect' })];
  const weighed = weigher.weigh(none, 1);
  for (const policy of ['roundrobin', 'closest', 'fastest'] as const)
    assert.equal(members(weighed.weights[policy], none), [2], policy);
  assert.match(weighed.why.roundrobin, 'suspects are tried');
  const dead = [at(1, 5, { health: 'down' })];
  assert.equal(weigher.weigh(dead, 2).weights.closest, [0]);
});

test('Weigher: closest takes the lowest RTT and spreads ties within 1 ms', () => {
  const candidates = [at(1, 30), at(2, 10.4), at(3, 10), at(4, 11.1)];
  const { weights, why } = new Weigher().weigh(candidates, 0);
  assert.equal(members(weights.closest, candidates), [2, 3]);
  assert.match(why.closest, '2 within 1 ms');
});

test('Weigher: closest prefers this node whatever the others measure', () => {
  const candidates = [at(1, 0.1), at(2, undefined, { local: true }), at(3, undefined, { local: true })];
  assert.equal(members(new Weigher().weigh(candidates, 0).weights.closest, candidates), [2, 3]);
});

test('Weigher: closest changes at once for 15 % and 1 ms, for 1 ms alone only after it lasts', () => {
  const weigher = new Weigher();
  const pick = (rtts: readonly number[], now: number): number[] => {
    const candidates = rtts.map((rtt, i) => at(i + 1, rtt));
    return members(weigher.weigh(candidates, now).weights.closest, candidates);
  };
  assert.equal(pick([100, 120], 0), [1]);
  assert.equal(pick([100, 90], 1000), [1]);
  assert.equal(pick([100, 120], 2000), [1]);
  assert.equal(pick([100, 90], 3000), [1]);
  assert.equal(pick([100, 90], 3000 + SETTLE_MS), [2]);
  assert.equal(pick([100, 79], 9000), [2]);
  assert.equal(pick([50, 79], 9001), [1]);
  assert.equal(pick([2.4, 1.2], 9002), [2], '100 % and 1.2 ms: clear');
  assert.equal(pick([1.9, 1.2], 9003), [1, 2], '58 % but 0.7 ms: a tie');
});

test('Weigher: two RTTs that both swing by 8 % around the same value cause fewer than one switch in 50 s', () => {
  const weigher = new Weigher();
  const rng = new Rng(3);
  weigher.weigh([at(1, 50), at(2, 60)], 0);
  for (let s = 1; s < 3600; s++)
    weigher.weigh([at(1, rng.jitter(52, 0.08)), at(2, rng.jitter(52, 0.08))], s * 1000);
  assert.ok(weigher.switches <= 3600 / 50, `${weigher.switches} switches`);
});

test('Weigher: a measured RTT beats an estimate that is only a little lower, not one that is far lower', () => {
  const near = [at(1, 40), at(2, 35, { confirmed: false })];
  assert.equal(members(new Weigher().weigh(near, 0).weights.closest, near), [1]);
  const far = [at(1, 40), at(2, 10, { confirmed: false })];
  assert.equal(members(new Weigher().weigh(far, 0).weights.closest, far), [2]);
});

test('Weigher: without any RTT closest and fastest spread over all', () => {
  const candidates = [at(1), at(2), at(3)];
  const { weights } = new Weigher().weigh(candidates, 0);
  assert.equal(weights.closest, [1, 1, 1]);
  assert.equal(shares(weights.fastest), [1 / 3, 1 / 3, 1 / 3]);
});

test('slowdown is that of processor sharing, continuous and rising through overload', () => {
  assert.is(slowdown(0), 1);
  assert.is(slowdown(0.5), 2);
  assert.ok(Math.abs(slowdown(0.9) - 10) < 1e-9);
  assert.ok(Math.abs(slowdown(0.9000001) - 10) < 1e-3);
  for (let load = 0; load < 5; load += 0.01) assert.ok(slowdown(load + 0.01) > slowdown(load));
});

test('Weigher: fastest weighs RTT with load: near and idle wins, near and overloaded loses to farther', () => {
  const idle = [at(1, 2, { load: 0.1 }), at(2, 40, { load: 0.1 })];
  assert.equal(members(new Weigher().weigh(idle, 0).weights.fastest, idle), [1]);
  const busy = [at(1, 2, { load: 2 }), at(2, 40, { load: 0.1 })];
  assert.equal(members(new Weigher().weigh(busy, 0).weights.fastest, busy), [2]);
  assert.ok(costMs(at(1, 2, { load: 0.1 })) < costMs(at(1, 2, { load: 0.5 })));
});

test('Weigher: fastest takes 80 % of the flows from an overloaded instance within 3 s of knowing it', () => {
  const weigher = new Weigher();
  const loads = (first: number): Candidate[] => [
    at(1, 10, { load: first }),
    at(2, 12, { load: 0.2 }),
    at(3, 15, { load: 0.2 }),
  ];
  for (let t = 0; t < 20; t++) weigher.weigh(loads(0.2), t * 1000);
  let share = 1;
  for (let t = 20; t <= 23; t++) share = shares(weigher.weigh(loads(1.5), t * 1000).weights.fastest)[0]!;
  assert.ok(share < 0.2, String(share));
});

test('Weigher: fastest gives an instance that is new and cheaper its share at once, and takes all from one that goes', () => {
  const weigher = new Weigher();
  weigher.weigh([at(1, 10, { load: 0.6 })], 0);
  const both = [at(1, 10, { load: 0.6 }), at(2, 10, { load: 0.1 })];
  assert.ok(shares(weigher.weigh(both, 100).weights.fastest)[1]! > 0.3);
  assert.equal(shares(weigher.weigh(both.slice(1), 200).weights.fastest), [1]);
});

test('Weigher: fastest spreads equal instances evenly, and stays put when nothing changes', () => {
  const weigher = new Weigher();
  const equal = [1, 2, 3, 4].map((n) => at(n, 20, { load: 0.3 }));
  for (let t = 0; t < 60; t++)
    for (const share of shares(weigher.weigh(equal, t * 1000).weights.fastest))
      assert.ok(Math.abs(share - 0.25) < 1e-6);
});

test('Weigher: fastest spreads over hundreds of equal instances, and leaves one of them that is overloaded', () => {
  for (const n of [99, 100, 101, 400]) {
    const weigher = new Weigher();
    const pool = (first: number): Candidate[] =>
      Array.from({ length: n }, (_, i) => at(i + 1, 5, { load: i === 0 ? first : 0.3 }));
    const before = weigher.weigh(pool(0.3), 0);
    for (const share of shares(before.weights.fastest)) assert.ok(Math.abs(share - 1 / n) < 1e-6);
    weigher.weigh(pool(2), 2_000);
    const after = weigher.weigh(pool(2), 4_000);
    assert.ok(shares(after.weights.fastest)[0]! < 0.2 / n);
    assert.not(alike(before, after, 0.02));
  }
});

test('Weigher: fastest never gives a weight that is not a number, whatever loads and RTTs say (20,000 random pools)', () => {
  const rng = new Rng(5);
  const weigher = new Weigher();
  for (let k = 0; k < 20_000; k++) {
    const pool = Array.from({ length: k % 100 === 0 ? rng.below(500) : rng.below(6) }, (_, i) =>
      at(i + 1, rng.unit() < 0.2 ? undefined : rng.unit() * 10 ** rng.below(5), {
        local: rng.unit() < 0.1,
        confirmed: rng.unit() < 0.5,
        health: (['up', 'suspect', 'down'] as const)[rng.below(3)]!,
        ...(rng.unit() < 0.3 ? {} : { load: rng.unit() * 10 ** (rng.below(8) - 1) }),
      }),
    );
    const { weights } = weigher.weigh(pool, k * 700);
    const may = pool.some((c) => c.health !== 'down');
    for (const list of Object.values(weights)) {
      assert.ok(list.every((w) => w >= 0 && w <= 1));
      assert.is(
        list.some((w) => w > 0),
        may,
        JSON.stringify(pool),
      );
    }
    for (const list of Object.values(weights))
      for (const [i, w] of list.entries()) if (pool[i]!.health === 'down') assert.is(w, 0);
  }
});

test.run();
