// One buffer seen at several widths. Views are made once; the packet path indexes them.
import { assert } from '../assert.ts';

export interface Bytes {
  readonly u8: Uint8Array<ArrayBuffer>;
  /** Network order by default, as DataView has it. */
  readonly view: DataView<ArrayBuffer>;
  /** Native order; for sums only, which do not care (RFC 1071 §2 (B)). */
  readonly u16: Uint16Array<ArrayBuffer>;
  readonly i32: Int32Array<ArrayBuffer>;
  /** The sum of a stretch by vectors, where the memory has one (checksum_simd.ts). */
  readonly vectorSum: ((offset: number, length: number) => number) | undefined;
}

/** Views over memory that begins 4-aligned and whose length is a multiple of four. */
export function bytesOf(u8: Uint8Array<ArrayBuffer>): Bytes {
  assert(u8.byteOffset % 4 === 0 && u8.byteLength % 4 === 0, 'packet memory is 4-aligned');
  return {
    u8,
    view: new DataView(u8.buffer, u8.byteOffset, u8.byteLength),
    u16: new Uint16Array(u8.buffer, u8.byteOffset, u8.byteLength / 2),
    i32: new Int32Array(u8.buffer, u8.byteOffset, u8.byteLength / 4),
    vectorSum: undefined,
  };
}

/** New memory of that many bytes, rounded up to four. */
export function newBytes(length: number): Bytes {
  return bytesOf(new Uint8Array(new ArrayBuffer((length + 3) & ~3)));
}
