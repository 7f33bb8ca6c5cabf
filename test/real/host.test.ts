// The environment manager against real namespaces; see host_lab.ts for the topology.
import { type ChildProcess, spawn } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { formatCidr } from '../../src/addr.ts';
import {
  address,
  addTun,
  codeOf,
  echo,
  HostLab,
  MTU,
  must,
  node,
  reaches,
  SERVICES,
  says,
  spoken,
  start,
  Talker,
  toNetns,
  whoami,
  within,
} from './host_lab.ts';

/** A process with namespaces of its own and a private resolv.conf; ready when it says so. */
async function startProcess(dir: string, ownFile: boolean): Promise<ChildProcess> {
  const file = join(dir, 'own-resolv.conf');
  await writeFile(file, 'nameserver 192.0.2.1\n');
  const bind = ownFile ? `mount --bind ${file} /etc/resolv.conf && ` : '';
  const child = spawn('unshare', ['--net', '--mount', 'sh', '-c', `${bind}echo ready; exec sleep 300`], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  await spoken(child, 'the process');
  return child;
}

const test = suite<{ lab: HostLab }>('environment');
test.before.each(async (context) => {
  context.lab = await HostLab.up();
});
test.after.each(async ({ lab }) => {
  await lab.down();
});

test('attach gives a namespace an address, the way out and one nameserver; detach and cleanNode leave nothing', async ({
  lab,
}) => {
  const a = await lab.instance('a');
  const before = await lab.snapshot(a);
  const environment = lab.environment();
  await environment.setupNode(node);
  const attached = await environment.attach(toNetns('shop.prod.cart.v1/1', a, '172.16.0.66'));
  assert.is(attached.interface, 'eth0');
  assert.is(attached.resolvConf, `/etc/netns/${a}/resolv.conf`);
  assert.is(
    await readFile(`/etc/netns/${a}/resolv.conf`, 'utf8'),
    '# edgeway: instance shop.prod.cart.v1/1\nnameserver 172.16.0.65\noptions ndots:1\n',
  );
  assert.ok(await reaches(a, '172.16.0.65'), 'gateway');
  assert.ok(await reaches(a, '10.99.0.1'), 'outside');
  assert.ok(await reaches(lab.host, '172.16.0.66'), 'from the host');
  const inner = await within(a).run(['ip', '-d', 'addr', 'show', 'eth0']);
  assert.match(inner.stdout, `mtu ${MTU}`);
  assert.not.match(inner.stdout, 'inet6');
  await environment.detach({ id: 'shop.prod.cart.v1/1' });
  await environment.detach({ id: 'shop.prod.cart.v1/1' });
  await environment.cleanNode();
  await environment.cleanNode();
  assert.is(await lab.snapshot(a), before);
});

test('setupNode and attach repeated change nothing, and another process picks up from the state file', async ({
  lab,
}) => {
  const a = await lab.instance('a');
  const before = await lab.snapshot(a);
  const first = lab.environment();
  await first.setupNode(node);
  const attached = await first.attach(toNetns('a', a, '172.16.0.66'));
  const made = await lab.snapshot(a);
  await first.setupNode(node);
  assert.equal(await first.attach(toNetns('a', a, '172.16.0.66')), attached);
  const second = lab.environment();
  await second.setupNode(node);
  assert.equal(await second.attach(toNetns('a', a, '172.16.0.66')), attached);
  assert.is(await lab.snapshot(a), made);
  const listed = { id: 'a', namespaceIp: address('172.16.0.66'), netns: `/run/netns/${a}`, ports: [] };
  assert.equal(await second.attachments(), [{ ...listed, ...attached }]);
  await must('ip', '-n', lab.host, 'link', 'del', attached.hostInterface);
  await second.attach(toNetns('a', a, '172.16.0.66'));
  assert.ok(await reaches(a, '172.16.0.65'), 'attached anew after somebody deleted the link');
  await lab.environment().cleanNode();
  assert.is(await lab.snapshot(a), before);
});

test('setupNode with another subnet moves the bridge', async ({ lab }) => {
  const environment = lab.environment();
  await environment.setupNode(node);
  await environment.setupNode({ ...node, subnet: { base: address('172.16.0.128'), bits: 26 } });
  const shown = (await lab.runner.run(['ip', '-4', '-br', 'addr', 'show', 'edgeway0'])).stdout;
  assert.match(shown, '172.16.0.129/26');
  assert.not.match(shown, '172.16.0.65');
});

test('two instances meet neither on the bridge nor through its router, and reach of the host only DNS', async ({
  lab,
}) => {
  const [a, b] = [await lab.instance('a'), await lab.instance('b')];
  const environment = lab.environment();
  await environment.setupNode(node);
  await environment.attach(toNetns('a', a, '172.16.0.66'));
  await environment.attach(toNetns('b', b, '172.16.0.67'));
  const [onTheLink, outside] = await Promise.all([reaches(a, '172.16.0.67'), reaches(a, '172.16.5.2')]);
  assert.not(onTheLink, 'on the link');
  assert.not(outside, 'the platform does not leak outside');
  await must('ip', '-n', a, 'route', 'add', '172.16.0.67', 'via', '172.16.0.65');
  assert.not(await reaches(a, '172.16.0.67'), 'through the router');
  const server = spawn('nsenter', [
    `--net=/run/netns/${lab.host}`,
    '--',
    'busybox',
    'nc',
    '-ll',
    '-p',
    '8080',
    '-e',
    'echo',
    'hi',
  ]);
  try {
    const ask = (netns: string, host: string, port: string) =>
      within(netns).run(['busybox', 'timeout', '3', 'busybox', 'nc', '-w', '2', host, port]);
    for (let tries = 0; tries < 100 && (await ask(lab.host, '10.99.0.2', '8080')).stdout !== 'hi\n'; tries++)
      await pause(20);
    assert.is((await ask(lab.outside, '10.99.0.2', '8080')).stdout, 'hi\n', 'the port is open to others');
    await must('ip', '-n', a, 'route', 'add', '127.0.0.2', 'via', '172.16.0.65');
    const targets = ['172.16.0.65', '10.99.0.2', '127.0.0.1', '127.0.0.2'];
    const heard = await Promise.all(targets.map((target) => ask(a, target, '8080')));
    for (const [at, { stdout }] of heard.entries()) assert.not.match(stdout, 'hi', targets[at]);
  } finally {
    server.kill('SIGKILL');
  }
});

test('an instance cannot pretend to be another, neither by IP, nor by hardware address, nor in ARP', async ({
  lab,
}) => {
  const [a, b] = [await lab.instance('a'), await lab.instance('b')];
  const environment = lab.environment();
  await environment.setupNode(node);
  await environment.attach(toNetns('a', a, '172.16.0.66'));
  await environment.attach(toNetns('b', b, '172.16.0.67'));
  const from = async (netns: string, source: string) =>
    (await within(netns).run(['busybox', 'ping', '-c', '1', '-W', '1', '-I', source, '172.16.0.65']))
      .status === 0;
  await must('ip', '-n', a, 'addr', 'add', '172.16.0.67/32', 'dev', 'eth0');
  assert.ok(await from(a, '172.16.0.66'));
  assert.not(await from(a, '172.16.0.67'), "another's IP address");
  // The host asks who has .67: only b's answer counts.
  await lab.runner.run(['ip', 'neigh', 'flush', 'dev', 'edgeway0']);
  assert.ok(await reaches(lab.host, '172.16.0.67'));
  const neighbour = (await lab.runner.run(['ip', 'neigh', 'show', '172.16.0.67'])).stdout;
  assert.match(neighbour, '02:45:ac:10:00:43');
  await must('ip', '-n', a, 'link', 'set', 'eth0', 'address', '02:45:ac:10:00:43');
  assert.not(await from(a, '172.16.0.66'), "another's hardware address");
  assert.ok(await from(b, '172.16.0.67'), 'and the other is not cut off by it');
  await must('ip', '-n', a, 'link', 'set', 'eth0', 'address', '02:45:ac:10:00:42');
  assert.ok(await from(a, '172.16.0.66'));
});

test('an instance reaches neither other nodes’ tunnels nor the coordination store', async ({ lab }) => {
  const a = await lab.instance('a');
  const environment = lab.environment();
  await environment.setupNode({
    ...node,
    tunnelPort: 4791,
    stores: [{ address: address('10.99.0.1'), port: 2379 }],
  });
  await environment.attach(toNetns('a', a, '172.16.0.66'));
  await environment.expose([], [4999]);
  const ports = [4790, 4791, 4999, 2379, 5000];
  const servers = await Promise.all(ports.map((port) => whoami(lab.outside, port, 'other')));
  try {
    assert.is(await says(a, 'udp', '10.99.0.1', 5000), 'other 10.99.0.2', 'what is nobody’s tunnel');
    assert.is(await says(a, 'tcp', '10.99.0.1', 4790), 'other 10.99.0.2', 'a tunnel is UDP');
    for (const port of [4790, 4791, 4999]) {
      assert.match(await says(a, 'udp', '10.99.0.1', port), /^error E/, `udp port ${port}`);
      assert.is(await says(lab.host, 'udp', '10.99.0.1', port), 'other 10.99.0.2', 'the host itself');
    }
    assert.match(await says(a, 'tcp', '10.99.0.1', 2379), /^error E/);
    assert.is(await says(lab.host, 'tcp', '10.99.0.1', 2379), 'other 10.99.0.2');
    await environment.expose([], []);
    assert.is(await says(a, 'udp', '10.99.0.1', 4999), 'other 10.99.0.2', 'no node has it any more');
  } finally {
    for (const server of servers) server.kill('SIGKILL');
  }
});

test('a conversation through a published port ends when the port leads elsewhere, or nowhere', async ({
  lab,
}) => {
  const [a, b] = [await lab.instance('a'), await lab.instance('b')];
  const environment = lab.environment();
  await environment.setupNode(node);
  const published = (id: string, name: string, ip: string, on: boolean) =>
    environment.attach({
      ...toNetns(id, name, ip),
      ports: on
        ? (['tcp', 'udp'] as const).map((protocol) => ({ source: 8080, destination: 80, protocol }))
        : [],
    });
  await published('a', a, '172.16.0.66', true);
  const servers = [await echo(a, 80, 'a'), await echo(b, 80, 'b')];
  const talkers: Talker[] = [];
  const talk = (netns: string, protocol: 'tcp' | 'udp'): Talker => {
    const talker = new Talker(netns, protocol, '10.99.0.2', 8080);
    talkers.push(talker);
    return talker;
  };
  try {
    const first = [
      ...[talk(lab.outside, 'tcp'), talk(lab.outside, 'udp')],
      ...[talk(lab.host, 'tcp'), talk(lab.host, 'udp')],
    ];
    for (const one of first) assert.match(await one.say(), /^a /);
    // Rules are replaced under it, and it goes on.
    await published('a', a, '172.16.0.66', true);
    for (const one of first) assert.match(await one.say(), /^a /);
    await published('a', a, '172.16.0.66', false);
    for (const one of first) assert.match(await one.say(), /^error /, 'published no more');
    await published('b', b, '172.16.0.67', true);
    for (const one of first) assert.match(await one.say(), /^error /, 'b’s port by now');
    const second = [talk(lab.outside, 'tcp'), talk(lab.outside, 'udp')];
    for (const one of second) assert.match(await one.say(), /^b /);
    await environment.detach({ id: 'b' });
    for (const one of second) assert.match(await one.say(), /^error /, 'b is gone');
    // A service's port: who talks to one target may go on while new ones find the other.
    const target = (ip: string) => ({ address: address(ip), port: 80 });
    const service = (targets: string[], kept: string[]) =>
      environment.expose([
        { protocol: 'tcp', source: 8081, targets: targets.map(target), kept: kept.map(target) },
      ]);
    await environment.attach(toNetns('b', b, '172.16.0.67'));
    await service(['172.16.0.66'], []);
    const third = new Talker(lab.outside, 'tcp', '10.99.0.2', 8081);
    talkers.push(third);
    assert.match(await third.say(), /^a /);
    await service(['172.16.0.67'], ['172.16.0.66']);
    assert.match(await third.say(), /^a /);
    assert.match(await says(lab.outside, 'tcp', '10.99.0.2', 8081), /^b /);
    await service([], ['172.16.0.66']);
    assert.match(await third.say(), /^a /);
    assert.is(await says(lab.outside, 'tcp', '10.99.0.2', 8081), 'error ECONNREFUSED');
  } finally {
    for (const one of [...talkers.map(({ child }) => child), ...servers]) one.kill('SIGKILL');
  }
});

test('a port that Docker publishes by rules alone is taken', async ({ lab }) => {
  const a = await lab.instance('a');
  const environment = lab.environment();
  await environment.setupNode(node);
  // As Docker writes it with userland-proxy=false: no process listens.
  for (const rule of [
    '-N DOCKER',
    '-A DOCKER ! -i docker0 -p tcp -m tcp --dport 9090 -j DNAT --to-destination 172.17.0.2:90',
  ])
    assert.is((await lab.runner.run(['iptables', '-t', 'nat', ...rule.split(' ')])).status, 0);
  const attach = (source: number) =>
    environment.attach({
      ...toNetns('a', a, '172.16.0.66'),
      ports: [{ source, destination: 80, protocol: 'tcp' }],
    });
  assert.match(await codeOf(attach(9090)), /^port_taken: .* held by a container of Docker/);
  assert.is(await codeOf(attach(9091)), 'ok');
});

test('one namespace is one instance’s, by whatever name it is called', async ({ lab }) => {
  const a = await lab.instance('a');
  const environment = lab.environment();
  await environment.setupNode(node);
  await environment.attach(toNetns('a', a, '172.16.0.66'));
  const before = await lab.snapshot(a);
  assert.match(
    await codeOf(environment.attach(toNetns('b', a, '172.16.0.67'))),
    /^instance_exists: instance a lives in the network namespace of netns /,
  );
  const child = await start(a, 'sh', '-c', 'echo in; exec sleep 60');
  try {
    assert.match(
      await codeOf(
        environment.attach({
          ...toNetns('b', a, '172.16.0.67'),
          target: { kind: 'pid', pid: child.pid ?? 0 },
        }),
      ),
      /^instance_exists: instance a lives in the network namespace of pid /,
    );
  } finally {
    child.kill('SIGKILL');
  }
  assert.is(await lab.snapshot(a), before);
  await environment.detach({ id: 'a' });
  await environment.attach(toNetns('b', a, '172.16.0.67'));
});

test('an attachment gets another MTU where it is, and a FORWARD that somebody flushed gets our chain back', async ({
  lab,
}) => {
  const a = await lab.instance('a');
  const environment = lab.environment();
  await environment.setupNode(node);
  const one = await environment.attach(toNetns('a', a, '172.16.0.66'));
  const forward = async (): Promise<string> =>
    (await lab.runner.run(['sh', '-c', 'iptables -S FORWARD; iptables -S EW-edgeway0'])).stdout;
  const room = await forward();
  assert.match(room, '-A FORWARD -m comment --comment edgeway -j EW-edgeway0');
  await environment.attach({ ...toNetns('a', a, '172.16.0.66'), mtu: 1300 });
  for (const [netns, link] of [
    [lab.host, one.hostInterface],
    [a, one.interface],
  ] as const)
    assert.match(await must('ip', '-n', netns, 'link', 'show', link), 'mtu 1300');
  await lab.runner.run(['iptables', '-F', 'FORWARD']);
  await environment.attach(toNetns('a', a, '172.16.0.66'));
  assert.is(await forward(), room);
});

test('attach by pid writes the resolv.conf of that process alone and puts it back', async ({ lab }) => {
  const environment = lab.environment();
  await environment.setupNode(node);
  const before = await lab.snapshot();
  const hostFile = await readFile('/etc/resolv.conf', 'utf8');
  for (const own of [true, false]) {
    const child = await startProcess(lab.dir, own);
    const pid = child.pid ?? 0;
    try {
      const attached = await environment.attach({
        ...toNetns('p', '', '172.16.0.70'),
        target: { kind: 'pid', pid },
      });
      const inside = (
        await must('nsenter', `--target=${pid}`, '--mount', '--', 'cat', '/etc/resolv.conf')
      ).split('\n');
      if (own) assert.is(inside[1], 'nameserver 172.16.0.65');
      else assert.is(attached.resolvConf, undefined, "the host's own file is never written");
      assert.is(await readFile('/etc/resolv.conf', 'utf8'), hostFile);
      assert.is((await lab.runner.run(['busybox', 'ping', '-c', '1', '-W', '2', '172.16.0.70'])).status, 0);
      await environment.detach({ id: 'p' });
      assert.is(await readFile(join(lab.dir, 'own-resolv.conf'), 'utf8'), 'nameserver 192.0.2.1\n');
      // And when the process is gone already:
      await environment.attach({ ...toNetns('p', '', '172.16.0.70'), target: { kind: 'pid', pid } });
    } finally {
      child.kill('SIGKILL');
      await new Promise((resolve) => child.once('exit', resolve));
    }
    await environment.detach({ id: 'p' });
    assert.is(await lab.snapshot(), before);
  }
});

test('attach refuses the host’s own namespace, what is not there, and nodes without a network', async ({
  lab,
}) => {
  const environment = lab.environment();
  assert.match(await codeOf(environment.attach(toNetns('a', 'nosuch', '172.16.0.66'))), /^not_registered/);
  await environment.setupNode(node);
  const before = await lab.snapshot();
  assert.match(
    await codeOf(environment.attach(toNetns('a', 'nosuch', '172.16.0.66'))),
    /^namespace_unknown: .*"nosuch"/,
  );
  assert.match(await codeOf(environment.attach(toNetns('a', '../../x', '172.16.0.66'))), /^invalid_request/);
  assert.match(
    await codeOf(environment.attach(toNetns('a', lab.host, '172.16.0.66'))),
    /^invalid_request: .*host's own/,
  );
  const pid = (value: number) =>
    codeOf(environment.attach({ ...toNetns('a', '', '172.16.0.66'), target: { kind: 'pid', pid: value } }));
  assert.match(await pid(2 ** 22 + 1), /^namespace_unknown: there is no process/);
  assert.match(await pid(-1), /^invalid_request/);
  const child = spawn('nsenter', [`--net=/run/netns/${lab.host}`, '--', 'sleep', '60']);
  try {
    const own = async (): Promise<string> => must('readlink', `/proc/${child.pid}/ns/net`);
    const host = await within(lab.host).run(['readlink', '/proc/self/ns/net']);
    for (let tries = 0; tries < 200 && (await own()) !== host.stdout; tries++) await pause(10);
    assert.match(
      await pid(child.pid ?? 0),
      /^invalid_request: process \d+ lives in the host's own network namespace/,
    );
  } finally {
    child.kill('SIGKILL');
  }
  assert.is(await lab.snapshot(), before);
});

test('detach and cleanNode succeed when link, namespace, bridge and rules are gone already', async ({
  lab,
}) => {
  const [a, b] = [await lab.instance('a'), await lab.instance('b')];
  const before = await lab.snapshot(b);
  const environment = lab.environment();
  await environment.setupNode(node);
  const one = await environment.attach(toNetns('a', a, '172.16.0.66'));
  await must('ip', '-n', lab.host, 'link', 'del', one.hostInterface);
  await environment.detach({ id: 'a' });
  await environment.attach(toNetns('a', a, '172.16.0.66'));
  await environment.attach(toNetns('b', b, '172.16.0.67'));
  await must('ip', 'netns', 'del', a);
  await environment.detach({ id: 'a' });
  await must('ip', '-n', lab.host, 'link', 'del', 'edgeway0');
  await lab.runner.run(['nft', 'flush', 'ruleset']);
  await environment.cleanNode();
  assert.is(await lab.snapshot(b), before);
});

test('a default route that is there already stays, and only the platform goes through us', async ({
  lab,
}) => {
  const a = await lab.instance('a');
  await must('ip', '-n', a, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'other');
  await must('ip', '-n', a, 'addr', 'add', '192.0.2.2/24', 'dev', 'eth0');
  await must('ip', '-n', a, 'link', 'set', 'eth0', 'up');
  await must('ip', '-n', a, 'route', 'add', 'default', 'via', '192.0.2.1');
  const environment = lab.environment();
  await environment.setupNode(node);
  assert.is((await environment.attach(toNetns('a', a, '172.16.0.66'))).interface, 'eth1');
  const routes = await must('ip', '-n', a, '-4', 'route');
  assert.match(routes, 'default via 192.0.2.1 dev eth0');
  assert.match(routes, '172.16.0.0/12 via 172.16.0.65 dev eth1');
});

test('attachTun routes the services to the device with the bridge as source, twice', async ({ lab }) => {
  const before = await lab.snapshot();
  const environment = lab.environment();
  await environment.setupNode(node);
  await addTun(lab.host);
  for (let times = 0; times < 2; times++)
    await environment.attachTun({ tun: 'edgeway-tun', services: SERVICES });
  const routes = await must('ip', '-n', lab.host, '-4', 'route');
  assert.match(routes, /172\.30\.0\.0\/16 dev edgeway-tun scope link src 172\.16\.0\.65/);
  assert.equal((await environment.hostRoutes()).map(formatCidr).toSorted(), [
    '10.99.0.0/24',
    '10.99.0.0/24',
    '10.99.0.2/32',
    '10.99.0.255/32',
  ]);
  await environment.cleanNode();
  assert.is(await lab.snapshot(), before);
});

test.run();
