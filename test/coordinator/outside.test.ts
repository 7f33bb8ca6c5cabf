import { Buffer } from 'node:buffer';
import * as packet from 'dns-packet';
import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { Held } from '../../coordinator/keyspace.ts';
import { answerOutside, outsideName, parseZone, zoneTable } from '../../coordinator/outside.ts';
import { View } from '../../coordinator/view.ts';
import { ipv4 } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import type { Instance, Node, Service } from '../../src/model.ts';
import { CART, descriptor, instance, ip, node, sid } from '../support/sample.ts';

const ZONE = unwrap(parseZone('Edge.Example.ORG.', { address: ip('192.0.2.53') }));
const WEB = [{ source: 80, destination: 8080, protocol: 'tcp' as const }];
const NAME = 'cart.v1.shop.prod.edge.example.org';
const NODES = Array.from({ length: 12 }, (_, n) => node(`n${n}`, n));
const [N0, N1, N2] = NODES as [Node, Node, Node];

function service(id = CART, exposed = true): Service {
  return { id, descriptor: descriptor(id, { exposed, ports: WEB }), addresses: {} };
}

function tableOf(parts: { nodes?: Node[]; services?: Service[]; instances?: Instance[]; synced?: boolean }) {
  const at = { createRevision: 1, modRevision: 1 };
  const puts = [
    ...(parts.nodes ?? []).map((value) => ({
      kind: 'node',
      key: { kind: 'node', node: value.node, cluster: value.cluster },
      value,
      ...at,
    })),
    ...(parts.services ?? []).map((value) => ({
      kind: 'service',
      key: { kind: 'service', service: value.id },
      value,
      ...at,
    })),
    ...(parts.instances ?? []).map((value) => ({
      kind: 'instance',
      key: { kind: 'instance', service: value.service, instance: value.instance },
      value,
      ...at,
    })),
  ] as Held[];
  const view = new View(new Keys());
  view.apply({ kind: 'snapshot', path: '/', revision: 7, puts, deletes: [], brought: [] });
  return zoneTable(view, ZONE, parts.synced ?? true, 7);
}

function query(name: string, type: string, more: object = {}): Buffer {
  return packet.encode({
    type: 'query',
    id: 8,
    flags: packet.RECURSION_DESIRED,
    questions: [{ name, type: type as 'A', class: 'IN' }],
    ...more,
  });
}

function ask(table: ReturnType<typeof tableOf>, name: string, type = 'A', more: object = {}) {
  const reply = answerOutside(table, query(name, type, more), 'udp');
  assert.ok(reply);
  const {
    answers = [],
    authorities = [],
    additionals = [],
    rcode,
    flag_aa,
    flag_tc,
    questions,
  } = packet.decode(reply) as packet.DecodedPacket & { rcode: string };
  return {
    rcode,
    aa: flag_aa,
    tc: flag_tc,
    question: questions?.[0]?.name,
    addresses: answers.map((one) => ('data' in one ? String(one.data) : '')),
    ttl: answers[0] !== undefined && 'ttl' in answers[0] ? answers[0].ttl : undefined,
    soa: authorities.map(({ type }) => type).join(),
    opt: additionals.length,
  };
}

const live = tableOf({
  nodes: [N0, N1, N2],
  services: [service(), service(sid('shop.prod.hidden.v1'), false), service(sid('shop.prod.idle.v1'))],
  instances: [instance(N2, CART, 1)],
});

test('an exposed service has the addresses of the nodes that are up, the one that runs it among them, TTL 10 s', () => {
  const { rcode, aa, addresses, ttl, question } = ask(live, NAME.toUpperCase());
  assert.is(rcode, 'NOERROR');
  assert.is(aa, true);
  assert.is(ttl, 10);
  assert.is(question, NAME.toUpperCase(), 'the question as it was asked (0x20)');
  assert.equal(addresses.toSorted(), ['10.0.0.1', '10.0.0.2', '10.0.0.3']);
  assert.is(outsideName(CART, ZONE), NAME);
});

test('a node that is gone, or an instance on one, is in no answer', () => {
  const without = tableOf({
    nodes: [N0],
    services: [service()],
    instances: [instance(N0, CART, 1), instance(N1, CART, 2)],
  });
  assert.equal(ask(without, NAME).addresses, ['10.0.0.1']);
  const orphan = tableOf({ nodes: [N0], services: [service()], instances: [instance(N1, CART, 2)] });
  assert.equal(ask(orphan, NAME), { ...ask(orphan, NAME), rcode: 'NOERROR', addresses: [], soa: 'SOA' });
});

test('at most eight addresses, nodes that run the service first, and askers begin at different ones', () => {
  const many = tableOf({ nodes: NODES, services: [service()], instances: [instance(NODES[11]!, CART, 1)] });
  const firsts = new Set<string>();
  for (let id = 0; id < 16; id++) {
    const reply = answerOutside(many, query(NAME, 'A', { id }), 'udp');
    const { answers = [] } = packet.decode(reply!);
    assert.is(answers.length, 8);
    const addresses = answers.map((one) => ('data' in one ? String(one.data) : ''));
    assert.ok(addresses.includes('10.0.0.12'));
    firsts.add(addresses[0]!);
  }
  assert.is(firsts.size, 8);
});

test('negative answers: NODATA for what exists, NXDOMAIN for what does not, both with the SOA', () => {
  const nodata = [
    'idle.v1.shop.prod.edge.example.org A',
    `${NAME} AAAA`,
    'v1.shop.prod.edge.example.org A',
    'prod.edge.example.org A',
    'edge.example.org A',
  ];
  for (const one of nodata) {
    const [name = '', type = ''] = one.split(' ');
    const { rcode, addresses, soa } = ask(live, name, type);
    assert.equal({ rcode, addresses, soa }, { rcode: 'NOERROR', addresses: [], soa: 'SOA' }, one);
  }
  for (const name of [
    'hidden.v1.shop.prod.edge.example.org',
    'nosuch.edge.example.org',
    `x.${NAME}`,
    'a b.edge.example.org',
  ]) {
    const { rcode, soa } = ask(live, name);
    assert.equal({ rcode, soa }, { rcode: 'NXDOMAIN', soa: 'SOA' }, name);
  }
});

test('the apex has SOA and NS, the name server its address; other zones, classes and transfers are refused', () => {
  assert.is(ask(live, 'edge.example.org', 'SOA').addresses.length, 1);
  assert.equal(ask(live, 'edge.example.org', 'NS').addresses, ['ns.edge.example.org']);
  assert.equal(ask(live, 'ns.edge.example.org').addresses, ['192.0.2.53']);
  for (const [name, type] of [
    ['example.org', 'A'],
    ['xedge.example.org', 'A'],
    ['.', 'NS'],
    ['edge.example.org', 'AXFR'],
  ] as const) {
    const { rcode, aa } = ask(live, name, type);
    assert.equal([rcode, aa], ['REFUSED', false], name);
  }
  assert.is(ask(live, NAME, 'A', { questions: [{ name: NAME, type: 'A', class: 'CH' }] }).rcode, 'REFUSED');
  assert.is(ask(tableOf({ synced: false }), NAME).rcode, 'SERVFAIL', 'nothing is known yet');
});

test('EDNS is answered, an unknown version refused, and an answer has as many addresses as fit', () => {
  const opt = (ednsVersion: number) => ({
    additionals: [
      { type: 'OPT', name: '.', udpPayloadSize: 4096, ednsVersion, extendedRcode: 0, flags: 0, options: [] },
    ],
  });
  assert.is(ask(live, NAME, 'A', opt(0)).opt, 1);
  const bad = packet.decode(answerOutside(live, query(NAME, 'A', opt(1)), 'udp')!);
  const [answered] = bad.additionals ?? [];
  assert.is((answered as { extendedRcode?: number } | undefined)?.extendedRcode, 1);
  const long = sid(`${'a'.repeat(40)}.${'b'.repeat(40)}.${'c'.repeat(40)}.${'d'.repeat(40)}`);
  const table = tableOf({ nodes: NODES, services: [service(long)], instances: [instance(N0, long, 1)] });
  const name = outsideName(long, ZONE);
  assert.is(ask(table, name).addresses.length, 1, 'as many as fit into 512');
  assert.is(ask(table, name, 'A', opt(0)).addresses.length, 5, 'as many as fit into 1,232');
  const tcp = packet.decode(answerOutside(table, query(name, 'A'), 'tcp')!);
  assert.is(tcp.answers?.length, 8);
});

test('hostile messages get an error or silence, never an exception', () => {
  const silent = [Buffer.alloc(0), Buffer.alloc(11), packet.encode({ type: 'response', id: 1 })];
  for (const message of silent) assert.is(answerOutside(live, message, 'udp'), undefined);
  const whole = query(NAME, 'A');
  for (let length = 12; length < whole.length; length++) {
    const reply = answerOutside(live, whole.subarray(0, length), 'udp');
    assert.ok(reply === undefined || (reply.readUInt16BE(2) & 15) === 1, `cut at ${length}`);
  }
  const update = Buffer.from(whole);
  update.writeUInt16BE(0x2800, 2);
  assert.is(answerOutside(live, update, 'udp')!.readUInt16BE(2) & 15, 4, 'NOTIMP');
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 300 }), fc.nat(whole.length), (noise, at) => {
      const mixed = Buffer.concat([whole.subarray(0, at), noise]);
      answerOutside(live, noise, 'udp');
      const reply = answerOutside(live, mixed, 'udp');
      if (reply !== undefined) assert.ok(reply.length >= 12 && reply.length <= 1232);
    }),
    { seed: 20261121, numRuns: 3_000 },
  );
});

test('parseZone refuses what cannot be delegated, and knows its name server', () => {
  for (const bad of [
    '',
    'org',
    'a..b',
    '-a.b',
    'a_b.org',
    `${'x'.repeat(64)}.org`,
    'a.b/c',
    `${'a.'.repeat(80)}org`,
  ])
    assert.not(parseZone(bad).ok, bad);
  assert.equal(ZONE, {
    domain: 'edge.example.org',
    nameServer: 'ns.edge.example.org',
    address: ip('192.0.2.53'),
  });
  assert.equal(unwrap(parseZone('e.org', { nameServer: 'NS1.other.net.', address: ipv4(1) })), {
    domain: 'e.org',
    nameServer: 'ns1.other.net',
  });
});

test.run();
