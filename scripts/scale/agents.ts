// A thousand agents' control planes in a few processes against one etcd: they join from cold, deploy, churn, leave.
// Each has connections, leases, a routing table and interests of its own; hosts and packets are not there.
//
// parent ── JSON lines on stdin/stdout ── workers; times are CLOCK_MONOTONIC, which all processes share
import { type ChildProcess, spawn } from 'node:child_process';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import {
  applyService,
  claimInstance,
  claimSubnet,
  ensureConfig,
  ownerOf,
  publishInstance,
  publishNode,
  releaseInstance,
  releaseSubnet,
  type SubnetClaim,
} from '../../coordinator/claims.ts';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import { systemTime } from '../../coordinator/etcd/time.ts';
import { Keyspace } from '../../coordinator/keyspace.ts';
import type { Kv } from '../../coordinator/kv.ts';
import { keepLease, type LeaseKeeper } from '../../coordinator/lease.ts';
import { RouteFollower } from '../../edge/routes/follow.ts';
import { ipv4 } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { SILENT } from '../../src/log.ts';
import type { Instance, NetworkConfig, Node } from '../../src/model.ts';
import { parseServiceId, type ServiceId } from '../../src/name.ts';
import { layoutOf } from '../../src/plan.ts';
import { DEFAULT_NETWORK_CONFIG } from '../../src/records.ts';
import type { Bench } from '../scale.ts';
import { residentMb } from '../usage.ts';
import { inParallel, percentile, round, sharedNowMs } from './stats.ts';

const keys = new Keys();
const WORKERS = 4;
const JOINING = 16;
const AGENTS_PER_SERVICE = 10;
const STEADY_MS = 30_000;
/** Changes a second that go on during the deploys; an instance that goes and comes back makes three. */
const CHANGES_PER_S = 20;
const CHANGES_PER_CHURN = 3;
const DEPLOYS = 200;
/** Promise of the design: after any heal every agent equals etcd within this time. */
const HEAL_MS = 10_000;

type Request =
  | { readonly kind: 'join' }
  | { readonly kind: 'renewals' }
  /** One agent publishes its instance anew with this mark (carried in `nsp`); everybody reports when it arrives. */
  | { readonly kind: 'deploy'; readonly agent: number; readonly mark: number }
  /** This agent's instance goes and comes back. */
  | { readonly kind: 'churn'; readonly agent: number }
  /** etcd stands still: every agent reports when it notices, and when its table is whole again. */
  | { readonly kind: 'heal' }
  | { readonly kind: 'leave' };
type Answer =
  | { readonly kind: 'joined'; readonly atMs: number; readonly claims: number }
  | { readonly kind: 'renewals'; readonly count: number }
  | { readonly kind: 'deployed'; readonly mark: number; readonly startMs: number; readonly commitMs: number }
  /** The mark is in one table. */
  | { readonly kind: 'arrived'; readonly mark: number; readonly atMs: number }
  | { readonly kind: 'cut' }
  | { readonly kind: 'healed'; readonly atMs: number }
  | { readonly kind: 'left' }
  | { readonly kind: 'failed'; readonly what: string };

const serviceOf = (agent: number): ServiceId =>
  unwrap(parseServiceId(`app.prod.s${Math.floor(agent / AGENTS_PER_SERVICE)}.v1`));

export async function measureAgents({ etcd, say, rssMb }: Bench, count: number) {
  const answers: Answer[] = [];
  let wake = (): void => {};
  const workers: ChildProcess[] = [];
  const coldMs = sharedNowMs();
  for (let w = 0; w < WORKERS; w++) {
    const worker = spawn(
      process.execPath,
      [
        '--disable-warning=ExperimentalWarning',
        ...[fileURLToPath(import.meta.url), etcd.endpoint, String(w), String(count)],
      ],
      { stdio: ['pipe', 'pipe', 'inherit'] },
    );
    createInterface({ input: worker.stdout }).on('line', (line) => {
      const answer = JSON.parse(line) as Answer;
      if (answer.kind === 'failed') say(answer.what);
      answers.push(answer);
      wake();
    });
    workers.push(worker);
  }
  const send = (to: ChildProcess, request: Request): void => {
    to.stdin?.write(`${JSON.stringify(request)}\n`);
  };
  const workerOf = (agent: number): ChildProcess => workers[agent % WORKERS]!;
  const until = async (condition: () => boolean, limitMs: number): Promise<void> => {
    const deadline = performance.now() + limitMs;
    while (!condition()) {
      if (performance.now() > deadline) throw new Error(`waited ${limitMs / 1000} s in vain`);
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, 50);
        wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
  };
  const of = <Kind extends Answer['kind']>(kind: Kind) =>
    answers.filter((answer): answer is Extract<Answer, { kind: Kind }> => answer.kind === kind);
  const all = (request: Request): void => {
    for (const worker of workers) send(worker, request);
  };

  try {
    all({ kind: 'join' });
    await until(() => of('joined').length === WORKERS, 300_000);
    const joinS = (Math.max(...of('joined').map(({ atMs }) => atMs)) - coldMs) / 1_000;
    say(`${count} agents joined in ${round(joinS)} s`);

    const renewals = async (): Promise<number> => {
      const seen = of('renewals').length;
      all({ kind: 'renewals' });
      await until(() => of('renewals').length === seen + WORKERS, 30_000);
      return of('renewals')
        .slice(seen)
        .reduce((sum, { count: n }) => sum + n, 0);
    };
    const before = await renewals();
    const steadyFrom = sharedNowMs();
    await new Promise((resolve) => setTimeout(resolve, STEADY_MS));
    const perAgent = ((await renewals()) - before) / count / ((sharedNowMs() - steadyFrom) / 1_000);
    say(`${round(perAgent, 3)} renewals per agent and second`);
    const steadyRss = await rssMb();

    let next = 0;
    let churned = 0;
    const churn = setInterval(
      () => {
        next = (next + 37) % count;
        const agent = next;
        // The first agent of each service is the one that deploys; its neighbour churns in its stead.
        const churning = agent % AGENTS_PER_SERVICE === 0 ? agent + 1 : agent;
        send(workerOf(churning), { kind: 'churn', agent: churning });
        churned++;
      },
      (1_000 * CHANGES_PER_CHURN) / CHANGES_PER_S,
    );
    const services = Math.floor(count / AGENTS_PER_SERVICE);
    for (let i = 0; i < DEPLOYS; i++) {
      const agent = (i % services) * AGENTS_PER_SERVICE;
      send(workerOf(agent), { kind: 'deploy', agent, mark: i + 1 });
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    const tables = AGENTS_PER_SERVICE;
    const missed = await until(() => of('arrived').length >= DEPLOYS * tables, 60_000).then(
      () => '',
      () => 'not every deploy reached every table',
    );
    clearInterval(churn);
    const arrivals = new Map<number, number[]>();
    for (const { mark, atMs } of of('arrived')) {
      const list = arrivals.get(mark) ?? [];
      list.push(atMs);
      arrivals.set(mark, list);
    }
    const whole: number[] = [];
    const lags: number[] = [];
    let unreached = 0;
    const deployed = new Map(of('deployed').map((answer) => [answer.mark, answer]));
    // A deploy that was refused, or missed a table, took for ever; it is not left out of the sum.
    for (let mark = 1; mark <= DEPLOYS; mark++) {
      const at = arrivals.get(mark) ?? [];
      const done = deployed.get(mark);
      unreached += Math.max(0, tables - at.length);
      whole.push(done !== undefined && at.length >= tables ? Math.max(...at) - done.startMs : Infinity);
      if (done !== undefined) for (const atMs of at) lags.push(Math.max(0, atMs - done.commitMs));
    }
    const memory = workers.map(({ pid }) => residentMb(pid!));
    const rss = await rssMb();
    process.kill(etcd.pid, 'SIGSTOP');
    all({ kind: 'heal' });
    await until(() => of('cut').length === count, 60_000).finally(() => process.kill(etcd.pid, 'SIGCONT'));
    const mendedMs = sharedNowMs();
    await until(() => of('healed').length === count, 120_000).catch(() => {});
    const heals = of('healed').map(({ atMs }) => atMs - mendedMs);
    while (heals.length < count) heals.push(Infinity);
    const healMs = percentile(heals, 0.99);
    say(`99 of 100 tables were whole ${round(healMs, 0)} ms after etcd came back`);
    const leavingFrom = sharedNowMs();
    all({ kind: 'leave' });
    await until(() => of('left').length === WORKERS, 120_000);
    return {
      missed: [
        missed,
        healMs > HEAL_MS ? `tables whole within ${HEAL_MS} ms` : '',
        of('failed').length > 0 ? `${of('failed').length} failures` : '',
      ]
        .filter((text) => text !== '')
        .join('; '),
      count,
      join_s: round(joinS),
      renewals_per_agent_s: round(perAgent, 3),
      deploy_p50_ms: round(percentile(whole, 0.5)),
      deploy_p99_ms: round(percentile(whole, 0.99)),
      etcd_rss_mb: rss,
      etcd_rss_idle_mb: steadyRss,
      deploys: whole.filter(Number.isFinite).length,
      tables_unreached: unreached,
      changes_per_s: CHANGES_PER_S,
      deploys_per_s: 10,
      churned,
      heal_p50_ms: round(percentile(heals, 0.5), 0),
      heal_p99_ms: round(healMs, 0),
      watch_lag_p50_ms: round(percentile(lags, 0.5)),
      watch_lag_p99_ms: round(percentile(lags, 0.99)),
      claims_per_s: round(of('joined').reduce((sum, { claims }) => sum + claims, 0) / joinS),
      agent_mb: round(memory.reduce((sum, mb) => sum + mb, 0) / count, 2),
      leave_s: round((sharedNowMs() - leavingFrom) / 1_000),
      failures: of('failed').length,
    };
  } finally {
    for (const worker of workers) worker.kill('SIGKILL');
  }
}

// ---- worker ----

class SimulatedAgent {
  readonly #index: number;
  readonly #kv: Kv;
  readonly #report: (answer: Answer) => void;
  readonly #service: ServiceId;
  #config: NetworkConfig = DEFAULT_NETWORK_CONFIG;
  #claim: SubnetClaim | undefined;
  #tenure: LeaseKeeper | undefined;
  #presence: LeaseKeeper | undefined;
  #routes: RouteFollower | undefined;
  #instance: Instance | undefined;
  #work: Promise<void> = Promise.resolve();
  #marked = 0;

  constructor(index: number, endpoint: string, report: (answer: Answer) => void) {
    this.#index = index;
    this.#report = report;
    this.#service = serviceOf(index);
    this.#kv = connectEtcd({ endpoints: [endpoint], log: SILENT, requestTimeoutMs: 20_000 });
  }

  get renewals(): number {
    return (this.#tenure?.renewals ?? 0) + (this.#presence?.renewals ?? 0);
  }
  get #number(): number {
    return (this.#index % AGENTS_PER_SERVICE) + 1;
  }
  get #owner() {
    return { node: `n${this.#index}`, cluster: 'default' };
  }

  async join(): Promise<void> {
    const kv = this.#kv;
    this.#config = await ensureConfig(kv, keys, DEFAULT_NETWORK_CONFIG);
    const claim = await claimSubnet(kv, keys, this.#config, this.#owner);
    this.#claim = claim;
    const lease = { kv, time: systemTime, random: Math.random, log: SILENT };
    this.#tenure = keepLease({
      ...lease,
      ttlS: this.#config.tenureTtlS,
      resume: claim.lease,
      onHeld: () => {},
    });
    const node = this.#node(claim);
    this.#presence = keepLease({
      ...lease,
      ttlS: this.#config.presenceTtlS,
      onHeld: async (held) => {
        await publishNode(kv, keys, node, held);
        if (this.#instance !== undefined) await publishInstance(kv, keys, claim.subnet, this.#instance, held);
      },
    });
    const routes = new RouteFollower({
      keys,
      open: (listener) => new Keyspace(kv, keys, SILENT, listener),
      after: systemTime.after,
      interest: {
        idleMs: 600_000,
        negativeMs: 10_000,
        max: 4_096,
        now: () => performance.now(),
        ownerOf: async (address) => (await ownerOf(kv, keys, address))?.service,
        subnetTaken: async () => false,
      },
    });
    this.#routes = routes;
    routes.onDelta(() => this.#look());
    const held = await this.#presence.held(60_000);
    const [appname, appnamespace, servicename, servicenamespace] = this.#service.split('.') as [
      string,
      string,
      string,
      string,
    ];
    await applyService(kv, keys, this.#config, {
      appname,
      appnamespace,
      servicename,
      servicenamespace,
      exposed: false,
      ports: [80],
      statefull: false,
    });
    routes.pin(new Set([this.#service]));
    const { instanceIp } = await claimInstance(kv, keys, this.#config, {
      service: this.#service,
      instance: this.#number,
      node: node.node,
      lease: claim.lease,
    });
    this.#instance = {
      service: this.#service,
      instance: this.#number,
      node: node.node,
      cluster: node.cluster,
      nodeIp: node.nodeIp,
      ewp: node.ewp,
      nsp: 0,
      namespaceIp: layoutOf(claim.subnet).firstInstance,
      instanceIp,
      ports: [80],
      epoch: claim.epoch,
    };
    const revision = await publishInstance(kv, keys, claim.subnet, this.#instance, held);
    await routes.waitFor(revision, 60_000);
  }

  deploy(mark: number): void {
    this.#alone(async () => {
      const { claim, instance, presence } = this.#parts();
      const startMs = sharedNowMs();
      await publishInstance(
        this.#kv,
        keys,
        claim.subnet,
        { ...instance, nsp: mark },
        await presence.held(5_000),
      );
      this.#report({ kind: 'deployed', mark, startMs, commitMs: sharedNowMs() });
    });
  }

  churn(): void {
    this.#alone(async () => {
      const { claim, instance, presence } = this.#parts();
      const { service, node } = instance;
      await releaseInstance(
        this.#kv,
        keys,
        { ...this.#config, quarantineS: 2 },
        { service, instance: this.#number, node },
      );
      await claimInstance(this.#kv, keys, this.#config, {
        service,
        instance: this.#number,
        node,
        lease: claim.lease,
        preferred: instance.instanceIp,
      });
      await publishInstance(this.#kv, keys, claim.subnet, instance, await presence.held(5_000));
    });
  }

  /** Waits until this agent is cut off, and then until its table holds every instance of its service, with its node. */
  async heal(): Promise<void> {
    const until = async (condition: () => boolean): Promise<void> => {
      while (!condition()) await new Promise((resolve) => setTimeout(resolve, 50));
    };
    const routes = this.#routes;
    if (routes === undefined) throw new Error('not joined');
    await until(() => !routes.live);
    this.#report({ kind: 'cut' });
    await until(() => {
      const instances = routes.table.instancesOf(this.#service);
      const there = instances.filter(({ node }) => routes.table.node(node) !== undefined);
      return routes.live && there.length === AGENTS_PER_SERVICE;
    });
    this.#report({ kind: 'healed', atMs: sharedNowMs() });
  }

  async leave(): Promise<void> {
    await this.#work;
    await this.#presence?.stop(true);
    await this.#tenure?.stop(false);
    if (this.#claim !== undefined)
      await releaseSubnet(
        this.#kv,
        keys,
        { ...this.#config, quarantineS: 0 },
        this.#owner,
        this.#claim.subnet,
      );
    await this.#routes?.close();
    await this.#kv.close();
  }

  #parts() {
    if (this.#claim === undefined || this.#instance === undefined || this.#presence === undefined)
      throw new Error('not joined');
    return { claim: this.#claim, instance: this.#instance, presence: this.#presence };
  }

  /** The mark that the service's first instance carries, once. */
  #look(): void {
    const mark = this.#routes?.table.instance(this.#service, 1)?.nsp ?? 0;
    if (mark === 0 || mark === this.#marked) return;
    this.#marked = mark;
    this.#report({ kind: 'arrived', mark, atMs: sharedNowMs() });
  }

  #alone(work: () => Promise<void>): void {
    this.#work = this.#work.then(work).catch((error: unknown) => {
      this.#report({ kind: 'failed', what: `agent ${this.#index}: ${(error as Error).message}` });
    });
  }

  #node(claim: SubnetClaim): Node {
    return {
      ...this.#owner,
      nodeIp: ipv4(0x0a000000 + this.#index),
      ewp: 4790,
      nsp: 0,
      subnet: claim.subnet,
      epoch: claim.epoch,
    };
  }
}

async function workerSide(endpoint: string, worker: number, count: number): Promise<void> {
  const answer = (given: Answer): void => {
    process.stdout.write(`${JSON.stringify(given)}\n`);
  };
  const agents = new Map<number, SimulatedAgent>();
  for (let i = worker; i < count; i += WORKERS) agents.set(i, new SimulatedAgent(i, endpoint, answer));
  const take = async (request: Request): Promise<void> => {
    switch (request.kind) {
      case 'join': {
        await inParallel(JOINING, [...agents.values()], (agent) => agent.join());
        // Subnet, InstanceIP and a tenth of three ServiceIPs each.
        answer({ kind: 'joined', atMs: sharedNowMs(), claims: Math.round(agents.size * 2.3) });
        break;
      }
      case 'renewals':
        answer({
          kind: 'renewals',
          count: [...agents.values()].reduce((sum, agent) => sum + agent.renewals, 0),
        });
        break;
      case 'deploy':
        agents.get(request.agent)?.deploy(request.mark);
        break;
      case 'churn':
        agents.get(request.agent)?.churn();
        break;
      case 'heal':
        await Promise.all([...agents.values()].map((agent) => agent.heal()));
        break;
      case 'leave':
        await inParallel(JOINING, [...agents.values()], (agent) => agent.leave());
        answer({ kind: 'left' });
        break;
    }
  };
  for await (const line of createInterface({ input: process.stdin })) {
    const request = JSON.parse(line) as Request;
    void take(request).catch((error: unknown) => {
      answer({ kind: 'failed', what: `worker ${worker}: ${request.kind}: ${(error as Error).message}` });
    });
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url))
  await workerSide(process.argv[2]!, Number(process.argv[3]), Number(process.argv[4]));
