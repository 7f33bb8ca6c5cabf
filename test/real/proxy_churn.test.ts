// 100 clients, 10 services of 3 instances on 3 nodes, instances coming and going all the time: no packet at a wrong
// instance, no answer from a wrong source, no altered payload, and every reset explained by an instance that went.
// EDGEWAY_CHURN_S sets how long (default 20 s); for minutes it runs without the suite's limit:
//   EDGEWAY_CHURN_S=300 scripts/run test/real/proxy_churn.test.ts
import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { InstanceRoute } from '../../edge/proxy/command.ts';
import {
  inside,
  type LabHost,
  ProxyLab,
  type Runtime,
  runtimeArgv,
  SERVICES,
  shell,
} from '../../scripts/proxy_lab.ts';
import { formatIpv4, ipv4 } from '../../src/addr.ts';
import type { ServiceId } from '../../src/name.ts';
import { Rng } from '../../src/rng.ts';
import { eventually } from '../support/eventually.ts';

const runtime: Runtime = 'deno' in process.versions ? 'deno' : 'node';
const SECONDS = Number(process.env['EDGEWAY_CHURN_S'] ?? 20);
const CLIENTS_PER_HOST = [34, 33, 33];
const PORT = 7100;
/** From telling three hosts that an instance went until all have done it, generously. */
const GRACE_MS = 3_000;
/** A reset comes after its cause, and the client writes its time down within one pause between exchanges. */
const RESET_EARLY_MS = 500;
const PEER = join(import.meta.dirname, 'proxy_churn_peer.ts');
const lab = new ProxyLab(`ewAc${process.pid}`);
const children: ChildProcess[] = [];

interface Series {
  readonly kind: string;
  readonly service: string;
  readonly began: number;
  readonly by: readonly string[];
  readonly ended: number;
  readonly exchanges: number;
  readonly lost: number;
  readonly error: string;
}

/** Instance n of service s lives on host n, at address 10 + s of its subnet. */
const serviceId = (s: number): ServiceId => `churn.t.s${s}.v1` as ServiceId;
const serviceIp = (s: number): number => SERVICES + 256 + s;
const route = (s: number, n: number, here: LabHost): InstanceRoute => {
  const host = lab.hosts[n - 1]!;
  return {
    instance: n,
    instanceIp: ipv4(SERVICES + 512 + s * 8 + n),
    namespaceIp: ipv4(host.subnet + 10 + s),
    nodeIp: host.nodeIp,
    ewp: 4790,
    local: host === here,
  };
};

const live = Array.from({ length: 10 }, () => new Set([1, 2, 3]));
/** When each instance went and came, by "service instance". */
const history = new Map<string, { readonly at: number; readonly live: boolean }[]>();

function tell(s: number): void {
  for (const host of lab.hosts)
    host.send({
      kind: 'service',
      service: serviceId(s),
      addresses: { roundrobin: ipv4(serviceIp(s)) },
      instances: [...live[s]!].map((n) => route(s, n, host)),
    });
}

function change(s: number, n: number, comes: boolean): void {
  const name = `${serviceId(s)} ${n}`;
  const host = lab.hosts[n - 1]!;
  const { namespaceIp, instanceIp } = route(s, n, host);
  if (comes) {
    live[s]!.add(n);
    host.send({ kind: 'local', namespaceIp, instanceIp, service: serviceId(s) });
  } else live[s]!.delete(n);
  tell(s);
  if (!comes) host.send({ kind: 'localGone', namespaceIp });
  history.set(name, [...(history.get(name) ?? []), { at: Date.now(), live: comes }]);
}

/** True when the instance was away at some moment of that stretch, give or take the time to tell. */
function wentBetween(name: string, from: number, to: number): boolean {
  return (history.get(name) ?? []).some(
    ({ at, live }) => !live && at >= from - GRACE_MS && at <= to + GRACE_MS,
  );
}
/** True when a reset at that time has its cause: that instance went a moment ago, or any of the service's if unknown. */
function explained(service: string, name: string | undefined, at: number): boolean {
  const names = name === undefined ? [1, 2, 3].map((n) => `${service} ${n}`) : [name];
  return names.some((one) =>
    (history.get(one) ?? []).some(
      (change) => !change.live && change.at >= at - GRACE_MS && change.at <= at + RESET_EARLY_MS,
    ),
  );
}
function wasLive(name: string, from: number, to: number): boolean {
  const before = (history.get(name) ?? []).filter(({ at }) => at <= to + GRACE_MS);
  const last = before.at(-1);
  return last === undefined || last.live || last.at >= from - GRACE_MS;
}

function run(netns: string, ...args: readonly string[]): { child: ChildProcess; lines: Series[] } {
  const argv = inside(netns, ...runtimeArgv('node'), PEER, ...args);
  const child = spawn(argv[0]!, argv.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] });
  children.push(child);
  const lines: Series[] = [];
  createInterface({ input: child.stdout }).on('line', (line) => lines.push(JSON.parse(line) as Series));
  return { child, lines };
}

const churn = suite('ProxyTUN under churn');

churn.before(async () => {
  lab.up(3);
  await Promise.all(lab.hosts.map((host) => host.start(runtime)));
  for (const host of lab.hosts) {
    lab.instance(host, 'churn.t.client.v1', host.index);
    const servers = lab.instance(host, 'churn.t.servers.v1', host.index);
    for (let s = 0; s < 10; s++)
      shell(
        inside(
          servers.netns,
          'ip',
          'addr',
          'add',
          `${formatIpv4(ipv4(host.subnet + 10 + s))}/26`,
          'dev',
          'eth0',
        ),
      );
  }
  lab.tellAll();
  for (let s = 0; s < 10; s++) for (const n of [1, 2, 3]) change(s, n, true);
  history.clear();
  for (const [i, host] of lab.hosts.entries()) {
    const names = Object.fromEntries(
      Array.from({ length: 10 }, (_, s) => [
        formatIpv4(ipv4(host.subnet + 10 + s)),
        `${serviceId(s)} ${i + 1}`,
      ]),
    );
    const { lines } = run(host.instances[1]!.netns, 'serve', String(PORT), JSON.stringify(names));
    await eventually(() => lines.length > 0, `the servers of host ${host.index}`, 30_000);
  }
});

churn.after(async () => {
  for (const child of children) child.kill('SIGKILL');
  await lab.down();
});

churn(`${SECONDS} s of it`, async () => {
  const addresses = JSON.stringify(
    Object.fromEntries(Array.from({ length: 10 }, (_, s) => [serviceId(s), formatIpv4(ipv4(serviceIp(s)))])),
  );
  const clients = lab.hosts.map((host, i) =>
    run(
      host.instances[0]!.netns,
      ...['dial', String(PORT), String(CLIENTS_PER_HOST[i]), String(SECONDS), String(i + 1), addresses],
    ),
  );
  const done = Promise.all(
    clients.map(({ child }) => new Promise((resolve) => child.once('close', resolve))),
  );
  let running = true;
  void done.then(() => {
    running = false;
  });
  const rng = new Rng(99);
  // One comes or goes every 300 ms; each service keeps at least one.
  while (running) {
    await new Promise((resolve) => setTimeout(resolve, 300));
    const s = rng.below(10);
    const n = 1 + rng.below(3);
    if (live[s]!.has(n)) {
      if (live[s]!.size > 1) change(s, n, false);
    } else change(s, n, true);
  }
  await done;

  const all = clients.flatMap(({ lines }) => lines);
  const problems: string[] = [];
  const notes: Record<string, number> = {};
  const note = (what: string): void => {
    notes[what] = (notes[what] ?? 0) + 1;
  };
  for (const series of all) {
    const text = JSON.stringify(series);
    for (const name of series.by) {
      if (!name.startsWith(`${series.service} `)) problems.push(`wrong service: ${text}`);
      if (!wasLive(name, series.began, series.ended)) problems.push(`an instance that had gone: ${text}`);
    }
    // Within one flow the instance changes only because the one before went.
    for (let i = 0; i + 1 < series.by.length; i++)
      if (series.kind === 'tcp' || !wentBetween(series.by[i]!, series.began, series.ended))
        problems.push(`the choice changed: ${text}`);
    if (series.error === '') continue;
    note(series.error);
    const by = series.by.at(-1);
    if (/^(ECONNRESET|EPIPE|closed)$/.test(series.error)) {
      if (!explained(series.service, by, series.ended)) problems.push(`unexplained reset: ${text}`);
    } else if (series.error === 'silent' && by === undefined) {
      // A SYN that waits for an instance which has gone is repeated for seconds.
      const instances = [1, 2, 3].map((n) => `${series.service} ${n}`);
      if (!instances.some((name) => wentBetween(name, series.began, series.ended)))
        problems.push(`unexplained silence: ${text}`);
    } else problems.push(text);
  }
  const exchanges = all.reduce((sum, series) => sum + series.exchanges, 0);
  const lost = all.reduce((sum, series) => sum + series.lost, 0);
  console.log(
    JSON.stringify({
      series: all.length,
      exchanges,
      lost,
      errors: notes,
      changes: [...history.values()].flat().length,
    }),
  );
  assert.equal(problems.slice(0, 10), []);
  assert.ok(exchanges > SECONDS * 100, `${exchanges} exchanges`);
  for (const host of lab.hosts) {
    const counters = await host.counters();
    // IPv6 router solicitations of the TUN device's own are the only packets that are not IPv4.
    for (const name of ['drop_malformed_ipv4', 'drop_spoofed_sender', 'drop_bad_quote'])
      assert.ok(counters[name]! < 20, `${name} ${counters[name]}`);
  }
});

churn.run();
