import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unwrap } from '../../src/error.ts';
import { checkId, Keys } from '../../src/keys.ts';
import { anyKey, CART, ip } from '../support/sample.ts';

const keys = new Keys();

test('Keys.build and Keys.parse are inverses for every kind of key, under any root', () => {
  fc.assert(
    fc.property(anyKey, fc.constantFrom('/edgeway/v1', '/a', '/x/y/z'), (key, root) => {
      const under = new Keys(root);
      assert.equal(unwrap(under.parse(under.build(key))), key);
    }),
    { numRuns: 1_000 },
  );
});

test('Keys.build spells keys as the reference does', () => {
  assert.is(keys.build({ kind: 'config' }), '/edgeway/v1/config/network');
  assert.is(
    keys.build({ kind: 'subnet', subnet: { base: ip('172.16.0.64'), bits: 26 } }),
    '/edgeway/v1/subnets/172.16.0.64/26',
  );
  assert.is(keys.build({ kind: 'node', cluster: 'lab', node: 'n1' }), '/edgeway/v1/nodes/lab/n1');
  assert.is(keys.build({ kind: 'service', service: CART }), '/edgeway/v1/services/shop.prod.cart.v1');
  assert.is(
    keys.build({ kind: 'instance', service: CART, instance: 2 }),
    '/edgeway/v1/instances/shop.prod.cart.v1/2',
  );
  assert.is(keys.build({ kind: 'clusterLeader', cluster: 'lab' }), '/edgeway/v1/clusters/lab/leader');
  assert.is(keys.build({ kind: 'call', node: 'n2', caller: 'n1' }), '/edgeway/v1/calls/n2/n1');
});

test('Keys.prefix and Keys.instancesOf hold what they name and nothing beside it', () => {
  fc.assert(
    fc.property(anyKey, (key) => {
      const text = keys.build(key);
      const inside = text.startsWith(keys.prefix('instances'));
      assert.is(inside, key.kind === 'instance');
      assert.is(text.startsWith(keys.instancesOf(CART)), key.kind === 'instance' && key.service === CART);
      assert.is(text.startsWith(keys.callsTo('n')), key.kind === 'call' && key.node === 'n');
    }),
  );
});

test('Keys.parse is total: foreign keys are refused with the key in the message', () => {
  for (const text of [
    '/edgeway/v1/',
    '/edgeway/v1/config',
    '/edgeway/v1/config/other',
    '/edgeway/v1/config/network/more',
    '/edgeway/v1/subnets/172.16.0.0',
    '/edgeway/v1/subnets/172.16.0.1/26',
    '/edgeway/v1/subnets/300.1.1.1/26',
    '/edgeway/v1/nodes/lab',
    '/edgeway/v1/nodes/lab/n1/x',
    '/edgeway/v1/nodes/LAB/n1',
    '/edgeway/v1/nodes//n1',
    '/edgeway/v1/calls/n2',
    '/edgeway/v1/calls/n2/N1',
    '/edgeway/v1/calls/n2/n1/x',
    '/edgeway/v1/services/shop.prod.cart',
    '/edgeway/v1/services/Shop.prod.cart.v1',
    '/edgeway/v1/services/shop.prod.cart.v1/x',
    '/edgeway/v1/addresses/1.2.3',
    '/edgeway/v1/addresses/01.2.3.4',
    '/edgeway/v1/instances/shop.prod.cart.v1/0',
    '/edgeway/v1/instances/shop.prod.cart.v1/01',
    '/edgeway/v1/instances/shop.prod.cart.v1',
    '/edgeway/v1/root/blocks/172.16.0.0',
    '/edgeway/v1/root/other',
    '/edgeway/v1/clusters/lab/other',
    '/edgeway/v1/wine/bottle',
    '/edgeway/v2/config/network',
    '/other',
    '',
  ]) {
    const result = keys.parse(text);
    assert.not.ok(result.ok, text);
  }
  fc.assert(
    fc.property(fc.string(), (tail) => {
      const text = `/edgeway/v1/${tail}`;
      const result = keys.parse(text);
      if (result.ok) assert.is(keys.build(result.value), text, 'what parses is spelled in one way only');
    }),
    { numRuns: 2_000 },
  );
});

test('checkId takes one path segment and says the rule', () => {
  assert.ok(checkId('node', 'edge-1.rack_2').ok);
  for (const id of ['', 'A', '-a', 'a/b', 'x'.repeat(64), 'a b']) {
    const result = checkId('node', id);
    assert.not.ok(result.ok, id);
    if (!result.ok) assert.match(result.error.message, '1…63');
  }
});

test.run();
