// The leader of the roles is killed again and again, at random moments, while services and nodes come and go. What
// was granted must still be held by whom it was granted to, and nothing may ever have had two owners.
//
//   three coordinator processes (root + cluster)      claimants in this process      a witness of every change
import { type ChildProcess, spawn } from 'node:child_process';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { applyService, claimSubnet, deleteService, releaseSubnet } from '../../coordinator/claims.ts';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import type { KvEntry } from '../../coordinator/kv.ts';
import { type Cidr, formatCidr, formatIpv4 } from '../../src/addr.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { SILENT } from '../../src/log.ts';
import { bareDescriptor } from '../../src/model.ts';
import { parseServiceId, type ServiceId } from '../../src/name.ts';
import { POLICIES } from '../../src/policy.ts';
import {
  DEFAULT_NETWORK_CONFIG,
  decodeAddress,
  decodeLeader,
  decodeService,
  decodeSubnet,
  encodeConfig,
} from '../../src/records.ts';
import { Rng } from '../../src/rng.ts';
import type { Bench } from '../scale.ts';
import { percentile, round } from './stats.ts';

const keys = new Keys();
/** Short, so that addresses come to others during the run. */
const config = { ...DEFAULT_NETWORK_CONFIG, quarantineS: 10 };
const COORDINATORS = 3;
const ROLE_TTL_S = 2;
const SERVICES = 60;
const NODES = 60;

const leaderKeys = [
  keys.build({ kind: 'rootLeader' }),
  keys.build({ kind: 'clusterLeader', cluster: 'default' }),
] as const;

export async function measureLeaderKills({ etcd, say }: Bench, kills: number) {
  const rng = new Rng(Date.now() % 0xffffffff);
  const kv = connectEtcd({ endpoints: [etcd.endpoint], log: SILENT, requestTimeoutMs: 5_000 });
  const coordinators = new Map<string, ChildProcess>();
  let born = 0;
  const start = (): void => {
    const holder = `c${++born}`;
    const file = fileURLToPath(new URL('../../coordinator/main.ts', import.meta.url));
    coordinators.set(
      holder,
      spawn(
        process.execPath,
        [
          '--disable-warning=ExperimentalWarning',
          ...[file, '--etcd', etcd.endpoint, '--holder', holder],
          ...['--role-ttl', String(ROLE_TTL_S), '--log-level', 'error'],
        ],
        { stdio: ['ignore', 'ignore', 'inherit'] },
      ),
    );
  };
  await kv.txn([], [{ kind: 'put', key: keys.build({ kind: 'config' }), value: encodeConfig(config) }]);
  for (let i = 0; i < COORDINATORS; i++) start();

  // The witness: an address or subnet that passes from one owner to another without having been free or at rest, or that
  // comes to another before it rested for the quarantine. It hears of a release later than it happened, never earlier,
  // so half a second is left to etcd and the watch.
  let doubleClaims = 0;
  let unrested = 0;
  const owners = new Map<string, string>();
  const released = new Map<string, { readonly owner: string; readonly atMs: number }>();
  const checkRest = (key: string, owner: string): void => {
    const last = released.get(key);
    if (last === undefined || last.owner === owner) return;
    const restedMs = performance.now() - last.atMs;
    if (restedMs >= config.quarantineS * 1_000 - 500) return;
    unrested++;
    say(`${key} came to ${owner} ${Math.round(restedMs)} ms after ${last.owner} had it`);
  };
  const witness = (entry: KvEntry): void => {
    const key = keys.parse(entry.key);
    if (!key.ok) return;
    let owner: string | undefined;
    if (key.value.kind === 'address') {
      const held = unwrap(decodeAddress(entry.value));
      owner = held.resting ? undefined : JSON.stringify(held);
    } else if (key.value.kind === 'subnet') {
      const held = unwrap(decodeSubnet(entry.value));
      owner = held.resting ? undefined : held.node;
    }
    const before = owners.get(entry.key);
    if (before !== undefined && owner !== undefined && before !== owner) {
      doubleClaims++;
      say(`${entry.key} passed from ${before} to ${owner}`);
    }
    if (owner === undefined) release(entry.key);
    else {
      if (before !== owner) checkRest(entry.key, owner);
      owners.set(entry.key, owner);
    }
  };
  const release = (key: string): void => {
    const owner = owners.get(key);
    owners.delete(key);
    if (owner !== undefined) released.set(key, { owner, atMs: performance.now() });
  };
  const follow = (path: string) =>
    kv.follow(path, {
      live: () => {},
      batch: (batch) => {
        if (batch.kind === 'snapshot') for (const entry of batch.entries) witness(entry);
        else
          for (const change of batch.changes)
            if (change.kind === 'put') witness(change.entry);
            else release(change.key);
      },
    });
  const followers = [follow(keys.prefix('addresses')), follow(keys.prefix('subnets'))];

  // The load: what is granted is entered here after the answer and taken out before the release.
  const services = new Map<ServiceId, Readonly<Record<string, number>>>();
  const subnets = new Map<string, Cidr>();
  let running = true;
  let operations = 0;
  let failures = 0;
  const each = async (index: number, step: (index: number) => Promise<void>): Promise<void> => {
    while (running) {
      try {
        await step(index);
        operations++;
      } catch (error) {
        // The store was never away: whatever comes here is a race lost, to be tried again.
        if (!(error instanceof EdgewayError)) throw error;
        failures++;
      }
      await new Promise((resolve) => setTimeout(resolve, 20 + rng.below(80)));
    }
  };
  const serviceStep = async (index: number): Promise<void> => {
    const id = unwrap(parseServiceId(`app.prod.s${index}.v1`));
    if (!services.has(id)) {
      if (rng.below(3) === 0) {
        // By hand, without addresses: the cluster role must find it.
        const [appname, appnamespace, servicename, servicenamespace] = id.split('.');
        const key = keys.build({ kind: 'service', service: id });
        const value = JSON.stringify({ v: 1, appname, appnamespace, servicename, servicenamespace });
        await kv.txn([{ key, createRevision: 0 }], [{ kind: 'put', key, value }]);
        const deadline = performance.now() + 30_000;
        for (;;) {
          const entry = await kv.get(key);
          const record = entry === undefined ? undefined : decodeService(entry.value, id);
          if (record?.ok && POLICIES.every((policy) => record.value.addresses[policy] !== undefined)) {
            services.set(id, record.value.addresses);
            return;
          }
          if (performance.now() > deadline || !running) throw new EdgewayError('timeout', `${id} stays bare`);
          await new Promise((resolve) => setTimeout(resolve, 50));
        }
      }
      services.set(id, (await applyService(kv, keys, config, bareDescriptor(id))).service.addresses);
    } else if (rng.below(2) === 0) {
      services.delete(id);
      await deleteService(kv, keys, config, id);
    }
  };
  const nodeStep = async (index: number): Promise<void> => {
    const node = `n${index}`;
    const held = subnets.get(node);
    const owner = { node, cluster: 'default' };
    if (held === undefined) subnets.set(node, (await claimSubnet(kv, keys, config, owner)).subnet);
    else if (rng.below(2) === 0) {
      subnets.delete(node);
      await releaseSubnet(kv, keys, config, owner, held);
    }
  };
  const load = [
    ...Array.from({ length: SERVICES }, (_, i) => each(i, serviceStep)),
    ...Array.from({ length: NODES }, (_, i) => each(i, nodeStep)),
  ];

  const leader = async (): Promise<string | undefined> => {
    const holders = new Set<string>();
    for (const key of leaderKeys) {
      const entry = await kv.get(key);
      if (entry === undefined) return undefined;
      holders.add(unwrap(decodeLeader(entry.value)).holder);
    }
    const [holder] = holders;
    return holder !== undefined && coordinators.has(holder) ? holder : undefined;
  };
  const takeovers: number[] = [];
  let killed = 0;
  while (killed < kills) {
    const since = performance.now();
    let holder = await leader();
    while (holder === undefined) {
      if (performance.now() - since > 60_000) throw new Error('nobody took over within a minute');
      await new Promise((resolve) => setTimeout(resolve, 20));
      holder = await leader();
    }
    if (killed > 0) takeovers.push(performance.now() - since);
    await new Promise((resolve) => setTimeout(resolve, rng.below(1_000)));
    coordinators.get(holder)?.kill('SIGKILL');
    coordinators.delete(holder);
    start();
    killed++;
    if (killed % 10 === 0)
      say(
        `${killed} kills, ${operations} claims and releases, takeover p50 ${round(percentile(takeovers, 0.5), 0)} ms`,
      );
  }
  running = false;
  await Promise.all(load);
  await new Promise((resolve) => setTimeout(resolve, 3 * ROLE_TTL_S * 1_000)); // a last takeover and its sweep

  let lostClaims = 0;
  const users = new Map<number, string>();
  for (const [id, addresses] of services) {
    const entry = await kv.get(keys.build({ kind: 'service', service: id }));
    const record = entry === undefined ? undefined : decodeService(entry.value, id);
    for (const policy of POLICIES) {
      const address = addresses[policy];
      if (address === undefined || !record?.ok || record.value.addresses[policy] !== address) {
        lostClaims++;
        say(`lost: ${policy} of ${id}`);
        continue;
      }
      const owner = (await kv.get(keys.build({ kind: 'address', address: address as never })))?.value;
      if (owner === undefined || !owner.includes(`"${id}"`) || owner.includes('resting')) {
        lostClaims++;
        say(`lost: ${formatIpv4(address as never)} of ${id} is held by ${owner ?? 'nobody'}`);
      }
    }
  }
  for (const [node, subnet] of subnets) {
    const entry = await kv.get(keys.build({ kind: 'subnet', subnet }));
    const owner = entry === undefined ? undefined : unwrap(decodeSubnet(entry.value));
    if (owner?.node !== node || owner.resting === true) {
      lostClaims++;
      say(`lost: ${formatCidr(subnet)} of ${node}`);
    }
  }
  for (const entry of (await kv.range(keys.prefix('services'))).entries) {
    const key = keys.parse(entry.key);
    if (!key.ok || key.value.kind !== 'service') continue;
    const record = unwrap(decodeService(entry.value, key.value.service));
    for (const address of Object.values(record.addresses)) {
      if ((users.get(address) ?? record.id) !== record.id) doubleClaims++;
      users.set(address, record.id);
    }
  }
  for (const child of coordinators.values()) child.kill('SIGKILL');
  await Promise.all(followers.map((follower) => follower.close()));
  await kv.close();
  return {
    missed:
      doubleClaims + lostClaims + unrested > 0 ? 'no double claim, no lost claim, no rest cut short' : '',
    count: killed,
    double_claims: doubleClaims,
    rests_cut_short: unrested,
    lost_claims: lostClaims,
    operations,
    retried: failures,
    takeover_p50_ms: round(percentile(takeovers, 0.5), 0),
    takeover_max_ms: round(Math.max(...takeovers), 0),
    role_ttl_s: ROLE_TTL_S,
  };
}
