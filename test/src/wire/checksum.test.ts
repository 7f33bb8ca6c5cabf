import * as fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Rng } from '../../../src/rng.ts';
import { type Bytes, newBytes } from '../../../src/wire/bytes.ts';
import { adjust, difference, finish, fold, plainSum, pseudoSum, sum } from '../../../src/wire/checksum.ts';
import { vectorBytes } from '../../../src/wire/checksum_simd.ts';

/** RFC 1071 §1 as it is written: 16-bit words, big-endian, an odd octet padded with zero. */
function naiveSum(data: Uint8Array): number {
  let total = 0;
  for (let i = 0; i < data.length; i += 2) {
    total += (data[i]! << 8) | (data[i + 1] ?? 0);
    total = (total & 0xffff) + (total >> 16);
  }
  return total;
}

function fill(bytes: Bytes, seed: number): void {
  const rng = new Rng(seed);
  for (let i = 0; i < bytes.u8.length; i++) bytes.u8[i] = rng.u32();
}

const vectors = vectorBytes(131_072);

test('both runtimes have vectors, so the fast path is the one that is tested', () => {
  assert.ok(vectors !== undefined);
});

for (const [name, bytes] of [
  ['plainSum', newBytes(131_072)],
  ['vectorSum', vectors!],
] as const) {
  const of = (offset: number, length: number): number =>
    name === 'plainSum' ? plainSum(bytes, offset, length) : bytes.vectorSum!(offset, length);

  test(`${name} equals the naive twin for every length to 300 at every alignment to 9`, () => {
    fill(bytes, 1);
    for (let length = 0; length <= 300; length++)
      for (let offset = 0; offset <= 9; offset++)
        assert.is(
          of(offset, length),
          naiveSum(bytes.u8.subarray(offset, offset + length)),
          `${length} at ${offset}`,
        );
  });

  test(`${name} equals the naive twin for long stretches, and for the largest sums there are`, () => {
    fill(bytes, 2);
    const rng = new Rng(3);
    for (let i = 0; i < 500; i++) {
      const offset = rng.below(65_536);
      const length = rng.below(65_536);
      assert.is(of(offset, length), naiveSum(bytes.u8.subarray(offset, offset + length)));
    }
    bytes.u8.fill(0xff);
    for (const offset of [0, 1, 2, 3])
      assert.is(of(offset, 65_535), naiveSum(bytes.u8.subarray(offset, offset + 65_535)));
    bytes.u8.fill(0);
    assert.is(of(0, 65_535), 0);
  });
}

test('sum takes the same value by either way at the length where it changes ways', () => {
  fill(vectors!, 4);
  for (let length = 50; length < 80; length++)
    assert.is(sum(vectors!, 7, length), plainSum(vectors!, 7, length), `${length}`);
});

test('adjust and difference give what a sum from scratch gives (RFC 1624)', () => {
  fc.assert(
    fc.property(
      fc.uint8Array({ minLength: 20, maxLength: 40 }),
      fc.integer({ min: 0, max: 8 }),
      fc.integer({ min: 0, max: 0xffff }),
      (data, word, value) => {
        const bytes = newBytes(48);
        bytes.u8.set(data);
        const before = finish(plainSum(bytes, 0, 40));
        const was = bytes.view.getUint16(word * 2);
        bytes.view.setUint16(word * 2, value);
        const after = finish(plainSum(bytes, 0, 40));
        const adjusted = adjust(before, difference(was, value));
        // 0x0000 and 0xffff are the same sum.
        assert.is(adjusted % 0xffff, after % 0xffff);
      },
    ),
    { seed: 7, numRuns: 2_000 },
  );
});

test('fold leaves 16 bits, and pseudoSum is the sum of its parts', () => {
  assert.is(fold(0xffffffff), 0xffff);
  assert.is(fold(0x1fffe), 0xffff);
  assert.is(pseudoSum(0xac100042, 0xac1e0004, 6, 20), fold(0xac10 + 0x42 + 0xac1e + 4 + 6 + 20));
});

test.run();
