import { decode, encode, type Packet } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
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

interface Node {
  readonly table: RouteTable;
  readonly claims: AliasClaims;
}
const node = (address: string, table = published()): Node => ({
  table,
  claims: new AliasClaims({
    aliases: [{ name: 'cart.local', service: CART }],
    table,
    address: ip(address),
    seed: 9,
  }),
});

/** Runs the nodes on one LAN until nothing is due before `untilMs`; returns what was said, one line each. */
function lan(nodes: readonly Node[], fromMs: number, untilMs: number): string[] {
  const lines: string[] = [];
  for (let now = fromMs; now <= untilMs; now += 10) {
    for (const { claims } of nodes) {
      if ((claims.deadline() ?? Number.POSITIVE_INFINITY) <= now) claims.handleTimeout(now);
      for (let out = claims.poll(); out !== undefined; out = claims.poll()) {
        lines.push(`${now} ${line(out)}`);
        for (const other of nodes) {
          if (other.claims === claims) continue;
          const packet = decode(encode(out));
          if (packet.type === 'query') {
            other.claims.handleProbe(packet, now);
            // What the responder does with a held name (§8.1).
            const held = other.claims.resolve({ name: 'cart.local', type: 'A' });
            if (held.kind === 'answer' && held.records[0]?.type === 'A')
              claims.handleResponse(
                decode(
                  encode({
                    type: 'response',
                    answers: [{ type: 'A', name: 'cart.local', ttl: 120, data: '10.0.0.9' }],
                  }),
                ),
                now,
              );
          } else other.claims.handleResponse(packet, now);
        }
      }
    }
  }
  return lines;
}
function line(packet: Packet): string {
  if (packet.type === 'query') return 'probe';
  const record = packet.answers![0]! as { ttl: number; data: string };
  return record.ttl === 0 ? 'goodbye' : `is ${record.data}`;
}
const held = ({ claims }: Node): boolean =>
  claims.resolve({ name: 'cart.local', type: 'A' }).kind === 'answer';

test('AliasClaims probes three times, a quarter of a second apart, before it answers and announces twice', () => {
  const one = node('10.0.0.1');
  one.claims.changed(0);
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
  first.claims.changed(0);
  lan([first], 0, 3_000);
  const second = node('10.0.0.1');
  second.claims.changed(3_000);
  lan([first, second], 3_000, 6_000);
  assert.ok(held(first) && !held(second));
  assert.is(second.claims.counters['mdns_alias_conflicts'], 1);
  first.claims.goodbye();
  const lines = lan([first, second], 6_000, 90_000);
  assert.ok(!held(first) && held(second), lines.join('\n'));
  assert.is(lines.filter((each) => each.endsWith('goodbye')).length, 1);
});

test('AliasClaims of two nodes that probe at once: the greater address wins (§8.2), and nothing storms', () => {
  const low = node('10.0.0.1');
  const high = node('10.0.0.9');
  low.claims.changed(0);
  high.claims.changed(0);
  const lines = lan([low, high], 0, 40_000);
  assert.ok(held(high) && !held(low), lines.join('\n'));
  assert.ok(lines.length <= 12, lines.join('\n'));
});

test('AliasClaims serves only exposed services with a published port, and says goodbye when that ends', () => {
  const one = node('10.0.0.1');
  const open = one.table.service(CART)!;
  one.table.putService({ ...open, descriptor: { ...open.descriptor, exposed: false } });
  one.claims.changed(0);
  assert.equal(lan([one], 0, 2_000), []);
  one.table.putService(open);
  one.claims.changed(2_000);
  lan([one], 2_000, 5_000);
  assert.ok(held(one));
  one.table.deleteService(CART);
  one.claims.changed(5_000);
  assert.equal(lan([one], 5_000, 8_000), ['5000 goodbye']);
  assert.not(held(one));
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
