import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  answer,
  type Decision,
  formatReverse,
  parseReverse,
  type ResolverOptions,
} from '../../../edge/resolver/resolver.ts';
import { RouteTable } from '../../../edge/routes/table.ts';
import { formatIpv4, ipv4 } from '../../../src/addr.ts';
import { DNS_INSTANCE_TTL_S, DNS_TTL_S } from '../../../src/limits.ts';
import { node } from '../../support/sample.ts';
import { CART, CART_ANY, id, ip, service, world } from './world.ts';

const table = world();
const ask = (name: string, type = 'A', options: ResolverOptions = {}): Decision =>
  answer({ name, type }, table, options);

/** The whole decision as one line. */
function line(decision: Decision): string {
  switch (decision.kind) {
    case 'answer':
      return decision.records
        .map((record) =>
          record.type === 'A'
            ? `${record.name} ${record.ttl} A ${formatIpv4(record.address)}`
            : record.type === 'PTR'
              ? `${record.name} ${record.ttl} PTR ${record.target}`
              : `${record.name} ${record.ttl} SRV ${record.port} ${record.target}`,
        )
        .join('; ');
    case 'nodata':
      return `nodata ${decision.zone} ${decision.ttl} [${decision.types}]`;
    case 'nxdomain':
      return `nxdomain ${decision.zone}: ${decision.why}`;
    case 'soa':
      return `soa ${decision.zone}`;
    case 'servfail':
    case 'refused':
      return `${decision.kind}: ${decision.why}`;
    case 'forward':
      return 'forward';
  }
}

test('answer gives every policy its ServiceIP and every instance its InstanceIP', () => {
  assert.is(
    line(ask('shop.prod.cart.v1.any.roundrobin.local')),
    `shop.prod.cart.v1.any.roundrobin.local ${DNS_TTL_S} A 172.30.0.1`,
  );
  assert.is(line(ask(CART_ANY)), `${CART_ANY} ${DNS_TTL_S} A 172.30.0.2`);
  assert.is(
    line(ask('shop.prod.cart.v1.any.fastest.local')),
    `shop.prod.cart.v1.any.fastest.local ${DNS_TTL_S} A 172.30.0.3`,
  );
  assert.is(
    line(ask('shop.prod.cart.v1.2.fixed.local')),
    `shop.prod.cart.v1.2.fixed.local ${DNS_INSTANCE_TTL_S} A 172.30.1.2`,
  );
});

test('answer compares case-blind and repeats the spelling of the question', () => {
  assert.is(
    line(ask('Shop.PROD.cart.v1.ANY.cloSest.LOCAL')),
    `Shop.PROD.cart.v1.ANY.cloSest.LOCAL ${DNS_TTL_S} A 172.30.0.2`,
  );
});

test('answer says NODATA for a type that does not exist, and which types do', () => {
  assert.is(line(ask(CART_ANY, 'AAAA')), `nodata closest.local ${DNS_TTL_S} [A,SRV]`);
  assert.is(line(ask(CART_ANY, 'TXT')), `nodata closest.local ${DNS_TTL_S} [A,SRV]`);
  assert.is(line(ask(CART_ANY, 'UNKNOWN_65')), `nodata closest.local ${DNS_TTL_S} [A,SRV]`);
});

test('answer gives one SRV per port with the address beside it', () => {
  const decision = ask(CART_ANY, 'SRV');
  assert.is(
    line(decision),
    `${CART_ANY} ${DNS_TTL_S} SRV 80 ${CART_ANY}; ${CART_ANY} ${DNS_TTL_S} SRV 443 ${CART_ANY}`,
  );
  assert.is(decision.kind === 'answer' && decision.additionals.length, 1);
});

test('answer says NXDOMAIN only for what surely is not there', () => {
  assert.is(
    line(ask('shop.prod.cart.v2.any.closest.local')),
    'nxdomain closest.local: there is no service shop.prod.cart.v2',
  );
  assert.is(
    line(ask('shop.prod.cart.v1.3.fixed.local')),
    'nxdomain fixed.local: service shop.prod.cart.v1 has no instance 3',
  );
  assert.match(
    line(ask('shop.prod.cart.v1.1.closest.local')),
    /^nxdomain closest.local: .*"1" must be "any"/,
  );
  assert.match(line(ask('a.shop.prod.cart.v1.any.closest.local')), /^nxdomain/);
  assert.match(line(ask('sh_op.prod.cart.v1.any.closest.local')), /^nxdomain/);
});

test('answer says NODATA for what names may stand under (RFC 8020)', () => {
  for (const name of [
    'closest.local',
    'any.closest.local',
    'v1.any.closest.local',
    '7.fixed.local',
    'prod.cart.v1.any.fastest.local',
  ])
    assert.match(line(ask(name)), /^nodata/, name);
  for (const name of ['foo.closest.local', 'any.fixed.local', '0.fixed.local', '7.closest.local'])
    assert.match(line(ask(name)), /^nxdomain/, name);
  assert.is(line(ask('Closest.local', 'SOA')), 'soa closest.local');
});

test('answer says NODATA while a policy of a known service has no address', () => {
  const partial = world();
  partial.putService({
    ...service('shop.prod.db.v1', '172.30.2.1'),
    addresses: { closest: ip('172.30.2.2') },
  });
  const decision = answer({ name: 'shop.prod.db.v1.any.fastest.local', type: 'A' }, partial);
  assert.is(line(decision), 'nodata fastest.local 0 []');
});

test('answer says SERVFAIL for the unknown while the table is not synced, and still answers the known', () => {
  const fresh = world();
  fresh.synced = false;
  assert.match(line(answer({ name: 'a.b.c.d.any.closest.local', type: 'A' }, fresh)), /^servfail/);
  assert.match(line(answer({ name: CART_ANY, type: 'A' }, fresh)), / A 172.30.0.2$/);
  assert.match(line(answer({ name: '9.9.30.172.in-addr.arpa', type: 'PTR' }, new RouteTable())), /^servfail/);
});

test('answer refuses what the asker does not need, and says so', () => {
  const needs = [id('shop.prod.db.v1')];
  assert.is(line(ask(CART_ANY, 'A', { needs })), "refused: shop.prod.cart.v1 is not among the asker's needs");
  assert.match(line(ask(CART_ANY, 'A', { needs: [CART] })), / A /);
  assert.is(line(ask('example.org', 'A', { needs: [] })), 'forward');
});

test('answer forwards what is not ours', () => {
  for (const name of [
    'example.org',
    'printer.local',
    'local',
    '.',
    'closest.local.example.org',
    '1.0.0.10.in-addr.arpa',
    'x.in-addr.arpa',
    '1.30.172.in-addr.arpa',
  ])
    assert.is(line(ask(name)), 'forward', name);
});

test('answer names ServiceIPs, InstanceIPs and namespace addresses in reverse', () => {
  assert.is(
    line(ask('2.0.30.172.in-addr.arpa', 'PTR')),
    `2.0.30.172.in-addr.arpa ${DNS_TTL_S} PTR ${CART_ANY}`,
  );
  assert.is(
    line(ask('1.1.30.172.in-addr.arpa', 'PTR')),
    `1.1.30.172.in-addr.arpa ${DNS_INSTANCE_TTL_S} PTR shop.prod.cart.v1.1.fixed.local`,
  );
  assert.is(
    line(ask('130.0.16.172.in-addr.arpa', 'PTR')),
    `130.0.16.172.in-addr.arpa ${DNS_INSTANCE_TTL_S} PTR shop.prod.cart.v1.2.fixed.local`,
  );
  assert.is(
    line(ask('2.0.30.172.in-addr.arpa', 'A')),
    `nodata 30.172.in-addr.arpa ${DNS_INSTANCE_TTL_S} [PTR]`,
  );
  assert.is(
    line(ask('99.9.30.172.in-addr.arpa', 'PTR')),
    'nxdomain 30.172.in-addr.arpa: 172.30.9.99 belongs to nobody',
  );
});

test('answer says NODATA for an address in a node’s subnet that it knows no name of, never NXDOMAIN', () => {
  const table = new RouteTable();
  table.synced = true;
  const unknown = '99.0.16.172.in-addr.arpa';
  const reverse = (name: string): string => line(answer({ name, type: 'PTR' }, table));
  assert.is(reverse(unknown), 'servfail: whether a node holds 172.16.0.99 is not known yet');
  table.tellSubnet(ip('172.16.0.64'), true);
  assert.is(reverse(unknown), `nodata ${unknown} 0 []`);
  table.tellSubnet(ip('172.16.0.64'), false);
  assert.is(reverse(unknown), 'forward', 'another network of the operator’s');
  table.putNode(node('n2', 1));
  assert.is(reverse(unknown), `nodata ${unknown} 0 []`);
  table.deleteNode('n2');
  assert.is(reverse(unknown), 'forward');
  assert.is(reverse('1.0.0.10.in-addr.arpa'), 'forward', 'outside the plan');
});

test('formatReverse and parseReverse are inverses', () => {
  fc.assert(
    fc.property(fc.nat(0xffffffff), (value) => {
      const address = ipv4(value);
      assert.is(parseReverse(formatReverse(address)), address);
    }),
  );
  for (const bad of ['256.0.0.1', '01.0.0.1', '1.2.3', '1.2.3.4.5', 'a.b.c.d', ''])
    assert.is(parseReverse(`${bad}.in-addr.arpa`), undefined, bad);
});

test('answer is total over any name and type', () => {
  fc.assert(
    fc.property(
      fc.string({ unit: 'binary' }),
      fc.constantFrom('', '.closest.local', '.any.fixed.local', '.in-addr.arpa'),
      fc.constantFrom('A', 'PTR', 'ANY', 'SRV'),
      (text, end, type) => {
        assert.type(line(answer({ name: text + end, type }, table)), 'string');
      },
    ),
    { numRuns: 2000 },
  );
});

test.run();
