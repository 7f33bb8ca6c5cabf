// Every subnet of the plan, claimed by racing nodes: once in the store in memory, once in etcd.
import { claimSubnet } from '../../coordinator/claims.ts';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import type { Kv } from '../../coordinator/kv.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { formatCidr } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { SILENT } from '../../src/log.ts';
import { subnetCount } from '../../src/plan.ts';
import { DEFAULT_NETWORK_CONFIG as config, decodeSubnet } from '../../src/records.ts';
import type { Bench } from '../scale.ts';
import { inParallel, round } from './stats.ts';

const keys = new Keys();
const CLIENTS = 4;
const RACERS = 64;

/** `kvs`: clients that the nodes share; `count` claimants, RACERS at a time. */
async function race(kvs: readonly Kv[], say: (text: string) => void) {
  const count = subnetCount(config.plan);
  const got = new Map<string, string>();
  let duplicates = 0;
  let refused = 0;
  let transactions = 0;
  const counted = kvs.map(
    (kv) =>
      new Proxy(kv, {
        get: (target, name) => {
          if (name !== 'txn') return Reflect.get(target, name).bind(target);
          return (...args: Parameters<Kv['txn']>) => {
            transactions++;
            return target.txn(...args);
          };
        },
      }),
  );
  // One tenure lease per client stands for those of its nodes: 15,360 leases would measure something else.
  const leases = await Promise.all(kvs.map((kv) => kv.grant(config.tenureTtlS)));
  const started = performance.now();
  const nodes = Array.from({ length: count }, (_, i) => `n${i}`);
  await inParallel(RACERS, nodes, async (node, i) => {
    try {
      const { subnet } = await claimSubnet(
        counted[i % kvs.length]!,
        keys,
        config,
        { node, cluster: 'lab' },
        { lease: leases[i % kvs.length]! },
      );
      const text = formatCidr(subnet);
      if (got.has(text)) duplicates++;
      got.set(text, node);
    } catch (error) {
      refused++;
      say(`${node}: ${(error as Error).message}`);
    }
  });
  const seconds = (performance.now() - started) / 1000;
  // The store has the last word: each subnet is there once, and held by the node that was told so.
  let misheld = 0;
  for (const entry of (await kvs[0]!.range(keys.prefix('subnets'))).entries) {
    const key = keys.parse(entry.key);
    const owner = decodeSubnet(entry.value);
    if (!key.ok || key.value.kind !== 'subnet' || !owner.ok) misheld++;
    else if (got.get(formatCidr(key.value.subnet)) !== owner.value.node) misheld++;
  }
  let overflow = 'granted';
  try {
    await claimSubnet(kvs[0]!, keys, config, { node: 'one-too-many', cluster: 'lab' }, { lease: leases[0]! });
  } catch (error) {
    overflow = error instanceof EdgewayError ? error.code : String(error);
    say(`node ${count + 1}: ${(error as Error).message}`);
  }
  return {
    subnets: got.size,
    duplicates: duplicates + misheld,
    missing: count - got.size,
    refused,
    overflow,
    per_s: round(count / seconds, 0),
    conflicts: transactions - count,
    seconds: round(seconds),
  };
}

export async function measureClaims({ etcd, say }: Bench) {
  const store = new MemoryStore(() => performance.now());
  const pure = await race(
    Array.from({ length: CLIENTS }, () => store.connect()),
    say,
  );
  say(`in memory: ${JSON.stringify(pure)}`);
  const kvs = Array.from({ length: CLIENTS }, () =>
    connectEtcd({ endpoints: [etcd.endpoint], log: SILENT, requestTimeoutMs: 10_000 }),
  );
  const real = await race(kvs, say);
  await Promise.all(kvs.map((kv) => kv.close()));
  const wrong = [pure, real].some(
    (one) => one.duplicates + one.missing + one.refused > 0 || one.overflow !== 'subnets_exhausted',
  );
  return {
    missed: wrong ? 'every subnet once, none twice, and the next node refused' : '',
    ...real,
    pure_subnets: pure.subnets,
    pure_duplicates: pure.duplicates,
    pure_missing: pure.missing,
  };
}
