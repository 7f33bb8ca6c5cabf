import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  contains,
  formatCidr,
  formatIpv4,
  ipv4,
  maskOf,
  networkOf,
  overlaps,
  parseCidr,
  parseIpv4,
  sizeOf,
} from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import { anyCidr, anyIpv4 } from '../support/sample.ts';

test('formatIpv4 and parseIpv4, formatCidr and parseCidr are inverses', () => {
  fc.assert(
    fc.property(anyIpv4, anyCidr, (address, cidr) => {
      assert.is(unwrap(parseIpv4(formatIpv4(address))), address);
      assert.equal(unwrap(parseCidr(formatCidr(cidr))), cidr);
    }),
    { numRuns: 1_000 },
  );
});

test('parseIpv4 and parseCidr refuse short forms, leading zeros, host bits and anything else', () => {
  for (const text of [
    '',
    '1',
    '1.2.3',
    '01.2.3.4',
    '1.2.3.4.5',
    '256.1.1.1',
    '1.2.3.4/24',
    'a.b.c.d',
    '1.2.3.4 ',
  ])
    assert.not.ok(parseIpv4(text).ok, text);
  for (const text of [
    '',
    '1.2.3.4',
    '1.2.3.4/33',
    '1.2.3.4/24',
    '1.2.3.0/',
    '/24',
    '1.2.3.0/24/24',
    '1.2.3.0/2x',
  ])
    assert.not.ok(parseCidr(text).ok, text);
  const bits = parseCidr('172.16.0.70/26');
  assert.not.ok(bits.ok);
  if (!bits.ok) assert.match(bits.error.message, 'begins at 172.16.0.64/26');
  fc.assert(
    fc.property(fc.string(), (text) => {
      const parsed = parseCidr(text);
      if (parsed.ok) assert.is(formatCidr(parsed.value), text);
    }),
    { numRuns: 2_000 },
  );
});

test('contains and overlaps agree with counting addresses', () => {
  const range = ({ base, bits }: { base: number; bits: number }): [number, number] => [
    base,
    base + 2 ** (32 - bits) - 1,
  ];
  fc.assert(
    fc.property(anyCidr, anyCidr, anyIpv4, (a, b, address) => {
      const [a0, a1] = range(a);
      const [b0, b1] = range(b);
      assert.is(contains(a, address), address >= a0 && address <= a1);
      assert.is(overlaps(a, b), a0 <= b1 && b0 <= a1);
      assert.is(sizeOf(a), a1 - a0 + 1);
    }),
    { numRuns: 2_000 },
  );
  assert.is(maskOf(0), 0);
  assert.is(maskOf(32), 0xffffffff);
  assert.is(networkOf(ipv4(0xffffffff), 1), 0x80000000);
});

test.run();
