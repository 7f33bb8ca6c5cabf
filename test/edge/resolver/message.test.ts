import { decode, encode, type Packet } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  checkUpstreamAnswer,
  encodeDecision,
  parseQuery,
  type Query,
  udpLimit,
} from '../../../edge/resolver/message.ts';
import { answer } from '../../../edge/resolver/resolver.ts';
import { Rng } from '../../../src/rng.ts';
import { CART_ANY, service, world } from './world.ts';

const table = world();

function wire(packet: Packet): Buffer {
  return encode({ type: 'query', id: 0x1234, flags: 0x0100, ...packet });
}
function ask(name: string, type = 'A', more: Packet = {}): Query {
  const parsed = parseQuery(wire({ questions: [{ name, type: type as 'A', class: 'IN' }], ...more }));
  if (!('query' in parsed)) throw new Error('not a query');
  return parsed.query;
}
const OPT = { type: 'OPT', name: '.', udpPayloadSize: 4096, flags: 0x8000, options: [] } as never;

function reply(
  query: Query,
  limit = udpLimit(query),
): { readonly bytes: Buffer; readonly message: ReturnType<typeof decode> & { rcode?: string } } {
  const decision = answer(query, table);
  if (decision.kind === 'forward') throw new Error('would be forwarded');
  const bytes = encodeDecision(query, decision, limit);
  return { bytes, message: decode(bytes) };
}

test('encodeDecision repeats id, question bytes and RD, and sets QR, AA and RA', () => {
  const { bytes, message } = reply(ask('SHOP.prod.Cart.v1.any.closest.local'));
  assert.is(message.id, 0x1234);
  assert.is(bytes.readUInt16BE(2), 0x8580);
  assert.is(message.questions![0]!.name, 'SHOP.prod.Cart.v1.any.closest.local');
  assert.equal(
    message.answers!.map((record) => [record.name, record.type, (record as { data: unknown }).data]),
    [['SHOP.prod.Cart.v1.any.closest.local', 'A', '172.30.0.2']],
  );
  assert.is(message.additionals!.length, 0, 'no OPT for an asker without EDNS');
});

test('encodeDecision answers EDNS with EDNS, repeats DO, and explains a refusal in words', () => {
  const { message } = reply(ask('shop.prod.cart.v1.1.closest.local', 'A', { additionals: [OPT] }));
  assert.is(message.rcode, 'NXDOMAIN');
  const opt = message.additionals![0] as unknown as {
    type: string;
    flag_do: boolean;
    options: { code: number; data: Buffer }[];
  };
  assert.is(opt.type, 'OPT');
  assert.is(opt.flag_do, true);
  assert.is(opt.options[0]!.code, 15);
  assert.match(opt.options[0]!.data.subarray(2).toString(), 'must be "any" with policy "closest"');
});

test('encodeDecision puts an SOA beside NODATA and NXDOMAIN', () => {
  for (const query of [ask(CART_ANY, 'AAAA'), ask('shop.prod.nil.v1.any.closest.local')]) {
    const { message } = reply(query);
    assert.is(message.answers!.length, 0);
    assert.is(message.authorities![0]!.type, 'SOA');
    assert.is(message.authorities![0]!.name, 'closest.local');
  }
});

test('encodeDecision cuts what does not fit and sets TC; over TCP it is whole', () => {
  table.putService(
    service(
      'shop.prod.many.v1',
      '172.30.7.1',
      Array.from({ length: 40 }, (_, i) => 8000 + i),
    ),
  );
  const query = ask('shop.prod.many.v1.any.closest.local', 'SRV');
  const cut = reply(query);
  assert.ok(cut.bytes.length <= 512);
  assert.is(cut.message.flag_tc, true);
  assert.is(cut.message.answers!.length, 0);
  assert.is(cut.message.questions!.length, 1);
  const whole = reply(query, 65_535);
  assert.is(whole.message.flag_tc, false);
  assert.is(whole.message.answers!.length, 40);
  const edns = ask('shop.prod.many.v1.any.closest.local', 'SRV', { additionals: [OPT] });
  assert.is(udpLimit(edns), 1232);
});

test('parseQuery is silent to answers and fragments, and says FORMERR or NOTIMP to the rest', () => {
  const good = wire({ questions: [{ name: CART_ANY, type: 'A' }] });
  const answered = Buffer.from(good);
  answered[2] = answered[2]! | 0x80;
  assert.equal(parseQuery(answered), { reply: undefined });
  for (let length = 0; length < good.length; length++) {
    const parsed = parseQuery(good.subarray(0, length));
    assert.ok('reply' in parsed, `${length} octets`);
    if (length < 12) assert.is(parsed.reply, undefined);
    else assert.is(parsed.reply!.readUInt16BE(2) & 0x800f, 0x8001);
  }
  const status = Buffer.from(good);
  status[2] = 0x10;
  const parsed = parseQuery(status);
  assert.is('reply' in parsed && parsed.reply!.readUInt16BE(2) & 0xf, 4);
  for (const questions of [
    [],
    [
      { name: CART_ANY, type: 'A' as const },
      { name: CART_ANY, type: 'A' as const },
    ],
  ]) {
    const many = parseQuery(wire({ questions }));
    assert.is('reply' in many && many.reply!.readUInt16BE(2) & 0xf, 1);
  }
});

/** A query whose question is these raw labels. */
function raw(labels: readonly (string | Buffer)[], tail = Buffer.from([0, 0, 1, 0, 1])): Buffer {
  const header = Buffer.from([0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
  return Buffer.concat([
    header,
    ...labels.flatMap((label) => [Buffer.from([label.length]), Buffer.from(label as string)]),
    tail,
  ]);
}

test('parseQuery marks a dot or a strange octet inside a label, and refuses pointers and over-long names', () => {
  const dotted = parseQuery(raw(['shop.prod', 'cart.v1.any', 'closest', 'local']));
  assert.ok('query' in dotted && !dotted.query.plain);
  const binary = parseQuery(raw([Buffer.from([0xff, 0xfe, 0x41]), 'closest', 'local']));
  assert.ok('query' in binary && !binary.query.plain);
  const straight = parseQuery(raw(['shop', 'local']));
  assert.ok('query' in straight && straight.query.plain);
  const isFormerr = (message: Buffer, what: string): void => {
    const parsed = parseQuery(message);
    assert.ok('reply' in parsed && (parsed.reply!.readUInt16BE(2) & 0xf) === 1, what);
  };
  isFormerr(raw(['a'], Buffer.from([0xc0, 0x0c, 0, 1, 0, 1])), 'a pointer to itself');
  isFormerr(raw([], Buffer.from([0xc0, 0x00, 0, 1, 0, 1])), 'a pointer into the header');
  isFormerr(raw([Buffer.alloc(64, 0x61)]), 'a label of 64 octets');
  isFormerr(raw(Array.from({ length: 130 }, () => 'a')), 'a name of 261 octets');
  const counts = Buffer.from(raw(['a', 'local']));
  counts.writeUInt16BE(65_535, 6);
  counts.writeUInt16BE(65_535, 10);
  isFormerr(counts, 'counts without records');
});

test('parseQuery survives 100,000 random and mutated datagrams, fast and without a wrong answer', () => {
  const rng = new Rng(20261121);
  const seeds = [
    wire({ questions: [{ name: CART_ANY, type: 'A' }] }),
    wire({ questions: [{ name: 'shop.prod.cart.v1.1.fixed.local', type: 'SRV' }], additionals: [OPT] }),
    wire({ questions: [{ name: '2.0.30.172.in-addr.arpa', type: 'PTR' }] }),
  ];
  let answered = 0;
  for (let i = 0; i < 100_000; i++) {
    let message: Buffer;
    if (i % 2 === 0) {
      message = Buffer.alloc(rng.u32() % 80);
      for (let j = 0; j < message.length; j++) message[j] = rng.u32() & 255;
    } else {
      message = Buffer.from(seeds[i % 3]!);
      for (let k = rng.u32() % 4; k >= 0; k--) message[rng.u32() % message.length] = rng.u32() & 255;
      if (rng.u32() % 8 === 0) message = message.subarray(0, rng.u32() % message.length);
    }
    const parsed = parseQuery(message);
    if ('reply' in parsed) {
      assert.ok(parsed.reply === undefined || parsed.reply.length === 12);
      continue;
    }
    const { query } = parsed;
    const decision = answer(query, table);
    if (decision.kind === 'forward' || !query.plain) continue;
    const bytes = encodeDecision(query, decision, udpLimit(query));
    assert.is(bytes.readUInt16BE(0), message.readUInt16BE(0));
    assert.ok(
      bytes.subarray(12, 12 + query.question.length).equals(query.question),
      'the question comes back',
    );
    if (decision.kind !== 'answer') continue;
    answered++;
    for (const record of decode(bytes).answers ?? [])
      if (record.type === 'A') {
        const right = answer({ name: query.name, type: 'A' }, table);
        assert.is(right.kind, 'answer');
        assert.match(record.data, /^172\.30\./);
      }
  }
  assert.ok(answered > 1_000, `${answered} of the mutants still were good questions`);
});

test('checkUpstreamAnswer survives 100,000 mutated answers and never takes another question for this one', () => {
  const rng = new Rng(7);
  const query = ask('example.org');
  const good = encode({
    type: 'response',
    id: 5,
    flags: 0x0180,
    questions: [{ name: 'example.org', type: 'A' }],
    answers: [
      { type: 'CNAME', name: 'example.org', ttl: 30, data: 'www.example.net' },
      { type: 'A', name: 'www.example.net', ttl: 60, data: '192.0.2.1' },
    ],
  });
  assert.equal(checkUpstreamAnswer(good, 5, query.question)?.ttlS, 30);
  for (let i = 0; i < 100_000; i++) {
    const bent = Buffer.from(good);
    for (let k = rng.u32() % 5; k >= 0; k--) bent[rng.u32() % bent.length] = rng.u32() & 255;
    const seen = checkUpstreamAnswer(
      i % 3 === 0 ? bent.subarray(0, rng.u32() % bent.length) : bent,
      5,
      query.question,
    );
    if (seen === undefined) continue;
    assert.is(bent.readUInt16BE(0), 5);
    assert.is(bent.toString('latin1', 13, 20).toLowerCase(), 'example');
    for (const offset of seen.ttlOffsets) assert.ok(offset + 4 <= bent.length);
  }
});

test('checkUpstreamAnswer takes the negative TTL from the SOA (RFC 2308)', () => {
  const query = ask('nil.example.org');
  const soa = { mname: 'a', rname: 'b', serial: 1, refresh: 1, retry: 1, expire: 1, minimum: 20 };
  const message = encode({
    type: 'response',
    id: 5,
    flags: 0x0183,
    questions: [{ name: 'nil.example.org', type: 'A' }],
    authorities: [{ type: 'SOA', name: 'example.org', ttl: 900, data: soa }],
  });
  assert.is(checkUpstreamAnswer(message, 5, query.question)?.ttlS, 20);
});

test('checkUpstreamAnswer keeps a denial behind an alias no longer than the denial and the alias (RFC 2308 §2.1)', () => {
  const query = ask('alias.example.org');
  const soa = { mname: 'a', rname: 'b', serial: 1, refresh: 1, retry: 1, expire: 1, minimum: 20 };
  const seen = (rcode: number, aliasTtl: number, withSoa = true) =>
    checkUpstreamAnswer(
      encode({
        type: 'response',
        id: 5,
        flags: 0x0180 | rcode,
        questions: [{ name: 'alias.example.org', type: 'A' }],
        answers: [{ type: 'CNAME', name: 'alias.example.org', ttl: aliasTtl, data: 'nil.example.net' }],
        authorities: withSoa ? [{ type: 'SOA', name: 'example.net', ttl: 900, data: soa }] : [],
      }),
      5,
      query.question,
    );
  for (const rcode of [0, 3]) {
    assert.is(seen(rcode, 3_600)?.ttlS, 20);
    assert.is(seen(rcode, 3_600)?.negative, true);
    assert.is(seen(rcode, 7)?.ttlS, 7);
    assert.is(seen(rcode, 3_600, false)?.ttlS, 0, 'a denial without SOA is not kept (§5)');
  }
});

test.run();
