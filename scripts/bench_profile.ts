// Where the packet loops' time goes, load by load: samples of both agents (perf of Debian's linux-perf, by the clock, so
// that virtual machines can do it too), their system calls by their own counters, and how much of the cores they had.
// One run of each load of bench_proxy.ts, Node only: Deno has no map of its compiled code for perf.
//   npm run bench -- profile [--seconds N] [--json FILE] [--svg FILE] [--symbols N]
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { formatIpv4 } from '../src/addr.ts';
import { inside, type LabHost, ProxyLab, runtimeArgv, setOffloads, shell } from './proxy_lab.ts';

const { values } = parseArgs({
  allowPositionals: true,
  options: {
    seconds: { type: 'string', default: '4' },
    json: { type: 'string' },
    svg: { type: 'string' },
    symbols: { type: 'string', default: '0' },
  },
});
const seconds = Number(values.seconds);
const PORT = 7000;
const LOAD = join(import.meta.dirname, 'bench_load.ts');
const dir = mkdtempSync(join(tmpdir(), 'edgeway-profile-'));
const lab = new ProxyLab(`ewF${process.pid}`);

/** What a sample is counted as: the first that matches, kernel symbols first. */
const KINDS = [
  ['copies', 'copies in the kernel'],
  ['memory', 'packet memory'],
  ['network', 'other network stack'],
  ['switching', 'waiting, waking, switching'],
  ['calls', 'system call entry'],
  ['typescript', 'TypeScript'],
  ['sums', 'checksums'],
  ['runtime', 'V8, koffi, libc'],
] as const;
type Kind = (typeof KINDS)[number][0];

const KERNEL: readonly (readonly [RegExp, Kind])[] = [
  [/copy|memcpy|memmove|rep_movs|memset|clear_page|csum/, 'copies'],
  [
    // Samples of what runs with interrupts off land where they are switched on again: after a wake-up, a switch.
    /schedule$|sched_|wake|ttwu|finish_task|spin_unlock_irq|switch_|futex|hrtimer|pick_|enqueue_(task|entity)|dequeue_(task|entity)|update_curr|update_load|yield|idle|poll|tick|timer|rcu_/,
    'switching',
  ],
  [/entry_SYSCALL|syscall|do_sys|__x64_|fdget|__fget|fput|exit_to_user|x86_pmu|import_iov/, 'calls'],
  [/skb|kmem|slab|alloc|free|page|put_cpu|memcg|refill_stock/, 'memory'],
];

function kindOf(symbol: string, object: string): Kind {
  if (object.includes('kernel') || object.startsWith('[k') || object.endsWith('.ko'))
    return KERNEL.find(([pattern]) => pattern.test(symbol))?.[1] ?? 'network';
  if (/wasm/i.test(symbol)) return 'sums';
  // The map holds what V8 compiled from us, and its own stubs.
  return symbol.startsWith('JS:') ? 'typescript' : 'runtime';
}

interface Profile {
  readonly load: string;
  /** Cores that both agents had, of all there are. */
  readonly agent_cores: number;
  readonly machine_cores: number;
  readonly shares: Readonly<Record<Kind, number>>;
  /** Packets through both agents, super-packets counted once, and system calls for each. */
  readonly packets_per_s: number;
  readonly calls_per_packet: Readonly<Record<string, number>>;
}

const CALLS = ['tun_reads', 'tun_writes', 'tunnel_reads', 'tunnel_sends', 'polls'] as const;

async function sum(hosts: readonly LabHost[]): Promise<Record<string, number>> {
  const total: Record<string, number> = {};
  for (const host of hosts) {
    for (const [name, value] of Object.entries(await host.counters()))
      total[name] = (total[name] ?? 0) + value;
    total['cpu_ms'] = (total['cpu_ms'] ?? 0) + (await host.memory()).cpuMs;
  }
  return total;
}

async function ended(argv: readonly string[]): Promise<void> {
  const child = spawn(argv[0]!, argv.slice(1), { stdio: ['ignore', 'ignore', 'pipe'] });
  let said = '';
  child.stderr.on('data', (chunk: Buffer) => {
    said = (said + chunk.toString()).slice(-2_000);
  });
  const status = await new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  if (status !== 0) throw new Error(`${argv.join(' ')} ended with ${status}: ${said}`);
}

async function profile(load: string, argv: readonly string[]): Promise<Profile> {
  const running = ended(argv);
  await new Promise((resolve) => setTimeout(resolve, 1_000)); // past the start of the stream
  const file = join(dir, `${load.replaceAll(/\W/g, '_')}.data`);
  const pids = lab.hosts.map((host) => host.process!.pid).join(',');
  const before = await sum(lab.hosts);
  const began = performance.now();
  await ended([
    'perf',
    'record',
    '-q',
    '-o',
    file,
    '-F',
    '1999',
    '-e',
    'cpu-clock',
    '-p',
    pids,
    '--',
    'sleep',
    String(seconds),
  ]);
  const after = await sum(lab.hosts);
  const took = (performance.now() - began) / 1000;
  await running;
  const shares = Object.fromEntries(KINDS.map(([kind]) => [kind, 0])) as Record<Kind, number>;
  const samples = shell(['perf', 'script', '-i', file, '-F', 'ip,sym,dso']).split('\n');
  const symbols = new Map<string, number>();
  let all = 0;
  for (const line of samples) {
    const [, symbol, object] = /^\s*[0-9a-f]+ (.*) \(([^()]*)\)$/.exec(line) ?? [];
    if (symbol === undefined || object === undefined) continue;
    const kind = kindOf(symbol, object);
    const name = `${kind} ${symbol}`;
    symbols.set(name, (symbols.get(name) ?? 0) + 1);
    shares[kind]++;
    all++;
  }
  for (const [kind] of KINDS) shares[kind] = Math.round((1000 * shares[kind]) / Math.max(all, 1)) / 10;
  const most = [...symbols].sort(([, a], [, b]) => b - a).slice(0, Number(values.symbols));
  for (const [name, count] of most) console.log(`${((100 * count) / all).toFixed(1).padStart(6)} %  ${name}`);
  const grown = (name: string): number => (after[name] ?? 0) - (before[name] ?? 0);
  const packets = grown('from_tun_packets') + grown('from_tunnel_packets');
  return {
    load,
    agent_cores: Math.round(grown('cpu_ms') / took / 10) / 100,
    machine_cores: availableParallelism(),
    shares,
    packets_per_s: Math.round(packets / took),
    calls_per_packet: Object.fromEntries(
      CALLS.map((name) => [name, Math.round((100 * grown(name)) / Math.max(packets, 1)) / 100]),
    ),
  };
}

try {
  shell(['perf', '--version']);
  lab.up(2, 1500, true);
  const [one, two] = lab.hosts as [LabHost, LabHost];
  // A map of the compiled code, /tmp/perf-PID.map; the log that comes with it would be put here.
  const flags = ['--perf-basic-prof', '--no-logfile-per-isolate', `--logfile=${join(dir, 'v8.log')}`];
  await Promise.all(lab.hosts.map((host) => host.start('node', {}, flags)));
  const client = lab.instance(one, 's.s.client.v1', 1);
  const server = lab.instance(two, 's.s.server.v1', 1);
  lab.tellAll();
  const address = formatIpv4(lab.serviceIp('s.s.server.v1'));
  const serving = inside(server.netns, ...runtimeArgv('node'), LOAD, 'serve', String(PORT));
  const echo = spawn(serving[0]!, serving.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] });
  const bulk = inside(server.netns, 'iperf3', '-s');
  const iperf = spawn(bulk[0]!, bulk.slice(1), { stdio: 'ignore' });
  try {
    await new Promise((resolve) => createInterface({ input: echo.stdout }).once('line', resolve));
    const time = String(seconds + 2);
    const from = (...argv: string[]): string[] => inside(client.netns, ...argv);
    const generate = (mode: string, ...rest: string[]): string[] =>
      from(...runtimeArgv('node'), LOAD, mode, address, String(PORT), ...rest);
    const stream = (streams: string): string[] => from('iperf3', '-c', address, '-t', time, '-P', streams);
    const wire = lab.hosts.map(({ netns }) => ({ netns, device: 'up0' }));
    await ended(from('iperf3', '-c', address, '-t', '2')); // warm
    const profiles: Profile[] = [];
    const add = async (load: string, argv: readonly string[]): Promise<void> => {
      const found = await profile(load, argv);
      profiles.push(found);
      console.log(JSON.stringify(found));
    };
    await add('TCP, 1 stream', stream('1'));
    setOffloads(wire, false);
    await add('1,500-byte frames', stream('1'));
    setOffloads(wire, true);
    await add('TCP, 4 streams', stream('4'));
    await add('request, response', generate('rr', time));
    await add('UDP 64 B', generate('udp', '150000', time, '64'));
    await add('new connections', generate('connect', time));
    if (values.json !== undefined)
      writeFileSync(values.json, `${JSON.stringify({ bench: 'profile', profiles }, undefined, 2)}\n`);
    if (values.svg !== undefined) writeFileSync(values.svg, picture(profiles));
  } finally {
    echo.kill('SIGKILL');
    iperf.kill('SIGKILL');
  }
} finally {
  const maps = lab.hosts.flatMap((host) =>
    host.process === undefined ? [] : [`/tmp/perf-${host.process.pid}.map`],
  );
  await lab.down();
  for (const map of maps) rmSync(map, { force: true });
  rmSync(dir, { recursive: true, force: true });
}

/** One bar of shares per load, as wide as a README's column. */
function picture(profiles: readonly Profile[]): string {
  const colours = ['#4e79a7', '#76b7b2', '#a0cbe8', '#f28e2b', '#ffbe7d', '#59a14f', '#8cd17d', '#bab0ac'];
  const [left, width, bar, gap, top] = [150, 560, 26, 14, 56];
  const height = top + profiles.length * (bar + gap) + 10;
  const text = (x: number, y: number, body: string, more = ''): string =>
    `<text x="${x}" y="${y}" ${more}>${body}</text>`;
  const legend = KINDS.map(([, label], i) => {
    const [x, y] = [10 + (i % 4) * 180, 10 + Math.floor(i / 4) * 20];
    return `<rect x="${x}" y="${y}" width="12" height="12" fill="${colours[i]}"/>${text(x + 17, y + 11, label)}`;
  });
  const bars = profiles.flatMap(({ load, shares, agent_cores, machine_cores }, row) => {
    const y = top + row * (bar + gap);
    let x = left;
    const parts = KINDS.map(([kind], i) => {
      const wide = (shares[kind] / 100) * width;
      const part = `<rect x="${x.toFixed(1)}" y="${y}" width="${wide.toFixed(1)}" height="${bar}" fill="${colours[i]}"/>`;
      const label =
        shares[kind] >= 5
          ? text(x + wide / 2, y + 17, `${Math.round(shares[kind])}`, 'text-anchor="middle" fill="#111"')
          : '';
      x += wide;
      return part + label;
    });
    const cores = text(left + width + 8, y + 17, `${agent_cores.toFixed(1)} of ${machine_cores}`);
    return [text(left - 8, y + 17, load, 'text-anchor="end"'), ...parts, cores];
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${left + width + 80}" height="${height}" font-family="sans-serif" font-size="12">
<title>Where the time of the packet loops goes, by load</title>
<rect width="100%" height="100%" fill="#fff"/>
${[...legend, text(left + width + 8, top - 8, 'cores'), ...bars].join('\n')}
</svg>
`;
}
