// Kudo's contract with the right answers: two nodes that only the kernel connects, their instances, and clients
// outside. Each defect of the original that its study names is a test here.
//
//   …-o 10.99.0.254 ─┬─ …-n1 10.99.0.1  kbr… 10.0.0.1/24 ── instances a1, a2
//        (bridge)    └─ …-n2 10.99.0.2  kbr… 10.0.1.1/24 ── instances b1, b2
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { hostRunner } from '../../edge/io/exec.ts';
import { hostFiles } from '../../edge/io/files.ts';
import { createKudo, type Kudo, type Port } from '../../edge/kudo/kudo.ts';
import type { Files, Runner } from '../../edge/ports.ts';
import { SILENT } from '../../src/log.ts';
import { codeOf, hostSnapshot, must, Saboteur, within } from './host_lab.ts';

const P = `ewD${process.pid}`;

/** Node for the servers in namespaces, whichever runtime runs the test. */
const NODE = process.env['NODE'] ?? 'node';

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
      for (const name of [lab.outside, ...lab.nodes]) {
        await must('ip', 'netns', 'add', name);
        await must('ip', '-n', name, 'link', 'set', 'lo', 'up');
      }
      await must('ip', '-n', lab.outside, 'link', 'add', 'switch', 'type', 'bridge');
      await must('ip', '-n', lab.outside, 'addr', 'add', '10.99.0.254/24', 'dev', 'switch');
      await must('ip', '-n', lab.outside, 'link', 'set', 'switch', 'up');
      for (const [index, name] of lab.nodes.entries()) {
        await must(
          ...[
            'ip',
            '-n',
            name,
            'link',
            'add',
            'up0',
            'type',
            'veth',
            'peer',
            `d${index}`,
            'netns',
            lab.outside,
          ],
        );
        await must('ip', '-n', lab.outside, 'link', 'set', `d${index}`, 'master', 'switch', 'up');
        await must('ip', '-n', name, 'addr', 'add', `10.99.0.${index + 1}/24`, 'dev', 'up0');
        await must('ip', '-n', name, 'link', 'set', 'up0', 'up');
        await must('ip', '-n', name, 'route', 'add', 'default', 'via', '10.99.0.254');
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
    const server = spawn(
      'nsenter',
      [
        `--net=/run/netns/${netns}`,
        '--',
        NODE,
        join(import.meta.dirname!, 'whoami.mjs'),
        String(port),
        answer,
      ],
      { stdio: ['ignore', 'pipe', 'inherit'] },
    );
    this.#servers.push(server);
    await new Promise((resolve) => server.stdout?.once('data', resolve));
  }

  async snapshot(): Promise<string> {
    const hosts = await Promise.all(this.nodes.map((name) => hostSnapshot(name, 'all')));
    const namespaces = (await must('ip', 'netns', 'list'))
      .split('\n')
      .filter((line) => line.startsWith('kns'));
    const state = (await hostRunner.run(['find', this.dir, '-type', 'f'])).stdout;
    return [...hosts, ...namespaces, state].join('\n');
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
async function ask(netns: string, address: string, port: number): Promise<string> {
  const result = await within(netns).run([
    'busybox',
    'timeout',
    '3',
    'busybox',
    'nc',
    '-w',
    '2',
    address,
    String(port),
  ]);
  return result.stdout.trim();
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
  assert.is(await ask(a1.namespaceName, '10.0.1.2', 8082), '', 'a port that b1 does not have');
  assert.is(await ask(a1.namespaceName, '10.0.1.3', 8081), '', 'a port that b2 does not have');
  assert.is(await ask(a1.namespaceName, '10.0.1.99', 8082), '', 'an address that nobody has');
  const ping = await within(a1.namespaceName).run(['busybox', 'ping', '-c', '1', '-W', '2', '10.0.1.2']);
  assert.is(ping.status, 0, 'ICMP too');
  // Another instance of the same node is a neighbour.
  assert.is(await ask(b2.namespaceName, '10.0.1.2', 80), 'b1 10.0.1.3');
  // When the peer leaves, its instances are out of reach; leaving twice is fine.
  await a.deleteNodeInCluster(peer(1));
  await a.deleteNodeInCluster(peer(1));
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
  assert.match(await ask(lab.nodes[1], '10.99.0.2', 8081), /^b1 /, 'from the node itself');
  assert.is(await ask(b2.namespaceName, '10.99.0.2', 8081), 'b1 10.0.1.1', 'hairpin from a neighbour');
  assert.is(await ask(b1.namespaceName, '10.99.0.2', 8081), 'b1 10.0.1.1', 'hairpin to itself');
  // Rules name no interface: the uplink may be renamed and the default route may move.
  await must('ip', '-n', lab.nodes[1], 'link', 'set', 'up0', 'down');
  await must('ip', '-n', lab.nodes[1], 'link', 'set', 'up0', 'name', 'lte0');
  await must('ip', '-n', lab.nodes[1], 'link', 'set', 'lte0', 'up');
  assert.is(await ask(lab.outside, '10.99.0.2', 8081), 'b1 10.99.0.254', 'after the uplink changed');
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
  assert.is(await ask(a1.namespaceName, '127.0.0.1', 9000), '');
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
  assert.match(await codeOf(a.setupNode({ ...node(0), nodeIpCidr: '10.0.0.0/24' })), /^invalid_request/);
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

test('a refusal at any command of setupNode or setupInstance leaves the host as it was', async ({ lab }) => {
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
    for (const act of [
      () => kudo.setupNode({ ...node(0), nodesIps: [peer(1)] }),
      () => kudo.setupInstance(instance(0, 'a1', 2, [{ source: 80, destination: 80 }])),
    ]) {
      const held = await lab.snapshot();
      const outcome = await codeOf(act());
      if (outcome === 'ok') continue;
      finished = false;
      assert.is(await lab.snapshot(), held, `change ${at}: ${outcome}`);
      break;
    }
    await lab.kudo(0).cleanNode({ nodeId: 'node0' });
  }
  assert.ok(at > 30, `only ${at} changes`);
});

test.run();
