// An agent on a store in memory, with a clock moved by hand and a host that only remembers.

import { ownerOf } from '../../coordinator/claims.ts';
import { Keyspace } from '../../coordinator/keyspace.ts';
import { type MemoryKv, MemoryStore } from '../../coordinator/memory.ts';
import { Agent, type AgentParts } from '../../edge/agent.ts';
import { parseConfig } from '../../edge/config.ts';
import type { Files, PacketLoop } from '../../edge/ports.ts';
import type { ProxyCommand, ProxyReport } from '../../edge/proxy/command.ts';
import { type InterestOptions, RouteFollower } from '../../edge/routes/follow.ts';
import { EdgewayError } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { INTEREST_IDLE_MS, INTEREST_NEGATIVE_MS, INTERESTS_MAX } from '../../src/limits.ts';
import { type Logger, SILENT } from '../../src/log.ts';
import type { NetworkConfig } from '../../src/model.ts';
import { DEFAULT_NETWORK_CONFIG } from '../../src/records.ts';
import { CART, ip } from '../support/sample.ts';
import { HostClock, VirtualTime } from '../support/time.ts';

export const keys = new Keys();
export class FakeHost {
  readonly attached = new Map<string, string>();
  refuse: string | undefined;
  readonly gone = new Set<string>();

  readonly environment: AgentParts['environment'] = {
    hostRoutes: async () => [],
    setupNode: async () => {},
    attachTun: async () => {},
    cleanNode: async () => this.attached.clear(),
    expose: async () => [],
    attach: async ({ id, target }) => {
      if (this.refuse !== undefined) throw new EdgewayError('host_command_failed', this.refuse);
      this.attached.set(id, target.kind === 'netns' ? target.name : String(target.pid));
      return { hostInterface: 'veth', interface: 'eth0' };
    },
    detach: async ({ id }) => {
      if (this.refuse !== undefined) throw new EdgewayError('host_command_failed', this.refuse);
      this.attached.delete(id);
    },
  };
}

/** What a restart finds again. */
export class FakeFiles implements Files {
  readonly files = new Map<string, string>();
  read = async (path: string) => this.files.get(path);
  write = async (path: string, content: string) => void this.files.set(path, content);
  writeInPlace = this.write;
  remove = async (path: string) => void this.files.delete(path);
}

interface Loop {
  readonly commands: ProxyCommand[];
  readonly report: (report: ProxyReport) => void;
}

export interface World {
  readonly time: VirtualTime;
  readonly store: MemoryStore;
  readonly clock: HostClock;
  readonly kv: MemoryKv;
  readonly routes: RouteFollower;
  readonly host: FakeHost;
  readonly files: FakeFiles;
  readonly loops: Loop[];
  readonly agent: Agent;
}

/** `earlier`: what another agent, or this one before a restart, left or shares. */
export function start(
  flags: Record<string, string> = {},
  earlier: Partial<World> = {},
  more: { nat?: boolean; network?: NetworkConfig; interest?: boolean; log?: Logger } = {},
): World {
  const time = earlier.time ?? new VirtualTime();
  const store = earlier.store ?? new MemoryStore(() => time.monotonicMs());
  const clock = earlier.clock ?? new HostClock(time);
  const files = earlier.files ?? new FakeFiles();
  const host = new FakeHost();
  const kv = store.connect(clock);
  const loops: Loop[] = [];
  let nonces = 0;
  const config = parseConfig(
    { node: 'n1', register: 'auto', 'data-dir': '/data', 'presence-ttl': '15', ...flags },
    {},
    'host',
    () => '',
  );
  const open = (listener: ConstructorParameters<typeof Keyspace>[3]) =>
    new Keyspace(kv, keys, SILENT, listener);
  const after = (ms: number, run: () => void) => clock.after(ms, run);
  const interest: InterestOptions = {
    idleMs: INTEREST_IDLE_MS,
    negativeMs: INTEREST_NEGATIVE_MS,
    max: INTERESTS_MAX,
    now: () => clock.monotonicMs(),
    ownerOf: async (address) => (await ownerOf(kv, keys, address))?.service,
    subnetTaken: async (subnet) => (await kv.get(keys.build({ kind: 'subnet', subnet }))) !== undefined,
  };
  const routes = new RouteFollower({ keys, open, after, ...(more.interest === true ? { interest } : {}) });
  const agent = new Agent({
    config,
    nodeIp: ip(config.node.replace(/^n/, '10.0.0.')),
    nat: more.nat ?? false,
    network: more.network ?? DEFAULT_NETWORK_CONFIG,
    kv,
    keys,
    table: routes.table,
    routes,
    openAll: () => new RouteFollower({ keys, open, after }),
    environment: host.environment,
    stores: [],
    engine: {
      inspect: async (name) => {
        throw new EdgewayError('container_unknown', `no container ${name}`);
      },
    },
    files,
    clock,
    timers: { after },
    log: more.log ?? SILENT,
    random: () => 0.5,
    nonce: () => ++nonces,
    vitals: {
      load: () => 0,
      identify: (home) => (host.gone.has(home.kind === 'netns' ? home.name : '') ? undefined : 'same'),
      check: async () => ({ ok: true, detail: '' }),
    },
    startLoop: async (_config, report) => {
      const commands: ProxyCommand[] = [];
      loops.push({ commands, report });
      const loop: PacketLoop = {
        send: (command) => void commands.push(command),
        counters: () => ({}),
        flows: () => 0,
        stop: async () => {},
      };
      return loop;
    },
    startNames: async () => ({ changed: () => {}, counters: () => ({}), stop: async () => {} }),
    runtime: 'test',
    version: '0',
  });
  return { time, store, clock, kv, routes, host, files, loops, agent };
}

export const deployCart = (agent: Agent, netns = 'web') =>
  agent.deploy({ service: CART, instance: 1, target: { kind: 'netns', name: netns }, addresses: {} });

/** Keys below a subtree, of a client that is never cut off. */
export async function keysOf(world: World, subtree: Parameters<Keys['prefix']>[0]): Promise<string[]> {
  return (await world.store.connect().range(keys.prefix(subtree))).entries.map((entry) => entry.key);
}

/** A promise whose timers are the virtual ones. */
export async function during<T>(world: World, work: Promise<T>, ms = 20_000): Promise<T> {
  work.catch(() => {});
  await world.time.advance(ms);
  return work;
}
