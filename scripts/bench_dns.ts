// Measures the unicast resolver beside dnsmasq, which serves the same names in the same run: each server alone on one
// core, dnsperf on another, loopback. Per runtime: how many queries a second it answers at full load and what one costs, the
// 99th percentile of the latency at 20,000 a second, and, while that load and 100 table changes a second go on, how
// many answers were wrong (an address that was not the name's at any moment between question and answer).
//   npm run bench -- dns [--runtime node|deno] [--seconds N] [--quick] [--json FILE]
import { type ChildProcess, spawn } from 'node:child_process';
import { createSocket } from 'node:dgram';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { decode, encode } from 'dns-packet';
import { formatIpv4, ipv4, parseCidr } from '../src/addr.ts';
import { unwrap } from '../src/error.ts';
import { layoutOf } from '../src/plan.ts';
import { POLICIES } from '../src/policy.ts';
import { Lab, type Runtime, until } from './lab.ts';
import { runtimeArgv } from './proxy_lab.ts';
import { cpuMs } from './usage.ts';

const SERVICES = 1_000;
const RATE = 20_000;
const UPDATES_PER_S = 100;
/** Services whose addresses change under load; dnsperf does not ask for them, the checker does. */
const MOVING = 20;
const root = join(import.meta.dirname, '..');

const { values } = parseArgs({
  allowPositionals: true,
  options: {
    runtime: { type: 'string' },
    seconds: { type: 'string', default: '5' },
    json: { type: 'string' },
    quick: { type: 'boolean', default: false },
  },
});
const seconds = values.quick ? 1 : Number(values.seconds);
const directory = mkdtempSync(join(tmpdir(), 'edgeway-bench-dns-'));
const questions = join(directory, 'questions');
const hosts = join(directory, 'hosts');

interface Figures {
  readonly runtime: string;
  readonly qps: number;
  readonly peer: string;
  readonly peer_qps: number;
  /** The peer's latency at the same rate: what the machine itself allows just then. */
  readonly peer_p99_ms: number;
  readonly ratio: number;
  /** Processor time per answered query at full load, microseconds, and how many a core's second would hold. */
  readonly cpu_us: number;
  readonly peer_cpu_us: number;
  readonly qps_per_cpu_second: number;
  readonly p50_ms: number;
  readonly p99_ms: number;
  readonly rate: number;
  readonly lost: number;
  readonly updates: number;
  readonly checked: number;
  readonly wrong_answers: number;
  /** From the request that makes a service to its first answer on each of three nodes. */
  readonly propagation_p50_ms: number;
  readonly propagation_p99_ms: number;
  readonly propagation_max_ms: number;
  /** From the request that deletes it to the first "there is none" of each. */
  readonly gone_max_ms: number;
}

const addressOf = (service: number, policy: number): string =>
  formatIpv4(ipv4(0xac1e0001 + service * 4 + policy));

function writeInputs(): void {
  const asked: string[] = [];
  const served: string[] = [];
  for (let service = 0; service < SERVICES; service++)
    for (const [i, policy] of POLICIES.entries()) {
      const name = `app.ns.s${service}.v1.any.${policy}.local`;
      served.push(`${addressOf(service, i)} ${name}`);
      if (service >= MOVING) asked.push(`${name} A`);
    }
  writeFileSync(questions, `${asked.join('\n')}\n`);
  writeFileSync(hosts, `${served.join('\n')}\n`);
}

/** On a core of its own where there are two. */
const pinned = (core: number, argv: readonly string[]): readonly string[] =>
  availableParallelism() > 1 ? ['taskset', '-c', String(core), ...argv] : argv;

function start(argv: readonly string[]): ChildProcess {
  const child = spawn(argv[0]!, argv.slice(1), { cwd: root, stdio: ['pipe', 'pipe', 'inherit'] });
  child.stdin!.on('error', () => {});
  return child;
}

async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const closed = new Promise<void>((resolve) => child.once('exit', () => resolve()));
  child.kill('SIGTERM');
  await closed;
}

/** dnsperf's own words. */
async function dnsperf(port: number, more: readonly string[]): Promise<string> {
  const argv = pinned(1, [
    'dnsperf',
    '-s',
    '127.0.0.1',
    '-p',
    String(port),
    '-d',
    questions,
    '-l',
    String(seconds),
    ...more,
  ]);
  const child = start(argv);
  const chunks: Buffer[] = [];
  child.stdout!.on('data', (chunk: Buffer) => chunks.push(chunk));
  const status = await new Promise<number | null>((resolve, reject) => {
    child.once('error', () => reject(new Error('dnsperf is missing: apt-get install dnsperf')));
    child.once('close', resolve);
  });
  const text = Buffer.concat(chunks).toString();
  if (status !== 0) throw new Error(`dnsperf ended with ${status}: ${text.slice(-500)}`);
  return text;
}

const number = (text: string, pattern: RegExp): number => Number(pattern.exec(text)?.[1] ?? Number.NaN);
const qpsOf = (text: string): number => Math.round(number(text, /Queries per second:\s+([\d.]+)/));

/** Answers that are no answer count as wrong: every name that is asked exists. */
function badCodes(text: string): number {
  const codes = /Response codes:\s+(.*)/.exec(text)?.[1] ?? '';
  return [...codes.matchAll(/(\w+) (\d+) \(/g)]
    .filter(([, code]) => code !== 'NOERROR')
    .reduce((sum, [, , count]) => sum + Number(count), 0);
}

interface FullLoad {
  readonly qps: number;
  /** Processor time of the server per answered query, microseconds; holds on a busy machine too. */
  readonly cpuUs: number;
  readonly wrong: number;
}

async function fullLoad(port: number, server: ChildProcess): Promise<FullLoad> {
  // The first run warms both up; of three the best counts, for both alike.
  let best: FullLoad = { qps: 0, cpuUs: Number.POSITIVE_INFINITY, wrong: 0 };
  for (let i = 0; i < 3; i++) {
    const before = cpuMs(server.pid!);
    const text = await dnsperf(port, ['-c', '4', '-q', '200']);
    const spent = (cpuMs(server.pid!) - before) * 1000;
    best = {
      qps: Math.max(best.qps, qpsOf(text)),
      cpuUs: Math.min(best.cpuUs, spent / number(text, /Queries completed:\s+(\d+)/)),
      wrong: best.wrong + badCodes(text),
    };
  }
  return { ...best, cpuUs: Math.round(best.cpuUs * 10) / 10 };
}

/** Load of a fixed rate, each answer with its latency. */
function steady(port: number): Promise<string> {
  return dnsperf(port, ['-Q', String(RATE), '-q', '1000', '-c', '4', '-v']);
}

/** Milliseconds, from dnsperf's verbose lines. */
function percentile(text: string, part: number): number {
  const latencies = [...text.matchAll(/^> \w+ \S+ A ([\d.]+)$/gm)].map(([, value]) => Number(value) * 1000);
  latencies.sort((a, b) => a - b);
  return Math.round((latencies[Math.floor(latencies.length * part)] ?? Number.NaN) * 1000) / 1000;
}

async function answering(port: number): Promise<void> {
  for (let tries = 0; tries < 200; tries++) {
    const seen = await askOnce(port, 'app.ns.s0.v1.any.closest.local', 50);
    if (seen !== undefined) return;
    await sleep(25);
  }
  throw new Error(`nothing answers on 127.0.0.1:${port}`);
}

async function askOnce(port: number, name: string, limitMs: number): Promise<string | undefined> {
  const socket = createSocket('udp4');
  try {
    return await new Promise<string | undefined>((resolve) => {
      const timer = setTimeout(resolve, limitMs, undefined);
      socket.on('error', () => resolve(undefined));
      socket.once('message', (message) => {
        clearTimeout(timer);
        const record = decode(message).answers?.[0];
        resolve(record?.type === 'A' ? record.data : 'no address');
      });
      socket.send(
        encode({ type: 'query', id: 1, flags: 0x100, questions: [{ type: 'A', name }] }),
        port,
        '127.0.0.1',
      );
    });
  } finally {
    socket.close();
  }
}

type Peer = Pick<Figures, 'peer_qps' | 'peer_p99_ms' | 'peer_cpu_us'>;
type Spread = Pick<
  Figures,
  'propagation_p50_ms' | 'propagation_p99_ms' | 'propagation_max_ms' | 'gone_max_ms'
>;
/** What bench_dns_watch.ts prints. */
type Watched = Readonly<Record<'seen' | 'gone', Readonly<Record<string, number>>>>;
type Own = Omit<Figures, 'peer' | 'ratio' | keyof Peer | keyof Spread>;

async function peer(port: number): Promise<Peer> {
  const child = start(
    pinned(0, [
      'dnsmasq',
      '--keep-in-foreground',
      '--conf-file=/dev/null',
      '--no-resolv',
      '--no-hosts',
      `--addn-hosts=${hosts}`,
      `--port=${port}`,
      '--listen-address=127.0.0.1',
      '--bind-interfaces',
      '--cache-size=10000',
      '--pid-file=',
      '--user=root',
    ]),
  );
  child.once('error', () => console.error('dnsmasq is missing: apt-get install dnsmasq-base'));
  try {
    await answering(port);
    const { qps, cpuUs } = await fullLoad(port, child);
    return { peer_qps: qps, peer_cpu_us: cpuUs, peer_p99_ms: percentile(await steady(port), 0.99) };
  } finally {
    await stop(child);
  }
}

/** Changes services one after the other and asks for them meanwhile; knows at any moment what may be answered. */
async function change(
  child: ChildProcess,
  port: number,
  untilMs: number,
): Promise<{ readonly updates: number; readonly checked: number; readonly wrong: number }> {
  // Per service: addresses that were right at some moment since the oldest open question.
  const now = Array.from({ length: MOVING }, (_, i) => addressOf(i, 1));
  const coming: (string | undefined)[] = Array.from({ length: MOVING });
  const version = Array.from({ length: MOVING }, () => 0);
  const waiting = new Map<string, () => void>();
  createInterface({ input: child.stdout! }).on('line', (line) => {
    if (!line.startsWith('{')) return;
    const { service } = JSON.parse(line) as { service: string };
    waiting.get(service)?.();
    waiting.delete(service);
  });
  let updates = 0;
  let checked = 0;
  let wrong = 0;
  const updater = (async () => {
    for (let i = 0; performance.now() < untilMs; i++) {
      const service = i % MOVING;
      const first = ipv4(0xac1e8001 + ((i * 4) % 0x7f00));
      coming[service] = formatIpv4(ipv4(first + 1));
      const told = new Promise<void>((resolve) => waiting.set(`app.ns.s${service}.v1`, resolve));
      child.stdin!.write(
        `${JSON.stringify({ service: `app.ns.s${service}.v1`, first: formatIpv4(first) })}\n`,
      );
      await told;
      now[service] = coming[service]!;
      coming[service] = undefined;
      version[service]!++;
      updates++;
      await sleep(1000 / UPDATES_PER_S - 1);
    }
  })();
  const socket = createSocket('udp4');
  const open = new Map<number, { readonly service: number; readonly allowed: Set<string> }>();
  socket.on('message', (message) => {
    const packet = decode(message);
    const asked = open.get(packet.id!);
    if (asked === undefined) return;
    open.delete(packet.id!);
    const record = packet.answers?.[0];
    const allowed = asked.allowed.add(now[asked.service]!);
    const next = coming[asked.service];
    if (next !== undefined) allowed.add(next);
    checked++;
    if (record?.type !== 'A' || !allowed.has(record.data)) wrong++;
  });
  for (let id = 1; performance.now() < untilMs; id = (id + 1) & 0xffff) {
    const service = id % MOVING;
    const allowed = new Set([now[service]!]);
    const next = coming[service];
    if (next !== undefined) allowed.add(next);
    // Whatever becomes right before the answer comes is allowed too: see the listener.
    open.set(id, { service, allowed });
    const name = `app.ns.s${service}.v1.any.closest.local`;
    socket.send(
      encode({ type: 'query', id, flags: 0x100, questions: [{ type: 'A', name }] }),
      port,
      '127.0.0.1',
    );
    if (id % 8 === 0) await sleep(2);
  }
  await updater;
  await sleep(200);
  socket.close();
  return { updates, checked, wrong };
}

async function ours(runtime: Runtime, port: number): Promise<Own> {
  const file = join(import.meta.dirname, 'bench_dns_server.ts');
  const argv = [...runtimeArgv(runtime), file];
  const child = start(pinned(0, [...argv, String(port), String(SERVICES)]));
  try {
    await answering(port);
    const full = await fullLoad(port, child);
    const changing = change(child, port, performance.now() + seconds * 1000);
    const text = await steady(port);
    const { updates, checked, wrong } = await changing;
    return {
      runtime,
      qps: full.qps,
      cpu_us: full.cpuUs,
      qps_per_cpu_second: Math.round(1e6 / full.cpuUs),
      p50_ms: percentile(text, 0.5),
      p99_ms: percentile(text, 0.99),
      rate: qpsOf(text),
      lost: number(text, /Queries lost:\s+(\d+)/),
      updates,
      checked,
      wrong_answers: wrong + full.wrong + badCodes(text),
    };
  } finally {
    await stop(child);
  }
}

/** New services on real agents: how long until every node that asks for them answers. */
async function propagation(runtime: Runtime): Promise<Spread> {
  const count = values.quick ? 5 : 20;
  const lab = await Lab.up({ nodes: 3, runtime });
  try {
    await lab.startAll();
    const nameOf = (i: number): string => `app.ns.new${i}.v1.any.closest.local`;
    const names = Array.from({ length: count }, (_, i) => nameOf(i));
    const watchers: { readonly child: ChildProcess; readonly told: Promise<Watched> }[] = [];
    for (const index of [1, 2, 3]) {
      const subnet = await until(`node ${index} has a subnet`, 20_000, async () => {
        const { body } = await lab.api(index, 'GET', '/api/v1/status');
        return (body.subnet as string | null) ?? undefined;
      });
      const bridge = formatIpv4(layoutOf(unwrap(parseCidr(subnet))).bridge);
      const script = join(import.meta.dirname, 'bench_dns_watch.ts');
      const node = [process.execPath, '--disable-warning=ExperimentalWarning', script];
      const child = start(['ip', 'netns', 'exec', lab.node(index).netns, ...node, bridge, '60000', ...names]);
      const lines = createInterface({ input: child.stdout! })[Symbol.asyncIterator]();
      await lines.next();
      watchers.push({ child, told: lines.next().then(({ value }) => JSON.parse(String(value))) });
    }
    // By now every node has asked for each of them and follows what it was told there is not.
    await sleep(1_000);
    const made: number[] = [];
    for (let i = 0; i < count; i++) {
      const [appname, appnamespace, servicename, servicenamespace] = nameOf(i).split('.');
      made.push(Date.now());
      const body = { appname, appnamespace, servicename, servicenamespace };
      const { status } = await lab.api(1, 'POST', '/api/v1/services', body);
      if (status !== 200) throw new Error(`the service ${nameOf(i)} was refused with ${status}`);
      await sleep(50);
    }
    await sleep(1_000);
    const deleted: number[] = [];
    for (let i = 0; i < count; i++) {
      deleted.push(Date.now());
      const service = nameOf(i).split('.').slice(0, 4).join('.');
      const { status } = await lab.api(1, 'DELETE', `/api/v1/services/${service}`);
      if (status !== 200) throw new Error(`the deletion of ${service} was refused with ${status}`);
      await sleep(50);
    }
    const delays: number[] = [];
    const ends: number[] = [];
    for (const { told } of watchers) {
      const { seen, gone } = await told;
      for (let i = 0; i < count; i++) {
        delays.push((seen[nameOf(i)] ?? Number.POSITIVE_INFINITY) - made[i]!);
        ends.push((gone[nameOf(i)] ?? Number.POSITIVE_INFINITY) - deleted[i]!);
      }
    }
    delays.sort((a, b) => a - b);
    return {
      propagation_p50_ms: delays[delays.length >> 1]!,
      propagation_p99_ms: delays[Math.ceil(0.99 * delays.length) - 1]!,
      propagation_max_ms: delays.at(-1)!,
      gone_max_ms: Math.max(...ends),
    };
  } finally {
    await lab.down();
  }
}

try {
  writeInputs();
  // Below the range of outgoing ports, and of this process alone.
  const port = 20_000 + (process.pid % 5_000) * 2;
  const results: Figures[] = [];
  const runtimes: readonly Runtime[] =
    values.runtime === undefined ? ['node', 'deno'] : [values.runtime === 'deno' ? 'deno' : 'node'];
  for (const runtime of runtimes) {
    const beside = await peer(port);
    const own = await ours(runtime, port + 1);
    const spread = await propagation(runtime);
    const figures: Figures = {
      ...own,
      ...spread,
      peer: 'dnsmasq',
      ...beside,
      ratio: Math.round((own.qps / beside.peer_qps) * 100) / 100,
    };
    results.push(figures);
    console.log(
      `${runtime.padEnd(5)} ${figures.qps} q/s per core, dnsmasq ${figures.peer_qps} (ratio ${figures.ratio}) · ${figures.cpu_us} µs of processor per query (dnsmasq ${figures.peer_cpu_us}), ${figures.qps_per_cpu_second} a second · at ${figures.rate} q/s p50 ${figures.p50_ms} ms, p99 ${figures.p99_ms} ms (dnsmasq ${figures.peer_p99_ms}) · ${figures.updates} updates, ${figures.checked} answers checked, ${figures.wrong_answers} wrong, ${figures.lost} lost · a new name on 3 nodes after ${figures.propagation_p50_ms} ms (median), ${figures.propagation_max_ms} ms (worst), a deleted one gone from them after ${figures.gone_max_ms} ms (worst)`,
    );
  }
  if (values.json !== undefined)
    writeFileSync(
      values.json,
      `${JSON.stringify({ bench: 'dns', cpu: cpus()[0]?.model, cores: availableParallelism(), services: SERVICES, seconds, results }, undefined, 2)}\n`,
    );
} finally {
  rmSync(directory, { recursive: true, force: true });
}
