// Measures the data plane beside what it must be compared with, all in one run on one machine:
//
//   veth        two network namespaces, one veth pair: what the machine can do
//   vxlan       the same with a kernel VXLAN between them
//   kernel      the kernel's own service path: apps behind bridges, VXLAN-GPE routes, nftables DNAT of a service address
//   node, deno  apps behind bridges, the ProxyTUN of each runtime, a ServiceIP
//   same_node   the ProxyTUN with client and server on one node
//
// Every path gets the same loads (iperf3 for TCP streams, bench_load.ts for the rest), paths take turns at every load,
// and the table shows medians. Everything shares this machine's cores: read the ratios, not the figures.
//   npm run bench -- [--quick] [--repeat N] [--seconds N] [--soak SECONDS] [--json FILE]
//                    [--paths node,kernel] [--loads tcp1,tcp4,wire,rr,udp,conn]
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { availableParallelism, cpus, release } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { formatIpv4 } from '../src/addr.ts';
import { MTU_DEFAULT, VNI_DEFAULT } from '../src/limits.ts';
import {
  inside,
  type LabHost,
  type LinkEnd,
  ProxyLab,
  type Runtime,
  runtimeArgv,
  setOffloads,
  shell,
} from './proxy_lab.ts';
import { growth } from './usage.ts';

const PATHS = ['veth', 'vxlan', 'kernel', 'node', 'deno', 'same_node'] as const;
type Path = (typeof PATHS)[number];
const METRICS = [
  'tcp1_mbps',
  'tcp4_mbps',
  'wire_tcp1_mbps',
  'rr_p50_us',
  'rr_p99_us',
  'udp64_pps',
  'conn_per_s',
  'cpu_s_per_gb',
  'machine_cpu_s_per_gb',
  'rss_idle_mb',
  'rss_load_mb',
] as const;
type Metric = (typeof METRICS)[number];
type Figures = Partial<Record<Metric, number>>;

const { values } = parseArgs({
  allowPositionals: true,
  options: {
    quick: { type: 'boolean', default: false },
    repeat: { type: 'string' },
    seconds: { type: 'string' },
    paths: { type: 'string' },
    loads: { type: 'string' },
    soak: { type: 'string' },
    json: { type: 'string' },
  },
});
const repeat = Number(values.repeat ?? (values.quick ? 1 : 3));
const seconds = Number(values.seconds ?? (values.quick ? 2 : 5));
const loads = values.loads?.split(',');
const chosen = (values.paths?.split(',') ?? PATHS) as Path[];
/** Bisection of the datagram rate: this many trials after the first. */
const UDP_TRIALS = values.quick ? 4 : 7;
const UDP_LOSS_MAX = 0.001;
const UDP_RATE_MAX = 400_000;
const PORT = 7000;
const LOAD = join(import.meta.dirname, 'bench_load.ts');

/** Where client and server are, and what carries the packets between them. */
interface Place {
  readonly client: string;
  readonly server: string;
  readonly address: string;
  /** Ends of the underlay, for the runs in which every frame is at most 1,500 bytes. */
  readonly wire: readonly LinkEnd[];
  readonly agents: readonly LabHost[];
}

const children: ChildProcess[] = [];
/** All that were begun, whole or not. */
const labs: ProxyLab[] = [];

async function serve(netns: string): Promise<void> {
  const load = inside(netns, ...runtimeArgv('node'), LOAD, 'serve', String(PORT));
  const child = spawn(load[0]!, load.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] });
  const iperf = inside(netns, 'iperf3', '-s');
  children.push(child, spawn(iperf[0]!, iperf.slice(1), { stdio: 'ignore' }));
  await new Promise((resolve) => createInterface({ input: child.stdout }).once('line', resolve));
}

const up = {
  veth,
  vxlan,
  kernel,
  node: proxied('node'),
  deno: proxied('deno'),
  same_node: proxied('node', true),
};

function plain(name: string): { lab: ProxyLab; one: LabHost; two: LabHost } {
  const lab = new ProxyLab(`ewA${process.pid}${name}`);
  labs.push(lab);
  lab.up(2, 1500, true);
  const [one, two] = lab.hosts as [LabHost, LabHost];
  return { lab, one, two };
}

const ends = (one: LabHost, two: LabHost): Place['wire'] =>
  [one, two].map(({ netns }) => ({ netns, device: 'up0' }));

async function veth(): Promise<Place> {
  const { one, two } = plain('v');
  return {
    client: one.netns,
    server: two.netns,
    address: formatIpv4(two.nodeIp),
    wire: ends(one, two),
    agents: [],
  };
}

async function vxlan(): Promise<Place> {
  const { one, two } = plain('x');
  for (const [host, other, address] of [
    [one, two, '10.79.0.1'],
    [two, one, '10.79.0.2'],
  ] as const) {
    const remote = formatIpv4(other.nodeIp);
    shell(
      inside(
        host.netns,
        'sh',
        '-c',
        `ip link add vx0 type vxlan id 7 dstport 4789 remote ${remote} dev up0 && ip link set vx0 mtu 1450 up && ip addr add ${address}/24 dev vx0`,
      ),
    );
  }
  return {
    client: one.netns,
    server: two.netns,
    address: '10.79.0.2',
    wire: ends(one, two),
    agents: [],
  };
}

async function kernel(): Promise<Place> {
  const { lab, one, two } = plain('k');
  const client = lab.instance(one, 's.s.client.v1', 1);
  const server = lab.instance(two, 's.s.server.v1', 1);
  for (const [host, other] of [
    [one, two],
    [two, one],
  ] as const) {
    shell(
      inside(
        host.netns,
        'sh',
        '-c',
        `ip link add gpe0 type vxlan external gpe dstport 4790 nolearning && ip link set gpe0 mtu ${MTU_DEFAULT} up && ip route add ${formatIpv4(other.subnet)}/26 encap ip id ${VNI_DEFAULT} dst ${formatIpv4(other.nodeIp)} dev gpe0`,
      ),
    );
    // Two choices, as for a service of two instances; both are this one, because iperf3 opens several connections.
    const backend = formatIpv4(server.namespaceIp);
    const map = `0 : ${backend}, 1 : ${backend}`;
    shell(
      inside(host.netns, 'nft', '-f', '-'),
      [
        'table ip bench {',
        '  chain pre {',
        '    type nat hook prerouting priority dstnat',
        `    ip daddr 172.30.0.8 dnat to numgen random mod 2 map { ${map} }`,
        '  }',
        '}',
        '',
      ].join('\n'),
    );
  }
  return {
    client: client.netns,
    server: server.netns,
    address: '172.30.0.8',
    wire: ends(one, two),
    agents: [],
  };
}

function proxied(runtime: Runtime, sameNode = false): () => Promise<Place> {
  return async () => {
    const { lab, one, two } = plain(sameNode ? 's' : runtime[0]!);
    await Promise.all(lab.hosts.map((host) => host.start(runtime)));
    const client = lab.instance(one, 's.s.client.v1', 1);
    const server = lab.instance(sameNode ? one : two, 's.s.server.v1', 1);
    lab.tellAll();
    return {
      client: client.netns,
      server: server.netns,
      address: formatIpv4(lab.serviceIp('s.s.server.v1')),
      wire: ends(one, two),
      agents: sameNode ? [one] : [one, two],
    };
  };
}

function load(place: Place, mode: string, ...rest: (string | number)[]): Record<string, number> {
  const argv = inside(
    place.client,
    ...runtimeArgv('node'),
    LOAD,
    mode,
    place.address,
    String(PORT),
    ...rest.map(String),
  );
  return JSON.parse(shell(argv)) as Record<string, number>;
}

/** Received bits per second, in Mbit/s, and the bytes. */
function iperf(place: Place, streams: number): { mbps: number; bytes: number } {
  const argv = inside(
    place.client,
    'iperf3',
    '-J',
    '-c',
    place.address,
    '-t',
    String(seconds),
    '-P',
    String(streams),
  );
  const { end } = JSON.parse(shell(argv)) as {
    end: { sum_received: { bits_per_second: number; bytes: number } };
  };
  return { mbps: end.sum_received.bits_per_second / 1e6, bytes: end.sum_received.bytes };
}

/** Seconds of work of all cores since start, from /proc/stat in ticks of 10 ms. */
function machineCpu(): number {
  const [, user, nice, system, , , irq, softirq] = readFileSync('/proc/stat', 'utf8')
    .split('\n')[0]!
    .split(/\s+/);
  return [user, nice, system, irq, softirq].reduce((sum, ticks) => sum + Number(ticks), 0) / 100;
}

async function agents(place: Place): Promise<{ cpuS: number; rssMb: number }> {
  const all = await Promise.all(place.agents.map((host) => host.memory()));
  return {
    cpuS: all.reduce((sum, { cpuMs }) => sum + cpuMs / 1000, 0),
    rssMb: Math.max(0, ...all.map(({ rssKb }) => rssKb / 1024)),
  };
}

/** The highest rate at which at most one in a thousand is lost; datagrams that arrived per second. */
function udp64(place: Place): number {
  let low = 0;
  let best = 0;
  let high = UDP_RATE_MAX;
  let rate = UDP_RATE_MAX;
  const trialS = values.quick ? 1 : 3;
  for (let trial = 0; trial <= UDP_TRIALS; trial++) {
    const {
      sent,
      received,
      per_s: offered,
    } = load(place, 'udp', Math.round(rate), trialS, 64) as {
      sent: number;
      received: number;
      per_s: number;
    };
    const good = sent > 0 && received >= sent * (1 - UDP_LOSS_MAX);
    if (good) {
      best = Math.max(best, (offered * received) / sent);
      // The generator could offer no more: there is nothing above.
      if (offered < rate * 0.98) break;
      low = rate;
    } else high = Math.min(rate, offered);
    rate = (low + high) / 2;
    if (high - low < high * 0.03) break;
  }
  return best;
}

type Step = (path: Path, place: Place, figures: Figures) => Promise<void> | void;

/** Paths take turns at every step, so that what else the machine does meets all of them alike. */
const LOADS: Readonly<Record<string, Step>> = {
  tcp1: async (_, place, figures) => {
    const before = await agents(place);
    const machine = machineCpu();
    const one = iperf(place, 1);
    const after = await agents(place);
    figures.tcp1_mbps = one.mbps;
    figures.machine_cpu_s_per_gb = (machineCpu() - machine) / (one.bytes / 1e9);
    if (place.agents.length > 0) figures.cpu_s_per_gb = (after.cpuS - before.cpuS) / (one.bytes / 1e9);
  },
  tcp4: (_, place, figures) => {
    figures.tcp4_mbps = iperf(place, 4).mbps;
  },
  wire: (path, place, figures) => {
    if (path === 'same_node') return;
    setOffloads(place.wire, false);
    try {
      figures.wire_tcp1_mbps = iperf(place, 1).mbps;
    } finally {
      setOffloads(place.wire, true);
    }
  },
  rr: (_, place, figures) => {
    const rr = load(place, 'rr', seconds);
    figures.rr_p50_us = rr['p50_us']!;
    figures.rr_p99_us = rr['p99_us']!;
  },
  udp: (_, place, figures) => {
    figures.udp64_pps = udp64(place);
  },
  conn: async (_, place, figures) => {
    figures.conn_per_s = load(place, 'connect', Math.min(seconds, 3))['per_s']!;
    if (place.agents.length > 0) figures.rss_load_mb = (await agents(place)).rssMb;
  },
};
const STEPS = Object.entries(LOADS)
  .filter(([name]) => loads?.includes(name) ?? true)
  .map(([, step]) => step);

/** Waits for a quiet machine, at most that long; the share of time that its cores were busy when it began. */
async function quiet(limitMs: number): Promise<number> {
  const end = performance.now() + limitMs;
  for (;;) {
    const from = machineCpu();
    await new Promise((resolve) => setTimeout(resolve, 300));
    const busy = (machineCpu() - from) / (0.3 * availableParallelism());
    if (busy < 0.08 || performance.now() > end) return busy;
  }
}

function median(numbers: readonly number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

const round = (value: number): number => (value >= 100 ? Math.round(value) : Math.round(value * 100) / 100);

function print(rows: readonly (readonly string[])[]): void {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  for (const row of rows)
    console.log(
      row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))).join('  '),
    );
}

const TARGETS: readonly (readonly [string, string, string])[] = [
  ['tcp1_vs_kernel', '≥ 0.42', '0.65'],
  ['wire_tcp1_vs_kernel', '≥ 0.50', '0.70'],
  ['tcp4_vs_kernel', '≥ 0.42', '0.70'],
  ['rr_p50_vs_veth', '≤ 2.2', '1.6'],
  ['udp64_vs_vxlan', '≥ 0.8', '1.4'],
  ['cpu_s_per_gb', '≤ 2.5', '1.2'],
  ['services_10000_vs_10', '≤ 1.1', '1.0'],
];

interface Soaked {
  /** Resident set of the larger agent at even times, MB. */
  readonly rss_mb: readonly number[];
  readonly growth_mb: number;
}

/** A steady load for that long. */
async function soak(place: Place, total: number): Promise<Soaked> {
  const samples: number[] = [];
  const end = performance.now() + total * 1000;
  while (performance.now() < end) {
    iperf(place, 4);
    load(place, 'connect', 2);
    load(place, 'udp', 60_000, 2, 64);
    samples.push(round((await agents(place)).rssMb));
  }
  return { rss_mb: samples, growth_mb: growth(samples) };
}

const places = new Map<Path, Place>();
const runs = new Map<Path, Figures[]>(chosen.map((path) => [path, []]));
const tables: Partial<Record<Runtime, Record<string, number>>> = {};
const soaked: Record<string, Soaked> = {};
let busiest = 0;

let cleaned: Promise<void> | undefined;
/** Once, whoever asks first: an interrupt and a failure that it causes may both. */
function cleanUp(): Promise<void> {
  cleaned ??= (async () => {
    for (const child of children) child.kill('SIGKILL');
    for (const lab of labs) await lab.down();
  })();
  return cleaned;
}
process.once('SIGINT', () => void cleanUp().then(() => process.exit(130)));

try {
  const idle = new Map<Path, number>();
  for (const path of chosen) {
    const place = await up[path]();
    places.set(path, place);
    await serve(place.server);
    if (place.agents.length > 0) idle.set(path, (await agents(place)).rssMb);
  }
  for (let i = 1; i <= repeat; i++) {
    const round_ = new Map<Path, Figures>(chosen.map((path) => [path, {}]));
    for (const [number, step] of STEPS.entries()) {
      busiest = Math.max(busiest, await quiet(values.quick ? 2_000 : 15_000));
      for (const [path, place] of places) await step(path, place, round_.get(path)!);
      console.error(`round ${i} of ${repeat}, step ${number + 1} of ${STEPS.length}`);
    }
    for (const [path, figures] of round_) {
      if (idle.has(path)) figures.rss_idle_mb = idle.get(path)!;
      runs.get(path)!.push(figures);
      console.error(
        `  ${path}: ${JSON.stringify(figures, (_, v) => (typeof v === 'number' ? round(v) : v))}`,
      );
    }
  }
  for (const runtime of ['node', 'deno'] as const)
    if (chosen.includes(runtime)) {
      const argv = [...runtimeArgv(runtime), join(import.meta.dirname, 'bench_tables.ts')];
      tables[runtime] = JSON.parse(shell(argv)) as Record<string, number>;
    }
  if (values.soak !== undefined)
    for (const [path, place] of places)
      if (place.agents.length > 0 && path !== 'same_node')
        soaked[path] = await soak(place, Number(values.soak));
} finally {
  await cleanUp();
}

const result: Record<Path, Figures> = Object.fromEntries(
  chosen.map((path) => [
    path,
    Object.fromEntries(
      METRICS.flatMap((metric) => {
        const found = runs.get(path)!.flatMap((figures) => figures[metric] ?? []);
        return found.length === 0 ? [] : [[metric, round(median(found))]];
      }),
    ),
  ]),
) as Record<Path, Figures>;

/** Ratios are taken within each round, then their median. */
function ratios(runtime: Runtime): Record<string, number> {
  const over = (metric: Metric, path: Path): number => {
    const own = runs.get(runtime) ?? [];
    const other = runs.get(path) ?? [];
    const found = own.flatMap((figures, i) => {
      const a = figures[metric];
      const b = other[i]?.[metric];
      return a === undefined || b === undefined ? [] : [a / b];
    });
    return found.length === 0 ? Number.NaN : round(median(found));
  };
  return {
    tcp1_vs_kernel: over('tcp1_mbps', 'kernel'),
    tcp4_vs_kernel: over('tcp4_mbps', 'kernel'),
    wire_tcp1_vs_kernel: over('wire_tcp1_mbps', 'kernel'),
    rr_p50_vs_veth: over('rr_p50_us', 'veth'),
    udp64_vs_vxlan: over('udp64_pps', 'vxlan'),
    services_10000_vs_10: tables[runtime]?.['services_10000_vs_10'] ?? Number.NaN,
  };
}

print([
  ['', ...chosen],
  ...METRICS.map((metric) => [metric, ...chosen.map((path) => String(result[path][metric] ?? '–'))]),
]);
console.log();
const both = { node: ratios('node'), deno: ratios('deno') };
print([
  ['ratio', 'node', 'deno', 'at least', 'aim'],
  ...TARGETS.map(([name, least, aim]) => [
    name,
    ...(['node', 'deno'] as const).map((runtime) =>
      String(name === 'cpu_s_per_gb' ? (result[runtime]?.cpu_s_per_gb ?? Number.NaN) : both[runtime][name]),
    ),
    least,
    aim,
  ]),
]);
console.log();
print([
  ['ns per decision', '10 services', '10,000', '10,000, 100,000 flows in turn'],
  ...Object.entries(tables).map(([runtime, of]) => [
    runtime,
    ...['services_10_ns', 'services_10000_ns', 'flows_100000_ns'].map((name) => String(of[name])),
  ]),
]);
for (const [path, { rss_mb, growth_mb }] of Object.entries(soaked))
  console.log(
    `\n${path}: resident set under load ${rss_mb[0]} → ${rss_mb.at(-1)} MB, grew by ${round(growth_mb)} MB after the first fifth`,
  );
const version = (runtime: Runtime): string =>
  spawnSync(runtimeArgv(runtime)[0]!, ['--version'], { encoding: 'utf8' }).stdout.split('\n')[0]!.trim();
console.log(
  `\n${availableParallelism()} × ${cpus()[0]?.model ?? 'unknown'}, Linux ${release()}, Node ${version('node')}, ${version('deno')}; medians of ${repeat}, ${seconds} s each; other work kept the cores busy for at most ${Math.round(busiest * 100)} % when a step began`,
);
if (values.json !== undefined)
  writeFileSync(
    values.json,
    `${JSON.stringify({ ...result, ratios: both, tables, soaked, repeat, seconds, busiest, kernel_release: release(), runs: Object.fromEntries(runs) }, null, 2)}\n`,
  );
process.exit(0);
