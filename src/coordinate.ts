// Network coordinates: an estimate of the RTT between two nodes that never met, from coordinates that each keeps by
// itself. Vivaldi (Dabek et al., SIGCOMM 2004) with the additions and the constants of Serf: height, adjustment
// window and gravity (Ledlie et al., NSDI 2007), median latency filter. Pure: measured RTTs come in, a coordinate
// comes out. Good for ranking nodes; below about 1 ms it is noise, so the best are confirmed by probes (probe.ts).
// All quantities are milliseconds.
import { assert } from './assert.ts';
import { fail, ok, type Result } from './error.ts';
import type { Rng } from './rng.ts';

export const DIMENSIONS = 8;
/** A coordinate that knows nothing; the error is relative to the RTT and never exceeds this. */
export const ERROR_MAX = 1.5;
/** c_e and c_c of the paper: shares of a new sample in error and position. */
const ERROR_GAIN = 0.25;
const POSITION_GAIN = 0.25;
/** Samples over which the mean residual is taken; half of it is this node's share. */
const ADJUSTMENT_WINDOW = 20;
/** 10 µs: a height of zero could never grow again, it is scaled. */
const HEIGHT_MIN_MS = 0.01;
/** RTTs per peer of which the median counts. */
const FILTER_SIZE = 3;
/** Serf pulls towards the origin by (d/150)² seconds, d in seconds; in milliseconds that is d² / (150² × 1000). */
const GRAVITY_MS = 150 * 150 * 1000;
/** Two points closer than 1 µs have no direction: a random one is taken. */
const ZERO_MS = 0.001;
/** One sample moves nobody further, and counts for no greater residual: a peer that lies about where it is bends us
 *  little. */
const STEP_MAX_MS = 100;
export const RTT_MAX_MS = 10_000;
/** Peers whose recent RTTs are remembered; the oldest gives way. 1,024 × 3 numbers are under 100 KiB. */
const FILTERED_PEERS_MAX = 1024;

/** An immutable value; `vec` has DIMENSIONS entries. */
export interface Coordinate {
  readonly vec: readonly number[];
  /** Distance to the core of the network, above the Euclidean plane: the node's access link. */
  readonly height: number;
  /** Mean residual of late, half of which each side of a pair accounts for. */
  readonly adjustment: number;
  /** Confidence, relative: 0 = sure, ERROR_MAX = knows nothing. */
  readonly error: number;
}

export const ORIGIN: Coordinate = {
  vec: new Array<number>(DIMENSIONS).fill(0),
  height: HEIGHT_MIN_MS,
  adjustment: 0,
  error: ERROR_MAX,
};

/** A coordinate that came from elsewhere: right size, finite, in range. */
export function checkCoordinate(c: Coordinate): Result<Coordinate> {
  if (c.vec.length !== DIMENSIONS)
    return fail('invalid_record', `coordinate: vec has ${c.vec.length} entries, ${DIMENSIONS} are needed`);
  const far = (x: number): boolean => !(Math.abs(x) <= 10 * RTT_MAX_MS);
  if (c.vec.some(far) || far(c.adjustment) || far(c.height) || c.height < 0)
    return fail('invalid_record', `coordinate: entries must be finite and within ${10 * RTT_MAX_MS} ms`);
  if (!(c.error >= 0 && c.error <= ERROR_MAX))
    return fail('invalid_record', `coordinate: error ${c.error} must be 0…${ERROR_MAX}`);
  return ok(c);
}

function span(a: readonly number[], b: readonly number[]): number {
  let sum = 0;
  for (let i = 0; i < DIMENSIONS; i++) sum += (a[i]! - b[i]!) ** 2;
  return Math.sqrt(sum);
}

function cut(ms: number): number {
  return Math.max(-STEP_MAX_MS, Math.min(STEP_MAX_MS, ms));
}

function rawDistance(a: Coordinate, b: Coordinate): number {
  return span(a.vec, b.vec) + a.height + b.height;
}

/** Estimated RTT, ms: distance and heights, and the adjustments as long as the sum stays positive. */
export function distanceMs(a: Coordinate, b: Coordinate): number {
  const raw = rawDistance(a, b);
  const adjusted = raw + a.adjustment + b.adjustment;
  return adjusted > 0 ? adjusted : raw;
}

/** How far a coordinate has moved, ms: in the plane and in height; adjustments come and go. */
export function movedMs(from: Coordinate, to: Coordinate): number {
  return span(from.vec, to.vec) + Math.abs(to.height - from.height);
}

/** This node's own coordinate, moved by every measured RTT. */
export class OwnCoordinate {
  #position: Coordinate;
  readonly #rng: Rng;
  readonly #residuals = new Array<number>(ADJUSTMENT_WINDOW).fill(0);
  #residualNext = 0;
  readonly #filters = new Map<string, number[]>();
  /** Times that the position was no number any more and began again. */
  resets = 0;

  /** `saved`: the position of the last run; it goes on from there. */
  constructor(rng: Rng, saved: Coordinate = ORIGIN) {
    assert(checkCoordinate(saved).ok, 'a saved coordinate was checked when it was read');
    this.#rng = rng;
    this.#position = saved;
    // The window begins as if every past sample had left what the position holds.
    this.#residuals.fill(saved.adjustment * 2);
  }

  get position(): Coordinate {
    return this.#position;
  }

  /** Takes one RTT to a peer whose coordinate is `other`; false when the sample is out of range and was ignored. */
  update(peer: string, other: Coordinate, rttMs: number): boolean {
    if (!(rttMs >= 0 && rttMs <= RTT_MAX_MS)) return false;
    const rtt = Math.max(this.#filter(peer, rttMs), ZERO_MS);
    this.#spring(other, rtt);
    this.#adjust(other, rtt);
    this.#gravitate();
    if (!checkCoordinate(this.#position).ok) {
      this.#position = ORIGIN;
      this.resets++;
    }
    return true;
  }

  forget(peer: string): void {
    this.#filters.delete(peer);
  }

  /** Median of the peer's last RTTs: one late packet moves nobody. */
  #filter(peer: string, rttMs: number): number {
    const samples = this.#filters.get(peer) ?? [];
    this.#filters.delete(peer);
    samples.push(rttMs);
    if (samples.length > FILTER_SIZE) samples.shift();
    if (this.#filters.size >= FILTERED_PEERS_MAX) {
      const oldest = this.#filters.keys().next();
      if (!oldest.done) this.#filters.delete(oldest.value);
    }
    this.#filters.set(peer, samples);
    return [...samples].sort((a, b) => a - b)[samples.length >> 1]!;
  }

  /** A spring between the two, as long as the RTT says; the less sure side moves more. */
  #spring(other: Coordinate, rtt: number): void {
    const own = this.#position;
    const distance = distanceMs(own, other);
    const wrongness = Math.abs(distance - rtt) / rtt;
    const weight = own.error / Math.max(own.error + other.error, 1e-6);
    const share = ERROR_GAIN * weight;
    const error = Math.min(share * wrongness + own.error * (1 - share), ERROR_MAX);
    this.#position = { ...own, error };
    this.#push(other, cut(POSITION_GAIN * weight * (rtt - distance)));
  }

  #adjust(other: Coordinate, rtt: number): void {
    this.#residuals[this.#residualNext] = cut(rtt - rawDistance(this.#position, other));
    this.#residualNext = (this.#residualNext + 1) % ADJUSTMENT_WINDOW;
    const sum = this.#residuals.reduce((a, b) => a + b, 0);
    this.#position = { ...this.#position, adjustment: sum / (2 * ADJUSTMENT_WINDOW) };
  }

  /** Keeps the whole cloud from drifting away, too weakly to bend it. */
  #gravitate(): void {
    const distance = distanceMs(ORIGIN, this.#position);
    this.#push(ORIGIN, -(distance * distance) / GRAVITY_MS);
  }

  /** Moves `force` ms away from `other` (towards it when negative), height in proportion. */
  #push(other: Coordinate, force: number): void {
    const own = this.#position;
    const distance = span(own.vec, other.vec);
    const apart = distance > ZERO_MS;
    const direction = apart ? own.vec.map((x, i) => (x - other.vec[i]!) / distance) : this.#anyDirection();
    const height = apart
      ? Math.max(own.height + cut(((own.height + other.height) * force) / distance), HEIGHT_MIN_MS)
      : own.height;
    this.#position = { ...own, vec: own.vec.map((x, i) => x + direction[i]! * force), height };
  }

  #anyDirection(): number[] {
    for (;;) {
      const vec = Array.from({ length: DIMENSIONS }, () => this.#rng.unit() - 0.5);
      const length = span(vec, ORIGIN.vec);
      if (length > 0.01) return vec.map((x) => x / length);
    }
  }
}
