import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unwrap } from '../../src/error.ts';
import type { Key } from '../../src/keys.ts';
import { DEFAULT_PLAN } from '../../src/plan.ts';
import { POLICIES } from '../../src/policy.ts';
import {
  DEFAULT_NETWORK_CONFIG,
  decodeConfig,
  decodeRecord,
  decodeService,
  encodeAddress,
  encodeBlock,
  encodeCall,
  encodeCluster,
  encodeConfig,
  encodeExposed,
  encodeInstance,
  encodeLeader,
  encodeNode,
  encodeService,
  encodeSubnet,
  type KeyRecord,
  parseDescriptor,
} from '../../src/records.ts';
import {
  anyCidr,
  anyId,
  anyInstanceNumber,
  anyIpv4,
  anyKey,
  anyPort,
  anyServiceId,
  CART,
  descriptor,
  instance,
  ip,
  node,
  sid,
} from '../support/sample.ts';

const why = (key: Key, text: string): string => {
  const result = decodeRecord(key, text);
  if (result.ok) throw new Error(`read without complaint: ${text}`);
  assert.is(result.error.code, 'invalid_record');
  return result.error.message;
};

/** A record of any kind with its text. */
const anyRecord: fc.Arbitrary<[Key, string, unknown]> = fc.oneof(
  fc
    .tuple(fc.integer({ min: 1, max: 0xffffff }), fc.integer({ min: 576, max: 9_000 }))
    .map(([vni, mtu]): [Key, string, unknown] => {
      const config = { ...DEFAULT_NETWORK_CONFIG, vni, mtu };
      return [{ kind: 'config' }, encodeConfig(config), config];
    }),
  anyId.map((holder): [Key, string, unknown] => [
    { kind: 'rootLeader' },
    encodeLeader({ holder }),
    { holder },
  ]),
  fc
    .tuple(anyCidr, anyId)
    .map(([block, cluster]): [Key, string, unknown] => [
      { kind: 'block', block },
      encodeBlock({ cluster }),
      { cluster },
    ]),
  fc
    .tuple(anyId, fc.boolean())
    .map(([cluster, admitted]): [Key, string, unknown] => [
      { kind: 'cluster', cluster },
      encodeCluster({ cluster, admitted }),
      { cluster, admitted },
    ]),
  fc
    .tuple(anyCidr, anyId, anyId)
    .map(([subnet, cluster, id]): [Key, string, unknown] => [
      { kind: 'subnet', subnet },
      encodeSubnet({ cluster, node: id, resting: true }),
      { cluster, node: id, resting: true },
    ]),
  fc
    .record(
      {
        node: anyId,
        cluster: anyId,
        nodeIp: anyIpv4,
        ewp: anyPort,
        nsp: fc.integer({ min: 0, max: 65_535 }),
        subnet: anyCidr,
        epoch: fc.nat(),
      },
      { noNullPrototype: true },
    )
    .chain((value) => fc.constantFrom(value, { ...value, nat: true }))
    .map((value): [Key, string, unknown] => [
      { kind: 'node', cluster: value.cluster, node: value.node },
      encodeNode(value),
      value,
    ]),
  fc
    .tuple(anyId, anyId, anyId)
    .map(([id, caller, cluster]): [Key, string, unknown] => [
      { kind: 'call', node: id, caller },
      encodeCall({ cluster }),
      { cluster },
    ]),
  fc
    .tuple(
      anyServiceId,
      fc.array(anyServiceId, { maxLength: 4 }),
      fc.array(anyPort, { maxLength: 3 }),
      fc.boolean(),
      fc.constantFrom(undefined, ...POLICIES),
      anyIpv4,
    )
    .map(([id, needs, ports, exposed, policy, address]): [Key, string, unknown] => {
      const service = {
        id,
        descriptor: descriptor(id, { needs, ports, exposed, ...(policy === undefined ? {} : { policy }) }),
        addresses: { closest: address },
      };
      return [{ kind: 'service', service: id }, encodeService(service), service];
    }),
  anyServiceId.map((service): [Key, string, unknown] => [{ kind: 'exposed', service }, encodeExposed(), {}]),
  fc
    .tuple(anyIpv4, anyServiceId, fc.constantFrom(...POLICIES))
    .map(([address, service, policy]): [Key, string, unknown] => {
      const owner = { kind: 'service', service, policy } as const;
      return [{ kind: 'address', address }, encodeAddress(owner), owner];
    }),
  fc
    .tuple(anyIpv4, anyServiceId, anyInstanceNumber, anyId)
    .map(([address, service, number, id]): [Key, string, unknown] => {
      const owner = { kind: 'instance', service, instance: number, node: id } as const;
      return [{ kind: 'address', address }, encodeAddress(owner), owner];
    }),
  fc.tuple(anyServiceId, anyInstanceNumber).map(([service, number]): [Key, string, unknown] => {
    const value = instance(node('n1', 3), service, number, { namespaceIp: ip('172.16.0.200') });
    return [{ kind: 'instance', service, instance: number }, encodeInstance(value), value];
  }),
);

test('decodeRecord reads back what the encoders wrote, for every kind of key', () => {
  const kinds = new Set<string>();
  fc.assert(
    fc.property(anyRecord, ([key, text, value]) => {
      const record = unwrap(decodeRecord(key, text)) as KeyRecord;
      assert.is(record.kind, key.kind);
      assert.equal(record.key, key);
      assert.equal(record.value, value);
      kinds.add(key.kind);
    }),
    { numRuns: 1_000 },
  );
  assert.is(kinds.size, 11, [...kinds].join(' '));
});

test('decodeRecord ignores fields that it does not know and refuses another version', () => {
  fc.assert(
    fc.property(anyRecord, ([key, text, value]) => {
      const json = JSON.parse(text);
      assert.equal(unwrap(decodeRecord(key, JSON.stringify({ ...json, later: { x: 1 } }))).value, value);
      assert.match(why(key, JSON.stringify({ ...json, v: 2 })), 'version 2, this agent reads version 1');
      const { v: _, ...bare } = json;
      why(key, JSON.stringify(bare));
    }),
  );
});

test('decodeRecord is total: any text, any JSON and every cut of a true record is a value or an error', () => {
  fc.assert(
    fc.property(
      anyKey,
      fc.oneof(
        fc.string(),
        fc.json(),
        fc.jsonValue().map((x) => JSON.stringify(x)),
      ),
      (key, text) => {
        const result = decodeRecord(key, text);
        if (!result.ok) assert.is(result.error.code, 'invalid_record');
      },
    ),
    { numRuns: 2_000 },
  );
  fc.assert(
    fc.property(anyRecord, ([key, text]) => {
      for (let cut = 0; cut < text.length; cut++) assert.not.ok(decodeRecord(key, text.slice(0, cut)).ok);
    }),
    { numRuns: 50 },
  );
});

test('decodeRecord survives one changed byte in a true record, everywhere', () => {
  fc.assert(
    fc.property(anyRecord, fc.nat(), fc.string({ minLength: 1, maxLength: 1 }), ([key, text], at, char) => {
      const place = at % text.length;
      const result = decodeRecord(key, text.slice(0, place) + char + text.slice(place + 1));
      if (!result.ok) assert.is(result.error.code, 'invalid_record');
    }),
    { numRuns: 2_000 },
  );
});

test('a broken record names the field and the rule', () => {
  const service: Key = { kind: 'service', service: CART };
  assert.match(why(service, '{"v":1'), 'is not JSON');
  assert.match(why(service, '[]'), /expected/i);
  assert.match(
    why(
      service,
      encodeService({ id: CART, descriptor: descriptor(), addresses: {} }).replace('[80]', '["x"]'),
    ),
    'ports.0',
  );
  assert.match(
    why(
      service,
      encodeService({ id: sid('a.b.c.d'), descriptor: descriptor(sid('a.b.c.d')), addresses: {} }),
    ),
    'describes service a.b.c.d under the key of shop.prod.cart.v1',
  );
  const n1 = node('n1', 1);
  assert.match(
    why({ kind: 'node', cluster: 'lab', node: 'n2' }, encodeNode(n1)),
    'something else than its key, which is that of node n2 of cluster lab',
  );
  assert.match(
    why({ kind: 'node', cluster: 'lab', node: 'n1' }, encodeNode(n1).replace('10.0.0.2', '10.0.0')),
    'nodeIp: "10.0.0" is not an IPv4 address',
  );
  assert.match(
    why({ kind: 'node', cluster: 'lab', node: 'n1' }, encodeNode({ ...n1, nat: true }).replace('true', '1')),
    'nat: ',
  );
  assert.match(
    why({ kind: 'call', node: 'n2', caller: 'n1' }, '{"v":1,"cluster":"Lab"}'),
    'cluster: must be',
  );
  assert.match(
    why({ kind: 'instance', service: CART, instance: 2 }, encodeInstance(instance(n1, CART, 1))),
    'instance 1 under the key of',
  );
});

test('decodeConfig refuses a plan whose parts do not fit each other', () => {
  const text = encodeConfig({ ...DEFAULT_NETWORK_CONFIG, plan: DEFAULT_PLAN });
  assert.equal(unwrap(decodeConfig(text)), DEFAULT_NETWORK_CONFIG);
  for (const [from, to] of [
    ['172.30.0.0/16', '10.0.0.0/16'],
    ['"nodePrefix":26', '"nodePrefix":8'],
    ['"vni":', '"vni":-'],
  ] as const) {
    const result = decodeConfig(text.replace(from, to));
    assert.not.ok(result.ok, to);
  }
});

test('decodeService takes a record that a person wrote with the least that says what it is', () => {
  const service = unwrap(
    decodeService(
      '{"v":1,"appname":"shop","appnamespace":"prod","servicename":"cart","servicenamespace":"v1"}',
      CART,
    ),
  );
  assert.equal(service.addresses, {});
  assert.equal(service.descriptor.ports, []);
  assert.is(service.descriptor.needs, undefined);
});

test('parseDescriptor takes names in needs, and never addresses', () => {
  const parsed = unwrap(
    parseDescriptor({
      ...descriptor(),
      needs: ['shop.prod.db.v1', 'shop.prod.pay.v1.any.closest.local'],
      addresses: { closest: '172.30.0.1' },
    }),
  );
  assert.equal(parsed.descriptor.needs, ['shop.prod.db.v1', 'shop.prod.pay.v1']);
  assert.not('addresses' in parsed.descriptor);
  for (const bad of [
    null,
    1,
    [],
    {},
    { ...descriptor(), appname: '-' },
    { ...descriptor(), ports: [0] },
    { ...descriptor(), policy: 'fixed' },
  ])
    assert.not.ok(parseDescriptor(bad).ok);
});

test.run();
