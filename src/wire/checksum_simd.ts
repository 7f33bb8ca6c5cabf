// The sum of checksum.ts with 128-bit vectors: a WebAssembly function of 100 instructions, assembled here from its
// listing, over a memory of its own. 65,000 bytes take about 2 µs instead of 10. Where the runtime has no vectors
// there is no such memory, and everything works without.
//
// Every 16 octets are eight 16-bit words; extadd_pairwise adds neighbours into four 32-bit lanes. A lane takes at most
// 4,096 × 2 × 65,535 < 2^30 from 65,535 octets, and all lanes together at most 32,768 × 65,535 < 2^31.
import { type Bytes, bytesOf } from './bytes.ts';

/** Adds `length` octets at `offset` of its memory: a sum as in checksum.ts, folded, network order. */
export type VectorSum = (offset: number, length: number) => number;

/** The part of the WebAssembly namespace that is used here. */
interface Wasm {
  validate(module: Uint8Array): boolean;
  Module: new (module: Uint8Array) => object;
  Instance: new (
    module: object,
    imports: Record<string, Record<string, object>>,
  ) => { readonly exports: Record<string, unknown> };
  Memory: new (limits: { initial: number; maximum: number }) => { readonly buffer: ArrayBuffer };
}

const PAGE = 65_536;

// Operations, by their names in the WebAssembly specification §5.4. Constants stay below 64: one octet of LEB128 each,
// but for 0xffff.
const OP = {
  block: [0x02, 0x40],
  loop: [0x03, 0x40],
  end: [0x0b],
  and: [0x71],
  or: [0x72],
  add: [0x6a],
  sub: [0x6b],
  shl: [0x74],
  shrU: [0x76],
  ltU: [0x49],
  eqz: [0x45],
  load8: [0x2d, 0x00, 0x00],
  load16: [0x2f, 0x00, 0x00],
  words: [0xfd, 0x7f], // i32x4.extadd_pairwise_i16x8_u
  addLanes: [0xfd, 0xae, 0x01], // i32x4.add
  ffff: [0x41, 0xff, 0xff, 0x03],
} as const;
const get = (local: number): number[] => [0x20, local];
const set = (local: number): number[] => [0x21, local];
const constant = (value: number): number[] => [0x41, value];
const leave = (depth: number): number[] => [0x0d, depth]; // br_if
const again = (depth: number): number[] => [0x0c, depth]; // br
const vector = (offset: number): number[] => [0xfd, 0x00, 0x00, offset]; // v128.load
const lane = (index: number): number[] => [0xfd, 0x1b, index]; // i32x4.extract_lane

const AT = 0;
const LEFT = 1;
const TOTAL = 2;
const A = 3;
const B = 4;

/** Takes one vector at AT + offset into an accumulator. */
const take = (accumulator: number, offset: number): number[] => [
  ...get(accumulator),
  ...get(AT),
  ...vector(offset),
  ...OP.words,
  ...OP.addLanes,
  ...set(accumulator),
];
/** AT += step; LEFT -= step. */
const step = (octets: number): number[] => [
  ...get(AT),
  ...constant(octets),
  ...OP.add,
  ...set(AT),
  ...get(LEFT),
  ...constant(octets),
  ...OP.sub,
  ...set(LEFT),
];
/** Repeats while at least that many octets are left. */
const whileLeft = (octets: number, ...body: number[]): number[] => [
  ...OP.block,
  ...OP.loop,
  ...get(LEFT),
  ...constant(octets),
  ...OP.ltU,
  ...leave(1),
  ...body,
  ...step(octets),
  ...again(0),
  ...OP.end,
  ...OP.end,
];
const addToTotal = (...value: number[]): number[] => [...get(TOTAL), ...value, ...OP.add, ...set(TOTAL)];
const foldTotal = [
  ...get(TOTAL),
  ...OP.ffff,
  ...OP.and,
  ...get(TOTAL),
  ...constant(16),
  ...OP.shrU,
  ...OP.add,
  ...set(TOTAL),
];

const body = [
  ...[0x02, 0x01, 0x7f, 0x02, 0x7b], // locals: one i32 (TOTAL), two v128 (A, B)
  ...whileLeft(48, ...take(A, 0), ...take(B, 16), ...take(A, 32)),
  ...whileLeft(16, ...take(A, 0)),
  ...get(A),
  ...get(B),
  ...OP.addLanes,
  ...set(A),
  ...addToTotal(...get(A), ...lane(0)),
  ...addToTotal(...get(A), ...lane(1)),
  ...addToTotal(...get(A), ...lane(2)),
  ...addToTotal(...get(A), ...lane(3)),
  ...whileLeft(2, ...addToTotal(...get(AT), ...OP.load16)),
  ...OP.block,
  ...get(LEFT),
  ...OP.eqz,
  ...leave(0),
  ...addToTotal(...get(AT), ...OP.load8),
  ...OP.end,
  ...foldTotal,
  ...foldTotal,
  // Words were little-endian: turn the two octets round.
  ...get(TOTAL),
  ...constant(8),
  ...OP.shl,
  ...OP.ffff,
  ...OP.and,
  ...get(TOTAL),
  ...constant(8),
  ...OP.shrU,
  ...OP.or,
  ...OP.end,
];

function leb(value: number): number[] {
  return value < 128 ? [value] : [(value & 127) | 128, ...leb(value >> 7)];
}
const section = (id: number, content: readonly number[]): number[] => [
  id,
  ...leb(content.length),
  ...content,
];

const MODULE = new Uint8Array([
  ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00],
  ...section(1, [1, 0x60, 2, 0x7f, 0x7f, 1, 0x7f]), // type 0: (i32, i32) -> i32
  ...section(2, [1, 1, 0x6d, 1, 0x6d, 0x02, 0x00, 1]), // import memory "m" "m", at least one page
  ...section(3, [1, 0]), // function 0 has type 0
  ...section(7, [1, 3, 0x73, 0x75, 0x6d, 0x00, 0]), // export "sum"
  ...section(10, [1, ...leb(body.length), ...body]),
]);

/** Memory of that many bytes with its vector sum; undefined where the runtime cannot. It never moves. */
export function vectorBytes(length: number): Bytes | undefined {
  const wasm = (globalThis as unknown as { readonly WebAssembly?: Wasm }).WebAssembly;
  if (wasm === undefined || !wasm.validate(MODULE)) return undefined;
  const pages = Math.ceil(length / PAGE);
  const memory = new wasm.Memory({ initial: pages, maximum: pages });
  const { exports } = new wasm.Instance(new wasm.Module(MODULE), { m: { m: memory } });
  const bytes = bytesOf(new Uint8Array(memory.buffer));
  return { ...bytes, vectorSum: exports['sum'] as VectorSum };
}
