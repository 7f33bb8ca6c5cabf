// What whole agents cost while their platform is never at rest: three hosts, and at the same time instances that come
// and go, a service that is made and deleted, questions (known names, unknown ones, reverse), new connections, and an
// etcd that is killed and comes back. Reads resident sets and processor time of the agents; fails when in the end an
// agent does not know exactly what there is, or has logged an error.
//   npm run bench -- agents [--seconds N] [--runtime node|deno] [--json FILE]
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { parseArgs } from 'node:util';
import { endOnSignals, Lab, must, type Runtime, until } from './lab.ts';
import { round } from './scale/stats.ts';
import { cpuMs, growth, residentMb } from './usage.ts';

const { values } = parseArgs({
  allowPositionals: true,
  options: {
    seconds: { type: 'string', default: '600' },
    runtime: { type: 'string', default: 'node' },
    json: { type: 'string' },
  },
});
if (values.runtime !== 'node' && values.runtime !== 'deno') throw new Error('--runtime: node or deno');
const runtime: Runtime = values.runtime;
const seconds = Number(values.seconds);

const HOSTS = 3;
/** Of each INSTANCES, and as many namespaces in all. They are gone through in turn: all instances leave, then all come. */
const SERVICES = 20;
const INSTANCES = 3;
const CHANGE_MS = 150;
const QUESTIONS_PER_SECOND = 400;
const FLOWS_PER_SECOND = 60;
const SAMPLE_MS = 5_000;
/** Between two deaths of etcd, and how long each lasts. */
const ETCD_MS = 90_000;
const ETCD_AWAY_MS = 4_000;
const PORT = 7000;
const CLIENT = 'soak.lab.client.v1';
const GUEST = 'soak.lab.guest.v1';

const wait = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
const nameOf = (n: number): string => `soak.lab.s${n}.v1`;
const node = [process.env['NODE'] ?? process.execPath, '--disable-warning=ExperimentalWarning'];

interface Slot {
  readonly host: number;
  readonly netns: string;
  holds: { service: string; instance: number } | undefined;
}

const lab = await Lab.create({
  lab: `ews${process.pid}`,
  nodes: HOSTS,
  runtime,
  progress: (line) => console.error(`  ${line}`),
});
const signals = endOnSignals(() => lab.down());
const slots: Slot[] = [];
const free = Array.from({ length: SERVICES * INSTANCES }, (_, i) => ({
  service: nameOf(i % SERVICES),
  instance: 1 + Math.floor(i / SERVICES),
}));
/** Of the calls, by their code: with etcd away some may fail. */
const answers: Record<string, number> = {};

async function call(index: number, method: string, path: string, body?: unknown): Promise<boolean> {
  const answer = await lab.api(index, method, path, body);
  const what = answer.status === 200 ? 'ok' : String(answer.body?.code ?? answer.status);
  answers[what] = (answers[what] ?? 0) + 1;
  return answer.status === 200;
}

async function apply(service: string): Promise<boolean> {
  const [appname, appnamespace, servicename, servicenamespace] = service.split('.');
  return call(1, 'POST', '/api/v1/services', { appname, appnamespace, servicename, servicenamespace });
}

/** An instance goes from that namespace, or one that is nowhere comes to it. */
async function change(slot: Slot): Promise<void> {
  const { host, netns, holds } = slot;
  if (holds !== undefined) {
    if (!(await call(host, 'DELETE', `/api/v1/instances/${holds.service}/${holds.instance}`))) return;
    slot.holds = undefined;
    free.push(holds);
    return;
  }
  const next = free.shift();
  if (next === undefined) return;
  if (await call(host, 'POST', '/api/v1/instances', { ...next, netns })) slot.holds = next;
  else free.push(next);
}

const ofAll = (use: (pid: number) => number): number[] => lab.nodes.map(({ agent }) => use(agent!.pid!));

function questions(): string {
  const file = join(lab.dir, 'questions');
  const lines = Array.from({ length: 4_000 }, (_, n) => {
    const service = nameOf(n % (SERVICES + 5)); // five that nobody made
    const policy = ['roundrobin', 'closest', 'fastest'][n % 3];
    return [
      `${service}.any.${policy}.local A`,
      `${service}.${1 + (n % 4)}.fixed.local A`,
      `x${n}.${service}.any.closest.local A`,
      `${n % 256}.${n % 16}.30.172.in-addr.arpa PTR`,
      `${service}.any.closest.local AAAA`,
      `_${n % 9}._tcp.${service}.local SRV`,
    ].join('\n');
  });
  writeFileSync(file, `${lines.join('\n')}\n`);
  return file;
}

async function clients(): Promise<void> {
  const netns = await lab.addInstance('client');
  await call(1, 'POST', '/api/v1/instances', { service: CLIENT, instance: 1, netns });
  for (let n = 0; n < 3; n++)
    lab.spawn(
      netns,
      [
        ...[...node, 'scripts/bench_flows.ts', `${nameOf(n)}.any.closest.local`],
        ...[String(PORT), String(FLOWS_PER_SECOND / 3), '0', 'keep'],
      ],
      join(lab.dir, 'flows.log'),
    );
  const resolver = /nameserver (\S+)/.exec((await lab.exec(netns, ['cat', '/etc/resolv.conf'])).stdout)![1]!;
  const load = ['-d', questions(), '-Q', String(QUESTIONS_PER_SECOND), '-l', String(seconds)];
  lab.spawn(netns, ['dnsperf', '-s', resolver, ...load], join(lab.dir, 'dnsperf.log'));
}

async function etcdDies(): Promise<void> {
  const [pid] = (await must(['pgrep', '-f', `^etcd .*${lab.dir}/`])).trim().split('\n');
  process.kill(Number(pid), 'SIGKILL');
  await wait(ETCD_AWAY_MS);
  await lab.startEtcd();
}

async function knowsAll(index: number): Promise<void> {
  const held = slots.flatMap(({ holds }) =>
    holds === undefined ? [] : [`${holds.service}/${holds.instance}`],
  );
  const wanted = [...held, `${CLIENT}/1`].sort().join();
  await until(`n${index} knows what there is`, 15_000, async () => {
    const { items } = (await lab.api(index, 'GET', '/api/v1/instances')).body;
    const seen = items.map((i: { service: string; instance: number }) => `${i.service}/${i.instance}`);
    if (seen.sort().join() !== wanted)
      throw new Error(`it knows ${seen.length}, there are ${held.length + 1}`);
    return true;
  });
}

const samples: number[][] = [];
let busy: number[] = [];
let outages = 0;
let changes = 0;
try {
  await lab.build();
  await lab.startAll();
  for (let n = 0; n < SERVICES; n++) await apply(nameOf(n));
  await apply(CLIENT);
  for (let host = 1; host <= HOSTS; host++)
    for (let n = 0; n < SERVICES; n++) {
      const netns = await lab.addInstance(`h${host}n${n}`);
      lab.spawn(netns, [...node, 'test/lab/echo.ts', String(PORT), `n${host}`], join(lab.dir, 'echo.log'));
      slots.push({ host, netns, holds: undefined });
    }
  for (const slot of slots) await change(slot);
  await clients();

  const before = ofAll(cpuMs);
  const begin = performance.now();
  const elapsedMs = (): number => performance.now() - begin;
  let sampledMs = Number.NEGATIVE_INFINITY;
  while (elapsedMs() < seconds * 1000 && !signals.interrupted) {
    const begun = performance.now();
    await change(slots[(changes * 7) % slots.length]!);
    if (changes % 20 === 0) await apply(GUEST);
    if (changes % 20 === 10) await call(2, 'DELETE', `/api/v1/services/${GUEST}`);
    changes++;
    if (elapsedMs() > (outages + 0.5) * ETCD_MS) {
      outages++;
      await etcdDies();
    }
    if (elapsedMs() - sampledMs >= SAMPLE_MS) {
      sampledMs = elapsedMs();
      samples.push(ofAll(residentMb).map((mb) => round(mb)));
      if (samples.length % 6 === 1)
        console.error(
          `  ${Math.round(sampledMs / 1000)} s: ${samples.at(-1)!.join(', ')} MB, ${changes} changes`,
        );
    }
    await wait(Math.max(0, begun + CHANGE_MS - performance.now()));
  }
  const spentMs = elapsedMs();
  busy = ofAll(cpuMs).map((ms, host) => round(((ms - before[host]!) / spentMs) * 100));

  for (const { index, name, log } of lab.nodes) {
    await knowsAll(index);
    const [error] = readFileSync(log, 'utf8').match(/^.*"level":"(error|fatal)".*$/m) ?? [];
    if (error !== undefined) throw new Error(`${name} has logged: ${error}`);
  }
} finally {
  await lab.down();
}

const grown = lab.nodes.map((_, host) => round(growth(samples.map((sample) => sample[host]!))));
for (const [host, { name }] of lab.nodes.entries())
  console.log(
    `${runtime} ${name}: resident set ${samples[0]![host]} → ${samples.at(-1)![host]} MB, grew by ${grown[host]} MB after the first fifth; ${busy[host]} % of a core`,
  );
console.log(`${changes} changes, ${outages} deaths of etcd; answers to calls: ${JSON.stringify(answers)}`);
if (values.json !== undefined)
  writeFileSync(
    values.json,
    `${JSON.stringify({ runtime, seconds, samples, growth_mb: grown, busy, changes, outages, answers }, null, 2)}\n`,
  );
process.exit(0);
