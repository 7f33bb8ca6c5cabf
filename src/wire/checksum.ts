// The Internet checksum (RFC 1071) and its update by difference (RFC 1624). Sums are 16 bits, folded, in network
// order and not complemented, so they add up in any order; `finish` complements.
import type { Bytes } from './bytes.ts';

/** Folds to 16 bits; the input is below 2^32. */
export function fold(sum: number): number {
  let folded = (sum & 0xffff) + (sum >>> 16);
  folded = (folded & 0xffff) + (folded >>> 16);
  return folded;
}

/**
 * Sum of `length` bytes at any offset and of any parity; at most 65,535 bytes, so that 16,384 words of 32 bits stay
 * below 2^31 in each half. Words are taken in native order, two halves apart, and turned round at the end
 * (RFC 1071 §2 (B)); at an odd offset the aligned words are already the other way round.
 */
export function sum(bytes: Bytes, offset: number, length: number): number {
  const { vectorSum } = bytes;
  if (vectorSum !== undefined && length >= VECTOR_MIN) return vectorSum(offset, length);
  return plainSum(bytes, offset, length);
}

/** Below this the call costs more than the vectors save. */
const VECTOR_MIN = 64;

/** The same without vectors. */
export function plainSum(bytes: Bytes, offset: number, length: number): number {
  const { u8, u16, i32 } = bytes;
  const end = offset + length;
  let at = offset;
  let low = 0;
  let high = 0;
  if ((at & 1) !== 0 && at < end) low += u8[at++]! << 8;
  if ((at & 2) !== 0 && at + 2 <= end) {
    low += u16[at >> 1]!;
    at += 2;
  }
  let word = at >> 2;
  // Below a whole word `at` may still be 2 mod 4; then no word is taken.
  const words = (at & 3) === 0 ? end >> 2 : word;
  for (const unrolled = words - 7; word < unrolled; word += 8) {
    const a = i32[word]!;
    const b = i32[word + 1]!;
    const c = i32[word + 2]!;
    const d = i32[word + 3]!;
    const e = i32[word + 4]!;
    const f = i32[word + 5]!;
    const g = i32[word + 6]!;
    const h = i32[word + 7]!;
    low += (a & 0xffff) + (b & 0xffff) + (c & 0xffff) + (d & 0xffff);
    low += (e & 0xffff) + (f & 0xffff) + (g & 0xffff) + (h & 0xffff);
    high += (a >>> 16) + (b >>> 16) + (c >>> 16) + (d >>> 16);
    high += (e >>> 16) + (f >>> 16) + (g >>> 16) + (h >>> 16);
  }
  for (; word < words; word++) {
    const a = i32[word]!;
    low += a & 0xffff;
    high += a >>> 16;
  }
  if (at < words << 2) at = words << 2;
  if (at + 2 <= end) {
    low += u16[at >> 1]!;
    at += 2;
  }
  if (at < end) low += u8[at]!;
  const folded = fold(fold(low) + fold(high));
  return (offset & 1) !== 0 ? folded : ((folded & 0xff) << 8) | (folded >> 8);
}

/** The checksum field that belongs to a sum. */
export function finish(sum: number): number {
  return ~fold(sum) & 0xffff;
}

/** Sum of a 32-bit value, such as an address. */
export function sum32(value: number): number {
  return (value & 0xffff) + (value >>> 16);
}

/** What to add to a checksum's sum when `was` becomes `is`, both sums of the same words (RFC 1624: ~m + m'). */
export function difference(was: number, is: number): number {
  return fold((~fold(was) & 0xffff) + fold(is));
}

/** The checksum field after a difference (RFC 1624 eqn. 3). */
export function adjust(checksum: number, delta: number): number {
  return ~fold((~checksum & 0xffff) + delta) & 0xffff;
}

/** Sum of the TCP or UDP pseudo-header (RFC 9293 §3.1, RFC 768). */
export function pseudoSum(source: number, target: number, protocol: number, length: number): number {
  return fold(sum32(source) + sum32(target) + protocol + length);
}
