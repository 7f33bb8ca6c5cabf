// `closest` judged on a topology: ten services of five instances at random nodes, every node follows three of them
// and makes a flow to each every 500 ms, for 20 s from 3 s after it began to follow. The truth says what was right.
import type { ServiceId } from '../../src/name.ts';
import { Rng } from '../../src/rng.ts';
import { circle, grid, line, random, sites, split, type Truth } from './truth.ts';
import { World } from './world.ts';

export interface ClosestResult {
  readonly flows: number;
  /** Flows to the instance with the lowest RTT, or within 1 ms of it (ties are spread). */
  readonly right: number;
  /** Flows to exactly the lowest RTT. */
  readonly nearest: number;
  /** Flows to one both more than 20 % and more than 1 ms worse. */
  readonly bad: number;
}

/** Fifty nodes each; the last of the grid begins an eighth row. */
export const TOPOLOGIES: readonly (readonly [string, (seed: number) => Truth])[] = [
  ['sites', (seed) => sites(50, 8, 80, seed)],
  ['random', (seed) => random(50, 60, 20, seed)],
  ['line', () => line(50, 3)],
  ['grid', () => grid(50, 7)],
  ['circle', () => circle(50, 60)],
  ['split', () => split(50, 0.8, 30)],
];

const SERVICES = 10;
const INSTANCES = 5;

/** Who went where, against the truth. */
export function judge(rttMs: number, bestMs: number): { right: boolean; nearest: boolean; bad: boolean } {
  return {
    right: rttMs <= bestMs + 1,
    nearest: rttMs <= bestMs,
    bad: rttMs > bestMs * 1.2 && rttMs > bestMs + 1,
  };
}

export function closestOn(truth: Truth, seed: number): ClosestResult {
  const world = new World({ truth, seed });
  const nodes = truth.length;
  const rng = new Rng(seed, 77);
  const places = new Map<ServiceId, number[]>();
  const follows = (node: number, s: number): boolean => [0, 3, 7].some((k) => (node + k) % SERVICES === s);
  world.run(5_000);
  for (let s = 0; s < SERVICES; s++) {
    const service = `shop.prod.s${s}.v1` as ServiceId;
    const placement: number[] = [];
    while (placement.length < INSTANCES) {
      const node = rng.below(nodes);
      if (!placement.includes(node)) placement.push(node);
    }
    places.set(service, placement);
    world.service(
      service,
      placement,
      truth.map((_, i) => i).filter((i) => follows(i, s)),
    );
  }
  world.run(8_000);
  const seen = { flows: 0, right: 0, nearest: 0, bad: 0 };
  world.every(500, 28_000, () => {
    for (let from = 0; from < nodes; from++)
      for (const [service, placement] of places) {
        const to = world.flow(from, service, 'closest');
        if (to === undefined) continue;
        const best = Math.min(...placement.map((p) => truth[from]![p]!));
        const verdict = judge(truth[from]![to]!, best);
        seen.flows++;
        if (verdict.right) seen.right++;
        if (verdict.nearest) seen.nearest++;
        if (verdict.bad) seen.bad++;
      }
  });
  world.run(28_000);
  return seen;
}
