// North-south: 1,000 set-up and clean cycles with kills in the middle and what they leak, and the TCP throughput of a
// published port beside the same path without us.
//   npm run bench -- north-south [--json FILE] [--quick] [--cycles N] [--seconds S] [--runs N] [--seed N]
//
//   …-o ─┬─ 10.99.0.1 ── veth ── 10.99.0.2 …-h ── edgeway0 172.16.0.65/26  ── …-a 172.16.0.66   published: 10.99.0.2:5301
//        └─ 10.98.0.1 ── veth ── 10.98.0.2 …-p ── plain0   192.168.77.1/24 ── …-b 192.168.77.2  routed: its own address
//
// "Without us" is another host, on which we never were, that forwards the same bytes over a bridge and a veth of its
// own, by its routes alone: no rule, hook or connection tracking of ours.
//
// For information, a port of a node whose only instance is on another node: through two agents and the tunnel.
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { parseArgs } from 'node:util';
import { Environment } from '../edge/host/environment.ts';
import { hostRunner } from '../edge/io/exec.ts';
import { hostFiles } from '../edge/io/files.ts';
import { createKudo, getNamespaceName } from '../edge/kudo/kudo.ts';
import type { Runner } from '../edge/ports.ts';
import { parseCidr, parseIpv4 } from '../src/addr.ts';
import { unwrap } from '../src/error.ts';
import { SILENT } from '../src/log.ts';
import { Rng } from '../src/rng.ts';
import { Lab, until } from './lab.ts';

const { values } = parseArgs({
  options: {
    json: { type: 'string' },
    cycles: { type: 'string', default: '1000' },
    seconds: { type: 'string', default: '2' },
    runs: { type: 'string', default: '11' },
    seed: { type: 'string', default: '1' },
    quick: { type: 'boolean', default: false },
  },
});
/** Namespaces that the cycles make: names of the whole machine, so others' are left out. */
const OWN_NAMESPACES = new Set(
  Array.from({ length: 7 }, (_, n) => getNamespaceName(`ewB${process.pid}-h-${n}`)),
);
const CYCLES = values.quick ? 50 : Number(values.cycles);
const SECONDS = Number(values.seconds);
const RUNS = values.quick ? 3 : Number(values.runs);
const PREFIX = `ewB${process.pid}`;
const HOST = `${PREFIX}-h`;
const OUTSIDE = `${PREFIX}-o`;
const PLAIN_HOST = `${PREFIX}-p`;
const [OURS, PLAIN] = [`${PREFIX}-a`, `${PREFIX}-b`];

async function must(...argv: readonly string[]): Promise<string> {
  const result = await hostRunner.run(argv);
  if (result.status !== 0)
    throw new Error(`${argv.join(' ')}: ${result.stderr.trim()}${result.stdout.trim()}`);
  return result.stdout;
}
const within = (netns: string): Runner => ({
  run: (argv, stdin) => hostRunner.run(['nsenter', `--net=/run/netns/${netns}`, '--', ...argv], stdin),
});
const ip = (netns: string, text: string) => must('ip', '-n', netns, ...text.split(' '));
const median = (numbers: readonly number[]): number =>
  numbers.toSorted((a, b) => a - b)[numbers.length >> 1] ?? 0;

/** Everything that a cycle could leave: links, namespaces, rules, addresses, files. One line each. */
async function found(dir: string): Promise<readonly string[]> {
  const lines: string[] = [];
  for (const argv of [
    ['ip', '-br', 'link'],
    ['ip', '-4', '-o', 'addr'],
    ['ip', '-4', 'route', 'show', 'table', 'all'],
    ['nft', 'list', 'ruleset'],
  ])
    lines.push(...(await within(HOST).run(argv)).stdout.split('\n').map((line) => line.trim()));
  lines.push((await within(HOST).run(['cat', '/proc/sys/net/ipv4/ip_forward'])).stdout.trim());
  lines.push(
    ...(await must('ip', 'netns', 'list'))
      .split('\n')
      .filter((line) => OWN_NAMESPACES.has(line.split(' ')[0] ?? '')),
  );
  lines.push(...(await must('find', dir, '-type', 'f')).split('\n'));
  return lines.filter((line) => line !== '');
}

/** A process is killed at a random moment of so many milliseconds after its work began: five to twenty cycles. */
const LIFE_MS = 3_000;
/** Kills per cycle below which the run says too little. */
const KILLS_MIN = 0.05;

/** Cycles in processes of their own that are killed in the middle, as long as there are cycles to do. */
async function cycles(dir: string): Promise<{ done: number; kills: number; leaks: readonly string[] }> {
  const state = join(dir, 'kudo');
  const before = await found(dir);
  const rng = new Rng(Number(values.seed));
  let done = 0;
  let kills = 0;
  while (done < CYCLES) {
    const child = spawn(
      process.execPath,
      [
        ...('deno' in process.versions
          ? ['run', '-A', '--quiet']
          : ['--disable-warning=ExperimentalWarning']),
        join(import.meta.dirname!, 'kudo_cycles.ts'),
        ...[HOST, state, String(done), String(CYCLES)],
      ],
      { stdio: ['ignore', 'pipe', 'inherit'] },
    );
    let killer: ReturnType<typeof setTimeout> | undefined;
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      done += text.match(/^\d+$/gm)?.length ?? 0;
      killer ??= setTimeout(() => child.kill('SIGKILL'), rng.below(LIFE_MS));
    });
    const exited = new Promise<number | null>((resolve) => child.once('close', (status) => resolve(status)));
    const status = await exited;
    clearTimeout(killer);
    if (status === null) kills += 1;
    if (status !== 0 && status !== null) throw new Error(`a cycle failed with status ${status}`);
    if (process.stdout.isTTY) process.stdout.write(`\r${done} cycles, ${kills} kills `);
  }
  // What any caller does in the end.
  const kudo = createKudo({ runner: within(HOST), files: hostFiles, log: SILENT, stateDir: state });
  await kudo.cleanNode({ nodeId: 'cycles' });
  const after = await found(dir);
  const left = [...after];
  for (const line of before) {
    const at = left.indexOf(line);
    if (at >= 0) left.splice(at, 1);
  }
  return { done, kills, leaks: left };
}

/** Mbit/s of one TCP stream. */
async function stream(netns: string, target: string, port: number): Promise<number> {
  const text = await within(netns).run([
    'iperf3',
    '-J',
    '-c',
    target,
    '-p',
    String(port),
    '-t',
    String(SECONDS),
    '-O',
    '1',
    '--connect-timeout',
    '2000',
  ]);
  const report = JSON.parse(text.stdout) as {
    end?: { sum_received?: { bits_per_second?: number } };
    error?: string;
  };
  const bits = report.end?.sum_received?.bits_per_second;
  if (bits === undefined) throw new Error(`iperf3 to ${target}:${port}: ${report.error ?? text.stderr}`);
  return bits / 1e6;
}

async function throughput(
  dir: string,
  servers: ChildProcess[],
): Promise<{ ours: number[]; plain: number[] }> {
  const environment = new Environment({
    runner: within(HOST),
    files: hostFiles,
    log: SILENT,
    names: { bridge: 'edgeway0', tun: 'edgeway-tun' },
    stateDir: join(dir, 'edgeway'),
  });
  // The MTU of the plain path: the overlay's would be another comparison.
  const mtu = 1500;
  const subnet = unwrap(parseCidr('172.16.0.64/26'));
  try {
    await environment.setupNode({ subnet, services: unwrap(parseCidr('172.30.0.0/16')), mtu });
    await environment.attach({
      id: 'bench',
      target: { kind: 'netns', name: OURS },
      namespaceIp: unwrap(parseIpv4('172.16.0.66')),
      subnet,
      mtu,
      ports: [{ source: 5301, destination: 5201, protocol: 'tcp' }],
    });
    await within(PLAIN_HOST).run(['tee', '/proc/sys/net/ipv4/ip_forward'], '1');
    await ip(PLAIN_HOST, 'link add plain0 type bridge');
    await ip(PLAIN_HOST, 'addr add 192.168.77.1/24 dev plain0');
    await ip(PLAIN_HOST, 'link set plain0 up');
    await ip(PLAIN_HOST, `link add plainb type veth peer name eth0 netns ${PLAIN}`);
    await ip(PLAIN_HOST, 'link set plainb master plain0 up');
    await ip(PLAIN, 'addr add 192.168.77.2/24 dev eth0');
    await ip(PLAIN, 'link set eth0 up');
    await ip(PLAIN, 'route add default via 192.168.77.1');
    await ip(OUTSIDE, 'route add 192.168.77.0/24 via 10.98.0.2');
    for (const netns of [OURS, PLAIN]) {
      const server = spawn('nsenter', [`--net=/run/netns/${netns}`, '--', 'iperf3', '-s', '--forceflush'], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      servers.push(server);
      await new Promise((resolve) => server.stdout?.once('data', resolve));
    }
    const ours: number[] = [];
    const plain: number[] = [];
    for (let run = 0; run < RUNS; run++) {
      plain.push(await stream(OUTSIDE, '192.168.77.2', 5201));
      ours.push(await stream(OUTSIDE, '10.99.0.2', 5301));
    }
    return { ours, plain };
  } finally {
    await environment.cleanNode();
  }
}

/** Mbit/s from outside to an instance of another node than the one that was asked. */
async function remote(): Promise<number[]> {
  const lab = await Lab.up({
    nodes: 2,
    runtime: 'deno' in process.versions ? 'deno' : 'node',
    agentFlags: ['--mdns', 'off'],
  });
  try {
    await lab.startAll();
    const called = async (node: number, path: string, body: object): Promise<void> => {
      const answer = await lab.api(node, 'POST', path, body);
      if (answer.status !== 200) throw new Error(`${path}: ${JSON.stringify(answer.body)}`);
    };
    await called(1, '/api/v1/services', {
      ...{ appname: 'bench', appnamespace: 'edge', servicename: 'iperf', servicenamespace: 'v1' },
      ...{ exposed: true, ports: [{ source: 5301, destination: 5201, protocol: 'tcp' }] },
    });
    const netns = await lab.addInstance('iperf');
    lab.spawn(netns, ['iperf3', '-s'], join(lab.dir, 'iperf3.log'));
    await called(2, '/api/v1/instances', { service: 'bench.edge.iperf.v1', instance: 1, netns });
    const measured = () => stream(lab.switch, lab.node(1).ip, 5301);
    // Refused until n1 has heard of the instance.
    const mbit = [await until('n1 leads to n2', 30_000, measured)];
    while (mbit.length < Math.min(RUNS, 3)) mbit.push(await measured());
    return mbit;
  } finally {
    await lab.down();
  }
}

await must('iperf3', '--version');
const dir = await mkdtemp(join(tmpdir(), 'edgeway-bench-'));
const servers: ChildProcess[] = [];
const namespaces = [OUTSIDE, HOST, PLAIN_HOST, OURS, PLAIN];
try {
  for (const name of namespaces) {
    await must('ip', 'netns', 'add', name);
    await ip(name, 'link set lo up');
  }
  for (const [host, down, net] of [
    [HOST, 'down0', '10.99.0'],
    [PLAIN_HOST, 'down1', '10.98.0'],
  ] as const) {
    await ip(host, `link add up0 type veth peer name ${down} netns ${OUTSIDE}`);
    await ip(host, `addr add ${net}.2/24 dev up0`);
    await ip(host, 'link set up0 up');
    await ip(OUTSIDE, `addr add ${net}.1/24 dev ${down}`);
    await ip(OUTSIDE, `link set ${down} up`);
    await ip(host, `route add default via ${net}.1`);
  }

  const started = performance.now();
  const { done, kills, leaks } = await cycles(dir);
  const seconds = (performance.now() - started) / 1000;
  console.log(
    `\n${done} set-up/clean cycles in ${seconds.toFixed(0)} s, ${kills} kills, ${leaks.length} leaks`,
  );
  for (const leak of leaks) console.log(`  left: ${leak}`);

  const { ours, plain } = await throughput(dir, servers);
  // Of each pair, since a shared machine's speed drifts from one second to the next.
  const ratio = median(ours.map((mbit, run) => mbit / (plain[run] ?? Number.NaN)));
  const mbit = (numbers: readonly number[]): string => numbers.map((one) => one.toFixed(0)).join(' ');
  console.log(`plain path     ${mbit(plain)} Mbit/s`);
  console.log(`published port ${mbit(ours)} Mbit/s`);
  console.log(`median ratio of the pairs ${ratio.toFixed(3)}`);
  const through = await remote();
  const remoteRatio = median(through) / median(plain);
  console.log(`to another node ${mbit(through)} Mbit/s, ratio ${remoteRatio.toFixed(3)}`);
  if (values.json !== undefined)
    await writeFile(
      values.json,
      `${JSON.stringify(
        {
          tcp_ratio: Number(ratio.toFixed(3)),
          cycles: done,
          leaks: leaks.length,
          kills,
          tcp_mbit: Math.round(median(ours)),
          tcp_plain_mbit: Math.round(median(plain)),
          remote_tcp_ratio: Number(remoteRatio.toFixed(3)),
          remote_tcp_mbit: Math.round(median(through)),
          cycle_ms: Math.round((seconds * 1000) / Math.max(done, 1)),
        },
        undefined,
        2,
      )}\n`,
    );
  if (leaks.length > 0 || ratio < 0.8) process.exitCode = 1;
  if (kills < done * KILLS_MIN) {
    console.log(`only ${kills} kills: cycles end sooner than they are killed`);
    process.exitCode = 1;
  }
} finally {
  for (const server of servers) server.kill('SIGKILL');
  for (const name of namespaces) await hostRunner.run(['ip', 'netns', 'del', name]);
  await rm(dir, { recursive: true, force: true });
}
