// The agent's composition root. Above the line everything only reads settings; below it the world is touched:
// etcd, the host, sockets, the packet loop, signals.
import { randomBytes, randomInt } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { mkdir, realpath } from 'node:fs/promises';
import { hostname } from 'node:os';
import process from 'node:process';
import { serve } from '#serve';
import { ownerOf } from '../coordinator/claims.ts';
import { connectEtcd } from '../coordinator/etcd/client.ts';
import { Keyspace, type KeyspaceListener } from '../coordinator/keyspace.ts';
import { startRoles } from '../coordinator/roles.ts';
import { contains, formatIpv4, networkOf } from '../src/addr.ts';
import { type ErrorCode, toEdgewayError } from '../src/error.ts';
import { Keys } from '../src/keys.ts';
import * as limits from '../src/limits.ts';
import { type Logger, SILENT } from '../src/log.ts';
import type { NetworkConfig } from '../src/model.ts';
import { DEFAULT_NETWORK_CONFIG } from '../src/records.ts';
import { Agent } from './agent.ts';
import { createApp } from './api/app.ts';
import { restoreResolver, startNames } from './compose_names.ts';
import { type AgentConfig, parseConfig, type SettingValues } from './config.ts';
import { Environment } from './host/environment.ts';
import { findUnderlay } from './host/underlay.ts';
import { systemClock, systemTimers } from './io/clock.ts';
import { dockerEngine } from './io/docker.ts';
import { addressesOf } from './io/endpoints.ts';
import { startPrivateEtcd } from './io/etcd_private.ts';
import { hostRunner } from './io/exec.ts';
import { hostFiles } from './io/files.ts';
import { takeLock } from './io/lock.ts';
import { createLogger } from './io/log.ts';
import { startPacketLoop } from './io/packet_loop.ts';
import { hostVitals } from './io/vitals.ts';
import { type InterestOptions, RouteFollower } from './routes/follow.ts';
import { decodeSnapshot, type Snapshot } from './routes/snapshot.ts';
import { RouteTable } from './routes/table.ts';

const RESTORE_RETRY_MIN_MS = 2_000;
const RESTORE_RETRY_MAX_MS = 30_000;
/** What another try cannot change: somebody must ask for something else. */
const FINAL: ReadonlySet<ErrorCode> = new Set([
  'invalid_request',
  'address_not_in_plan',
  'already_registered',
]);

const runtimeName = (): string => {
  const { deno, node } = process.versions;
  return deno === undefined ? `node ${node}` : `deno ${deno}`;
};

function networkFor(config: AgentConfig, underlayMtu: number): NetworkConfig {
  return {
    ...DEFAULT_NETWORK_CONFIG,
    mtu: config.mtu ?? Math.max(limits.MTU_MIN, underlayMtu - limits.TUNNEL_OVERHEAD),
    presenceTtlS: config.presenceTtlS,
    secret: randomBytes(32).toString('hex'),
  };
}

/** Runs the agent until a signal ends it; resolves when the host is as it was found. */
export async function runAgent(flags: SettingValues, version: string): Promise<void> {
  let config: AgentConfig;
  try {
    config = parseConfig(flags, process.env, hostname(), (path) => readFileSync(path, 'utf8'));
  } catch (thrown) {
    process.stderr.write(`edgeway agent: ${toEdgewayError(thrown).message}\n`);
    process.exitCode = 2;
    return;
  }
  const log = createLogger(config.logLevel);
  const ended = new Promise<string>((resolve) => {
    for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => resolve(signal));
    process.on('uncaughtException', (error) => {
      log.error({ error: error.stack ?? error.message }, 'defect: stopping');
      process.exitCode = 1;
      resolve('uncaughtException');
    });
    // A promise that nobody awaited does not stop the packets of running instances.
    process.on('unhandledRejection', (thrown) => {
      const error = toEdgewayError(thrown);
      log.error(
        { code: error.code, error: error.stack ?? error.message },
        'defect: a promise was left alone',
      );
    });
  });

  // ---- below this line the world is touched ----
  const closers: (() => Promise<void>)[] = [];
  try {
    await start(config, log, version, closers);
    log.info({ reason: await ended }, 'stopping');
  } catch (thrown) {
    const error = toEdgewayError(thrown);
    log.error({ code: error.code, error: error.message }, 'the agent cannot start');
    process.exitCode = 1;
  }
  for (const close of closers.toReversed())
    try {
      await close();
    } catch (thrown) {
      log.warn({ error: toEdgewayError(thrown).message }, 'not closed cleanly');
    }
  process.exit(); // etcd3 keeps a channel's timers alive after close
}

async function start(
  config: AgentConfig,
  log: Logger,
  version: string,
  closers: (() => Promise<void>)[],
): Promise<void> {
  await mkdir(config.dataDir, { recursive: true, mode: 0o700 });
  // Before anything is changed: a second agent would take the first one's network for what a crash left behind.
  for (const [name, what] of [
    [`data ${await realpath(config.dataDir)}`, `the data directory ${config.dataDir}`],
    [`bridge ${config.bridge}`, `the bridge ${config.bridge}`],
  ] as const)
    closers.push(await takeLock(name, what));
  // What a crash left behind must not stand in the way of finding etcd by name.
  await restoreResolver(config.dataDir, log);
  const underlay = await findUnderlay(hostRunner, config.nodeIp);

  const endpoints = [...config.etcd];
  if (endpoints.length === 0) {
    const etcd = await startPrivateEtcd({ dataDir: config.dataDir, log });
    closers.push(() => etcd.stop());
    endpoints.push(etcd.endpoint);
  }
  const credentials = config.credentials === undefined ? {} : { credentials: config.credentials };
  const kv = connectEtcd({ endpoints, log, ...credentials });
  closers.push(() => kv.close());

  const keys = new Keys(config.root);
  const table = new RouteTable();
  const open = (listener: KeyspaceListener): Keyspace => new Keyspace(kv, keys, log, listener);
  const { after } = systemTimers;
  const interest: InterestOptions = {
    idleMs: config.interestIdleS * 1_000,
    negativeMs: limits.INTEREST_NEGATIVE_MS,
    max: limits.INTERESTS_MAX,
    now: () => systemClock.monotonicMs(),
    ownerOf: async (address) => (await ownerOf(kv, keys, address))?.service,
    // Also one that rests, or whose holder cannot be read.
    subnetTaken: async (subnet) => (await kv.get(keys.build({ kind: 'subnet', subnet }))) !== undefined,
    ...(underlay.nat ? { called: config.node } : {}),
  };
  const needed = config.follow === 'needed' ? { interest } : {};
  const restored = await readSnapshot(config, keys, log);
  const routes = new RouteFollower({ keys, table, open, after, ...needed, ...restored });
  closers.push(() => routes.close());

  const environment = new Environment({
    runner: hostRunner,
    files: hostFiles,
    log,
    names: { bridge: config.bridge, tun: config.tun },
    stateDir: config.dataDir,
  });
  const stores = await addressesOf(endpoints, log);
  const agent: Agent = new Agent({
    config,
    nodeIp: underlay.address,
    nat: underlay.nat,
    network: networkFor(config, underlay.mtu),
    kv,
    keys,
    table,
    routes,
    // Whoever asked is told what cannot be read; it need not be logged anew each time.
    openAll: (subtrees) =>
      new RouteFollower({
        ...{ keys, after, open: (listener) => new Keyspace(kv, keys, SILENT, listener) },
        ...(subtrees === undefined ? {} : { subtrees }),
      }),
    environment,
    stores,
    engine: dockerEngine(config.dockerSocket === undefined ? {} : { socketPath: config.dockerSocket }),
    files: hostFiles,
    clock: systemClock,
    timers: systemTimers,
    log,
    random: Math.random,
    nonce: () => randomInt(2 ** 32),
    vitals: hostVitals({
      runner: hostRunner,
      commands: config.healthCommands,
      ...(config.loadFile === undefined ? {} : { loadFile: config.loadFile }),
    }),
    startLoop: startPacketLoop,
    startNames: (subnet, needsOf, network) =>
      startNames({
        ...{ config, table, log, subnet, needsOf, network },
        onLookup: (service, source) => agent.asked(service, source),
        onAddress: (address, source) => {
          const { services, nodeBits: bits } = network.plan;
          return contains(services, address)
            ? routes.askAddress(address, source)
            : routes.askSubnet({ base: networkOf(address, bits), bits }, source);
        },
      }),
    runtime: runtimeName(),
    version,
  });
  closers.push(() => agent.stop());
  if (config.roles.length > 0) {
    const { roles, cluster, node: holder } = config;
    const time = { monotonicMs: () => systemClock.monotonicMs(), after };
    const network = networkFor(config, underlay.mtu);
    const running = startRoles({ kv, keys, time, random: Math.random, log, holder, roles, cluster, network });
    closers.push(() => running.stop());
  }

  const server = await serve(createApp(agent, log, version).fetch, config.api);
  closers.push(() => server.stop());
  log.info({ node: config.node, address: formatIpv4(underlay.address), port: config.ewp }, 'agent is up');
  restore(agent, log);
}

/** What was followed when the last run ended, if it can be read. */
async function readSnapshot(config: AgentConfig, keys: Keys, log: Logger): Promise<{ restored?: Snapshot }> {
  const file = `${config.dataDir}/routes.json`;
  const text = await hostFiles.read(file);
  if (text === undefined) return {};
  const snapshot = decodeSnapshot(text, keys);
  if (snapshot.ok) return { restored: snapshot.value };
  log.warn({ file, error: snapshot.error.message }, 'the saved routes cannot be read; etcd will tell');
  return {};
}

/** What stands in the way of joining may pass: etcd is away, a record is broken, an old address is still known.
 *  Requests may come in meanwhile. */
function restore(agent: Agent, log: Logger, pauseMs = RESTORE_RETRY_MIN_MS): void {
  agent.restore().catch((thrown: unknown) => {
    const error = toEdgewayError(thrown);
    log.warn({ code: error.code, error: error.message }, 'not registered yet');
    if (!FINAL.has(error.code))
      systemTimers.after(pauseMs, () => restore(agent, log, Math.min(RESTORE_RETRY_MAX_MS, 2 * pauseMs)));
  });
}
