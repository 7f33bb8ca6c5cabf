import process from 'node:process';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { type DecodedPacket, decode, encode, type Packet } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { type MdnsOutput, MdnsResponder, type MdnsSource } from '../../../edge/resolver/mdns.ts';
import type { RouteTable } from '../../../edge/routes/table.ts';
import { Rng } from '../../../src/rng.ts';
import { CART, CART_ANY, id, instance, service, world } from './world.ts';

const PEER: MdnsSource = { address: '172.16.0.66', port: 5353, direct: false };
const OTHER: MdnsSource = { ...PEER, address: '172.16.0.67' };
const LEGACY: MdnsSource = { ...PEER, port: 40_000 };

interface Bench {
  readonly table: RouteTable;
  readonly mdns: MdnsResponder;
  /** Everything that is to be sent now, one line each. */
  said(): string[];
}

function bench(): Bench {
  const table = world();
  const mdns = new MdnsResponder({ table, seed: 1 });
  const said = (): string[] => {
    const lines: string[] = [];
    for (let out = mdns.poll(); out !== undefined; out = mdns.poll()) lines.push(line(out));
    return lines;
  };
  return { table, mdns, said };
}

/** `multicast aa: A name 120 flush address + NSEC name 120 flush A,SRV`, through the wire format and back. */
function line(out: MdnsOutput): string {
  const packet = decode(encode(out.packet));
  const records = (list: DecodedPacket['answers']): string =>
    (list ?? [])
      .map((record) => {
        const { type, name, ttl, flush, data } = record as unknown as {
          type: string;
          name: string;
          ttl: number;
          flush: boolean;
          data: { rrtypes?: string[]; port?: number };
        };
        const shown = type === 'NSEC' ? data.rrtypes!.join(',') : type === 'SRV' ? data.port : String(data);
        return `${type} ${name} ${ttl}${flush ? ' flush' : ''} ${shown}`;
      })
      .join('; ');
  const to = out.kind === 'unicast' ? `unicast ${out.to.address}:${out.to.port}` : 'multicast';
  const more = packet.additionals!.length > 0 ? ` + ${records(packet.additionals)}` : '';
  const head = `${packet.flag_aa ? 'aa' : 'no aa'} id ${packet.id} q ${packet.questions!.length}`;
  return `${to} ${head}: ${records(packet.answers)}${more}`;
}

function query(
  questions: readonly { name: string; type: string; qu?: boolean }[],
  more: Packet = {},
): DecodedPacket {
  const message = encode({
    type: 'query',
    questions: questions.map(({ name, type }) => ({ name, type: type as 'A', class: 'IN' })),
    ...more,
  });
  let end = 12;
  for (const { name, qu } of questions) {
    end += name.length + 2 + 4;
    if (qu === true) message[end - 2] = 0x80;
  }
  return decode(message);
}
const A = [{ name: CART_ANY, type: 'A' }];
const QU = [{ name: CART_ANY, type: 'A', qu: true }];
const FIXED = 'shop.prod.cart.v1.2.fixed.local';
const ANSWER = `A ${CART_ANY} 120 flush 172.30.0.2 + NSEC ${CART_ANY} 120 flush A,SRV`;
const MULTICAST = `multicast aa id 0 q 0: ${ANSWER}`;

test('handleQuery multicasts A with cache-flush and an NSEC beside it, id 0 and without the question (§18, §10.2)', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(A, { id: 99 }), PEER, 0);
  assert.equal(said(), [MULTICAST]);
});

test('handleQuery answers a type that does not exist with NSEC, and silence to names that are not there (§6.1)', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query([{ name: CART_ANY, type: 'AAAA' }]), PEER, 0);
  assert.equal(said(), [`multicast aa id 0 q 0: NSEC ${CART_ANY} 120 flush A,SRV`]);
  for (const name of [
    'shop.prod.nil.v1.any.closest.local',
    'printer.local',
    'closest.local',
    'any.closest.local',
    'shop.prod.cart.v1.1.closest.local',
    'example.org',
  ])
    mdns.handleQuery(query([{ name, type: 'A' }]), PEER, 0);
  assert.equal(said(), []);
  assert.is(mdns.counters['mdns_unowned'], 6);
});

test('handleQuery answers a legacy asker by unicast: id and question repeated, TTL at most 10, no flush (§6.7)', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(A, { id: 4711 }), LEGACY, 0);
  assert.equal(said(), [
    `unicast 172.16.0.66:40000 aa id 4711 q 1: A ${CART_ANY} 10 172.30.0.2 + NSEC ${CART_ANY} 10 A,SRV`,
  ]);
  mdns.handleQuery(query([{ name: CART_ANY.toUpperCase(), type: 'A' }], { id: 1 }), LEGACY, 1);
  assert.match(said()[0]!, /^unicast 172.16.0.66:40000 aa id 1 q 1: A SHOP/);
});

test('handleQuery honours QU when the record was multicast lately, and multicasts when it was not (§5.4)', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(QU), PEER, 0);
  assert.equal(said(), [MULTICAST], 'never multicast: all caches profit');
  mdns.handleQuery(query(QU), PEER, 29_000);
  assert.equal(said(), [`unicast 172.16.0.66:5353 aa id 0 q 0: ${ANSWER}`]);
  mdns.handleQuery(query(QU), PEER, 30_000);
  assert.equal(said(), [MULTICAST], 'a quarter of the TTL has passed');
  mdns.handleQuery(query(A), { ...PEER, direct: true }, 32_000);
  assert.match(said()[0]!, /^unicast/, 'a query sent to our own address (§5.5)');
});

test('handleQuery says nothing that the asker knows for at least half its life (§7.1)', () => {
  const known = (ttl: number, data = '172.30.0.2'): Packet => ({
    answers: [{ type: 'A', name: CART_ANY, ttl, data }],
  });
  const { mdns, said } = bench();
  mdns.handleQuery(query(A, known(60)), PEER, 0);
  assert.equal(said(), []);
  mdns.handleQuery(query(A, known(59)), PEER, 0);
  assert.equal(said(), [MULTICAST]);
  mdns.handleQuery(query(A, known(120, '172.30.0.9')), PEER, 5_000);
  assert.equal(said(), [MULTICAST], 'another address is not our record');
});

test('handleQuery waits 400–500 ms for more known answers when TC is set, and drops what they name (§7.2)', () => {
  const { mdns, said } = bench();
  const tc: Packet = { flags: 0x0200 };
  mdns.handleQuery(query(A, tc), PEER, 1_000);
  assert.equal(said(), []);
  const due = mdns.deadline()!;
  assert.ok(due >= 1_400 && due <= 1_500, String(due));
  mdns.handleQuery(
    query([], { answers: [{ type: 'A', name: CART_ANY, ttl: 120, data: '172.30.0.2' }] }),
    OTHER,
    1_100,
  );
  assert.is(mdns.deadline(), due, 'what somebody else knows does not count');
  mdns.handleQuery(
    query([], { answers: [{ type: 'A', name: CART_ANY, ttl: 120, data: '172.30.0.2' }] }),
    PEER,
    1_200,
  );
  assert.is(mdns.deadline(), undefined);
  mdns.handleQuery(query(A, tc), PEER, 2_000);
  mdns.handleTimeout(2_500);
  assert.equal(said(), [MULTICAST]);
});

test('handleQuery multicasts a record at most once a second; the second asker is served when it has passed (§6)', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(A), PEER, 0);
  assert.is(said().length, 1);
  for (let now = 10; now < 1_000; now += 90) mdns.handleQuery(query(A), OTHER, now);
  assert.equal(said(), []);
  assert.is(mdns.deadline(), 1_000);
  mdns.handleTimeout(999);
  assert.equal(said(), []);
  mdns.handleTimeout(1_000);
  assert.equal(said(), [MULTICAST]);
  assert.is(mdns.deadline(), undefined);
});

test('handleTimeout sends a record that was asked for between two announcements once a second, not twice at once (§6)', () => {
  const { mdns, said } = bench();
  mdns.changed([CART], 0);
  assert.is(said().length, 1);
  mdns.handleQuery(query(A), PEER, 500);
  const seen: string[] = [];
  for (let next = mdns.deadline(); next !== undefined; next = mdns.deadline()) {
    mdns.handleTimeout(next);
    for (const one of said()) if (one.includes(`A ${CART_ANY}`)) seen.push(`${next}`);
  }
  assert.equal(seen, ['1000', '2000']);
});

test('handleQuery does not say again what a plain question has just made it say (§6, §7.2)', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(A, { flags: 0x0200 }), PEER, 0);
  mdns.handleQuery(query(A), OTHER, 10);
  assert.equal(said(), [MULTICAST]);
  assert.is(mdns.deadline(), undefined, 'the first asker has heard it too');
});

test('handleQuery keeps an answer that one asker knows for the others who wait for it (§7.2)', () => {
  const known: Packet = { answers: [{ type: 'A', name: CART_ANY, ttl: 120, data: '172.30.0.2' }] };
  for (const flags of [0x0200, 0]) {
    const { mdns, said } = bench();
    if (flags === 0) {
      mdns.handleQuery(query(A), OTHER, 0);
      said();
    }
    mdns.handleQuery(query(A, { flags: 0x0200 }), PEER, 10);
    mdns.handleQuery(query(A, { flags }), OTHER, 20);
    mdns.handleQuery(query([], known), PEER, 30);
    mdns.handleTimeout(1_500);
    assert.equal(said(), [MULTICAST], `flags ${flags}`);
  }
  const { mdns, said } = bench();
  for (const each of [PEER, OTHER]) mdns.handleQuery(query(A, { flags: 0x0200 }), each, 0);
  for (const each of [PEER, OTHER]) mdns.handleQuery(query([], known), each, 100);
  mdns.handleTimeout(1_500);
  assert.equal(said(), [], 'both know it');
});

test('handleQuery sends the SRV set of a name whole, since cache-flush drops what it lacks (§10.2)', () => {
  const { table, mdns, said } = bench();
  const srv = (port: number) => ({
    type: 'SRV' as const,
    name: CART_ANY,
    ttl: 120,
    data: { port, target: CART_ANY },
  });
  const SRV = [{ name: CART_ANY, type: 'SRV' }];
  mdns.handleQuery(query(SRV, { answers: [srv(80), srv(443)] }), PEER, 0);
  assert.equal(said(), [], 'all of it is known');
  table.putService(service(CART, '172.30.0.1', [80, 443, 9000]));
  mdns.handleQuery(query(SRV, { answers: [srv(80), srv(443)] }), PEER, 1_000);
  assert.match(said()[0]!, /: SRV \S+ 120 flush 80; SRV \S+ 120 flush 443; SRV \S+ 120 flush 9000/);
  table.putService(service(CART, '172.30.0.1', [80]));
  mdns.changed([CART], 3_000);
  assert.match(said().join('\n'), /SRV \S+ 120 flush 80(?!; SRV)/, 'a smaller set is announced');
});

test('poll gives no message that is longer than the link carries, additionals included (§17)', () => {
  for (const mtu of [undefined, 1_280, 576]) {
    const table = world();
    const mdns = new MdnsResponder({ table, seed: 1, ...(mtu === undefined ? {} : { mtu }) });
    const ids = Array.from({ length: 40 }, (_, i) => id(`${'x'.repeat(30)}.prod.s${i}.${'v'.repeat(40)}`));
    for (const [i, each] of ids.entries())
      table.putService(service(each, `172.30.16.${i * 4}`, [80, 443, 8080, 9000]));
    const questions = ids
      .slice(0, 8)
      .flatMap((each) =>
        ['A', 'SRV', 'AAAA', 'ANY'].map((type) => ({ name: `${each}.any.closest.local`, type })),
      );
    mdns.handleQuery(query(questions), PEER, 0);
    mdns.handleQuery(query(questions.slice(0, 2)), LEGACY, 0);
    mdns.changed(ids, 2_000);
    mdns.goodbye();
    let messages = 0;
    for (let out = mdns.poll(); out !== undefined; out = mdns.poll()) {
      const length = encode(out.packet).length;
      assert.ok(length + 28 <= Math.min(1_440, mtu ?? 1_440), `${length} octets at MTU ${mtu}`);
      messages++;
    }
    assert.ok(messages > 8);
  }
});

test('handleQuery puts all answers of a message into as few messages as hold them', () => {
  const { table, mdns, said } = bench();
  const ports = Array.from({ length: 40 }, (_, i) => 9000 + i);
  table.putService(service('shop.prod.many.v1', '172.30.7.1', ports));
  const many = 'shop.prod.many.v1.any.closest.local';
  mdns.handleQuery(query([{ name: many, type: 'SRV' }, ...A]), PEER, 0);
  const lines = said();
  assert.is(lines.join('').split('SRV shop').length - 1, 40);
  assert.ok(lines.length <= 4, `${lines.length} messages`);
  mdns.handleQuery(query([{ name: many, type: 'ANY' }], { id: 3 }), LEGACY, 0);
  assert.is(said().length, 1);
});

test('handleQuery answers a probe by unicast at once, or by multicast after a quarter of a second (§8.1, §6)', () => {
  const { mdns, said } = bench();
  const claim: Packet = { authorities: [{ type: 'A', name: CART_ANY, ttl: 120, data: '172.16.0.66' }] };
  mdns.handleQuery(query([{ name: CART_ANY, type: 'ANY', qu: true }], claim), PEER, 0);
  assert.match(said()[0]!, /^unicast 172.16.0.66:5353 aa id 0 q 0: A .*172.30.0.2; SRV .* 80; SRV .* 443/);
  mdns.handleQuery(query(A), PEER, 0);
  said();
  mdns.handleQuery(query(A, claim), PEER, 100);
  assert.is(mdns.deadline(), 250);
});

test('handleResponse spares an answer that somebody else has just given (§7.4)', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(A), PEER, 0);
  said();
  mdns.handleQuery(query(A), OTHER, 500);
  mdns.handleResponse(
    decode(
      encode({ type: 'response', answers: [{ type: 'A', name: CART_ANY, ttl: 120, data: '172.30.0.2' }] }),
    ),
    700,
  );
  assert.is(mdns.deadline(), undefined);
  assert.equal(said(), []);
});

test('changed announces twice, a second apart, and says goodbye with TTL 0 (§8.3, §10.1)', () => {
  const { table, mdns, said } = bench();
  table.putService(service('shop.prod.db.v1', '172.30.4.1'));
  mdns.changed([id('shop.prod.db.v1')], 0);
  const names = (ttl: number): string =>
    ['roundrobin 1', 'closest 2', 'fastest 3']
      .map((pair) => pair.split(' ') as [string, string])
      .map(
        ([policy, last]) =>
          `A shop.prod.db.v1.any.${policy}.local ${ttl}${ttl > 0 ? ' flush' : ''} 172.30.4.${last}`,
      )
      .join('; ');
  assert.equal(said(), [`multicast aa id 0 q 0: ${names(120)}`]);
  assert.is(mdns.deadline(), 1_000);
  mdns.handleTimeout(1_000);
  assert.equal(said(), [`multicast aa id 0 q 0: ${names(120)}`]);
  assert.is(mdns.deadline(), undefined);
  mdns.changed([id('shop.prod.db.v1')], 3_000);
  assert.equal(said(), [], 'nothing has changed');
  table.deleteService(id('shop.prod.db.v1'));
  mdns.changed([id('shop.prod.db.v1')], 4_000);
  assert.equal(said(), [`multicast aa id 0 q 0: ${names(0)}`]);
});

test('changed announces a new address once more and forgets announcements of what is gone again', () => {
  const { table, mdns, said } = bench();
  mdns.changed([CART], 0);
  assert.is(said().length, 1);
  table.putService(service(CART, '172.30.8.1'));
  mdns.changed([CART], 500);
  assert.match(said()[0]!, 'closest.local 120 flush 172.30.8.2');
  table.deleteService(CART);
  mdns.changed([CART], 600);
  assert.match(said()[0]!, 'closest.local 0 172.30.8.2');
  mdns.handleTimeout(2_000);
  assert.equal(said(), []);
});

test('changed says goodbye to the name of a single instance only when it was asked for', () => {
  const { table, mdns, said } = bench();
  mdns.changed([CART], 0);
  mdns.handleTimeout(1_000);
  mdns.handleQuery(query([{ name: FIXED, type: 'A' }]), PEER, 1_500);
  said();
  table.deleteInstance(CART, 1);
  table.deleteInstance(CART, 2);
  mdns.changed([CART], 3_000);
  assert.equal(said(), [`multicast aa id 0 q 0: A ${FIXED} 0 172.30.1.2; NSEC ${FIXED} 0 A,SRV`]);
  table.putInstance(instance(CART, 2, '172.16.0.130', '172.30.1.2'));
  mdns.changed([CART], 4_000);
  assert.equal(said(), []);
});

test('changed paces 1,000 services into bursts of full messages', () => {
  const { table, mdns, said } = bench();
  const ids = Array.from({ length: 1_000 }, (_, i) => id(`shop.prod.s${i}.v1`));
  for (const [i, each] of ids.entries())
    table.putService(service(each, `172.30.${16 + (i >> 6)}.${(i & 63) * 4}`));
  mdns.changed(ids, 0);
  let now = 0;
  let messages = 0;
  let most = 0;
  for (let rounds = 0; rounds < 1_000; rounds++) {
    const lines = said();
    messages += lines.length;
    most = Math.max(most, lines.length);
    const next = mdns.deadline();
    if (next === undefined) break;
    now = next;
    mdns.handleTimeout(now);
  }
  assert.is(mdns.counters['mdns_announced'], 6_000);
  assert.ok(most <= 24, `${most} messages at once`);
  assert.ok(messages < 320, `${messages} messages in all`);
  assert.ok(now < 10_000, `${now} ms`);
});

test('goodbye takes back everything that was multicast', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(A), PEER, 0);
  said();
  mdns.goodbye();
  assert.equal(said(), [`multicast aa id 0 q 0: A ${CART_ANY} 0 172.30.0.2; NSEC ${CART_ANY} 0 A,SRV`]);
  assert.is(mdns.deadline(), undefined);
});

test('goodbye and changed take back every type that was multicast (§10.1)', () => {
  const { table, mdns, said } = bench();
  mdns.handleQuery(query([{ name: CART_ANY, type: 'ANY' }]), PEER, 0);
  said();
  table.deleteService(CART);
  mdns.changed([CART], 5_000);
  const [gone] = said();
  for (const record of ['A', 'SRV', 'SRV', 'NSEC'])
    assert.match(gone!, new RegExp(`${record} ${CART_ANY} 0`));
  assert.match(gone!, /SRV \S+ 0 80; SRV \S+ 0 443/);
});

test('handleQuery keeps silent about what the asker does not need', () => {
  const { mdns, said } = bench();
  mdns.handleQuery(query(A), PEER, 0, [id('shop.prod.db.v1')]);
  assert.equal(said(), []);
  mdns.handleQuery(query(A), PEER, 0, [CART]);
  assert.is(said().length, 1);
});

test('handleQuery bounds what one message and one second can make it send', () => {
  const { mdns, said } = bench();
  const many = Array.from({ length: 200 }, (_, i) => ({ name: CART_ANY, type: i % 2 ? 'A' : 'SRV' }));
  mdns.handleQuery(query(many, { id: 1 }), LEGACY, 0);
  const first = said();
  assert.is(first.length, 1);
  assert.ok(first[0]!.split(';').length < 80);
  for (let i = 0; i < 2_000; i++) mdns.handleQuery(query(A, { id: i }), LEGACY, 0);
  assert.is(said().length, 99, 'one asker');
  for (let host = 1; host <= 50; host++)
    for (let i = 0; i < 200; i++)
      mdns.handleQuery(query(A, { id: i }), { ...LEGACY, address: `172.16.0.${host}` }, 0);
  assert.is(said().length, 900, 'all of them together');
  mdns.handleQuery(query(A), LEGACY, 1_500);
  assert.is(said().length, 1);
});

test('handleQuery and handleResponse survive 100,000 mutated messages without growth or a wrong answer', () => {
  const { mdns } = bench();
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  const heldMiB = (): number => {
    collect();
    return process.memoryUsage().heapUsed / 2 ** 20;
  };
  let before = 0;
  let records = 0;
  const rng = new Rng(3);
  const seeds = [
    encode({
      type: 'query',
      questions: [{ name: CART_ANY, type: 'A' }],
      answers: [{ type: 'A', name: CART_ANY, ttl: 90, data: '1.2.3.4' }],
    }),
    encode({
      type: 'query',
      flags: 0x0200,
      questions: [{ name: FIXED, type: 'SRV' }],
    }),
    encode({
      type: 'response',
      answers: [
        { type: 'NSEC', name: CART_ANY, ttl: 120, data: { nextDomain: CART_ANY, rrtypes: ['A'] } } as never,
      ],
    }),
  ];
  for (let i = 0; i < 100_000; i++) {
    // By then everything that is bounded is full.
    if (i === 20_000) before = heldMiB();
    const message = Buffer.from(seeds[i % 3]!);
    for (let k = rng.below(4); k >= 0; k--) message[rng.below(message.length)] = rng.below(256);
    let packet: DecodedPacket;
    try {
      packet = decode(message);
    } catch {
      continue;
    }
    if (packet.type === 'query') mdns.handleQuery(packet, i % 2 ? PEER : LEGACY, i);
    else mdns.handleResponse(packet, i);
    mdns.handleTimeout(i);
    for (let out = mdns.poll(); out !== undefined; out = mdns.poll())
      for (const record of [...(out.packet.answers ?? []), ...(out.packet.additionals ?? [])]) {
        records++;
        const { name, type } = record;
        const lower = name.toLowerCase();
        assert.ok(lower === CART_ANY || lower === FIXED, name);
        if (type === 'A') assert.is(record.data, lower === FIXED ? '172.30.1.2' : '172.30.0.2');
        else assert.ok(type === 'SRV' || (type as string) === 'NSEC', type);
      }
  }
  assert.ok(records > 1_000, `${records} of the mutants' questions were answered`);
  const grown = heldMiB() - before;
  assert.ok(grown < 8, `${grown} MiB more`);
});

test.run();
