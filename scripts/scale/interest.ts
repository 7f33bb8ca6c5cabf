// What an agent holds that is interested in 20 services, in a platform of 30,000 services and 15,360 nodes, and what
// it hears of the others while they change. The agent's control plane runs in a process of its own, so that its heap
// is only its own.
import { spawn } from 'node:child_process';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { ownerOf } from '../../coordinator/claims.ts';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import { Keyspace } from '../../coordinator/keyspace.ts';
import { type Kv, type Operation, TXN_OPERATIONS_MAX } from '../../coordinator/kv.ts';
import { RouteFollower } from '../../edge/routes/follow.ts';
import { ipv4, parseCidr } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { SILENT } from '../../src/log.ts';
import type { Instance, Node, Service } from '../../src/model.ts';
import { parseServiceId, type ServiceId } from '../../src/name.ts';
import { layoutOf, type Plan, serviceAddressAt, subnetAt } from '../../src/plan.ts';
import { POLICIES } from '../../src/policy.ts';
import {
  DEFAULT_NETWORK_CONFIG,
  encodeAddress,
  encodeConfig,
  encodeInstance,
  encodeNode,
  encodeService,
} from '../../src/records.ts';
import type { Bench } from '../scale.ts';
import { inParallel, round } from './stats.ts';

const keys = new Keys();
const SERVICES = 30_000;
const NODES = 15_360;
const INTERESTS = 20;
const INSTANCES_OF_EACH = 3;
const FOREIGN_CHANGES = 2_000;

/** 30,000 × 3 ServiceIPs do not fit into the default /16: this platform chose wider ranges, as its operator may. */
const PLAN: Plan = {
  platform: unwrap(parseCidr('10.0.0.0/8')),
  services: unwrap(parseCidr('10.252.0.0/14')),
  nodeBits: 26,
};
const config = { ...DEFAULT_NETWORK_CONFIG, plan: PLAN };

const serviceId = (i: number): ServiceId => unwrap(parseServiceId(`app${i % 100}.prod.service${i}.v1`));

function nodeAt(i: number, ewp = 4790): Node {
  return {
    node: `n${i}`,
    cluster: `c${i % 16}`,
    nodeIp: ipv4(0xc0a80000 + i),
    ewp,
    nsp: 0,
    subnet: subnetAt(PLAN, i),
    epoch: 1,
  };
}

function serviceAt(i: number, port = 80): Service {
  const [appname, appnamespace, servicename, servicenamespace] = serviceId(i).split('.') as [
    string,
    string,
    string,
    string,
  ];
  return {
    id: serviceId(i),
    descriptor: {
      appname,
      appnamespace,
      servicename,
      servicenamespace,
      exposed: false,
      ports: [port],
      statefull: false,
    },
    addresses: Object.fromEntries(POLICIES.map((policy, p) => [policy, serviceAddressAt(PLAN, i * 3 + p)])),
  };
}

function instanceAt(i: number, number: number): Instance {
  const node = nodeAt((i * 7 + number) % NODES);
  return {
    service: serviceId(i),
    instance: number,
    node: node.node,
    cluster: node.cluster,
    nodeIp: node.nodeIp,
    ewp: node.ewp,
    nsp: node.nsp,
    namespaceIp: ipv4(layoutOf(node.subnet).firstInstance + (i % 60)),
    instanceIp: serviceAddressAt(PLAN, SERVICES * 3 + i * 3 + number),
    ports: [80],
    epoch: 1,
  };
}

async function putAll(kv: Kv, operations: readonly Operation[]): Promise<void> {
  const chunks: Operation[][] = [];
  for (let i = 0; i < operations.length; i += TXN_OPERATIONS_MAX)
    chunks.push(operations.slice(i, i + TXN_OPERATIONS_MAX));
  await inParallel(4, chunks, async (chunk) => {
    await kv.txn([], chunk);
  });
}

export async function measureInterest({ etcd, say, rssMb }: Bench) {
  const kv = connectEtcd({ endpoints: [etcd.endpoint], log: SILENT, requestTimeoutMs: 20_000 });
  const put = (key: string, value: string): Operation => ({ kind: 'put', key, value });
  await kv.txn([], [put(keys.build({ kind: 'config' }), encodeConfig(config))]);
  await putAll(
    kv,
    Array.from({ length: NODES }, (_, i) => {
      const node = nodeAt(i);
      return put(keys.build({ kind: 'node', cluster: node.cluster, node: node.node }), encodeNode(node));
    }),
  );
  await putAll(
    kv,
    Array.from({ length: SERVICES }, (_, i) =>
      put(keys.build({ kind: 'service', service: serviceId(i) }), encodeService(serviceAt(i))),
    ),
  );
  // Two thousand services run; the others are described and wait.
  await putAll(
    kv,
    Array.from({ length: 2_000 * INSTANCES_OF_EACH }, (_, j) => {
      const instance = instanceAt(Math.floor(j / INSTANCES_OF_EACH), (j % INSTANCES_OF_EACH) + 1);
      return put(
        keys.build({ kind: 'instance', service: instance.service, instance: instance.instance }),
        encodeInstance(instance),
      );
    }),
  );
  const asked = serviceAt(19).addresses.closest!;
  await kv.txn(
    [],
    [
      put(
        keys.build({ kind: 'address', address: asked }),
        encodeAddress({ kind: 'service', service: serviceId(19), policy: 'closest' }),
      ),
    ],
  );
  say(
    `etcd holds ${SERVICES} services, ${NODES} nodes, ${2_000 * INSTANCES_OF_EACH} instances: ${await rssMb()} MB`,
  );

  const agent = spawn(
    process.execPath,
    ['--expose-gc', '--disable-warning=ExperimentalWarning', fileURLToPath(import.meta.url), etcd.endpoint],
    { stdio: ['pipe', 'pipe', 'inherit'] },
  );
  const lines = createInterface({ input: agent.stdout })[Symbol.asyncIterator]();
  const next = async (): Promise<Report> => JSON.parse((await lines.next()).value as string) as Report;
  const held = await next();
  say(
    `followed: ${held.services} services, ${held.instances} instances, ${held.nodes} nodes in ${round(held.followMs ?? 0)} ms`,
  );
  // Everybody else changes; then one of ours, so that the agent has surely heard all that it will hear.
  await putAll(
    kv,
    Array.from({ length: FOREIGN_CHANGES }, (_, j) => {
      const i = INTERESTS + j;
      return j % 2 === 0
        ? put(keys.build({ kind: 'service', service: serviceId(i) }), encodeService(serviceAt(i, 81)))
        : put(
            keys.build({ kind: 'node', cluster: nodeAt(i + 5_000).cluster, node: `n${i + 5_000}` }),
            encodeNode(nodeAt(i + 5_000, 4791)),
          );
    }),
  );
  await kv.txn(
    [],
    [put(keys.build({ kind: 'service', service: serviceId(0) }), encodeService(serviceAt(0, 8080)))],
  );
  const after = await next();
  agent.kill();
  await kv.close();
  return {
    missed: after.foreign > 0 ? 'nothing heard of services that nobody here uses' : '',
    mb: round(held.mb, 2),
    foreign_events: after.foreign,
    services: SERVICES,
    nodes: NODES,
    interests: INTERESTS,
    first_ask_ms: round(held.followMs ?? 0),
    etcd_rss_mb: await rssMb(),
  };
}

interface Report {
  readonly mb: number;
  readonly foreign: number;
  readonly services: number;
  readonly instances: number;
  readonly nodes: number;
  readonly followMs?: number;
}

/** The agent's side: prints a report when it follows its interests and another when the last change has come. */
async function agentSide(endpoint: string): Promise<void> {
  const used = (): number => {
    for (let i = 0; i < 4; i++) (globalThis as { gc?: () => void }).gc?.();
    const { heapUsed, external } = process.memoryUsage();
    return (heapUsed + external) / 1e6;
  };
  const mine = Array.from({ length: INTERESTS }, (_, i) => serviceId(i));
  const allowed = new Set<string>();
  for (const [i, service] of mine.entries()) {
    allowed.add(keys.build({ kind: 'service', service }));
    for (let number = 1; number <= INSTANCES_OF_EACH; number++) {
      const { cluster, node } = instanceAt(i, number);
      allowed.add(keys.build({ kind: 'instance', service, instance: number }));
      allowed.add(keys.build({ kind: 'node', cluster, node }));
    }
  }
  allowed.add(keys.build({ kind: 'config' }));
  let foreign = 0;
  const etcd = connectEtcd({ endpoints: [endpoint], log: SILENT });
  const kv = new Proxy(etcd, {
    get: (target, name) => {
      if (name !== 'follow') return Reflect.get(target, name).bind(target);
      return (path: string, listener: Parameters<Kv['follow']>[1]) =>
        target.follow(path, {
          live: (live) => listener.live(live),
          batch: (batch) => {
            const told =
              batch.kind === 'snapshot'
                ? batch.entries.map(({ key }) => key)
                : batch.changes.map((change) => (change.kind === 'put' ? change.entry.key : change.key));
            for (const key of told) if (!allowed.has(key)) foreign++;
            listener.batch(batch);
          },
        });
    },
  });
  const routes = new RouteFollower({
    keys,
    open: (listener) => new Keyspace(kv, keys, SILENT, listener),
    after: (ms, run) => {
      const timer = setTimeout(run, ms);
      return () => clearTimeout(timer);
    },
    interest: {
      idleMs: 600_000,
      negativeMs: 10_000,
      max: 4_096,
      now: () => performance.now(),
      ownerOf: async (address) => (await ownerOf(kv, keys, address))?.service,
      subnetTaken: async () => false,
    },
  });
  const until = async (condition: () => boolean): Promise<void> => {
    while (!condition()) await new Promise((resolve) => setTimeout(resolve, 5));
  };
  await until(() => routes.live && routes.table.synced);
  const before = used();
  const started = performance.now();
  // Nineteen are declared; the twentieth is asked for by a packet to its address.
  routes.pin(new Set(mine.slice(0, -1)));
  await routes.askAddress(serviceAt(INTERESTS - 1).addresses.closest!);
  const all = INTERESTS * INSTANCES_OF_EACH;
  await until(() => [...routes.table.instances()].length === all && [...routes.table.nodes()].length === all);
  const followMs = performance.now() - started;
  const report = (): Report => ({
    mb: used() - before,
    foreign,
    services: [...routes.table.services()].length,
    instances: [...routes.table.instances()].length,
    nodes: [...routes.table.nodes()].length,
    followMs,
  });
  console.log(JSON.stringify(report()));
  await until(() => routes.table.service(serviceId(0))?.descriptor.ports[0] === 8080);
  console.log(JSON.stringify(report()));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await agentSide(process.argv[2]!);
