import { decode, encode, type Packet } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { MdnsResponder } from '../../../edge/resolver/mdns.ts';
import { AliasClaims, parseAliasName } from '../../../edge/resolver/mdns_alias.ts';
import { RouteTable } from '../../../edge/routes/table.ts';
import { unwrap } from '../../../src/error.ts';
import { CART, ip, service } from './world.ts';

function published(): RouteTable {
  const table = new RouteTable();
  const plain = service(CART, '172.30.0.1');
  const ports = [{ source: 8080, destination: 80, protocol: 'tcp' as const }];
  table.putService({ ...plain, descriptor: { ...plain.descriptor, exposed: true, ports } });
  return table;
}

/** One node's aliases and the responder that speaks for them, joined as mdns_server.ts does it. */
class Node {
  readonly table = published();
  readonly claims: AliasClaims;
  readonly responder: MdnsResponder;
  readonly address: string;

  constructor(address: string) {
    this.address = address;
    const { table } = this;
    const aliases = [{ name: 'cart.local', service: CART }];
    const claims = new AliasClaims({ aliases, table, address: ip(address), seed: 9 });
    this.claims = claims;
    this.responder = new MdnsResponder({
      ...{ table, seed: 9 },
      names: { resolve: (question) => claims.resolve(question), of: (id) => claims.namesOf(id) },
    });
  }
  changed(now: number): void {
    this.claims.changed(now);
    this.responder.changed([CART], now);
  }
  ask(type: string, now: number): void {
    const packet = decode(encode({ type: 'query', questions: [{ name: 'cart.local', type: type as 'A' }] }));
    this.responder.handleQuery(packet, { address: '10.0.0.77', port: 5353, direct: false }, now);
  }
  hear(bytes: Buffer, from: Node, now: number): void {
    const packet = decode(bytes);
    if (packet.type === 'query') {
      this.claims.handleProbe(packet, now);
      this.responder.handleQuery(packet, { address: from.address, port: 5353, direct: false }, now);
    } else {
      this.responder.handleResponse(packet, now);
      this.claims.handleResponse(packet, now);
    }
  }
  /** What leaves now. */
  say(now: number): Packet[] {
    const said: Packet[] = [];
    if ((this.claims.deadline() ?? Number.POSITIVE_INFINITY) <= now) this.claims.handleTimeout(now);
    for (let out = this.claims.poll(); out !== undefined; out = this.claims.poll())
      if (out.kind === 'probe') said.push(out.packet);
      else this.responder.changed([out.service], now);
    if ((this.responder.deadline() ?? Number.POSITIVE_INFINITY) <= now) this.responder.handleTimeout(now);
    for (let out = this.responder.poll(); out !== undefined; out = this.responder.poll())
      said.push(out.packet);
    return said;
  }
}
const node = (address: string): Node => new Node(address);

/** Runs the nodes on one LAN until nothing is due before `untilMs`; returns what was said, one line each. */
function lan(nodes: readonly Node[], fromMs: number, untilMs: number): string[] {
  const lines: string[] = [];
  for (let now = fromMs; now <= untilMs; now += 10)
    for (const speaker of nodes)
      for (const packet of speaker.say(now)) {
        lines.push(`${now} ${line(packet)}`);
        for (const other of nodes) if (other !== speaker) other.hear(encode(packet), speaker, now);
      }
  return lines;
}
/** `probe`, `is 10.0.0.1 + NSEC`, or `goodbye A SRV NSEC`. */
function line(packet: Packet): string {
  if (packet.type === 'query') return 'probe';
  const records = packet.answers as { type: string; ttl: number; data: unknown; flush: boolean }[];
  if (records.every(({ ttl }) => ttl === 0))
    return `goodbye ${records.map(({ type, flush }) => (flush ? `${type}!` : type)).join(' ')}`;
  const said = records.map(({ type, data }) => (type === 'A' ? `is ${data}` : type));
  const more = (packet.additionals ?? []).map(({ type }) => type);
  return [...said, ...more].join(' + ');
}
const held = ({ claims }: Node): boolean =>
  claims.resolve({ name: 'cart.local', type: 'A' }).kind === 'answer';

test('AliasClaims probes three times, a quarter of a second apart, before it answers and announces twice', () => {
  const one = node('10.0.0.1');
  one.changed(0);
  const lines = lan([one], 0, 5_000);
  assert.equal(
    lines.map((each) => each.replace(/^\d+ /, '')),
    ['probe', 'probe', 'probe', 'is 10.0.0.1', 'is 10.0.0.1'],
  );
  const at = lines.map((each) => Number.parseInt(each, 10));
  assert.ok(at[0]! <= 250 && at[2]! - at[0]! >= 500 && at[4]! - at[3]! >= 1_000, String(at));
  assert.is(one.claims.deadline(), undefined);
  const answer = one.claims.resolve({ name: 'CART.local', type: 'SRV' });
  assert.is(answer.kind === 'answer' && answer.records[0]?.type === 'SRV' && answer.records[0].port, 8080);
  assert.is(one.claims.resolve({ name: 'cart.local', type: 'AAAA' }).kind, 'nodata');
  assert.is(one.claims.resolve({ name: 'printer.local', type: 'A' }).kind, 'forward');
});

test('AliasClaims gives up an alias that somebody else has, tries again a minute later, and takes over when it is free', () => {
  const first = node('10.0.0.9');
  first.changed(0);
  lan([first], 0, 3_000);
  const second = node('10.0.0.1');
  second.changed(3_000);
  lan([first, second], 3_000, 6_000);
  assert.ok(held(first) && !held(second));
  assert.is(second.claims.counters['mdns_alias_conflicts'], 1);
  first.responder.goodbye();
  for (const packet of first.say(6_000)) second.hear(encode(packet), first, 6_000);
  lan([second], 6_000, 90_000);
  assert.ok(held(second));
});

test('AliasClaims of two nodes that probe at once: the greater address wins (§8.2), and nothing storms', () => {
  const low = node('10.0.0.1');
  const high = node('10.0.0.9');
  low.changed(0);
  high.changed(0);
  const lines = lan([low, high], 0, 40_000);
  assert.ok(held(high) && !held(low), lines.join('\n'));
  assert.ok(lines.length <= 12, lines.join('\n'));
});

test('AliasClaims serves only exposed services with a published port, and says goodbye when that ends', () => {
  const one = node('10.0.0.1');
  const open = one.table.service(CART)!;
  one.table.putService({ ...open, descriptor: { ...open.descriptor, exposed: false } });
  one.changed(0);
  assert.equal(lan([one], 0, 2_000), []);
  one.table.putService(open);
  one.changed(2_000);
  lan([one], 2_000, 5_000);
  assert.ok(held(one));
  one.ask('SRV', 5_000);
  one.ask('AAAA', 5_000);
  assert.equal(lan([one], 5_000, 6_000), ['5000 SRV + A', '5000 NSEC']);
  one.table.deleteService(CART);
  one.changed(7_000);
  assert.equal(lan([one], 7_000, 9_000), ['7000 goodbye A SRV NSEC']);
  assert.not(held(one));
});

test('AliasClaims that loses an alias takes back what it said of it, and nothing of the other`s (§9, §10.2)', () => {
  const one = node('10.0.0.1');
  one.changed(0);
  lan([one], 0, 3_000);
  one.ask('SRV', 3_000);
  assert.equal(lan([one], 3_000, 4_000), ['3000 SRV + A']);
  const data = { type: 'A', name: 'cart.local', ttl: 120, flush: true, data: '10.0.0.9' } as const;
  one.hear(encode({ type: 'response', answers: [data] }), one, 5_000);
  assert.equal(lan([one], 5_000, 9_000), ['5000 goodbye A SRV']);
  assert.not(held(one));
});

test('AliasClaims announces an alias anew when its port has changed', () => {
  const one = node('10.0.0.1');
  one.changed(0);
  lan([one], 0, 3_000);
  one.ask('SRV', 3_000);
  lan([one], 3_000, 4_000);
  const open = one.table.service(CART)!;
  const ports = [{ source: 9090, destination: 80, protocol: 'tcp' as const }];
  one.table.putService({ ...open, descriptor: { ...open.descriptor, ports } });
  one.changed(5_000);
  assert.equal(lan([one], 5_000, 8_000), ['5000 SRV', '6000 SRV']);
});

test('parseAliasName takes two labels that end in local', () => {
  assert.is(unwrap(parseAliasName('Cart-v1.local.')), 'cart-v1.local');
  for (const bad of [
    'cart',
    'cart.lan',
    'a.cart.local',
    '-a.local',
    '.local',
    'ca_rt.local',
    `${'a'.repeat(64)}.local`,
  ])
    assert.not(parseAliasName(bad).ok, bad);
});

test.run();
