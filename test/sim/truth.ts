// Synthetic truths: matrices of RTTs (ms) between n nodes, the five of Serf's phantom.go. No node ever measures
// anything else in a simulation, so estimates and choices can be judged against them.
import { Rng } from '../../src/rng.ts';

/** truth[i][j] = RTT between i and j in ms; symmetric, zero on the diagonal. */
export type Truth = readonly (readonly number[])[];

function matrix(nodes: number, rtt: (i: number, j: number) => number): Truth {
  const truth = Array.from({ length: nodes }, () => new Array<number>(nodes).fill(0));
  for (let i = 0; i < nodes; i++)
    for (let j = i + 1; j < nodes; j++) {
      const value = rtt(i, j);
      truth[i]![j] = value;
      truth[j]![i] = value;
    }
  return truth;
}

export function line(nodes: number, spacingMs: number): Truth {
  return matrix(nodes, (i, j) => (j - i) * spacingMs);
}

export function grid(nodes: number, spacingMs: number): Truth {
  const side = Math.floor(Math.sqrt(nodes));
  return matrix(nodes, (i, j) => {
    const dx = (j % side) - (i % side);
    const dy = Math.floor(j / side) - Math.floor(i / side);
    return Math.hypot(dx, dy) * spacingMs;
  });
}

/** Two sites: `lanMs` inside one, `wanMs` more between them. */
export function split(nodes: number, lanMs: number, wanMs: number): Truth {
  const half = Math.floor(nodes / 2);
  return matrix(nodes, (i, j) => (i <= half === j <= half ? lanMs : lanMs + wanMs));
}

/** Node 0 is far above the plane of the others: what height is for. */
export function circle(nodes: number, radiusMs: number): Truth {
  return matrix(nodes, (i, j) => {
    if (i === 0) return 2 * radiusMs;
    const a = (2 * Math.PI * i) / nodes;
    const b = (2 * Math.PI * j) / nodes;
    return radiusMs * Math.hypot(Math.cos(b) - Math.cos(a), Math.sin(b) - Math.sin(a));
  });
}

/** No geometry at all: every pair for itself. */
export function random(nodes: number, meanMs: number, deviationMs: number, seed: number): Truth {
  const rng = new Rng(seed);
  return matrix(nodes, () => Math.max(0.1, meanMs + rng.normal() * deviationMs));
}

/** Sites on a plane of the given width with access links of their own and a little triangle violation: the
 *  nearest to the internet that a formula gets. Two nodes of one site are 0.2…2 ms apart. */
export function sites(nodes: number, count: number, widthMs: number, seed: number): Truth {
  const rng = new Rng(seed);
  const place = Array.from({ length: count }, () => [rng.unit() * widthMs, rng.unit() * widthMs] as const);
  const access = Array.from({ length: nodes }, () => 0.1 + rng.unit() * 0.9);
  const lastMile = Array.from({ length: nodes }, () => (rng.unit() < 0.3 ? 3 + rng.unit() * 12 : 0));
  return matrix(nodes, (i, j) => {
    const a = place[i % count]!;
    const b = place[j % count]!;
    const plane = Math.hypot(a[0] - b[0], a[1] - b[1]);
    return access[i]! + access[j]! + lastMile[i]! + lastMile[j]! + plane * (1 + 0.2 * rng.unit());
  });
}
