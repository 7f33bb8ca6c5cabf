// The unicast server on loopback: transports, waiting for the keyspace, bad clients, and hostile datagrams by the
// hundred thousand. What real resolvers make of it stands in test/real.
import { createSocket } from 'node:dgram';
import { connect, createServer, type Socket } from 'node:net';
import process from 'node:process';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { type DecodedPacket, decode, encode, type Packet } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { frame } from '../../../coordinator/io/dns_sockets.ts';
import { type DnsServer, type DnsServerOptions, startDnsServer } from '../../../edge/io/dns_server.ts';
import type { RouteTable } from '../../../edge/routes/table.ts';
import { formatIpv4 } from '../../../src/addr.ts';
import {
  DNS_LOOKUPS_WAITING_MAX,
  DNS_TCP_CLIENTS_MAX,
  DNS_TCP_IDLE_MS,
  DNS_TCP_SOURCE_CLIENTS_MAX,
  DNS_UPSTREAM_PENDING_MAX,
} from '../../../src/limits.ts';
import { SILENT } from '../../../src/log.ts';
import { Rng } from '../../../src/rng.ts';
import { CART, CART_ANY, id, ip, service, world } from '../resolver/world.ts';

const clock = { monotonicMs: () => performance.now(), wallMs: () => Date.now() };

async function withServer(
  more: Partial<DnsServerOptions>,
  body: (server: DnsServer, table: RouteTable) => Promise<void>,
): Promise<void> {
  const table = world();
  const server = await startDnsServer({
    address: ip('127.0.0.1'),
    port: 0,
    table,
    upstreams: () => [],
    log: SILENT,
    clock,
    ...more,
  });
  try {
    await body(server, table);
  } finally {
    await server.stop();
    await server.stop();
  }
}

const question = (name: string, id = 7, more: Packet = {}): Buffer =>
  encode({ type: 'query', id, flags: 0x100, questions: [{ type: 'A', name }], ...more });

/** One question over UDP; undefined when nothing comes within the limit. */
async function ask(
  port: number,
  message: Buffer,
  limitMs = 3_000,
): Promise<(DecodedPacket & { rcode?: string }) | undefined> {
  const socket = createSocket('udp4');
  try {
    return await new Promise((resolve) => {
      const timer = setTimeout(resolve, limitMs, undefined);
      socket.once('message', (bytes) => {
        clearTimeout(timer);
        resolve(decode(bytes));
      });
      socket.send(message, port, '127.0.0.1');
    });
  } finally {
    socket.close();
  }
}

const said = (packet: (DecodedPacket & { rcode?: string }) | undefined): string => {
  const record = packet?.answers?.[0];
  return record?.type === 'A' ? record.data : (packet?.rcode ?? 'silence');
};

async function until(condition: () => boolean, limitMs = 10_000): Promise<void> {
  const deadline = performance.now() + limitMs;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`waited ${limitMs} ms for: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** Sends the bytes over TCP and collects what comes until the server closes or `count` messages are there. */
function tcp(port: number, bytes: readonly Buffer[], count: number, limitMs = 5_000): Promise<Buffer[]> {
  return new Promise((resolve) => {
    const messages: Buffer[] = [];
    let received = Buffer.alloc(0);
    const socket = connect({ host: '127.0.0.1', port });
    const end = (): void => {
      clearTimeout(timer);
      socket.destroy();
      resolve(messages);
    };
    const timer = setTimeout(end, limitMs);
    socket.on('error', end);
    socket.on('close', end);
    socket.on('connect', () => {
      for (const chunk of bytes) socket.write(chunk);
    });
    socket.on('data', (chunk) => {
      received = Buffer.concat([received, chunk]);
      while (received.length >= 2 && received.length >= 2 + received.readUInt16BE(0)) {
        messages.push(received.subarray(2, 2 + received.readUInt16BE(0)));
        received = received.subarray(2 + received.readUInt16BE(0));
      }
      if (messages.length >= count) end();
    });
  });
}

test('startDnsServer answers the same over UDP, repeated UDP and TCP', async () => {
  await withServer({}, async (server) => {
    for (let i = 0; i < 3; i++) {
      const packet = await ask(server.port, question(CART_ANY, 100 + i));
      assert.is(said(packet), '172.30.0.2');
      assert.is(packet!.id, 100 + i);
    }
    assert.is(server.counters()['dns_fast'], 2);
    const [reply] = await tcp(server.port, [frame(question(CART_ANY, 9))], 1);
    assert.is(said(decode(reply!)), '172.30.0.2');
  });
});

test('startDnsServer never serves a remembered answer after the table has changed', async () => {
  await withServer({}, async (server, table) => {
    for (let i = 0; i < 200; i++) {
      const first = `172.30.${10 + (i >> 6)}.${(i & 63) * 4}`;
      if (i % 10 === 9) table.deleteService(CART);
      else table.putService(service(CART, first));
      const right = i % 10 === 9 ? 'NXDOMAIN' : first.replace(/\d+$/, (last) => String(Number(last) + 1));
      assert.is(said(await ask(server.port, question(CART_ANY))), right, `change ${i}`);
    }
    assert.is(said(await ask(server.port, question('shop.prod.cart.v1.9.fixed.local'))), 'NXDOMAIN');
  });
});

test('startDnsServer waits for the keyspace about an unknown service, and says SERVFAIL when it does not tell', async () => {
  let told = 0;
  await withServer(
    {
      onLookup: (asked) => {
        told++;
        if (asked === id('a.b.slow.d')) return new Promise(() => {});
        if (asked === id('a.b.broken.d')) return Promise.reject(new Error('no etcd'));
        if (asked !== id('a.b.late.d')) return undefined;
        return new Promise((resolve) => setTimeout(resolve, 50));
      },
    },
    async (server, table) => {
      setTimeout(() => table.putService(service('a.b.late.d', '172.30.8.1')), 20);
      assert.is(said(await ask(server.port, question('a.b.late.d.any.closest.local'))), '172.30.8.2');
      assert.is(said(await ask(server.port, question('a.b.broken.d.any.closest.local'))), 'SERVFAIL');
      assert.is(said(await ask(server.port, question('a.b.slow.d.any.closest.local'))), 'SERVFAIL');
      assert.is(said(await ask(server.port, question('a.b.none.d.any.closest.local'))), 'NXDOMAIN');
      assert.is(said(await ask(server.port, question('not.a.name.closest.local'))), 'NXDOMAIN');
      assert.is(told, 4, 'only valid names are told');
    },
  );
});

test('startDnsServer waits for the owner of an address of ours before it says that there is none', async () => {
  const asked: string[] = [];
  let owned: RouteTable;
  await withServer(
    {
      async onAddress(address, source) {
        asked.push(`${formatIpv4(address)} for ${formatIpv4(source)}`);
        if (address === ip('172.30.9.2')) owned.putService(service('a.b.late.d', '172.30.9.1'));
        return address !== ip('172.30.9.9');
      },
    },
    async (server, table) => {
      owned = table;
      const reverse = async (address: string): Promise<string> => {
        const name = `${address.split('.').reverse().join('.')}.in-addr.arpa`;
        const packet = await ask(server.port, question(name, 7, { questions: [{ type: 'PTR', name }] }));
        const record = packet?.answers?.[0];
        return record?.type === 'PTR' ? record.data : (packet as { rcode: string }).rcode;
      };
      assert.is(await reverse('172.30.0.2'), CART_ANY, 'known: nobody is asked');
      assert.is(await reverse('172.30.9.2'), 'a.b.late.d.any.closest.local');
      assert.is(await reverse('172.30.9.8'), 'NXDOMAIN');
      assert.is(await reverse('172.30.9.9'), 'SERVFAIL', 'the store is away');
      assert.equal(
        asked,
        ['172.30.9.2', '172.30.9.8', '172.30.9.9'].map((address) => `${address} for 127.0.0.1`),
      );
    },
  );
});

test('startDnsServer lets only so many questions wait, and does not hold them longer than a second', async () => {
  await withServer({ onLookup: () => new Promise(() => {}) }, async (server) => {
    const socket = createSocket('udp4');
    await new Promise<void>((resolve) => socket.bind(0, '127.0.0.1', resolve));
    let servfails = 0;
    socket.on('message', (bytes) => {
      if ((bytes.readUInt16BE(2) & 15) === 2) servfails++;
    });
    try {
      const waited = (): number => server.counters()['dns_waited']!;
      for (let i = 0; i < DNS_LOOKUPS_WAITING_MAX * 4; i++) {
        socket.send(question(`a.b.n${i}.d.any.closest.local`, i), server.port, '127.0.0.1');
        if (i % 50 === 0) await new Promise((resolve) => setImmediate(resolve));
      }
      // Those that did not wait were answered at once; the others by now.
      await until(() => servfails > DNS_LOOKUPS_WAITING_MAX && servfails >= waited());
      assert.ok(waited() < DNS_LOOKUPS_WAITING_MAX * 3, `${waited()} waited`);
      assert.is(said(await ask(server.port, question(CART_ANY))), '172.30.0.2');
    } finally {
      socket.close();
    }
  });
});

test('startDnsServer refuses names outside the needs of the asker, also remembered ones', async () => {
  let needs: readonly ReturnType<typeof id>[] | undefined;
  await withServer({ needsOf: () => needs }, async (server) => {
    assert.is(said(await ask(server.port, question(CART_ANY))), '172.30.0.2');
    needs = [id('shop.prod.db.v1')];
    assert.is(said(await ask(server.port, question(CART_ANY))), 'REFUSED');
    needs = [CART];
    assert.is(said(await ask(server.port, question(CART_ANY))), '172.30.0.2');
  });
});

test('startDnsServer serves the host itself whatever its links are', async () => {
  await withServer({ clients: [{ base: ip('172.16.0.64'), bits: 26 }] }, async (server) => {
    assert.is(said(await ask(server.port, question(CART_ANY))), '172.30.0.2');
    assert.is(server.counters()['dns_off_link'], 0);
  });
});

test('startDnsServer says SERVFAIL for foreign names without an upstream, and REFUSED for other classes', async () => {
  await withServer({}, async (server) => {
    assert.is(said(await ask(server.port, question('example.org'))), 'SERVFAIL');
    const chaos = question('version.bind', 7, {
      questions: [{ type: 'TXT', name: 'version.bind', class: 'CH' }],
    });
    assert.is(said(await ask(server.port, chaos)), 'REFUSED');
  });
});

test('startDnsServer lets no asker take all of the questions in flight upstream', async () => {
  const upstream = createSocket('udp4');
  await new Promise<void>((resolve) => upstream.bind(0, '127.0.0.1', resolve));
  upstream.on('message', (message, from) => {
    const { id: asked, questions } = decode(message);
    const { name } = questions![0]!;
    if (!name.startsWith('good')) return;
    const answers = [{ type: 'A' as const, name, ttl: 60, data: '192.0.2.7' }];
    upstream.send(encode({ type: 'response', id: asked!, questions: questions!, answers }), from.port);
  });
  const greedy = createSocket('udp4');
  try {
    await withServer({ upstreams: () => [`127.0.0.1:${upstream.address().port}`] }, async (server) => {
      await new Promise<void>((resolve) => greedy.bind(0, '127.0.0.2', resolve));
      for (let i = 0; i < DNS_UPSTREAM_PENDING_MAX + 20; i++)
        greedy.send(question(`n${i}.example`, i), server.port, '127.0.0.1');
      await until(() => server.counters()['dns_forward_overload']! > 0);
      assert.is(server.counters()['dns_upstream_overload'], 0);
      assert.is(said(await ask(server.port, question('good.example'))), '192.0.2.7', 'another asker');
    });
  } finally {
    greedy.close();
    upstream.close();
  }
});

test('startDnsServer serves many pipelined questions of one TCP client, in pieces of any size', async () => {
  await withServer({}, async (server) => {
    const all = Buffer.concat(Array.from({ length: 300 }, (_, i) => frame(question(CART_ANY, i))));
    const pieces: Buffer[] = [];
    for (let at = 0; at < all.length; at += 97) pieces.push(all.subarray(at, at + 97));
    const replies = await tcp(server.port, pieces, 300);
    assert.is(replies.length, 300);
    assert.equal(new Set(replies.map((reply) => reply.readUInt16BE(0))).size, 300);
  });
});

test('startDnsServer closes TCP clients that talk nonsense', async () => {
  await withServer({}, async (server) => {
    const web = await tcp(server.port, [Buffer.from('GET / HTTP/1.1\r\n\r\n'.repeat(4000))], 99);
    for (const reply of web) assert.is(reply.length, 12, 'an error without records');
    assert.ok(web.length < 5, `${web.length} errors before it was closed`);
    assert.equal(await tcp(server.port, [Buffer.from([0, 0, 0, 0])], 1), []);
    const answer = Buffer.from(question(CART_ANY));
    answer[2] = 0x80;
    assert.equal(await tcp(server.port, [frame(answer)], 1), []);
  });
});

test('startDnsServer bounds its TCP clients, of one source and of all, and closes those that say nothing', async () => {
  await withServer({}, async (server) => {
    const counted = (name: string): number => server.counters()[`dns_tcp_${name}`]!;
    const open: Socket[] = [];
    let closed = 0;
    const connectFrom = (source: string, count: number): void => {
      for (let i = 0; i < count; i++) {
        const socket = connect({ host: '127.0.0.1', port: server.port, localAddress: source });
        socket.on('error', () => {});
        socket.on('close', () => closed++);
        open.push(socket);
      }
    };
    try {
      const one = DNS_TCP_SOURCE_CLIENTS_MAX;
      connectFrom('127.0.0.2', one + 5);
      await until(() => counted('refused') === 5 && counted('clients') === one);
      const [reply] = await tcp(server.port, [frame(question(CART_ANY))], 1);
      assert.is(said(decode(reply!)), '172.30.0.2', 'others find room');
      await until(() => closed === 5);
      for (let host = 3; one * (host - 1) < DNS_TCP_CLIENTS_MAX; host++) connectFrom(`127.0.0.${host}`, one);
      await until(() => counted('clients') >= DNS_TCP_CLIENTS_MAX - one);
      connectFrom('127.0.0.99', one);
      await until(() => counted('clients') === DNS_TCP_CLIENTS_MAX + 1);
      connectFrom('127.0.0.100', 3);
      await until(() => counted('refused') >= 8);
      assert.is(said(await ask(server.port, question(CART_ANY))), '172.30.0.2', 'UDP goes on');
      const all = open.length;
      await until(() => closed === all, DNS_TCP_IDLE_MS * 3);
    } finally {
      for (const socket of open) socket.destroy();
    }
  });
});

test('startDnsServer stops listening to a TCP client that asks and does not read', async () => {
  await withServer({}, async (server) => {
    const questions = Buffer.concat(
      Array.from({ length: 2_000 }, (_, i) => frame(question(CART_ANY, i & 0xffff))),
    );
    const socket = connect({ host: '127.0.0.1', port: server.port });
    socket.on('error', () => {});
    socket.pause();
    try {
      const asked = (): number => server.counters()['dns_queries_tcp']!;
      let seen = -1;
      let isFull = false;
      // Until it takes no more: the kernel's buffers both ways, then ours, are full.
      for (let rounds = 0; rounds < 300 && !isFull; rounds++) {
        seen = asked();
        if (socket.writableLength < 2 ** 20) socket.write(questions);
        await new Promise((resolve) => setTimeout(resolve, 50));
        isFull = asked() === seen && socket.writableLength >= 2 ** 20;
      }
      assert.ok(isFull, `${seen} questions were answered and it still listened`);
      assert.is(said(await ask(server.port, question(CART_ANY))), '172.30.0.2');
    } finally {
      socket.destroy();
    }
  });
});

test('startDnsServer names what stands in the way and leaves nothing open', async () => {
  const tcpOnly = createServer();
  await new Promise<void>((resolve) => tcpOnly.listen(0, '127.0.0.1', () => resolve()));
  const { port } = tcpOnly.address() as { port: number };
  const why = async (address: string, at: number): Promise<string> => {
    try {
      await withServer({ address: ip(address), port: at }, async () => {});
      return 'started';
    } catch (error) {
      return `${(error as { code: string }).code}: ${(error as Error).message}`;
    }
  };
  assert.is(
    await why('127.0.0.1', port),
    `address_taken: cannot listen on TCP 127.0.0.1:${port}: another program listens there`,
  );
  assert.match(
    await why('198.51.100.7', 5353),
    /^host_unsupported: cannot listen on UDP 198\.51\.100\.7:5353: /,
  );
  await new Promise<void>((resolve) => tcpOnly.close(() => resolve()));
  assert.is(await why('127.0.0.1', port), 'started', 'the UDP socket of the failed start is closed');
});

test('startDnsServer survives 100,000 hostile datagrams: it answers right afterwards and has not grown', async () => {
  await withServer({ upstreams: () => [] }, async (server) => {
    const rng = new Rng(5);
    const socket = createSocket('udp4');
    await new Promise<void>((resolve) => socket.bind(0, '127.0.0.1', resolve));
    const seeds = [
      question(CART_ANY),
      question('shop.prod.cart.v1.2.fixed.local'),
      question('1.1.30.172.in-addr.arpa'),
    ];
    let wrong = 0;
    socket.on('message', (bytes) => {
      for (const record of decode(bytes).answers ?? [])
        if (record.type === 'A' && !/^172\.30\.(0\.[123]|1\.[12])$/.test(record.data)) wrong++;
    });
    const arrived = (): number => server.counters()['dns_queries_udp']!;
    setFlagsFromString('--expose-gc');
    const collect = runInNewContext('gc') as () => void;
    const heldMiB = (): number => {
      collect();
      const { heapUsed, external } = process.memoryUsage();
      return (heapUsed + external) / 2 ** 20;
    };
    let before = 0;
    for (let i = 0; i < 100_000; i++) {
      let message: Buffer;
      if (i % 3 === 0) {
        message = Buffer.alloc(rng.below(100));
        for (let j = 0; j < message.length; j++) message[j] = rng.below(256);
      } else {
        message = Buffer.from(seeds[i % seeds.length]!);
        for (let k = rng.below(5); k >= 0; k--) message[rng.below(message.length)] = rng.below(256);
      }
      socket.send(message, server.port, '127.0.0.1');
      // By then every cache is full.
      if (i === 20_000) before = heldMiB();
      // What the kernel would drop for want of buffers tests nothing.
      for (let turns = 0; i % 50 === 0 && arrived() < i - 50 && turns < 100; turns++)
        await new Promise((resolve) => setImmediate(resolve));
    }
    const deadline = performance.now() + 10_000;
    let seen = -1;
    while (seen !== arrived() && performance.now() < deadline) {
      seen = arrived();
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    socket.close();
    assert.ok(seen > 50_000, `${seen} of them arrived`);
    assert.is(wrong, 0);
    assert.is(said(await ask(server.port, question(CART_ANY))), '172.30.0.2');
    // 200 octets of each of 80,000 messages would be 15 MiB; what is remembered is bounded at about 4.
    const growth = heldMiB() - before;
    assert.ok(growth < 8, `${growth.toFixed(1)} MiB more than after 20,000 datagrams`);
  });
});

test.run();
