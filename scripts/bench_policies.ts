// What the policies promise, measured.
//   npm run bench -- policies [--json FILE] [--quick] [--only PART,…] [--cycles N] [--runtime node|deno]
//   simulator   50 nodes, six topologies; a closed loop for fastest (test/sim)
//   closest     six real agents behind a delay relay: who was chosen against who was nearest
//   roundrobin  3,000 flows from three nodes at once to three instances
//   fastest     one of three instances becomes overloaded
//   instance    kill -9 of an instance's process, again and again, while clients make flows
//   host        kill -9 of an agent, and of a whole host, at the same time in two services; then with etcd away
import { readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { parseArgs } from 'node:util';
import { closestOn, judge, TOPOLOGIES } from '../test/sim/closest.ts';
import { overload } from '../test/sim/queue.ts';
import { Lab, must, type Runtime, until } from './lab.ts';
import { DelayedLab } from './relay.ts';

const PARTS = ['simulator', 'closest', 'roundrobin', 'fastest', 'instance', 'host'] as const;
type Part = (typeof PARTS)[number];
const PORT = 7000;

const { values } = parseArgs({
  allowPositionals: true,
  options: {
    json: { type: 'string' },
    only: { type: 'string' },
    quick: { type: 'boolean', default: false },
    runtime: { type: 'string', default: 'node' },
    cycles: { type: 'string' },
  },
});
if (values.runtime !== 'node' && values.runtime !== 'deno') throw new Error('--runtime: node or deno');
const runtime: Runtime = values.runtime;
const only = values.only?.split(',') as Part[] | undefined;
for (const part of only ?? [])
  if (!PARTS.includes(part)) throw new Error(`--only ${part}: one of ${PARTS.join(', ')}`);
const wanted = (part: Part): boolean => only?.includes(part) ?? true;
const cycles = Number(values.cycles ?? (values.quick ? 4 : 20));

/** RTTs between the six hosts, ms. From no host are two others within 1.5 ms of each other. */
const RTT_MS: readonly (readonly number[])[] = [
  [0, 6, 14, 22, 35, 48],
  [6, 0, 9, 18, 31, 42],
  [14, 9, 0, 12, 24, 37],
  [22, 18, 12, 0, 15, 27],
  [35, 31, 24, 15, 0, 11],
  [48, 42, 37, 27, 11, 0],
];
const NEAR_MS = RTT_MS.map((row, i) => row.map((_, j) => (i === j ? 0 : 4)));

interface Flow {
  readonly at: number;
  readonly who?: string;
  readonly error?: string;
  readonly ms?: number;
  readonly lost?: string;
  readonly kept?: string;
  readonly left?: string;
}

const progress = (line: string): void => console.error(`  ${line}`);
const wait = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
/** Nearest rank; with 20 values the 99th percentile is the greatest. */
const percentile = (list: readonly number[], share: number): number | null => {
  if (list.length === 0) return null;
  const sorted = [...list].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)]!;
};
const seconds = (ms: number | null): number | null => (ms === null ? null : Number((ms / 1000).toFixed(3)));

const node = process.env['NODE'] ?? process.execPath;
/** Our own programs run under Node whatever the agents run under: they are not what is measured. */
const script = (file: string, ...args: string[]): string[] => [
  node,
  '--disable-warning=ExperimentalWarning',
  file,
  ...args,
];

class Bench {
  readonly lab: Lab;
  readonly delayed: DelayedLab;
  #clients = 0;

  private constructor(lab: Lab, delayed: DelayedLab) {
    this.lab = lab;
    this.delayed = delayed;
  }

  static async up(services: readonly string[], flags: (node: number) => string[] = () => []): Promise<Bench> {
    const lab = await Lab.up({
      lab: `ewb${process.pid}`,
      nodes: RTT_MS.length,
      runtime,
      agentFlags: ['--presence-ttl', '10', '--mdns', 'off'],
      progress,
    });
    try {
      const bench = new Bench(lab, await DelayedLab.over(lab));
      await Promise.all(
        lab.nodes.map(async ({ index }) => {
          await lab.startAgent(index, flags(index));
          await bench.must(index, 'POST', '/register', {});
        }),
      );
      for (const service of services) await bench.apply(service);
      await bench.apply(
        'client',
        services.map((name) => serviceId(name)),
      );
      return bench;
    } catch (thrown) {
      await lab.down();
      throw thrown;
    }
  }

  // biome-ignore lint/suspicious/noExplicitAny: whatever the API answered
  async must(index: number, method: string, path: string, body?: unknown): Promise<any> {
    const answer = await this.lab.api(index, method, path, body);
    if (answer.status !== 200)
      throw new Error(
        `${method} ${path} on n${index}: ${JSON.stringify(answer.body)}\n${this.lab.tail(this.lab.node(index))}`,
      );
    return answer.body;
  }

  async apply(name: string, needs?: readonly string[]): Promise<void> {
    const [appname, appnamespace, servicename, servicenamespace] = serviceId(name).split('.');
    const descriptor = { appname, appnamespace, servicename, servicenamespace };
    await this.must(
      1,
      'POST',
      '/api/v1/services',
      needs === undefined ? descriptor : { ...descriptor, needs },
    );
  }

  /** An echo server as a bare process in a network namespace of its own on that host; its label is `n<host>`. */
  async instance(name: string, number: number, index: number): Promise<number> {
    const host = this.lab.node(index);
    const child = this.lab.spawn(
      host.netns,
      ['unshare', '--net', ...script('test/lab/echo.ts', String(PORT), host.name)],
      join(this.lab.dir, `echo-${name}-${number}.log`),
    );
    const pid = child.pid!;
    const own = readNs('self');
    await until(`namespace of ${name} ${number}`, 10_000, () => {
      const ns = readNs(String(pid));
      return ns !== undefined && ns !== own && ns !== this.#hostNs(index) ? true : undefined;
    });
    await this.must(index, 'POST', '/api/v1/instances', { service: serviceId(name), instance: number, pid });
    await until(`${name} ${number} listens`, 10_000, () =>
      readFileSync(`/proc/${pid}/net/tcp`, 'utf8').includes(`:${PORT.toString(16).toUpperCase()} `)
        ? true
        : undefined,
    );
    return pid;
  }

  #hostNs(index: number): string | undefined {
    const agent = this.lab.node(index).agent?.pid;
    return agent === undefined ? undefined : readNs(String(agent));
  }

  /** A namespace on that host from which flows are made. */
  async client(index: number): Promise<string> {
    const instance = ++this.#clients;
    const netns = await this.lab.addInstance(`c${instance}`);
    const body = { service: serviceId('client'), instance, netns };
    await this.must(index, 'POST', '/api/v1/instances', body);
    return netns;
  }

  /** Starts a stream of flows; `read` gives what is known of them so far, oldest first. */
  flows(netns: string, name: string, policy: string, perSecond: number, count: number, keep = false) {
    const log = join(this.lab.dir, `flows-${netns}-${name}-${policy}-${Date.now()}.log`);
    const host = `${serviceId(name)}.any.${policy}.local`;
    const child = this.lab.spawn(
      netns,
      script(
        'scripts/bench_flows.ts',
        ...[host, String(PORT), String(perSecond), String(count)],
        ...(keep ? ['keep'] : []),
      ),
      log,
    );
    const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()));
    const read = (): Flow[] =>
      readFileSync(log, 'utf8')
        .split('\n')
        .slice(0, -1)
        .map((line) => {
          if (!line.startsWith('{')) throw new Error(`${log}: ${line}`);
          return JSON.parse(line) as Flow;
        });
    return { read, ended, stop: () => this.lab.end(child, 'SIGKILL') };
  }

  /** From now on nobody reaches etcd: packets to it vanish, which is harder on a client than a closed port. */
  async cutEtcd(): Promise<void> {
    const rules =
      'table inet cut { chain input { type filter hook input priority 0; tcp dport 2379 iif "under" drop; }; }';
    await must(['ip', 'netns', 'exec', this.lab.switch, 'nft', rules]);
  }

  /** Until that node has measured every candidate of the service. */
  async confirmed(index: number, name: string, instances: number): Promise<void> {
    await until(`n${index} has measured ${name}`, 60_000, async () => {
      const { body } = await this.lab.api(
        index,
        'GET',
        `/api/v1/explain?of=${serviceId(name)}.any.closest.local`,
      );
      const candidates = (body.candidates ?? []) as { rttBy: string | null; health: string }[];
      return candidates.length === instances &&
        candidates.every((c) => c.rttBy === 'probe' && c.health === 'up')
        ? true
        : undefined;
    });
  }
}

const serviceId = (name: string): string => `shop.prod.${name}.v1`;
/** Identity of a process's network namespace; undefined when there is no such process. */
function readNs(pid: string): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/ns/net`);
  } catch {
    return undefined;
  }
}

const results: Record<string, unknown> = {};
const detail: Record<string, unknown> = {};

// ---- the simulator ----
let simulated = { right: 1, bad: 0, switches: 0, moved: 1 };
if (wanted('simulator')) {
  console.error('simulator: 50 nodes');
  const closest: Record<string, unknown> = {};
  for (const [name, truthOf] of TOPOLOGIES) {
    const seen = closestOn(truthOf(1), 1);
    closest[name] = {
      flows: seen.flows,
      right: seen.right / seen.flows,
      nearest: seen.nearest / seen.flows,
      bad: seen.bad,
    };
    simulated = {
      ...simulated,
      right: Math.min(simulated.right, seen.right / seen.flows),
      bad: simulated.bad + seen.bad,
    };
    progress(`closest, ${name}: ${((100 * seen.right) / seen.flows).toFixed(2)} % right, ${seen.bad} bad`);
  }
  const loops = [150, 240, 270].flatMap((flowsPerSecond) =>
    [1, 2, 3, 4].map((seed) => ({
      flowsPerSecond,
      seed,
      ...overload({ seed, clients: 50, instances: 3, flowsPerSecond, capacityPerSecond: 160 }),
    })),
  );
  simulated = {
    ...simulated,
    switches: Math.max(...loops.map((l) => l.switches)),
    moved: Math.min(...loops.map((l) => l.moved)),
  };
  progress(
    `fastest: at least ${(100 * simulated.moved).toFixed(1)} % of its flows moved after 5 s, at most ${simulated.switches} switches in 90 s`,
  );
  detail['simulator'] = { closest, fastest: loops };
  results['closest_right'] = simulated.right;
  results['closest_bad'] = simulated.bad;
  results['fastest_share_after_5s'] = simulated.moved;
  results['fastest_switches'] = simulated.switches;
}

/** Times that another instance got most flows of a second, by 30 % of them. */
function switchesOf(flows: readonly Flow[]): number {
  const bySecond = new Map<number, Map<string, number>>();
  for (const { at, who } of flows) {
    if (who === undefined) continue;
    const second = bySecond.get(Math.floor(at / 1000)) ?? new Map<string, number>();
    bySecond.set(Math.floor(at / 1000), second.set(who, (second.get(who) ?? 0) + 1));
  }
  let leader: string | undefined;
  let switches = 0;
  for (const [, second] of [...bySecond].sort(([a], [b]) => a - b)) {
    const total = [...second.values()].reduce((a, b) => a + b, 0);
    const [first] = [...second].sort((a, b) => b[1] - a[1]);
    if (leader === undefined) leader = first![0];
    else if (first![1] - (second.get(leader) ?? 0) > 0.3 * total) {
      leader = first![0];
      switches++;
    }
  }
  return switches;
}

// ---- six agents that stay alive ----
if (wanted('closest') || wanted('roundrobin') || wanted('fastest')) {
  const loadFile = (index: number): string => `/tmp/edgeway-load-${process.pid}-${index}`;
  for (let i = 1; i <= RTT_MS.length; i++) writeFileSync(loadFile(i), '0.2\n');
  // Who hosts what; the truth is RTT_MS.
  const hosts: Record<string, readonly number[]> = {
    s1: [1, 3, 5],
    s2: [2, 4, 6],
    s3: [1, 2, 6],
    s4: [3, 4, 5],
    even: [4, 5, 6],
  };
  const bench = await Bench.up(Object.keys(hosts), (index) => ['--load-file', loadFile(index)]);
  try {
    for (const [name, list] of Object.entries(hosts))
      await Promise.all(list.map((index, k) => bench.instance(name, k + 1, index)));
    const clients = await Promise.all(RTT_MS.map((_, i) => bench.client(i + 1)));
    if (wanted('closest')) {
      console.error('closest: six agents behind delays');
      bench.delayed.setRtts(RTT_MS);
      for (let i = 1; i <= 6; i++)
        for (const [name, list] of Object.entries(hosts)) await bench.confirmed(i, name, list.length);
      await wait(8_000);
      const seen = { flows: 0, right: 0, nearest: 0, bad: 0, failed: 0, wrong: {} as Record<string, number> };
      const count = values.quick ? 20 : 100;
      for (const name of ['s1', 's2', 's3', 's4']) {
        const streams = clients.map((netns) => bench.flows(netns, name, 'closest', 20, count));
        for (const [i, stream] of streams.entries()) {
          await stream.ended;
          const best = Math.min(...hosts[name]!.map((index) => RTT_MS[i]![index - 1]!));
          for (const { who } of stream.read()) {
            seen.flows++;
            if (who === undefined) {
              seen.failed++;
              continue;
            }
            const verdict = judge(RTT_MS[i]![Number(who.slice(1)) - 1]!, best);
            if (verdict.right) seen.right++;
            if (verdict.nearest) seen.nearest++;
            if (verdict.bad) seen.bad++;
            const way = `${name}: n${i + 1} > ${who}`;
            if (!verdict.right) seen.wrong[way] = (seen.wrong[way] ?? 0) + 1;
          }
        }
      }
      detail['closest'] = seen;
      results['closest_right'] = Math.min(simulated.right, seen.right / seen.flows);
      results['closest_bad'] = simulated.bad + seen.bad;
      progress(
        `${seen.flows} flows: ${((100 * seen.right) / seen.flows).toFixed(2)} % right, ${seen.bad} bad, ${seen.failed} failed ${JSON.stringify(seen.wrong)}`,
      );
    }
    bench.delayed.setRtts(NEAR_MS);
    if (wanted('roundrobin')) {
      console.error('roundrobin: 3,000 flows from three nodes at once');
      const streams = clients.slice(0, 3).map((netns) => bench.flows(netns, 'even', 'roundrobin', 100, 1000));
      const seen = new Map<string, number>();
      let failed = 0;
      for (const stream of streams) {
        await stream.ended;
        for (const { who } of stream.read())
          if (who === undefined) failed++;
          else seen.set(who, (seen.get(who) ?? 0) + 1);
      }
      const total = [...seen.values()].reduce((a, b) => a + b, 0);
      const third = total / 3;
      const deviation = Math.max(
        ...['n4', 'n5', 'n6'].map((who) => Math.abs((seen.get(who) ?? 0) - third) / third),
      );
      detail['roundrobin'] = { byInstance: Object.fromEntries(seen), failed };
      results['roundrobin_max_deviation'] = deviation;
      progress(
        `${JSON.stringify(Object.fromEntries(seen))}: at most ${(100 * deviation).toFixed(2)} % from a third, ${failed} failed`,
      );
    }
    if (wanted('fastest')) {
      console.error('fastest: n4 becomes overloaded');
      for (let i = 1; i <= 3; i++) await bench.confirmed(i, 'even', 3);
      // RTTs have just changed from far to near: let the averages settle.
      await wait(6_000);
      const observeMs = values.quick ? 15_000 : 40_000;
      const streams = clients.slice(0, 3).map((netns) => bench.flows(netns, 'even', 'fastest', 40, 0));
      await wait(6_000);
      const begun = Date.now();
      writeFileSync(loadFile(4), '2.0\n');
      await wait(observeMs);
      const flows: Flow[] = [];
      for (const stream of streams) {
        await stream.stop();
        flows.push(...stream.read());
      }
      const victimShare = (from: number, to: number): number => {
        const window = flows.filter(
          ({ at, who }) => who !== undefined && at - begun >= from && at - begun < to,
        );
        return window.filter(({ who }) => who === 'n4').length / window.length;
      };
      const before = victimShare(-5_000, 0);
      const after = victimShare(5_000, 8_000);
      const moved = 1 - after / before;
      const bySecond = Array.from({ length: 12 }, (_, s) =>
        Number(victimShare(s * 1000, s * 1000 + 1000).toFixed(3)),
      );
      const switches = switchesOf(flows.filter(({ at }) => at >= begun));
      detail['fastest'] = {
        shareBefore: before,
        shareAfter5s: after,
        moved,
        shareBySecond: bySecond,
        switches,
        observedMs: observeMs,
      };
      results['fastest_share_after_5s'] = Math.min(simulated.moved, moved);
      results['fastest_switches'] = Math.max(simulated.switches, switches);
      progress(
        `share of n4: ${(100 * before).toFixed(1)} % before, ${(100 * after).toFixed(1)} % after 5 s (by second ${bySecond.join(' ')}); ${switches} switches`,
      );
    }
  } finally {
    await bench.lab.down();
    for (let i = 1; i <= RTT_MS.length; i++) await must(['rm', '-f', loadFile(i)]);
  }
}

/** A flow that was answered this late needed its SYN twice (RFC 6298 §2.1). */
const REPEATED_MS = 900;
const POLL_MS = 100;

/** What a node's counters say of its choices of one instance, asked all the time: the wall times at which they had
 *  grown. That is late by the packet loop's report (250 ms) and by the asking (100 ms), never early. */
class Choices {
  readonly grown: number[] = [];
  #stopped = false;
  readonly #ended: Promise<void>;

  constructor(bench: Bench, index: number, what: string) {
    let last = Number.POSITIVE_INFINITY;
    const ask = async (): Promise<void> => {
      while (!this.#stopped) {
        const counters = await bench.must(index, 'GET', '/api/v1/counters');
        const count = Number(counters[`chosen_${what}`] ?? 0);
        if (count > last) this.grown.push(Date.now());
        last = count;
        await wait(POLL_MS);
      }
    };
    this.#ended = ask();
  }

  stop(): Promise<void> {
    this.#stopped = true;
    return this.#ended;
  }
}

/** Wall times between a kill and the last choice of whom was killed, and until its established connections ended; of
 *  those that were there, `hung` did not end. */
function toll(
  flows: readonly Flow[],
  grown: readonly number[],
  killedAt: number,
  until: number,
  endedUntil: number,
  who: string,
) {
  const failed = flows.filter(
    ({ at, error, ms }) =>
      (error !== undefined || (ms ?? 0) >= REPEATED_MS) && at <= until && at >= killedAt - 2_000,
  );
  const before = (what: 'lost' | 'left'): number =>
    flows.filter((f) => f[what] === who && f.at < killedAt).length;
  // An answer on its way when the kill came makes a connection too.
  const kept = flows.filter((f) => f.kept === who && f.at <= until).length;
  const lost = flows.filter((f) => f.lost === who && f.at >= killedAt && f.at <= endedUntil);
  return {
    lastMs: grown.reduce((latest, at) => (at <= until ? Math.max(latest, at - killedAt) : latest), 0),
    failed: failed.filter(({ error }) => error !== undefined).length,
    repeated: failed.filter(({ error }) => error === undefined).length,
    resetMs: lost.length === 0 ? undefined : Math.max(...lost.map(({ at }) => at - killedAt)),
    hung: kept - before('lost') - before('left') - lost.length,
  };
}

if (wanted('instance')) {
  console.error(`instance: kill -9, ${cycles} times`);
  const bench = await Bench.up(['cart']);
  try {
    bench.delayed.setRtts(NEAR_MS);
    const pids = new Map<number, number>();
    for (const index of [4, 5, 6]) pids.set(index, await bench.instance('cart', index - 3, index));
    // One client beside an instance (its own node's knowledge), one elsewhere.
    const clients = [await bench.client(4), await bench.client(1)];
    for (const index of [4, 1]) await bench.confirmed(index, 'cart', 3);
    const streams = clients.map((netns) => bench.flows(netns, 'cart', 'roundrobin', 100, 0, true));
    const cart1 = `${serviceId('cart')}/1 roundrobin`;
    const choices = [4, 1].map((index) => new Choices(bench, index, cart1));
    await wait(2_000);
    const kills: { at: number; index: number; withdrawnMs: number }[] = [];
    for (let cycle = 0; cycle < cycles; cycle++) {
      const index = 4; // the first client's own node
      const at = Date.now();
      process.kill(pids.get(index)!, 'SIGKILL');
      await until('the dead instance is withdrawn', 10_000, async () => {
        const { items } = await bench.must(index, 'GET', '/api/v1/instances');
        return items.some(
          (i: { service: string; node: string }) => i.service === serviceId('cart') && i.node === `n${index}`,
        )
          ? undefined
          : true;
      });
      kills.push({ at, index, withdrawnMs: Date.now() - at });
      await wait(1_800); // so that flows to it have failed before it is back
      pids.set(index, await bench.instance('cart', 1, index));
      await wait(1_200);
    }
    const all = await Promise.all(
      streams.map(async (stream) => {
        await stream.stop();
        return stream.read();
      }),
    );
    for (const each of choices) await each.stop();
    const tolls = all.map((flows, i) =>
      kills.map(({ at, index, withdrawnMs }) => {
        const until = at + withdrawnMs + 1_700; // then it comes back
        return toll(flows, choices[i]!.grown, at, until, until, `n${index}`);
      }),
    );
    const own = tolls[0]!.map((t) => t.lastMs);
    const other = tolls[1]!.map((t) => t.lastMs);
    const resets = tolls.flat().flatMap((t) => t.resetMs ?? []);
    const count = (what: 'failed' | 'repeated' | 'hung'): number =>
      tolls.flat().reduce((sum, t) => sum + t[what], 0);
    detail['instance'] = {
      ownNodeMs: own,
      otherNodeMs: other,
      withdrawnMs: kills.map((k) => k.withdrawnMs),
      resetMs: resets,
      failed: count('failed'),
      repeated: count('repeated'),
    };
    results['instance_last_flow_p99_s'] = seconds(percentile(own, 0.99));
    results['instance_last_flow_elsewhere_p99_s'] = seconds(percentile(other, 0.99));
    results['instance_reset_p99_s'] = seconds(percentile(resets, 0.99));
    results['instance_connections_hung'] = count('hung');
    progress(
      `withdrawn after ${kills.map((k) => k.withdrawnMs).join(' ')} ms; last flow: own node ${own.join(' ')} ms; other node ${other.join(' ')} ms; ${resets.length} connections reset after at most ${percentile(resets, 1)} ms, ${count('hung')} hung`,
    );
  } finally {
    await bench.lab.down();
  }
}

if (wanted('host')) {
  console.error(`host: kill -9 of an agent and of a host, ${cycles} times each`);
  const bench = await Bench.up(['left', 'right']);
  try {
    bench.delayed.setRtts(NEAR_MS);
    for (const [k, index] of [3, 4].entries()) await bench.instance('left', k + 1, index);
    for (const [k, index] of [5, 6].entries()) await bench.instance('right', k + 1, index);
    const clients = [await bench.client(1), await bench.client(2)];
    const start = () => [
      bench.flows(clients[0]!, 'left', 'roundrobin', 60, 0, true),
      bench.flows(clients[1]!, 'right', 'roundrobin', 60, 0, true),
    ];
    const back = async (index: number): Promise<void> => {
      await must(['ip', '-n', bench.lab.switch, 'link', 'set', `p${index}`, 'up']);
      await bench.lab.startAgent(index);
      await until(`n${index} is registered again`, 30_000, async () => {
        const { body } = await bench.lab.api(index, 'GET', '/api/v1/status');
        return body.subnet !== null && body.instances > 0 ? true : undefined;
      });
    };
    const killAgent = async (index: number): Promise<void> => {
      const agent = bench.lab.node(index).agent!;
      bench.lab.node(index).agent = undefined;
      await bench.lab.end(agent, 'SIGKILL');
    };
    const round = async (agents: number, hosts: number, etcdAway: boolean) => {
      const tolls = { agent: [] as ReturnType<typeof toll>[], host: [] as ReturnType<typeof toll>[] };
      for (let cycle = 0; cycle < Math.max(agents, hosts); cycle++) {
        // In turns: an agent of the left service and a host of the right one, then the other way round.
        const agentIndex = cycle % 2 === 0 ? 3 : 5;
        const hostIndex = cycle % 2 === 0 ? 5 : 3;
        await bench.confirmed(1, 'left', 2);
        await bench.confirmed(2, 'right', 2);
        const streams = start();
        const watch = (index: number): Choices =>
          index <= 4
            ? new Choices(bench, 1, `${serviceId('left')}/${index - 2} roundrobin`)
            : new Choices(bench, 2, `${serviceId('right')}/${index - 4} roundrobin`);
        const choices = [watch(agentIndex), watch(hostIndex)];
        await wait(2_000 + ((cycle * 137) % 1_000)); // not always in the same phase of the probes
        if (etcdAway) await bench.cutEtcd();
        const at = Date.now();
        await Promise.all([killAgent(agentIndex), bench.lab.killHost(hostIndex)]);
        await wait(etcdAway ? 16_000 : 6_000);
        if (!etcdAway)
          await until('their presence has ended', 30_000, async () => {
            const { items } = await bench.must(1, 'GET', '/api/v1/nodes');
            return items.some(
              (n: { node: string }) => n.node === `n${agentIndex}` || n.node === `n${hostIndex}`,
            )
              ? undefined
              : true;
          });
        await wait(500);
        const [left, right] = await Promise.all(
          streams.map(async (stream) => {
            await stream.stop();
            return stream.read();
          }),
        );
        for (const each of choices) await each.stop();
        const tollOf = (k: number, index: number): ReturnType<typeof toll> =>
          toll(index <= 4 ? left! : right!, choices[k]!.grown, at, at + 6_000, at + 26_000, `n${index}`);
        tolls.agent.push(tollOf(0, agentIndex));
        tolls.host.push(tollOf(1, hostIndex));
        progress(
          `cycle ${cycle + 1}: agent ${JSON.stringify(tolls.agent.at(-1))} host ${JSON.stringify(tolls.host.at(-1))}`,
        );
        if (etcdAway) return tolls;
        await Promise.all([back(agentIndex), back(hostIndex)]);
      }
      return tolls;
    };
    const tolls = await round(cycles, cycles, false);
    const agent = tolls.agent.map((t) => t.lastMs);
    const host = tolls.host.map((t) => t.lastMs);
    const resets = [...tolls.agent, ...tolls.host].flatMap((t) => t.resetMs ?? []);
    results['agent_last_flow_p99_s'] = seconds(percentile(agent, 0.99));
    results['host_last_flow_p99_s'] = seconds(percentile([...agent, ...host], 0.99));
    results['host_reset_p99_s'] = seconds(percentile(resets, 0.99));
    const hung = (list: readonly { hung: number }[]): number => list.reduce((sum, t) => sum + t.hung, 0);
    results['host_connections_hung'] = hung([...tolls.agent, ...tolls.host]);
    const away = await round(1, 1, true);
    results['etcd_away_last_flow_s'] = seconds(Math.max(away.agent[0]!.lastMs, away.host[0]!.lastMs));
    results['etcd_away_connections_hung'] = hung([...away.agent, ...away.host]);
    results['etcd_away_reset_s'] = seconds(
      Math.max(away.agent[0]!.resetMs ?? -1, away.host[0]!.resetMs ?? -1),
    );
    detail['host'] = { agentMs: agent, hostMs: host, resetMs: resets, etcdAway: away };
  } finally {
    await bench.lab.down();
  }
}

const report = { ...results, runtime, cycles, detail };
if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(report, undefined, 2)}\n`);
console.log(JSON.stringify(results, undefined, 2));
process.exit(0);
