// Kudo's contract with the right answers: two nodes that only the kernel connects, their instances, and clients
// outside. Each defect of the original that its study names is a test here.
//
//   …-o 10.99.0.254 ─┬─ …-n1 10.99.0.1  kbr… 10.0.0.1/24 ── instances a1, a2
//        (bridge)    └─ …-n2 10.99.0.2  kbr… 10.0.1.1/24 ── instances b1, b2
import type { ChildProcess } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Environment } from '../../edge/host/environment.ts';
import { hostRunner } from '../../edge/io/exec.ts';
import { hostFiles } from '../../edge/io/files.ts';
import { createKudo, getNamespaceName, type Kudo, type Port } from '../../edge/kudo/kudo.ts';
import type { Files, Runner } from '../../edge/ports.ts';
import { until } from '../../scripts/lab.ts';
import { SILENT } from '../../src/log.ts';
import {
  address,
  codeOf,
  echo,
  filesBelow,
  hostSnapshot,
  ipBatch,
  MTU,
  must,
  PLATFORM,
  Saboteur,
  SERVICES,
  SUBNET,
  says,
  spoken,
  start,
  stream,
  Talker,
  whoami,
  within,
} from './host_lab.ts';

const P = `ewD${process.pid}`;

/** Instances of these tests. */
const LABELS = ['a1', 'a2', 'b1', 'b2'];

class KudoLab {
  readonly dir: string;
  readonly outside = `${P}-o`;
  readonly nodes = [`${P}-n1`, `${P}-n2`] as const;
  readonly #servers: ChildProcess[] = [];
  private constructor(dir: string) {
    this.dir = dir;
  }

  static async up(): Promise<KudoLab> {
    const lab = new KudoLab(await mkdtemp(join(tmpdir(), 'edgeway-kudo-')));
    try {
      for (const name of [lab.outside, ...lab.nodes]) await must('ip', 'netns', 'add', name);
      await ipBatch(
        lab.outside,
        'link set lo up',
        'link add switch type bridge',
        'addr add 10.99.0.254/24 dev switch',
        'link set switch up',
      );
      for (const [index, name] of lab.nodes.entries()) {
        await ipBatch(
          name,
          'link set lo up',
          `link add up0 type veth peer d${index} netns ${lab.outside}`,
          `addr add 10.99.0.${index + 1}/24 dev up0`,
          'link set up0 up',
          'route add default via 10.99.0.254',
        );
        await ipBatch(lab.outside, `link set d${index} master switch up`);
      }
    } catch (error) {
      await lab.down();
      throw error;
    }
    return lab;
  }

  kudo(node: number, parts: { runner?: Runner; files?: Files } = {}): Kudo {
    return createKudo({
      runner: parts.runner ?? within(this.nodes[node] ?? ''),
      files: parts.files ?? hostFiles,
      log: SILENT,
      stateDir: join(this.dir, `n${node}`),
    });
  }

  /** Every connection to the port is told who asks; ends with the lab. */
  async serve(netns: string, port: number, answer: string): Promise<void> {
    this.#servers.push(await whoami(netns, port, answer));
  }

  async snapshot(): Promise<string> {
    const hosts = await Promise.all(this.nodes.map(hostSnapshot));
    // Namespaces are names of the whole machine: only those of this run, whose ids end alike.
    const ours = LABELS.map((label) => getNamespaceName(id(label)));
    const namespaces = filesBelow('/run/netns').filter((name) => ours.includes(name));
    const state = filesBelow(this.dir).filter((file) => !/^n\d$/.test(file));
    return [...hosts, ...namespaces, ...state].join('\n');
  }

  async down(): Promise<void> {
    for (const server of this.#servers.splice(0)) server.kill('SIGKILL');
    for (const node of [0, 1]) {
      const kudo = this.kudo(node);
      const described = await kudo.describeNode();
      if (described !== undefined) await kudo.cleanNode({ nodeId: described.nodeId });
    }
    for (const name of [...this.nodes, this.outside]) await hostRunner.run(['ip', 'netns', 'del', name]);
    await rm(this.dir, { recursive: true, force: true });
  }
}

/** Answer of a whoami server: `NAME CLIENT`, or empty. */
async function ask(netns: string, host: string, port: number): Promise<string> {
  const result = await within(netns).run([
    'busybox',
    'timeout',
    '3',
    'busybox',
    'nc',
    '-w',
    '2',
    host,
    String(port),
  ]);
  return result.stdout.trim();
}

/** `BYTES DIGEST | BYTES DIGEST`: what was sent, and what came. */
function assertWhole(told: string, bytesMin: number): void {
  const [sent = '', came] = told.trim().split(' | ');
  assert.is(came, sent);
  assert.ok(Number(sent.split(' ')[0]) >= bytesMin, told);
}

/** Ids of this run: namespaces are names of the whole machine. */
const id = (label: string): string => `${label}-${process.pid}`;
const node = (n: 0 | 1) => ({ nodeId: `node${n}`, nodeIpCidr: `10.0.${n}.1/24`, nodesIps: [] });
const peer = (n: 0 | 1) => ({
  nodeId: `node${n}`,
  nodeIp: { clusterIpCidr: `10.0.${n}.1/24`, externalIpAddr: `10.99.0.${n + 1}` },
});
const instance = (n: 0 | 1, label: string, last: number, ports: readonly Port[] = []) => ({
  nodeId: `node${n}`,
  nodeIpAddr: `10.0.${n}.1`,
  instanceId: id(label),
  instanceIpCidr: `10.0.${n}.${last}/24`,
  ports,
});

const subnetOfAgent = { subnet: SUBNET, services: SERVICES, platform: PLATFORM, mtu: MTU };
/** Of a UDP packet without data, in hexadecimal. */
function ipv4Header(source: string, target: string): string {
  const bytes = Buffer.from(`4500001c0000000040110000${source}${target}`, 'hex');
  let sum = 0;
  for (let at = 0; at < bytes.length; at += 2) sum += bytes.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  bytes.writeUInt16BE(~sum & 0xffff, 10);
  return bytes.toString('hex');
}

const test = suite<{ lab: KudoLab }>('kudo');
test.before.each(async (context) => {
  context.lab = await KudoLab.up();
});
test.after.each(async ({ lab }) => {
  await lab.down();
});

test('§3.1, §3.2: traffic between nodes reaches the instance that was addressed, and it sees who asks', async ({
  lab,
}) => {
  const [a, b] = [lab.kudo(0), lab.kudo(1)];
  await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
  await b.setupNode(node(1));
  await b.newNodeInCluster(peer(0));
  const a1 = await a.setupInstance(instance(0, 'a1', 2));
  const b1 = await b.setupInstance(instance(1, 'b1', 2, [{ source: 8081, destination: 80 }]));
  const b2 = await b.setupInstance(instance(1, 'b2', 3, [{ source: 8082, destination: 80 }]));
  assert.is(a1.namespaceName, a.getNamespaceName(id('a1')));
  await lab.serve(b1.namespaceName, 80, 'b1');
  await lab.serve(b2.namespaceName, 80, 'b2');
  assert.is(await ask(a1.namespaceName, '10.0.1.2', 80), 'b1 10.0.0.2');
  assert.is(await ask(a1.namespaceName, '10.0.1.3', 80), 'b2 10.0.0.2');
  const nobody = [
    ['10.0.1.2', 8082],
    ['10.0.1.3', 8081],
    ['10.0.1.99', 8082],
  ] as const;
  assert.equal(
    await Promise.all(nobody.map(([host, port]) => ask(a1.namespaceName, host, port))),
    ['', '', ''],
    'neither a port that b1 does not have, nor b2, nor an address that nobody has',
  );
  const ping = await within(a1.namespaceName).run(['busybox', 'ping', '-c', '1', '-W', '2', '10.0.1.2']);
  assert.is(ping.status, 0, 'ICMP too');
  // Another instance of the same node is a neighbour.
  assert.is(await ask(b2.namespaceName, '10.0.1.2', 80), 'b1 10.0.1.3');
  // When the peer leaves, its instances are out of reach; leaving twice is fine.
  await a.deleteNodeInCluster(peer(1));
  await a.deleteNodeInCluster(peer(1));
  assert.not.match((await within(lab.nodes[0]).run(['ip', 'route'])).stdout, '10.0.1.0/24');
  assert.is(await ask(a1.namespaceName, '10.0.1.2', 80), '');
  await a.addOtherNodes([peer(1), peer(1)]);
  assert.is(await ask(a1.namespaceName, '10.0.1.2', 80), 'b1 10.0.0.2');
});

test('published ports: from outside with the client’s address, from the host, by hairpin; both protocols or one', async ({
  lab,
}) => {
  const b = lab.kudo(1);
  await b.setupNode(node(1));
  const b1 = await b.setupInstance(
    instance(1, 'b1', 2, [
      { source: 8081, destination: 80 },
      { source: 8443, destination: 80, protocol: 'udp' },
    ]),
  );
  const b2 = await b.setupInstance(instance(1, 'b2', 3));
  await lab.serve(b1.namespaceName, 80, 'b1');
  assert.is(await ask(lab.outside, '10.99.0.2', 8081), 'b1 10.99.0.254', 'from outside');
  assert.is(await ask(lab.outside, '10.99.0.2', 8443), '', 'udp only');
  assert.is(await says(lab.outside, 'udp', '10.99.0.2', 8443), 'b1 10.99.0.254');
  assert.is(await says(lab.outside, 'udp', '10.99.0.2', 8081), 'b1 10.99.0.254', 'both');
  assert.match(await ask(lab.nodes[1], '10.99.0.2', 8081), /^b1 /, 'from the node itself');
  assert.is(await ask(b2.namespaceName, '10.99.0.2', 8081), 'b1 10.0.1.1', 'hairpin from a neighbour');
  assert.is(await ask(b1.namespaceName, '10.99.0.2', 8081), 'b1 10.0.1.1', 'hairpin to itself');
  // Rules name no interface: the uplink may be renamed and the default route may move.
  await must('ip', '-n', lab.nodes[1], 'link', 'set', 'up0', 'down');
  await must('ip', '-n', lab.nodes[1], 'link', 'set', 'up0', 'name', 'lte0');
  await must('ip', '-n', lab.nodes[1], 'link', 'set', 'lte0', 'up');
  await until('the port answers after the uplink changed', 15_000, async () =>
    (await ask(lab.outside, '10.99.0.2', 8081)) === 'b1 10.99.0.254' ? true : undefined,
  );
});

test('§3.8: services on the host’s loopback stay out of reach of instances, and route_localnet stays off', async ({
  lab,
}) => {
  const a = lab.kudo(0);
  await a.setupNode(node(0));
  const a1 = await a.setupInstance(instance(0, 'a1', 2));
  await lab.serve(lab.nodes[0], 9000, 'host');
  assert.match(await ask(lab.nodes[0], '127.0.0.1', 9000), /^host/);
  assert.is(await ask(a1.namespaceName, '10.0.0.1', 9000), '');
  assert.is(await ask(a1.namespaceName, '10.99.0.1', 9000), '');
  // The attack of CVE-2020-8558: a packet to 127.0.0.1 through the gateway.
  await must('ip', '-n', a1.namespaceName, 'addr', 'del', '127.0.0.1/8', 'dev', 'lo');
  await must('ip', '-n', a1.namespaceName, 'link', 'set', 'lo', 'down');
  await must('ip', '-n', a1.namespaceName, 'route', 'add', '127.0.0.1', 'via', '10.0.0.1');
  await must(
    'ip',
    'netns',
    'exec',
    a1.namespaceName,
    'sh',
    '-c',
    'echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet',
  );
  // The packet comes as far as the bridge, also when somebody turned the switch on for all interfaces.
  await within(lab.nodes[0]).run(['nft', 'add table inet seen']);
  const hook = 'type filter hook prerouting priority -300;';
  await within(lab.nodes[0]).run(['nft', `add chain inet seen pre { ${hook} }`]);
  await within(lab.nodes[0]).run([
    'nft',
    'add rule inet seen pre ip daddr 127.0.0.1 iifname kbrnode0 counter',
  ]);
  const seen = async (): Promise<number> =>
    Number(
      /packets (\d+)/.exec((await within(lab.nodes[0]).run(['nft', 'list table inet seen'])).stdout)?.[1],
    );
  assert.is(await ask(a1.namespaceName, '127.0.0.1', 9000), '');
  const first = await seen();
  assert.ok(first > 0, 'it left the instance');
  const switched = '/proc/sys/net/ipv4/conf/all/route_localnet';
  await within(lab.nodes[0]).run(['tee', switched], '1');
  assert.is(await ask(a1.namespaceName, '127.0.0.1', 9000), '', 'our rules hold without the switch');
  assert.ok((await seen()) > first);
  await within(lab.nodes[0]).run(['tee', switched], '0');
  const localnet = await within(lab.nodes[0]).run([
    'sh',
    '-c',
    'cat /proc/sys/net/ipv4/conf/*/route_localnet',
  ]);
  assert.not.match(localnet.stdout, '1');
});

test('§3.4: every function repeated is a success and changes nothing', async ({ lab }) => {
  const [a, b] = [lab.kudo(0), lab.kudo(1)];
  const before = await lab.snapshot();
  const all = async (): Promise<void> => {
    await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
    await a.setupIptables({ nodeId: 'node0' });
    await a.addOtherNodes([peer(1)]);
    await a.newNodeInCluster(peer(1));
    await a.setupInstance(instance(0, 'a1', 2, [{ source: 80, destination: 80 }]));
    await b.setupNode(node(1));
  };
  await all();
  const made = await lab.snapshot();
  await all();
  assert.is(await lab.snapshot(), made);
  // A process that starts anew finds everything by the state file.
  assert.is((await lab.kudo(0).describeNode())?.instances.length, 1);
  for (let times = 0; times < 2; times++) {
    await a.cleanInstance({ instanceId: id('a1') });
    await lab.kudo(0).cleanNode({ nodeId: 'node0' });
    await b.cleanNode({ nodeId: 'node1' });
  }
  assert.is(await lab.snapshot(), before);
});

test('§3.3: clean-up succeeds whatever is gone already, and the ports go with it', async ({ lab }) => {
  const a = lab.kudo(0);
  const before = await lab.snapshot();
  await a.setupNode(node(0));
  const bare = await lab.snapshot();
  for (let times = 0; times < 10; times++) {
    const made = await a.setupInstance(instance(0, 'a1', 2, [{ source: 80, destination: 80 }]));
    // The kernel removes the host's end some time after the namespace: the race of the original.
    if (times % 3 === 0) await must('ip', 'netns', 'del', made.namespaceName);
    else if (times % 3 === 1) await must('ip', '-n', lab.nodes[0], 'link', 'del', made.interfaceName);
    await a.cleanInstance({ instanceId: id('a1') });
    assert.is(await lab.snapshot(), bare);
  }
  await must('ip', '-n', lab.nodes[0], 'link', 'del', 'kbrnode0');
  await within(lab.nodes[0]).run(['nft', 'flush', 'ruleset']);
  await a.cleanNode({ nodeId: 'node0' });
  await a.cleanInstance({ instanceId: 'never was' });
  await a.cleanNode({ nodeId: 'never was' });
  assert.is(await lab.snapshot(), before);
});

test('§3.5: ids that begin alike, are long or not plain get names of their own', async ({ lab }) => {
  const a = lab.kudo(0);
  await a.setupNode(node(0));
  const ids = ['instance-prod-1', 'instance-prod-2', 'Ünïcödé-ïnstance', 'x'.repeat(253)].map(
    (text) => `${text}`.slice(0, 240) + id(''),
  );
  const names = new Set<string>();
  for (const [at, instanceId] of ids.entries()) {
    const made = await a.setupInstance({ ...instance(0, '', at + 2), instanceId });
    assert.is(made.namespaceName, a.getNamespaceName(instanceId));
    assert.match(made.namespaceName, /^kns.{12}$/);
    names.add(made.namespaceName).add(made.interfaceName);
  }
  assert.is(names.size, ids.length * 2);
  assert.is(a.getNamespaceName('instance'), 'knsinstance', 'short ids stay readable');
});

test('§3.6: after a reboot one call brings everything back', async ({ lab }) => {
  const [a, b] = [lab.kudo(0), lab.kudo(1)];
  await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
  await b.setupNode({ ...node(1), nodesIps: [peer(0)] });
  const b1 = await b.setupInstance(instance(1, 'b1', 2, [{ source: 8081, destination: 80 }]));
  await lab.serve(b1.namespaceName, 80, 'before');
  // What a reboot takes away:
  await must('ip', 'netns', 'del', b1.namespaceName);
  for (const link of ['kbrnode1', 'kvxnode1']) await must('ip', '-n', lab.nodes[1], 'link', 'del', link);
  await within(lab.nodes[1]).run(['nft', 'flush', 'ruleset']);
  await within(lab.nodes[1]).run(['tee', '/proc/sys/net/ipv4/ip_forward'], '0');
  await lab.kudo(1).setupIptables({ nodeId: 'node1' });
  await lab.serve(b1.namespaceName, 80, 'after');
  assert.match(await ask(lab.outside, '10.99.0.2', 8081), /^after/);
  const a1 = await a.setupInstance(instance(0, 'a1', 2));
  assert.is(await ask(a1.namespaceName, '10.0.1.2', 80), 'after 10.0.0.2');
});

test('§3.7: after the default interface changed the way out is the new one, and clean-up leaves nothing', async ({
  lab,
}) => {
  const [n1] = lab.nodes;
  const far = '192.0.2.9';
  const ip = (netns: string, text: string) => must('ip', '-n', netns, ...text.split(' '));
  const use = async (on: string, off: string, gateway: string): Promise<void> => {
    await ip(n1, `link set ${off} down`);
    await ip(n1, `link set ${on} up`);
    await ip(n1, `route replace default via ${gateway}`);
  };
  await ip(lab.outside, `addr add ${far}/32 dev lo`);
  await ip(n1, `link add lte0 type veth peer tower netns ${lab.outside}`);
  await ip(n1, 'addr add 10.98.0.1/24 dev lte0');
  await ip(lab.outside, 'addr add 10.98.0.254/24 dev tower');
  await ip(lab.outside, 'link set tower up');
  await use('lte0', 'up0', '10.98.0.254');
  const before = await lab.snapshot();
  await use('up0', 'lte0', '10.99.0.254');
  const a = lab.kudo(0);
  await a.setupNode(node(0));
  const a1 = await a.setupInstance(instance(0, 'a1', 2, [{ source: 8081, destination: 80 }]));
  await lab.serve(a1.namespaceName, 80, 'a1');
  await lab.serve(lab.outside, 7000, 'far');
  assert.is(await ask(a1.namespaceName, far, 7000), 'far 10.99.0.1');
  await use('lte0', 'up0', '10.98.0.254');
  assert.is(await ask(a1.namespaceName, far, 7000), 'far 10.98.0.1', 'under the new address');
  assert.is(await ask(lab.outside, '10.98.0.1', 8081), 'a1 10.98.0.254', 'and in');
  await ip(n1, 'route del default');
  await a.setupIptables({ nodeId: 'node0' });
  await ip(n1, 'route add default via 10.98.0.254');
  assert.is(await ask(a1.namespaceName, far, 7000), 'far 10.98.0.1', 'none was needed meanwhile');
  await a.cleanInstance({ instanceId: id('a1') });
  await a.cleanNode({ nodeId: 'node0' });
  assert.is(await lab.snapshot(), before);
});

test('§3.9: rules are replaced under traffic, and no transfer is interrupted', async ({ lab }) => {
  const [a, b] = [lab.kudo(0), lab.kudo(1)];
  await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
  await b.setupNode({ ...node(1), nodesIps: [peer(0)] });
  const port = { source: 8081, destination: 80 };
  const a1 = await a.setupInstance(instance(0, 'a1', 2));
  const b1 = await b.setupInstance(instance(1, 'b1', 2, [port]));
  const programs = [await start(b1.namespaceName, ...stream('serve', '80'))];
  try {
    const published = await start(lab.outside, ...stream('tcp', '10.99.0.2', '8081'));
    const carried = await start(a1.namespaceName, ...stream('tcp', '10.0.1.2', '80'));
    programs.push(published, carried);
    for (let times = 0; times < 8; times++) {
      await b.setupIptables({ nodeId: 'node1' });
      await b.setupInstance(
        instance(1, 'b1', 2, times % 2 === 0 ? [port, { source: 9, destination: 9 }] : [port]),
      );
      await b.setupInstance(instance(1, 'b2', 3));
      await b.cleanInstance({ instanceId: id('b2') });
      await a.setupIptables({ nodeId: 'node0' });
    }
    for (const child of [published, carried]) {
      const told = spoken(child, 'the transfer');
      child.stdin?.end();
      assertWhole(await told, 1_000_000);
    }
  } finally {
    for (const child of programs) child.kill('SIGKILL');
  }
});

test('§3.9: whoever holds the lock of iptables is waited for', async ({ lab }) => {
  // Only the older kind of iptables has the lock; here with a file of its own.
  const lock = join(lab.dir, 'xtables.lock');
  const legacy = ['env', `XTABLES_LOCKFILE=${lock}`];
  const host = within(lab.nodes[0]);
  const runner: Runner = {
    run: ([program = '', ...args], stdin) =>
      /^iptables(-restore)?$/.test(program)
        ? host.run([...legacy, program.replace('iptables', 'iptables-legacy'), ...args], stdin)
        : host.run([program, ...args], stdin),
  };
  const a = lab.kudo(0, { runner });
  const holder = await start(lab.nodes[0], 'flock', lock, 'sh', '-c', 'echo held; sleep 1');
  try {
    assert.is(await codeOf(a.setupNode(node(0))), 'ok');
    assert.is(holder.exitCode, 0, 'it had let go by itself');
    assert.match((await runner.run(['iptables', '-S', 'FORWARD'])).stdout, '-j EW-kbrnode0');
    await a.cleanNode({ nodeId: 'node0' });
    assert.not.match((await runner.run(['iptables', '-S'])).stdout, 'EW-');
  } finally {
    holder.kill('SIGKILL');
  }
});

test('§3.11: 10 MB and the largest datagrams pass between nodes whole', async ({ lab }) => {
  const [a, b] = [lab.kudo(0), lab.kudo(1)];
  await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
  await b.setupNode({ ...node(1), nodesIps: [peer(0)] });
  const a1 = await a.setupInstance(instance(0, 'a1', 2));
  const b1 = await b.setupInstance(instance(1, 'b1', 2));
  const server = await start(b1.namespaceName, ...stream('serve', '80'));
  try {
    for (const [protocol, bytes] of [
      ['tcp', 10_000_000],
      // One that fills a packet (and is sent with DF), and the largest that there is.
      ['udp', MTU - 28],
      ['udp', 65_507],
    ] as const) {
      const argv = stream(protocol, '10.0.1.2', '80', String(bytes));
      assertWhole((await within(a1.namespaceName).run(argv)).stdout, bytes);
    }
  } finally {
    server.kill('SIGKILL');
  }
});

test('§3.11: an instance that takes an address which is not its own is not heard, neither here nor elsewhere', async ({
  lab,
}) => {
  const [a, b] = [lab.kudo(0), lab.kudo(1)];
  await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
  await b.setupNode({ ...node(1), nodesIps: [peer(0)] });
  const a1 = await a.setupInstance(instance(0, 'a1', 2));
  const a2 = await a.setupInstance(instance(0, 'a2', 3));
  const b1 = await b.setupInstance(instance(1, 'b1', 2));
  const stolen = '10.0.0.77';
  const link = (await must('ip', '-n', a1.namespaceName, '-br', 'link', 'show', 'type', 'veth')).split(
    /[@ ]/,
  )[0];
  await must('ip', '-n', a1.namespaceName, 'addr', 'add', `${stolen}/32`, 'dev', link ?? '');
  const watch = async (netns: string, family: string, hook: string): Promise<() => Promise<number>> => {
    await within(netns).run(['nft', `add table ${family} seen`]);
    await within(netns).run(['nft', `add chain ${family} seen in { type filter hook ${hook}; }`]);
    await within(netns).run(['nft', `add rule ${family} seen in ip saddr ${stolen} counter`]);
    return async () => {
      const { stdout } = await within(netns).run(['nft', 'list', 'table', family, 'seen']);
      return Number(/packets (\d+)/.exec(stdout)?.[1]);
    };
  };
  const arrived = [
    await watch(a2.namespaceName, 'ip', 'input priority 0'),
    await watch(b1.namespaceName, 'ip', 'input priority 0'),
    await watch(lab.outside, 'ip', 'input priority 0'),
  ];
  const left = await watch(lab.nodes[0], 'bridge', 'prerouting priority -400');
  const ping = async (source: string, target: string): Promise<number> => {
    const argv = ['busybox', 'ping', '-c', '1', '-W', '1', '-I', source, target];
    return (await within(a1.namespaceName).run(argv)).status;
  };
  const targets = ['10.0.0.3', '10.0.1.2', '10.99.0.254'];
  for (const target of targets)
    assert.is(await ping('10.0.0.2', target), 0, `${target} from its own address`);
  assert.is(await left(), 0);
  for (const status of await Promise.all(targets.map((target) => ping(stolen, target))))
    assert.is.not(status, 0);
  assert.ok((await left()) >= targets.length, 'they left the instance');
  assert.equal(await Promise.all(arrived.map((count) => count())), [0, 0, 0]);
});

test('§3.10: ports and addresses in use are refused, with a code', async ({ lab }) => {
  const a = lab.kudo(0);
  await a.setupNode(node(0));
  await a.setupInstance(instance(0, 'a1', 2, [{ source: 80, destination: 80 }]));
  await lab.serve(lab.nodes[0], 9000, 'host');
  const before = await lab.snapshot();
  const refused = async (pattern: RegExp, last: number, ports: readonly Port[]): Promise<void> =>
    assert.match(await codeOf(a.setupInstance(instance(0, 'a2', last, ports))), pattern);
  await refused(/^port_taken: tcp port 80 /, 3, [{ source: 80, destination: 81 }]);
  await refused(/^port_taken: udp port 80 /, 3, [{ source: 80, destination: 81, protocol: 'udp' }]);
  await refused(/^port_taken: tcp port 9000 .* held by a process of this host/, 3, [
    { source: 9000, destination: 1 },
  ]);
  await refused(/^port_taken: .* wanted twice/, 3, [
    { source: 70, destination: 1 },
    { source: 70, destination: 2, protocol: 'tcp' },
  ]);
  await refused(/^address_taken: 10\.0\.0\.2 belongs to instance/, 2, []);
  await refused(/^address_not_in_plan/, 1, []);
  await refused(/^invalid_request: port source 0/, 3, [{ source: 0, destination: 80 }]);
  await refused(/^invalid_request: port destination 65536/, 3, [{ source: 80, destination: 65_536 }]);
  assert.match(
    await codeOf(a.setupInstance(instance(0, 'a1', 5))),
    /^conflict: instance "a1-\d+" has 10\.0\.0\.2/,
  );
  assert.match(await codeOf(a.setupInstance({ ...instance(0, 'a2', 3), nodeId: 'other' })), /^not_found/);
  assert.match(
    await codeOf(a.setupInstance({ ...instance(0, 'a2', 3), instanceIpCidr: '10.0.9.3/24' })),
    /^address_not_in_plan/,
  );
  assert.match(await codeOf(a.setupNode({ ...node(0), nodeId: 'other' })), /^conflict/);
  assert.match(
    await codeOf(a.setupNode({ ...node(0), nodeIpCidr: '10.0.7.1/24' })),
    /^conflict: instance "a1/,
  );
  for (const nodeIpCidr of ['10.0.0.0/24', '10.0.0.1', 'fd00::1/64', ''])
    assert.match(await codeOf(a.setupNode({ ...node(0), nodeIpCidr })), /^invalid_request: nodeIpCidr/);
  assert.match(
    await codeOf(
      a.newNodeInCluster({
        ...peer(1),
        nodeIp: { clusterIpCidr: '10.0.0.9/16', externalIpAddr: '10.99.0.2' },
      }),
    ),
    /^subnet_taken/,
  );
  assert.match(await codeOf(lab.kudo(1).setupInstance(instance(1, 'b', 2))), /^not_registered/);
  assert.is(await lab.snapshot(), before);
});

test('prefixes that the host has are refused, and its routes stay', async ({ lab }) => {
  const a = lab.kudo(0);
  await must('ip', '-n', lab.nodes[0], 'route', 'add', '10.5.0.0/24', 'via', '10.99.0.254');
  // A wider route, such as a VPN's, may stand beside ours.
  await must('ip', '-n', lab.nodes[0], 'route', 'add', '10.0.0.0/8', 'via', '10.99.0.254');
  const untouched = await lab.snapshot();
  const at = (nodeIpCidr: string) => codeOf(a.setupNode({ ...node(0), nodeIpCidr }));
  assert.match(await at('10.99.0.77/24'), /^subnet_taken: .*10\.99\.0\.0\/24, which this host has on up0/);
  assert.match(await at('10.99.0.129/25'), /^subnet_taken/);
  assert.match(await at('10.5.0.1/24'), /^subnet_taken/);
  const other = (clusterIpCidr: string, externalIpAddr: string) => ({
    nodeId: 'other',
    nodeIp: { clusterIpCidr, externalIpAddr },
  });
  const bad: [ReturnType<typeof other>, RegExp][] = [
    [other('10.99.0.1/24', '192.0.2.1'), /^subnet_taken: .* of node "other" overlaps/],
    [other('10.5.0.1/24', '10.99.0.2'), /^subnet_taken/],
    [other('192.168.7.1/24', '192.168.7.9'), /^invalid_request: .* cannot be carried itself/],
  ];
  for (const [peerNode, why] of bad)
    assert.match(await codeOf(a.setupNode({ ...node(0), nodesIps: [peerNode] })), why);
  assert.is(await lab.snapshot(), untouched);
  await a.setupNode(node(0));
  const bare = await lab.snapshot();
  for (const [peerNode, why] of bad) assert.match(await codeOf(a.newNodeInCluster(peerNode)), why);
  for (const word of ['constructor', '__proto__'])
    assert.match(await codeOf(a.newNodeInCluster({ ...peer(1), nodeId: word })), /^invalid_request/);
  for (const word of ['toString', 'valueOf']) await a.cleanInstance({ instanceId: word });
  assert.is(await lab.snapshot(), bare);
});

test('a frame of the carrier from an address that no peer has goes nowhere, over IPv6 neither', async ({
  lab,
}) => {
  const a = lab.kudo(0);
  await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
  const a1 = await a.setupInstance(instance(0, 'a1', 2));
  await within(a1.namespaceName).run(['nft', 'add table inet seen']);
  await within(a1.namespaceName).run([
    'nft',
    'add chain inet seen in { type filter hook input priority 0; }',
  ]);
  await within(a1.namespaceName).run(['nft', 'add rule inet seen in udp dport 7 counter']);
  const arrived = async (): Promise<number> =>
    Number(
      /packets (\d+)/.exec((await within(a1.namespaceName).run(['nft', 'list table inet seen'])).stdout)?.[1],
    );
  // 10.0.1.2 → 10.0.0.2, UDP 9 → 7, empty and without a checksum, in a frame.
  const frame = `hex:0c00000100455700${ipv4Header('0a000102', '0a000002')}0009000700080000`;
  const six = (netns: string, at: string, dev: string) =>
    must('ip', '-n', netns, '-6', 'addr', 'add', at, 'dev', dev, 'nodad');
  await six(lab.nodes[0], 'fd00:99::1/64', 'up0');
  await six(lab.outside, 'fd00:99::fe/64', 'switch');
  await Promise.all([
    says(lab.outside, 'udp', 'fd00:99::1', 4790, frame),
    says(lab.outside, 'udp', '10.99.0.1', 4790, frame),
    says(a1.namespaceName, 'udp', '10.99.0.1', 4790, frame),
  ]);
  assert.is(await arrived(), 0);
  await says(lab.nodes[1], 'udp', '10.99.0.1', 4790, frame);
  assert.is(await arrived(), 1, 'the peer’s own');
});

test('setupNode repeated with other peers, another subnet and MTU: a refusal at any command leaves the host as it was', async ({
  lab,
}) => {
  const third = { nodeId: 'third', nodeIp: { clusterIpCidr: '10.0.3.1/24', externalIpAddr: '10.99.0.3' } };
  const moved = { ...node(0), nodeIpCidr: '10.0.9.1/24' };
  const healthy = lab.kudo(0);
  const uplinkMtu = (mtu: number) => ipBatch(lab.nodes[0], `link set up0 mtu ${mtu}`);
  await healthy.setupNode({ ...node(0), nodesIps: [peer(1)] });
  await uplinkMtu(1400);
  const held = await lab.snapshot();
  const invalid = { ...third, nodeIp: { ...third.nodeIp, clusterIpCidr: '10.0.1.1/24' } };
  assert.match(await codeOf(healthy.setupNode({ ...moved, nodesIps: [invalid] })), /^subnet_taken/);
  assert.is(await lab.snapshot(), held, 'refused before anything moves');
  let at = 0;
  for (let finished = false; !finished; ) {
    at += 2;
    assert.ok(at < 200, 'bounded');
    const saboteur = new Saboteur(at, false);
    const kudo = lab.kudo(0, {
      runner: saboteur.runner(within(lab.nodes[0])),
      files: saboteur.files(hostFiles),
    });
    const outcome = await codeOf(kudo.setupNode({ ...moved, nodesIps: [third] }));
    finished = outcome === 'ok';
    if (finished) break;
    assert.is(await lab.snapshot(), held, `change ${at}: ${outcome}`);
    // Taken back as if it had never been: the next try begins with a host that was set up once.
    await healthy.cleanNode({ nodeId: 'node0' });
    await uplinkMtu(1500);
    await healthy.setupNode({ ...node(0), nodesIps: [peer(1)] });
    await uplinkMtu(1400);
  }
  assert.ok(at > 10, `only ${at} changes`);
});

test('a refusal at any command that changes peers or ports leaves the host as it was', async ({ lab }) => {
  const a = lab.kudo(0);
  const third = { nodeId: 'third', nodeIp: { clusterIpCidr: '10.0.3.1/24', externalIpAddr: '10.99.0.3' } };
  const elsewhere = { ...peer(1), nodeIp: { clusterIpCidr: '10.0.7.1/24', externalIpAddr: '10.99.0.3' } };
  const ports = [{ source: 80, destination: 80 }];
  const acts: [string, (kudo: Kudo) => Promise<unknown>][] = [
    ['a peer goes', (kudo) => kudo.deleteNodeInCluster(peer(1))],
    ['a peer moves', (kudo) => kudo.newNodeInCluster(elsewhere)],
    ['a peer comes', (kudo) => kudo.addOtherNodes([peer(1), third])],
    ['ports come', (kudo) => kudo.setupInstance(instance(0, 'a1', 2, ports))],
  ];
  await a.setupNode({ ...node(0), nodesIps: [peer(1)] });
  await a.setupInstance(instance(0, 'a1', 2));
  const held = await lab.snapshot();
  for (const [what, act] of acts) {
    let at = 0;
    for (let finished = false; !finished; ) {
      at += 1;
      assert.ok(at < 20, 'bounded');
      const saboteur = new Saboteur(at, false);
      const kudo = lab.kudo(0, {
        runner: saboteur.runner(within(lab.nodes[0])),
        files: saboteur.files(hostFiles),
      });
      const outcome = await codeOf(act(kudo));
      finished = outcome === 'ok';
      if (finished) assert.is.not(await lab.snapshot(), held, what);
      else assert.is(await lab.snapshot(), held, `${what}, change ${at}: ${outcome}`);
    }
    assert.ok(at > 2, `${what}: only ${at} changes`);
    await a.deleteNodeInCluster(third);
    await a.addOtherNodes([peer(1)]);
    await a.setupInstance(instance(0, 'a1', 2));
    assert.is(await lab.snapshot(), held, `${what}, and back`);
  }
});

test('what a crash cut short is done when the call is repeated', async ({ lab }) => {
  const a = lab.kudo(0);
  const ports = [{ source: 80, destination: 80 }];
  const elsewhere = { ...peer(1), nodeIp: { ...peer(1).nodeIp, clusterIpCidr: '10.0.7.1/24' } };
  const acts: [string, () => Promise<unknown>, (kudo: Kudo) => Promise<unknown>][] = [
    ['a peer goes', () => a.addOtherNodes([peer(1)]), (kudo) => kudo.deleteNodeInCluster(peer(1))],
    ['a peer moves', () => a.addOtherNodes([peer(1)]), (kudo) => kudo.newNodeInCluster(elsewhere)],
    [
      'ports come',
      () => a.setupInstance(instance(0, 'a1', 2)),
      (kudo) => kudo.setupInstance(instance(0, 'a1', 2, ports)),
    ],
    ['an instance goes', async () => {}, (kudo) => kudo.cleanInstance({ instanceId: id('a1') })],
    ['the node goes', () => a.setupNode(node(0)), (kudo) => kudo.cleanNode({ nodeId: 'node0' })],
  ];
  await a.setupNode(node(0));
  for (const [what, prepare, act] of acts) {
    await prepare();
    await act(a);
    const wanted = await lab.snapshot();
    let at = 0;
    for (let finished = false; !finished; ) {
      at += 1;
      assert.ok(at < 100, 'bounded');
      await prepare();
      if (what.endsWith('e goes')) await a.setupInstance(instance(0, 'a1', 2, ports));
      const saboteur = new Saboteur(at, true);
      const kudo = lab.kudo(0, {
        runner: saboteur.runner(within(lab.nodes[0])),
        files: saboteur.files(hostFiles),
      });
      finished = (await codeOf(act(kudo))) === 'ok';
      await act(lab.kudo(0));
      assert.is(await lab.snapshot(), wanted, `${what}, change ${at}`);
    }
    assert.ok(at > 2, `${what}: only ${at} changes`);
  }
});

test('another MTU of the uplink reaches running instances, which run on', async ({ lab }) => {
  const a = lab.kudo(0);
  await a.setupNode(node(0));
  const a1 = await a.setupInstance(instance(0, 'a1', 2, [{ source: 80, destination: 80 }]));
  const server = await echo(a1.namespaceName, 80, 'a1');
  const talker = new Talker(lab.outside, 'tcp', '10.99.0.1', 80);
  try {
    assert.match(await talker.say(), /^a1 /);
    const mtu = async () =>
      /mtu (\d+)/.exec(await must('ip', '-n', a1.namespaceName, 'link', 'show', 'type', 'veth'))?.[1];
    assert.is(await mtu(), '1464');
    await must('ip', '-n', lab.nodes[0], 'link', 'set', 'up0', 'mtu', '1400');
    await a.setupIptables({ nodeId: 'node0' });
    assert.is(await mtu(), '1364');
    assert.match(await talker.say(), /^a1 /, 'the conversation goes on');
    const stray = await within(lab.nodes[0]).run(['ip', 'link', 'show', a1.interfaceName]);
    assert.match(stray.stdout, 'mtu 1364');
  } finally {
    talker.end();
    server.kill('SIGKILL');
  }
});

test('two networks of ours on one host see each other’s ports, and one leaves the other its forwarding', async ({
  lab,
}) => {
  const a = lab.kudo(0);
  const agent = new Environment({
    runner: within(lab.nodes[0]),
    files: hostFiles,
    log: SILENT,
    names: { bridge: 'edgeway0', tun: 'edgeway-tun' },
    stateDir: join(lab.dir, 'agent'),
  });
  const target = { address: address('172.16.0.66'), port: 80 };
  await agent.setupNode(subnetOfAgent);
  await a.setupNode(node(0));
  const a1 = await a.setupInstance(instance(0, 'a1', 2, [{ source: 80, destination: 80 }]));
  await lab.serve(a1.namespaceName, 80, 'a1');
  const refused = await agent.expose([
    { protocol: 'tcp', source: 80, targets: [target] },
    { protocol: 'tcp', source: 81, targets: [target] },
  ]);
  assert.equal(
    refused.map(({ reason }) => reason),
    ['tcp/80 belongs to another Edgeway network of this host (nftables table edgeway-kbrnode0)'],
  );
  assert.match(
    await codeOf(a.setupInstance(instance(0, 'a2', 3, [{ source: 81, destination: 80 }]))),
    /^port_taken: tcp port 81 .* another Edgeway network of this host \(nftables table edgeway\)/,
  );
  await agent.cleanNode();
  assert.is(await ask(lab.outside, '10.99.0.1', 80), 'a1 10.99.0.254', 'forwarding stays on');
  const forwarding = async (): Promise<string> =>
    (await within(lab.nodes[0]).run(['cat', '/proc/sys/net/ipv4/ip_forward'])).stdout.trim();
  assert.is(await forwarding(), '1');
  await a.cleanNode({ nodeId: 'node0' });
  assert.is(await forwarding(), '0', 'until the last one leaves, whoever turned it on');
  // Nor does it go off where it was on before all of us.
  await within(lab.nodes[0]).run(['tee', '/proc/sys/net/ipv4/ip_forward'], '1');
  await a.setupNode(node(0));
  await agent.setupNode(subnetOfAgent);
  await a.cleanNode({ nodeId: 'node0' });
  await agent.cleanNode();
  assert.is(await forwarding(), '1');
  await within(lab.nodes[0]).run(['tee', '/proc/sys/net/ipv4/ip_forward'], '0');
});

test('a refusal at any command of setupNode or setupInstance leaves the host as it was', async ({ lab }) => {
  const held = new Map<number, string>();
  let at = 0;
  for (let finished = false; !finished; ) {
    at += 3; // Every third: host.test.ts tries each command of the same environment manager.
    assert.ok(at < 300, 'bounded');
    const saboteur = new Saboteur(at, false);
    const kudo = lab.kudo(0, {
      runner: saboteur.runner(within(lab.nodes[0])),
      files: saboteur.files(hostFiles),
    });
    finished = true;
    for (const [nth, act] of [
      () => kudo.setupNode({ ...node(0), nodesIps: [peer(1)] }),
      () => kudo.setupInstance(instance(0, 'a1', 2, [{ source: 80, destination: 80 }])),
    ].entries()) {
      // Whatever was tried before, each begins with the same host.
      if (!held.has(nth)) held.set(nth, await lab.snapshot());
      const outcome = await codeOf(act());
      if (outcome === 'ok') continue;
      finished = false;
      assert.is(await lab.snapshot(), held.get(nth), `change ${at}: ${outcome}`);
      break;
    }
    await lab.kudo(0).cleanNode({ nodeId: 'node0' });
  }
  assert.ok(at > 20, `only ${at} changes`);
});

test.run();
