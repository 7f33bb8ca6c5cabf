// The only randomness that logic may use: PCG32 (O'Neill 2014, "PCG: A Family of Simple Fast Space-Efficient
// Statistically Good Algorithms for Random Number Generation", XSH-RR 64/32), seeded by the caller. It refuses to
// seed itself, and it is not for secrets: nonces that guard against forgery come from the runtime's crypto.

// The 64-bit state is two unsigned halves; the multiplier 6364136223846793005 is 0x5851f42d4c957f2d.
const MULTIPLIER_HIGH = 0x5851f42d;
const MULTIPLIER_LOW = 0x4c957f2d;

/** High 32 bits of the product of two unsigned 32-bit integers. */
function multiplyHigh(a: number, b: number): number {
  const aHigh = a >>> 16;
  const aLow = a & 0xffff;
  const bHigh = b >>> 16;
  const bLow = b & 0xffff;
  const low = aLow * bLow;
  const middle = aHigh * bLow + (low >>> 16);
  const other = aLow * bHigh + (middle % 0x10000);
  return (aHigh * bHigh + Math.floor(middle / 0x10000) + Math.floor(other / 0x10000)) >>> 0;
}

export class Rng {
  #high = 0;
  #low = 0;
  readonly #incrementHigh: number;
  readonly #incrementLow: number;

  /** Equal seed and stream give an equal sequence on every runtime. Both are taken as unsigned 32-bit integers. */
  constructor(seed: number, stream = 54) {
    this.#incrementHigh = (stream >>> 31) >>> 0;
    this.#incrementLow = ((stream << 1) | 1) >>> 0;
    this.u32();
    const low = this.#low + (seed >>> 0);
    this.#high = (this.#high + (low > 0xffffffff ? 1 : 0)) >>> 0;
    this.#low = low >>> 0;
    this.u32();
  }

  /** Uniform in 0 … 2^32-1. */
  u32(): number {
    const high = this.#high;
    const low = this.#low;
    const productLow = Math.imul(low, MULTIPLIER_LOW) >>> 0;
    const productHigh =
      multiplyHigh(low, MULTIPLIER_LOW) + Math.imul(high, MULTIPLIER_LOW) + Math.imul(low, MULTIPLIER_HIGH);
    const sumLow = productLow + this.#incrementLow;
    this.#low = sumLow >>> 0;
    this.#high = (productHigh + this.#incrementHigh + (sumLow > 0xffffffff ? 1 : 0)) >>> 0;
    // Output: ((state >> 18) ^ state) >> 27, rotated right by state >> 59.
    const mixedHigh = (high ^ (high >>> 18)) >>> 0;
    const mixedLow = (low ^ ((low >>> 18) | (high << 14))) >>> 0;
    const word = ((mixedLow >>> 27) | (mixedHigh << 5)) >>> 0;
    const turn = high >>> 27;
    return ((word >>> turn) | (word << (-turn & 31))) >>> 0;
  }

  /** Uniform in 0 … n-1, without modulo bias; n is 1 … 2^32. */
  below(n: number): number {
    const limit = 0x100000000 - (0x100000000 % n);
    for (;;) {
      const value = this.u32();
      if (value < limit) return value % n;
    }
  }

  /** Uniform in [0, 1), 32 bits of it. */
  unit(): number {
    return this.u32() / 0x100000000;
  }

  /** Uniform in [value × (1-spread), value × (1+spread)): what every periodic thing is jittered by. */
  jitter(value: number, spread: number): number {
    return value * (1 + spread * (2 * this.unit() - 1));
  }

  /** Normally distributed, mean 0 and deviation 1 (Box and Muller 1958). */
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.unit())) * Math.cos(2 * Math.PI * this.unit());
  }
}
