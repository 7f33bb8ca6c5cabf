// The host itself asks the resolver: where systemd-resolved serves, and where resolv.conf names servers; and everything
// is put back, also after kill -9.
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unpacked } from './debian.ts';
import { type Client, DnsLab, must, runtimeArgv, type Talker, until } from './dns_lab.ts';

const NAME = 'shop.prod.cart.v1.any.closest.local';
const FOREIGN = 'www.example.test';
const PLAIN = '# the administrator\nnameserver 127.0.0.1\noptions timeout:1 attempts:1\n';
// A bus that lets everybody do everything: it lives in one namespace for the length of a test.
const BUS = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>
`;
let labs: DnsLab[] = [];

/** A host with the resolver running and dnsmasq on 127.0.0.1:53 as what it asked before. */
async function host(
  files: Readonly<Record<string, string>>,
): Promise<{ readonly lab: DnsLab; readonly space: Client }> {
  const lab = await new DnsLab().up();
  labs.push(lab);
  // A port, so that systemd-resolved sees a link with a carrier.
  await lab.client(1);
  const space = await lab.hostSpace({
    'nsswitch.conf': 'passwd: files\ngroup: files\nhosts: files dns\n',
    ...files,
  });
  space.start([
    'dnsmasq',
    '--keep-in-foreground',
    '--conf-file=/dev/null',
    '--no-resolv',
    '--local=/test/',
    '--no-hosts',
    '--listen-address=127.0.0.1',
    '--bind-interfaces',
    '--pid-file=',
    '--user=root',
    `--host-record=${FOREIGN},192.0.2.80`,
  ]);
  await lab.resolver({ upstreams: ['127.0.0.1'] });
  await until('dnsmasq', async () =>
    (await space.run(['dig', '+short', '+time=1', '+tries=1', '@127.0.0.1', FOREIGN])).stdout.includes(
      '192.0.2.80',
    ),
  );
  return { lab, space };
}

const setUp = async (lab: DnsLab, space: Client, environment: readonly string[] = []): Promise<Talker> => {
  const argv = runtimeArgv(join(import.meta.dirname, 'dns_setup.ts'));
  const talker = lab.talk(
    space.enter(['env', ...environment, ...argv, 'set-up', join(lab.directory, 'resolv.json')]),
  );
  return talker;
};
const conf = async (space: Client): Promise<string> => (await space.run(['cat', '/etc/resolv.conf'])).stdout;

async function resolves(space: Client): Promise<void> {
  const ours = await space.run(['getent', 'ahosts', NAME]);
  assert.match(ours.stdout, '172.30.0.2', ours.stderr);
  assert.ok(ours.ms < 3_000, `${ours.ms} ms`);
  assert.match((await space.run(['getent', 'ahosts', FOREIGN])).stdout, '192.0.2.80');
}

test.after(async () => {
  for (const lab of labs) await lab.down();
  labs = [];
});

test('setUpHostResolver on a host with a plain resolv.conf: names resolve, changes are followed, restore puts it back', async () => {
  const { lab, space } = await host({ 'resolv.conf': PLAIN });
  const talker = await setUp(lab, space);
  assert.equal(await talker.next(), { kind: 'file' });
  await resolves(space);
  assert.equal(await talker.ask('upstreams' as never), { upstreams: ['127.0.0.1'] });
  await must(space.enter(['sh', '-c', 'echo nameserver 192.0.2.53 > /etc/resolv.conf']));
  await talker.ask('check' as never);
  assert.match(await conf(space), /^nameserver 172\.16\.0\.65$/m);
  await until('the new upstream', async () =>
    JSON.stringify(await talker.ask('upstreams' as never)).includes('192.0.2.53'),
  );
  await talker.ask('restore' as never);
  assert.is(await conf(space), 'nameserver 192.0.2.53\n');
});

test('kill -9 leaves a resolv.conf that the next start and the restore command put back', async () => {
  const { lab, space } = await host({ 'resolv.conf': PLAIN });
  const kill = async (): Promise<void> => {
    const talker = await setUp(lab, space);
    await talker.next();
    await resolves(space);
    talker.child.kill('SIGKILL');
    await until('its end', () => talker.exited);
    assert.match(await conf(space), 'nameserver 172.16.0.65');
  };
  await kill();
  const again = await setUp(lab, space);
  await again.next();
  await again.ask('restore' as never);
  assert.is(await conf(space), PLAIN);
  await kill();
  const argv = runtimeArgv(join(import.meta.dirname, 'dns_setup.ts'));
  const restored = await space.run([...argv, 'restore', join(lab.directory, 'resolv.json')]);
  assert.is(restored.stdout, '{"restored":true}\n', restored.stderr);
  assert.is(await conf(space), PLAIN);
});

test('setUpHostResolver with systemd-resolved: our suffixes come to us, everything else stays, revert undoes it', async () => {
  const root = await unpacked('systemd-resolved', 'libsystemd-shared');
  const { lab, space } = await host({
    'resolv.conf': 'nameserver 127.0.0.53\noptions edns0 trust-ad\n',
    'bus.conf': BUS,
    passwd:
      'root:x:0:0:root:/root:/bin/sh\nsystemd-resolve:x:991:991::/:/usr/sbin/nologin\nmessagebus:x:992:992::/:/usr/sbin/nologin\n',
    group: 'root:x:0:\nsystemd-resolve:x:991:\nmessagebus:x:992:\n',
    'systemd/resolved.conf': '[Resolve]\nDNS=127.0.0.1\nDNSSEC=no\nMulticastDNS=yes\nFallbackDNS=\n',
  });
  const environment = [
    `LD_LIBRARY_PATH=${root}/usr/lib/x86_64-linux-gnu/systemd`,
    `PATH=${root}/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin`,
  ];
  await must(space.enter(['mkdir', '-p', '/run/dbus', '/run/systemd']));
  space.start(['dbus-daemon', '--config-file=/etc/bus.conf', '--nofork', '--nopidfile']);
  await until(
    'the system bus',
    async () => (await space.run(['test', '-S', '/run/dbus/system_bus_socket'])).status === 0,
  );
  const resolved = space.start(['env', ...environment, `${root}/lib/systemd/systemd-resolved`]);
  const ctl = (...argv: string[]) => space.run(['env', ...environment, 'resolvectl', '--no-pager', ...argv]);
  await until('systemd-resolved', async () => (await ctl('status')).status === 0, 15_000).catch(
    (error: Error) => {
      throw new Error(`${error.message}: ${resolved.stderr}`);
    },
  );
  await until(
    'its stub',
    async () => (await space.run(['getent', 'ahosts', FOREIGN])).stdout.includes('192.0.2.80'),
    15_000,
  );
  assert.not.match(
    (await space.run(['getent', 'ahosts', NAME])).stdout,
    '172.30.0.2',
    'not before the set-up',
  );

  const talker = await setUp(lab, space, environment);
  assert.equal(await talker.next(), { kind: 'resolved' });
  await resolves(space);
  const link = (await ctl('status', 'br0')).stdout;
  assert.match(link, /DNS Servers: 172\.16\.0\.65/);
  assert.match(
    link,
    /DNS Domain: ~closest\.local ~fastest\.local ~fixed\.local ~roundrobin\.local|DNS Domain: .*~closest\.local/,
  );
  assert.match(link, /-DefaultRoute/);
  // Resolved knows the stub's real upstream; we never forward to the stub that would ask us again.
  assert.equal(await talker.ask('upstreams' as never), { upstreams: ['127.0.0.1'] });
  const musl = await space.run(['dig', '+short', '@127.0.0.53', NAME]);
  assert.is(musl.stdout.trim(), '172.30.0.2');
  talker.child.kill('SIGKILL');
  await until('its end', () => talker.exited);
  await resolves(space);
  const again = await setUp(lab, space, environment);
  await again.next();
  await again.ask('restore' as never);
  assert.not.match((await ctl('status', 'br0')).stdout, '172.16.0.65');
  assert.match((await space.run(['getent', 'ahosts', FOREIGN])).stdout, '192.0.2.80');
});

test.run();
