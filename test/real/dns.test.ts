import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unpacked } from './debian.ts';
import { type Client, DnsLab, must, until } from './dns_lab.ts';

const NAME = 'shop.prod.cart.v1.any.closest.local';
let lab: DnsLab;
let client: Client;

async function withResolver(
  options: object,
  body: (talker: Awaited<ReturnType<DnsLab['resolver']>>) => Promise<void>,
): Promise<void> {
  const talker = await lab.resolver(options);
  try {
    await body(talker);
  } finally {
    await talker.end();
  }
}

test.before(async () => {
  lab = await new DnsLab().up();
  client = await lab.client(1, { 'nsswitch.conf': 'hosts: files dns\n' });
});
test.after(async () => {
  await lab.down();
});

const dig = async (...args: string[]): Promise<string> =>
  (await client.run(['dig', '+tries=1', '+time=3', '@172.16.0.65', ...args])).stdout;

test('startDnsServer answers dig over UDP and over TCP', async () => {
  await withResolver({}, async (talker) => {
    for (const transport of ['+notcp', '+tcp']) {
      assert.is((await dig(transport, '+short', NAME, 'A')).trim(), '172.30.0.2', transport);
      assert.match(
        await dig(transport, NAME, 'AAAA'),
        /status: NOERROR.*\n.*ANSWER: 0, AUTHORITY: 1/,
        transport,
      );
      assert.match(await dig(transport, 'shop.prod.nil.v1.any.closest.local'), /status: NXDOMAIN/, transport);
    }
    const full = await dig('SHOP.prod.cart.V1.any.Closest.local');
    assert.match(full, /^;SHOP\.prod\.cart\.V1\.any\.Closest\.local\./m);
    assert.match(full, /^SHOP\.prod\.cart\.V1\.any\.Closest\.local\.\s+120\s+IN\s+A\s+172\.30\.0\.2/m);
    assert.match(full, /flags: qr aa rd ra/);
    assert.is((await dig('+short', '-x', '172.30.1.2')).trim(), 'shop.prod.cart.v1.2.fixed.local.');
    assert.match(await dig('+short', NAME, 'SRV'), /^0 0 80 shop/m);
    const told = (await talker.ask({})) as {
      asked: Record<string, number>;
      counters: Record<string, number>;
    };
    assert.ok(told.asked['shop.prod.cart.v1']! >= 5);
    assert.ok(told.counters['dns_queries_tcp']! >= 3);
  });
});

test('getent finds a seven-label name in a namespace with one nameserver, at once', async () => {
  await withResolver({}, async () => {
    const ran = await client.run(['getent', 'ahosts', NAME]);
    assert.match(ran.stdout, /^172\.30\.0\.2\s+STREAM/);
    assert.ok(ran.ms < 5_000, `${ran.ms} ms: a query went unanswered, and getent asked again`);
    assert.is((await client.run(['getent', 'hosts', 'shop.prod.nil.v1.any.closest.local'])).status, 2);
  });
});

test('startDnsServer says SERVFAIL while unsynced and follows the table', async () => {
  await withResolver({}, async (talker) => {
    const db = 'shop.prod.db.v1.any.fastest.local';
    await talker.ask({ synced: false });
    assert.match(await dig(db), /status: SERVFAIL/);
    await talker.ask({ synced: true });
    assert.match(await dig(db), /status: NXDOMAIN/);
    await talker.ask({ put: 'shop.prod.db.v1', first: '172.30.4.1' });
    assert.is((await dig('+short', db)).trim(), '172.30.4.3');
    await talker.ask({ put: 'shop.prod.db.v1', first: '172.30.5.1' });
    assert.is((await dig('+short', db)).trim(), '172.30.5.3');
    await talker.ask({ delete: 'shop.prod.db.v1' });
    assert.match(await dig(db), /status: NXDOMAIN/);
  });
});

test('startDnsServer refuses what the asker does not need', async () => {
  await withResolver({ needs: { '172.16.0.66': ['shop.prod.db.v1'] } }, async () => {
    const said = await dig('+nocookie', NAME);
    assert.match(said, /status: REFUSED/);
    assert.match(said, /Prohibited.*not among the asker's needs/);
  });
});

test('startDnsServer names the address when it is taken, and starts again after a stop', async () => {
  await withResolver({}, async () => {
    try {
      await withResolver({}, async () => {});
      assert.unreachable('a second server must not start');
    } catch (error) {
      assert.match(
        (error as Error).message,
        'cannot listen on UDP 172.16.0.65:53: another program listens there',
      );
    }
  });
  await withResolver({}, async () => {
    assert.is((await dig('+short', NAME)).trim(), '172.30.0.2');
  });
});

test('avahi-resolve finds a seven-label name by multicast, and a goodbye takes it away', async () => {
  await client.avahi();
  await withResolver({}, async (talker) => {
    await until('avahi to resolve', async () => {
      const ran = await client.run(['avahi-resolve', '-4', '-n', NAME]);
      return ran.stdout.includes('172.30.0.2');
    });
    const told = (await talker.ask({})) as { counters: Record<string, number> };
    assert.ok(told.counters['mdns_multicast']! + told.counters['mdns_announced']! > 0);
    assert.is(told.counters['mdns_malformed'], 0);
    await talker.ask({ delete: 'shop.prod.cart.v1' });
    await until(
      'avahi to forget',
      async () => (await client.run(['avahi-resolve', '-4', '-n', NAME])).stdout === '',
      15_000,
    );
  });
});

test('avahi-resolve and getent find a two-label alias on a LAN, avahi not the names of the bridge', async () => {
  const root = await unpacked('libnss-mdns');
  const hosts = 'hosts: files mdns4_minimal [NOTFOUND=return] dns\n';
  const visitor = await lab.client(2, { 'nsswitch.conf': hosts });
  await visitor.avahi();
  await withResolver({ alias: 'cart.local' }, async (talker) => {
    await until('the alias to be held', async () => {
      const told = (await talker.ask({})) as { counters: Record<string, number> };
      return told.counters['mdns_alias_held'] === 1;
    });
    assert.match((await visitor.run(['avahi-resolve', '-4', '-n', 'cart.local'])).stdout, '172.16.0.65');
    // Asks for every family, and must not wait for the one that there is not (5 s).
    const library = `LD_LIBRARY_PATH=${root}/lib/x86_64-linux-gnu`;
    const ran = await visitor.run(['env', library, 'getent', 'ahosts', 'cart.local']);
    assert.match(ran.stdout, '172.16.0.65');
    assert.ok(ran.ms < 4_500, `${Math.round(ran.ms)} ms`);
    assert.is((await visitor.run(['avahi-resolve', '-4', '-n', NAME], { limitMs: 15_000 })).stdout, '');
  });
});

test('multicast answers stay on the bridge', async () => {
  await lab.inHost(['ip', 'link', 'add', 'out0', 'type', 'veth', 'peer', 'name', 'out1']);
  await lab.inHost(['ip', 'addr', 'add', '10.9.0.1/24', 'dev', 'out0']);
  for (const link of ['out0', 'out1']) {
    await lab.inHost(['sysctl', '-q', '-w', `net.ipv6.conf.${link}.disable_ipv6=1`]);
    await lab.inHost(['ip', 'link', 'set', link, 'up']);
  }
  await lab.inHost(['ip', 'route', 'add', 'default', 'via', '10.9.0.2']);
  const before = await must(['ip', '-n', lab.host, '-j', '-s', 'link', 'show', 'out1']);
  await withResolver({}, async (talker) => {
    await talker.ask({ put: 'shop.prod.web.v1' });
    await until('announcements', async () => {
      const told = (await talker.ask({})) as { counters: Record<string, number> };
      return told.counters['mdns_announced']! >= 6;
    });
  });
  const packets = (text: string): number =>
    (JSON.parse(text) as { stats64: { rx: { packets: number } } }[])[0]!.stats64.rx.packets;
  const after = await must(['ip', '-n', lab.host, '-j', '-s', 'link', 'show', 'out1']);
  assert.is(packets(after) - packets(before), 0, 'nothing left by the default route');
});

test('startMdns lives beside avahi on its own host: both answer, in either order of start', async () => {
  const visitor = await lab.client(3);
  await visitor.avahi();
  const space = await lab.hostSpace({
    'avahi/avahi-daemon.conf': '[server]\nhost-name=ewhost\nuse-ipv6=no\n',
  });
  const both = async (): Promise<void> => {
    await until('our name', async () =>
      (await visitor.run(['avahi-resolve', '-4', '-n', NAME])).stdout.includes('172.30.0.2'),
    );
    await until('the name of the host', async () =>
      (await visitor.run(['avahi-resolve', '-4', '-n', 'ewhost.local'])).stdout.includes('172.16.0.65'),
    );
    await until('our name, asked on the host', async () =>
      (await space.run(['avahi-resolve', '-4', '-n', NAME])).stdout.includes('172.30.0.2'),
    );
  };
  await withResolver({}, async () => {
    await space.avahi();
    await both();
  });
  await withResolver({}, both);
});

test.run();
