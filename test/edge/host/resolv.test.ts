import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  type HostResolverOptions,
  parseResolvConf,
  restoreHostResolver,
  setUpHostResolver,
  upstreamsOf,
} from '../../../edge/host/resolv.ts';
import type { CommandResult } from '../../../edge/ports.ts';
import { SILENT } from '../../../src/log.ts';
import { ip } from '../resolver/world.ts';

const CONF = '/etc/resolv.conf';
const STATE = '/var/lib/edgeway/resolv.conf.json';
const PLAIN =
  '# by hand\nsearch lan example.org\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions timeout:2\n';
const STUB = 'nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n';

/** Files and commands of a host, in memory; `fails` makes the command that contains it fail. */
class Host {
  readonly files = new Map<string, string>();
  readonly ran: string[] = [];
  fails = '\n';
  crashOnWrite = '';
  readonly options: HostResolverOptions = {
    bridge: 'br0',
    address: ip('172.16.0.65'),
    statePath: STATE,
    log: SILENT,
    runner: {
      run: async (argv): Promise<CommandResult> => {
        this.ran.push(argv.join(' '));
        const failed = argv.join(' ').includes(this.fails);
        return { status: failed ? 1 : 0, stdout: '', stderr: failed ? 'no such link' : '' };
      },
    },
    files: {
      read: async (path) => this.files.get(path),
      write: async (path, content) => this.#put(path, content),
      writeInPlace: async (path, content) => this.#put(path, content),
      remove: async (path) => {
        this.files.delete(path);
      },
    },
  };
  #put(path: string, content: string): void {
    if (path === this.crashOnWrite) throw new Error('kill -9');
    this.files.set(path, content);
  }
  constructor(conf: string) {
    this.files.set(CONF, conf);
  }
}

test('setUpHostResolver makes us the only nameserver, keeps the other lines, and restore gives the original back', async () => {
  const host = new Host(PLAIN);
  const resolver = await setUpHostResolver(host.options);
  assert.is(resolver.kind, 'file');
  assert.equal(parseResolvConf(host.files.get(CONF)!), {
    nameservers: ['172.16.0.65'],
    others: ['search lan example.org', 'options timeout:2'],
  });
  assert.equal(
    upstreamsOf(
      { resolvConf: host.files.get(CONF), resolved: undefined, saved: host.files.get(STATE) },
      ip('172.16.0.65'),
    ),
    ['192.0.2.1', '192.0.2.2'],
  );
  await resolver.restore();
  assert.is(host.files.get(CONF), PLAIN);
  assert.not(host.files.has(STATE));
  assert.equal(host.ran, []);
});

test('setUpHostResolver after kill -9 still knows the first original', async () => {
  const host = new Host(PLAIN);
  await setUpHostResolver(host.options);
  const again = await setUpHostResolver(host.options);
  await again.restore();
  assert.is(host.files.get(CONF), PLAIN);
});

test('restoreHostResolver undoes a crash between the two writes, and leaves what others wrote', async () => {
  const host = new Host(PLAIN);
  host.crashOnWrite = CONF;
  try {
    await setUpHostResolver(host.options);
    assert.unreachable();
  } catch (error) {
    assert.is((error as Error).message, 'kill -9');
  }
  host.crashOnWrite = '';
  assert.is(await restoreHostResolver(host.options), false);
  assert.is(host.files.get(CONF), PLAIN);
  await setUpHostResolver(host.options);
  host.files.set(CONF, 'nameserver 198.51.100.1\n');
  assert.is(await restoreHostResolver(host.options), false);
  assert.is(host.files.get(CONF), 'nameserver 198.51.100.1\n');
  assert.is(await restoreHostResolver(host.options), false, 'twice is harmless');
});

test('restoreHostResolver ignores a state file that is not ours', async () => {
  const host = new Host(PLAIN);
  for (const text of ['', '{', '[]', 'null', '{"path":1}', '{"link":1}']) {
    host.files.set(STATE, text);
    assert.is(await restoreHostResolver(host.options), false, text);
  }
});

test('HostResolver.check takes a rewritten resolv.conf back a few times, and restores the newest original', async () => {
  const host = new Host(PLAIN);
  const resolver = await setUpHostResolver(host.options);
  const lease = 'nameserver 198.51.100.1\n';
  host.files.set(CONF, lease);
  await resolver.check();
  assert.match(host.files.get(CONF)!, 'nameserver 172.16.0.65');
  assert.equal(
    upstreamsOf(
      { resolvConf: host.files.get(CONF), resolved: undefined, saved: host.files.get(STATE) },
      ip('172.16.0.65'),
    ),
    ['198.51.100.1'],
  );
  for (let i = 0; i < 10; i++) {
    host.files.set(CONF, lease);
    await resolver.check();
  }
  assert.is(host.files.get(CONF), lease, 'it gives in to a stubborn program');
  await resolver.restore();
  assert.is(host.files.get(CONF), lease);
});

test('restoreHostResolver mends a resolv.conf that was cut short, wherever, by either write', async () => {
  const host = new Host(PLAIN);
  await setUpHostResolver(host.options);
  const written = host.files.get(CONF)!;
  const state = host.files.get(STATE)!;
  const restored = async (current: string): Promise<string> => {
    host.files.set(CONF, current);
    host.files.set(STATE, state);
    await restoreHostResolver(host.options);
    return host.files.get(CONF)!;
  };
  for (let length = 0; length <= written.length; length++) {
    assert.is(await restored(written.slice(0, length)), PLAIN, `ours, cut at ${length}`);
    const zeros = '\0'.repeat(written.length - length);
    assert.is(await restored(written.slice(0, length) + zeros), PLAIN, `zeros from ${length}`);
  }
  for (let length = 0; length < PLAIN.length; length++) {
    const cut = PLAIN.slice(0, length);
    const isDoubtful = cut.endsWith('\n');
    assert.is(await restored(cut), isDoubtful ? cut : PLAIN, `the original, cut at ${length}`);
    assert.is(host.files.has(STATE), isDoubtful, 'the original is kept while it cannot be told');
  }
  host.files.delete(CONF);
  host.files.set(STATE, state);
  await restoreHostResolver(host.options);
  assert.is(host.files.get(CONF), PLAIN, 'a file that is gone');
});

test('HostResolver.check mends what was cut short and never takes it for an original', async () => {
  const host = new Host(PLAIN);
  const resolver = await setUpHostResolver(host.options);
  const written = host.files.get(CONF)!;
  for (const cut of ['', written.slice(0, 40)]) {
    host.files.set(CONF, cut);
    await resolver.check();
    assert.is(host.files.get(CONF), written);
  }
  await resolver.restore();
  assert.is(host.files.get(CONF), PLAIN);
});

test('HostResolver.restore is the last word, however many checks are under way', async () => {
  for (let turns = 0; turns < 40; turns++) {
    const host = new Host(PLAIN);
    const resolver = await setUpHostResolver(host.options);
    host.files.set(CONF, 'nameserver 198.51.100.1\n');
    const checks = [resolver.check(), resolver.check()];
    for (let i = 0; i < turns; i++) await Promise.resolve();
    await Promise.all([resolver.restore(), resolver.check(), ...checks]);
    await resolver.check();
    assert.not.match(host.files.get(CONF)!, '172.16.0.65', `restored after ${turns} turns`);
    assert.not(host.files.has(STATE));
  }
});

test('setUpHostResolver routes only our two-label domains where systemd-resolved serves', async () => {
  const host = new Host(STUB);
  const resolver = await setUpHostResolver(host.options);
  assert.is(resolver.kind, 'resolved');
  assert.equal(host.ran, [
    'resolvectl dns br0 172.16.0.65',
    'resolvectl domain br0 ~roundrobin.local ~closest.local ~fastest.local ~fixed.local',
    'resolvectl default-route br0 no',
    'resolvectl mdns br0 no',
    'resolvectl llmnr br0 no',
  ]);
  assert.is(host.files.get(CONF), STUB);
  await resolver.restore();
  assert.is(host.ran.at(-1), 'resolvectl revert br0');
});

test('setUpHostResolver reverts the link when a command fails, and names the command', async () => {
  const host = new Host(STUB);
  host.fails = 'default-route';
  try {
    await setUpHostResolver(host.options);
    assert.unreachable();
  } catch (error) {
    assert.is((error as Error).message, 'resolvectl default-route br0 no: status 1: no such link');
    assert.is((error as { code?: string }).code, 'host_command_failed');
  }
  assert.is(host.ran.at(-1), 'resolvectl revert br0');
});

test('upstreamsOf looks behind the stub of systemd-resolved, and never names ourselves', () => {
  const own = ip('172.16.0.65');
  const behind = 'nameserver 192.0.2.1\nnameserver 172.16.0.65\nnameserver fe80::1%eth0\n';
  assert.equal(upstreamsOf({ resolvConf: STUB, resolved: behind, saved: undefined }, own), [
    '192.0.2.1',
    'fe80::1%eth0',
  ]);
  assert.equal(upstreamsOf({ resolvConf: STUB, resolved: undefined, saved: undefined }, own), ['127.0.0.53']);
  assert.equal(
    upstreamsOf({ resolvConf: 'nameserver 192.0.2.9\n', resolved: behind, saved: undefined }, own),
    ['192.0.2.9'],
  );
  assert.equal(upstreamsOf({ resolvConf: undefined, resolved: undefined, saved: undefined }, own), []);
});

test('parseResolvConf takes any text', () => {
  assert.equal(parseResolvConf('\n; c\n nameserver\t1.1.1.1 # x\nnameserver\nsortlist 1\r\n'), {
    nameservers: ['1.1.1.1'],
    others: ['nameserver', 'sortlist 1'],
  });
  assert.is(parseResolvConf('nameserver 1.1.1.1\n'.repeat(100)).nameservers.length, 8);
});

test.run();
