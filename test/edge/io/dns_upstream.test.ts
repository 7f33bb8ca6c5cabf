// The forwarder against real sockets on loopback that behave well, badly and maliciously.
import { createSocket, type RemoteInfo, type Socket } from 'node:dgram';
import { createServer, type Server } from 'node:net';
import { decode, encode } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { frame } from '../../../coordinator/io/dns_sockets.ts';
import { createForwarder, type Forwarder } from '../../../edge/io/dns_upstream.ts';
import { adoptAnswer, parseQuery, type Query } from '../../../edge/resolver/message.ts';
import { parseUpstream } from '../../../edge/resolver/upstream.ts';
import { DNS_CACHE_BYTES_MAX, DNS_CACHE_ENTRIES_MAX, DNS_UPSTREAM_PENDING_MAX } from '../../../src/limits.ts';
import { SILENT } from '../../../src/log.ts';

/** Real time, moved on by hand. */
let aheadMs = 0;
const clock = { monotonicMs: () => performance.now() + aheadMs, wallMs: () => Date.now() };

function query(name: string, id = 1, type: 'A' | 'TXT' = 'A'): Query {
  const parsed = parseQuery(
    encode({ type: 'query', id, flags: 0x0100, questions: [{ type, name, class: 'IN' }] }),
  );
  if (!('query' in parsed)) throw new Error('not a query');
  return parsed.query;
}

interface Fake {
  readonly port: number;
  asked: number;
  tcpAsked: number;
  close(): void;
}
type Behave = (message: Buffer, reply: (bytes: Buffer) => void, from: RemoteInfo) => void;

/** An upstream on loopback, UDP and TCP on one port. */
async function fake(
  behave: Behave,
  behaveTcp?: (message: Buffer) => Buffer,
  address = '127.0.0.1',
): Promise<Fake> {
  // A port that is free for UDP may be taken for TCP.
  for (let tries = 0; tries < 20; tries++) {
    const made = await fakeOnce(behave, behaveTcp, address);
    if (made !== undefined) return made;
  }
  throw new Error('no port is free for both UDP and TCP');
}

async function fakeOnce(
  behave: Behave,
  behaveTcp: ((message: Buffer) => Buffer) | undefined,
  address: string,
): Promise<Fake | undefined> {
  const udp: Socket = createSocket(address.includes(':') ? 'udp6' : 'udp4');
  await new Promise<void>((resolve) => udp.bind(0, address, resolve));
  const { port } = udp.address();
  const tcp: Server = createServer((socket) => {
    socket.on('error', () => {});
    socket.once('data', (data: Buffer) => {
      self.tcpAsked++;
      if (behaveTcp !== undefined) socket.end(frame(behaveTcp(data.subarray(2))));
    });
  });
  const isListening = await new Promise<boolean>((resolve) => {
    tcp.once('error', () => resolve(false));
    tcp.listen(port, address, () => resolve(true));
  });
  if (!isListening) {
    udp.close();
    return undefined;
  }
  const self: Fake = {
    port,
    asked: 0,
    tcpAsked: 0,
    close() {
      udp.close();
      tcp.close();
    },
  };
  udp.on('message', (message, from) => {
    self.asked++;
    behave(message, (bytes) => udp.send(bytes, from.port, from.address), from);
  });
  return self;
}

function answerTo(
  message: Buffer,
  address = '192.0.2.7',
  more: { flags?: number; ttl?: number; id?: number; name?: string } = {},
): Buffer {
  const asked = decode(message);
  const question = asked.questions![0]!;
  return encode({
    type: 'response',
    id: more.id ?? asked.id!,
    flags: 0x0180 | (more.flags ?? 0),
    questions: [{ ...question, name: more.name ?? question.name }],
    answers:
      more.flags === undefined
        ? [{ type: 'A', name: question.name, ttl: more.ttl ?? 300, data: address }]
        : [],
  });
}

async function withForwarder(
  fakes: readonly Fake[],
  body: (forwarder: Forwarder) => Promise<void>,
  servers?: readonly string[],
): Promise<void> {
  const forwarder = createForwarder({
    upstreams: () => servers ?? fakes.map(({ port }) => `127.0.0.1:${port}`),
    log: SILENT,
    clock,
  });
  try {
    await body(forwarder);
  } finally {
    forwarder.stop();
    for (const each of fakes) each.close();
  }
}

async function addressOf(forwarder: Forwarder, asked: Query): Promise<string | undefined> {
  const got = await forwarder.resolve(asked);
  if (got === undefined) return undefined;
  const message = decode(adoptAnswer(got.message, asked, got.ttlOffsets, got.ageS, 1232));
  const record = message.answers![0];
  return record?.type === 'A' ? record.data : `rcode ${(message as { rcode?: string }).rcode}`;
}

test('createForwarder answers from upstream once and then from memory, with the spelling of each asker', async () => {
  const good = await fake((message, reply) => reply(answerTo(message)));
  await withForwarder([good], async (forwarder) => {
    assert.is(await addressOf(forwarder, query('Example.org')), '192.0.2.7');
    const second = query('eXAMPLE.org', 777);
    const got = (await forwarder.resolve(second))!;
    const own = decode(adoptAnswer(got.message, second, got.ttlOffsets, 12, 1232));
    assert.is(own.id, 777);
    assert.is(own.questions![0]!.name, 'eXAMPLE.org');
    assert.is((own.answers![0] as { ttl: number }).ttl, 288);
    assert.is(forwarder.counters['upstream_cached'], 1);
  });
});

test('createForwarder lets askers of one question share one exchange', async () => {
  const slow = await fake((message, reply) => setTimeout(() => reply(answerTo(message)), 50));
  await withForwarder([slow], async (forwarder) => {
    const all = await Promise.all(
      Array.from({ length: 50 }, (_, i) => addressOf(forwarder, query('one.example', i))),
    );
    assert.equal(new Set(all), new Set(['192.0.2.7']));
    assert.is(forwarder.counters['upstream_joined'], 49);
  });
});

test('createForwarder takes only the answer that matches address, id and question', async () => {
  const other = createSocket('udp4');
  await new Promise<void>((resolve) => other.bind(0, '127.0.0.1', resolve));
  const liar = await fake((message, reply, from) => {
    const id = decode(message).id!;
    const evil = '203.0.113.66';
    // From another port, and from the right one with a wrong id, a wrong question, cut, and as a query.
    other.send(answerTo(message, evil), from.port, from.address);
    reply(answerTo(message, evil, { id: (id + 1) & 0xffff }));
    reply(answerTo(message, evil, { name: 'victim.exampl2' }));
    reply(answerTo(message, evil).subarray(0, 30));
    const echoed = Buffer.from(answerTo(message, evil));
    echoed[2] = echoed[2]! & 0x7f;
    reply(echoed);
    reply(Buffer.alloc(0));
    setTimeout(() => reply(answerTo(message)), 60);
  });
  try {
    await withForwarder([liar], async (forwarder) => {
      assert.is(await addressOf(forwarder, query('victim.example')), '192.0.2.7');
      assert.ok(forwarder.counters['upstream_mismatch']! >= 5);
    });
  } finally {
    other.close();
  }
});

test('createForwarder asks each question from a port and an id of its own', async () => {
  const ports = new Set<number>();
  const ids = new Set<number>();
  const good = await fake((message, reply, from) => {
    ports.add(from.port);
    ids.add(decode(message).id!);
    reply(answerTo(message));
  });
  await withForwarder([good], async (forwarder) => {
    for (let i = 0; i < 40; i++) await forwarder.resolve(query(`n${i}.example`));
    assert.ok(ports.size > 20, `${ports.size} ports`);
    assert.ok(ids.size > 35, `${ids.size} ids`);
  });
});

test('createForwarder goes to the next server when one is silent or fails, and remembers which', async () => {
  const silent = await fake(() => {});
  const failing = await fake((message, reply) => reply(answerTo(message, '', { flags: 2 })));
  const good = await fake((message, reply) => reply(answerTo(message)));
  await withForwarder([silent, failing, good], async (forwarder) => {
    assert.is(await addressOf(forwarder, query('first.example')), '192.0.2.7');
    const before = silent.asked;
    assert.ok(before >= 1);
    assert.is(await addressOf(forwarder, query('second.example')), '192.0.2.7');
    assert.is(silent.asked, before, 'the silent one is asked last now');
  });
});

test('createForwarder gives the failure of the last server when none does better', async () => {
  const failing = await fake((message, reply) => reply(answerTo(message, '', { flags: 2 })));
  await withForwarder([failing], async (forwarder) => {
    assert.is(await addressOf(forwarder, query('first.example')), 'rcode SERVFAIL');
  });
});

test('createForwarder resolves to undefined without servers, with unreadable ones, and when all are silent', async () => {
  await withForwarder([], async (forwarder) => {
    assert.is(await forwarder.resolve(query('a.example')), undefined);
  });
  await withForwarder(
    [],
    async (forwarder) => {
      assert.is(await forwarder.resolve(query('a.example')), undefined);
      assert.is(forwarder.counters['upstream_unreadable_server'], 2);
    },
    ['dns.example', '300.1.1.1'],
  );
  const silent = await fake(() => {});
  await withForwarder([silent], async (forwarder) => {
    const waiting = forwarder.resolve(query('a.example'));
    assert.is(await waiting, undefined);
    assert.is(silent.asked, 4);
  });
});

test('createForwarder repeats a cut answer over TCP', async () => {
  const cut = await fake(
    (message, reply) => reply(answerTo(message, '', { flags: 0x0200 })),
    (message) => answerTo(message, '192.0.2.9'),
  );
  await withForwarder([cut], async (forwarder) => {
    assert.is(await addressOf(forwarder, query('long.example')), '192.0.2.9');
    assert.ok(cut.tcpAsked >= 1);
  });
});

test('createForwarder does not remember TTL 0, failures or cut answers', async () => {
  const asked = new Map<string, number>();
  const server = await fake((message, reply) => {
    const { name } = decode(message).questions![0]!;
    asked.set(name, (asked.get(name) ?? 0) + 1);
    if (name === 'zero.example') reply(answerTo(message, '192.0.2.1', { ttl: 0 }));
    else if (name === 'kept.example') reply(answerTo(message));
    else reply(answerTo(message, '', { flags: name === 'cut.example' ? 0x0200 : 2 }));
  });
  await withForwarder([server], async (forwarder) => {
    for (const name of ['zero.example', 'failing.example', 'cut.example', 'kept.example']) {
      for (let i = 0; i < 3; i++) assert.ok(await forwarder.resolve(query(name)), name);
      // A busy machine may repeat a question, never answer without one.
      if (name === 'kept.example') assert.is(forwarder.counters['upstream_cached'], 2);
      else assert.ok(asked.get(name)! >= 3, `${name}: ${asked.get(name)}`);
    }
  });
});

test('createForwarder passes over servers that no route, link or permission leads to', async () => {
  const good = await fake((message, reply) => reply(answerTo(message)));
  const nowhere = ['fe80::1', 'fe80::1%nolink0', '255.255.255.255', '[2001:db8::1]:53'];
  const servers = [...nowhere, `127.0.0.1:${good.port}`];
  // Each alone, so that each is the one that fails; then the next one is asked.
  await withForwarder(
    [],
    async (forwarder) => {
      assert.is(await forwarder.resolve(query('a.example')), undefined);
    },
    nowhere.slice(0, 3),
  );
  await withForwarder(
    [good],
    async (forwarder) => {
      for (let i = 0; i < 6; i++) {
        const got = await forwarder.resolve(query(`n${i}.example`));
        if (i > 0) assert.ok(got, `question ${i}`);
      }
    },
    servers,
  );
});

test('createForwarder asks a server with an IPv6 address, however it is spelled', async () => {
  const server = await fake((message, reply) => reply(answerTo(message)), undefined, '::1');
  await withForwarder(
    [server],
    async (forwarder) => {
      assert.is(await addressOf(forwarder, query('six.example')), '192.0.2.7');
      assert.is(forwarder.counters['upstream_mismatch'], 0);
    },
    [`[0:0:0:0:0:0:0:1]:${server.port}`],
  );
  const mapped = await fake((message, reply) => reply(answerTo(message)));
  await withForwarder(
    [mapped],
    async (forwarder) => assert.is(await addressOf(forwarder, query('four.example')), '192.0.2.7'),
    [`[::ffff:127.0.0.1]:${mapped.port}`],
  );
});

test('createForwarder keeps an answer for an hour at most, and a denial for a minute', async () => {
  const soa = { mname: 'a', rname: 'b', serial: 1, refresh: 1, retry: 1, expire: 1, minimum: 86_400 };
  const server = await fake((message, reply) => {
    const asked = decode(message);
    const { name } = asked.questions![0]!;
    if (name === 'long.example') return reply(answerTo(message, '192.0.2.7', { ttl: 86_400 }));
    const authorities = [{ type: 'SOA' as const, name: 'example', ttl: 86_400, data: soa }];
    const flags = 0x0180 | (name === 'nil.example' ? 3 : 0);
    reply(encode({ type: 'response', id: asked.id!, flags, questions: asked.questions!, authorities }));
  });
  await withForwarder([server], async (forwarder) => {
    const isKept = async (name: string): Promise<boolean> => {
      const before = forwarder.counters['upstream_cached']!;
      assert.ok(await forwarder.resolve(query(name)), name);
      return forwarder.counters['upstream_cached'] === before + 1;
    };
    for (const [name, keptS] of [
      ['long.example', 3_600],
      ['nil.example', 60],
      ['nodata.example', 60],
    ] as const) {
      assert.not(await isKept(name));
      aheadMs += (keptS - 20) * 1_000;
      assert.ok(await isKept(name), `${name} short of ${keptS} s`);
      aheadMs += 21_000;
      assert.not(await isKept(name), `${name} after ${keptS} s`);
    }
  });
});

test('createForwarder remembers 4,096 answers and 4 MiB at most, and forgets what was asked longest ago', async () => {
  const small = await fake((message, reply) => reply(answerTo(message)));
  await withForwarder([small], async (forwarder) => {
    for (let i = 0; i < DNS_CACHE_ENTRIES_MAX + 1; i += 64)
      await Promise.all(
        Array.from({ length: Math.min(64, DNS_CACHE_ENTRIES_MAX + 1 - i) }, (_, j) =>
          forwarder.resolve(query(`n${i + j}.example`)),
        ),
      );
    const cached = forwarder.counters['upstream_cached'];
    await forwarder.resolve(query(`n${DNS_CACHE_ENTRIES_MAX}.example`));
    assert.is(forwarder.counters['upstream_cached'], cached! + 1, 'the last one');
    // One of the first 64 went, and asking for it makes another one go.
    for (let i = 0; i < 64; i++) await forwarder.resolve(query(`n${i}.example`));
    assert.ok(forwarder.counters['upstream_cached']! < cached! + 65);
  });
  const text = Array.from({ length: 240 }, () => 'x'.repeat(250));
  const big = await fake(
    (message, reply) => reply(answerTo(message, '', { flags: 0x0200 })),
    (message) => {
      const { id: asked, questions } = decode(message);
      const { name } = questions![0]!;
      const answers = [{ type: 'TXT' as const, name, ttl: 300, data: text }];
      return encode({ type: 'response', id: asked!, flags: 0x0180, questions: questions!, answers });
    },
  );
  await withForwarder([big], async (forwarder) => {
    const txt = (name: string): Query => query(name, 1, 'TXT');
    const fits = Math.floor(DNS_CACHE_BYTES_MAX / 60_500);
    for (let i = 0; i <= fits; i++) await forwarder.resolve(txt(`n${i}.example`));
    assert.is(forwarder.counters['upstream_cached'], 0);
    await forwarder.resolve(txt(`n${fits}.example`));
    assert.is(forwarder.counters['upstream_cached'], 1);
    await forwarder.resolve(txt('n0.example'));
    assert.is(forwarder.counters['upstream_cached'], 1, 'the first one made room');
  });
});

test('createForwarder refuses more than 256 questions in flight, and takes them again afterwards', async () => {
  let isSilent = true;
  const held: (() => void)[] = [];
  const server = await fake((message, reply) => {
    if (isSilent) held.push(() => reply(answerTo(message)));
    else reply(answerTo(message));
  });
  await withForwarder([server], async (forwarder) => {
    const waiting = Array.from({ length: DNS_UPSTREAM_PENDING_MAX }, (_, i) =>
      forwarder.resolve(query(`n${i}.example`)),
    );
    assert.is(await forwarder.resolve(query('more.example')), undefined);
    assert.is(forwarder.counters['upstream_overload'], 1);
    isSilent = false;
    for (const say of held.splice(0)) say();
    await Promise.all(waiting);
    assert.ok(await forwarder.resolve(query('more.example')));
  });
});

test('createForwarder gives up open questions on stop', async () => {
  const silent = await fake(() => {});
  await withForwarder([silent], async (forwarder) => {
    const waiting = forwarder.resolve(query('a.example'));
    forwarder.stop();
    assert.is(await waiting, undefined);
  });
});

test('parseUpstream reads addresses with and without a port, and nothing else', () => {
  assert.equal(parseUpstream('192.0.2.1'), { address: '192.0.2.1', port: 53, family: 4 });
  assert.equal(parseUpstream('192.0.2.1:5300'), { address: '192.0.2.1', port: 5300, family: 4 });
  assert.equal(parseUpstream('2001:db8::1'), { address: '2001:db8::1', port: 53, family: 6 });
  assert.equal(parseUpstream('[2001:db8::1]:5300'), { address: '2001:db8::1', port: 5300, family: 6 });
  assert.equal(parseUpstream('2001:DB8:0::0:1'), { address: '2001:db8::1', port: 53, family: 6 });
  assert.equal(parseUpstream('[::FFFF:192.0.2.1]:54'), { address: '192.0.2.1', port: 54, family: 4 });
  assert.equal(parseUpstream('FE80:0::1%eth0'), { address: 'fe80::1%eth0', port: 53, family: 6 });
  assert.equal(parseUpstream('fe80::1%eth0'), { address: 'fe80::1%eth0', port: 53, family: 6 });
  for (const bad of ['', 'dns.example', '192.0.2.1:0', '192.0.2.1:70000', '1.2.3', '[::1'])
    assert.is(parseUpstream(bad), undefined, bad);
});

test.run();
