import * as fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { ipv4 } from '../../../src/addr.ts';
import { DIMENSIONS, ORIGIN } from '../../../src/coordinate.ts';
import { PROBE_STATUS_BYTES } from '../../../src/limits.ts';
import { Rng } from '../../../src/rng.ts';
import { decodeProbeStatus, encodeProbeStatus, type ProbeStatus } from '../../../src/wire/probe.ts';

const some: ProbeStatus = {
  subnet: ipv4(0xac100040),
  load: 0.75,
  liveLow: 0b1100,
  liveHigh: 0x80000000,
  coordinate: { vec: [1, -2, 3, -4, 5, -6, 7, -8], height: 0.5, adjustment: -0.25, error: 0.125 },
};

test('encodeProbeStatus: the bytes on the wire', () => {
  assert.is(
    Buffer.from(encodeProbeStatus(some)).toString('hex'),
    '01030000ac1000403f400000800000000000000c3f000000be8000003e0000003f800000c000000040400000c080000040a00000c0c0000040e00000c1000000',
  );
});

test('decodeProbeStatus is the inverse of encodeProbeStatus, with and without coordinate and load', () => {
  const { coordinate, load, ...bare } = some;
  for (const status of [some, bare, { ...bare, load }, { ...bare, coordinate }] as ProbeStatus[]) {
    const result = decodeProbeStatus(encodeProbeStatus(status));
    assert.ok(result.ok && result.value);
    if (result.ok) assert.equal(result.value, status);
  }
});

test('decodeProbeStatus refuses every shorter length, another version, and numbers out of range', () => {
  const bytes = encodeProbeStatus(some);
  for (let length = 0; length < PROBE_STATUS_BYTES; length++)
    assert.not(decodeProbeStatus(bytes.subarray(0, length)).ok, String(length));
  assert.ok(decodeProbeStatus(new Uint8Array([...bytes, 1, 2, 3])).ok);
  assert.not(decodeProbeStatus(new Uint8Array([2, ...bytes.subarray(1)])).ok);
  for (const load of [Number.NaN, -1, Number.POSITIVE_INFINITY])
    assert.not(decodeProbeStatus(encodeProbeStatus({ ...some, load })).ok, String(load));
  for (const height of [Number.NaN, -1, 1e9])
    assert.not(decodeProbeStatus(encodeProbeStatus({ ...some, coordinate: { ...ORIGIN, height } })).ok);
});

test('decodeProbeStatus takes any bytes: a value or an error, and a value has finite numbers', () => {
  const rng = new Rng(1);
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 100 }), (junk) => {
      const bytes = Uint8Array.from(junk);
      if (rng.unit() < 0.8) bytes[0] = 1;
      const result = decodeProbeStatus(bytes);
      if (!result.ok) return;
      assert.ok((result.value.load ?? 0) >= 0);
      assert.is(result.value.coordinate?.vec.length ?? DIMENSIONS, DIMENSIONS);
      assert.ok(result.value.coordinate?.vec.every(Number.isFinite) ?? true);
    }),
    { numRuns: 5_000, seed: 7 },
  );
});

test.run();
