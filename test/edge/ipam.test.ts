import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { NamespaceAddresses } from '../../edge/ipam.ts';
import { contains, formatIpv4, parseCidr, parseIpv4 } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';

const SUBNET = unwrap(parseCidr('172.16.0.64/26'));
const at = (text: string) => unwrap(parseIpv4(text));
const take = (addresses: NamespaceAddresses, owner: string, nowMs = 0): string =>
  formatIpv4(unwrap(addresses.take(owner, nowMs)));

test('take gives 61 addresses of a /26 and then says what is in use', () => {
  const addresses = new NamespaceAddresses(SUBNET, 1000);
  const seen = new Set<string>();
  for (let n = 0; n < 61; n++) seen.add(take(addresses, `o${n}`));
  assert.is(seen.size, 61);
  assert.not(seen.has('172.16.0.64'));
  assert.not(seen.has('172.16.0.65'), 'the bridge');
  assert.not(seen.has('172.16.0.127'), 'the broadcast address');
  addresses.giveBack('o7', 0);
  const full = addresses.take('one more', 500);
  assert.not(full.ok);
  if (!full.ok) {
    assert.is(full.error.code, 'addresses_exhausted');
    assert.match(full.error.message, '172.16.0.64/26 has no free address: 60 are in use and 1 rest');
  }
  assert.is(take(addresses, 'one more', 1000), '172.16.0.73', 'rested');
});

test('take prefers what the owner held, even while it rests, and is the same twice', () => {
  const addresses = new NamespaceAddresses(SUBNET, 1000);
  assert.is(take(addresses, 'a'), '172.16.0.66');
  assert.is(take(addresses, 'a'), '172.16.0.66');
  assert.is(take(addresses, 'b'), '172.16.0.67');
  addresses.giveBack('a', 0);
  assert.is(addresses.inUse(), 1);
  assert.is(take(addresses, 'c', 1), '172.16.0.68', 'a freed address rests');
  assert.is(take(addresses, 'a', 2), '172.16.0.66');
  addresses.giveBack('nobody', 0);
});

test('hold records what is in use, refuses what is not an instance address or held by another', () => {
  const addresses = new NamespaceAddresses(SUBNET, 1000);
  unwrap(addresses.hold('a', at('172.16.0.70'), 0));
  unwrap(addresses.hold('a', at('172.16.0.70'), 0));
  const code = (owner: string, text: string): string => {
    const result = addresses.hold(owner, at(text), 0);
    return result.ok ? 'ok' : result.error.code;
  };
  assert.is(code('b', '172.16.0.70'), 'address_taken');
  assert.is(code('b', '172.16.0.65'), 'address_not_in_plan');
  assert.is(code('b', '172.16.0.127'), 'address_not_in_plan');
  assert.is(code('b', '172.16.0.130'), 'address_not_in_plan');
  assert.is(code('a', '172.16.0.71'), 'ok');
  assert.is(addresses.inUse(), 1, 'the former address rests');
  assert.is(code('b', '172.16.0.70'), 'ok', 'what the host shows to be in use wins over rest');
});

test('no address has two owners, and none is given within its rest (random histories)', () => {
  const step = fc.record({
    owner: fc.integer({ min: 0, max: 80 }).map((n) => `o${n}`),
    give: fc.boolean(),
    afterMs: fc.integer({ min: 0, max: 400 }),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 300 }), (steps) => {
      const addresses = new NamespaceAddresses(SUBNET, 1000);
      const held = new Map<string, number>();
      const freed = new Map<number, { owner: string; atMs: number }>();
      let nowMs = 0;
      for (const { owner, give, afterMs } of steps) {
        nowMs += afterMs;
        const mine = held.get(owner);
        if (give) {
          addresses.giveBack(owner, nowMs);
          if (mine !== undefined) freed.set(mine, { owner, atMs: nowMs });
          held.delete(owner);
          continue;
        }
        const taken = addresses.take(owner, nowMs);
        if (!taken.ok) continue;
        assert.ok(contains(SUBNET, taken.value));
        for (const [other, address] of held) if (address === taken.value) assert.is(other, owner);
        const rest = freed.get(taken.value);
        if (rest !== undefined && rest.owner !== owner) assert.ok(nowMs - rest.atMs >= 1000);
        held.set(owner, taken.value);
        assert.is(addresses.inUse(), held.size);
      }
    }),
    { seed: 20261121, numRuns: 200 },
  );
});

test.run();
