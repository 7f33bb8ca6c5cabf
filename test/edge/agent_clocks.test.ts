// Hosts whose clocks disagree: they run fast or slow beside the store's, and their dates are set by an hour.
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { claimSubnet } from '../../coordinator/claims.ts';
import type { KvEntry } from '../../coordinator/kv.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { unwrap } from '../../src/error.ts';
import { DEFAULT_NETWORK_CONFIG as config, decodeSubnet } from '../../src/records.ts';
import { CART } from '../support/sample.ts';
import { HostClock, settle, VirtualTime } from '../support/time.ts';
import { during, keys, start, type World } from './world.ts';

const HOUR_MS = 3_600_000;
const MINUTE_MS = 60_000;

/** Agents n1, n2, … on one store, each with a clock of its own and an instance of cart. */
async function fleet(rates: readonly number[], network = config) {
  const time = new VirtualTime();
  const store = new MemoryStore(() => time.monotonicMs());
  const worlds: World[] = [];
  for (const [i, rate] of rates.entries()) {
    // One host believes in 1970, the next in 2027, …
    const clock = new HostClock(time, (i * 1_800_000_000_000) % 5_400_000_000_000);
    clock.rate = rate;
    const world = start({ node: `n${i + 1}` }, { time, store, clock }, { network });
    worlds.push(world);
    await during(world, world.agent.restore());
    const target = { kind: 'netns', name: 'web' } as const;
    await during(world, world.agent.deploy({ service: CART, instance: i + 1, target, addresses: {} }));
  }
  const direct = store.connect();
  const claims = async (): Promise<KvEntry[]> => {
    const all = await Promise.all(
      (['subnets', 'addresses', 'hosts'] as const).map((subtree) => direct.range(keys.prefix(subtree))),
    );
    return all.flatMap(({ entries }) => [...entries]);
  };
  return { time, store, worlds, direct, claims };
}

/** What becomes of the keys below some subtrees, from now on. */
function watchChanges(store: MemoryStore, subtrees: readonly Parameters<typeof keys.prefix>[0][]) {
  const told = { deleted: [] as string[], put: [] as KvEntry[] };
  for (const subtree of subtrees)
    store.connect().follow(keys.prefix(subtree), {
      live: () => {},
      batch: (batch) => {
        for (const change of batch.kind === 'changes' ? batch.changes : [])
          if (change.kind === 'delete') told.deleted.push(change.key);
          else told.put.push(change.entry);
      },
    });
  return told;
}

/** As the store would without anybody's asking. */
async function pass(store: MemoryStore, time: VirtualTime, ms: number): Promise<void> {
  for (let left = ms; left > 0; left -= 1_000) {
    await time.advance(Math.min(1_000, left));
    store.expire();
  }
}

test('clocks that run 20 % slow and 25 % fast, and dates set by an hour: no claim moves, no presence flaps', async () => {
  const { time, store, worlds, direct, claims } = await fleet([0.8, 1.25, 1]);
  const [slow, fast, right] = worlds as [World, World, World];
  const presence = async () => {
    const all = await Promise.all([
      direct.range(keys.prefix('nodes')),
      direct.range(keys.prefix('instances')),
    ]);
    return all.flatMap(({ entries }) =>
      entries.map(({ key, lease, createRevision }) => ({ key, lease, createRevision })),
    );
  };
  const before = { claims: await claims(), presence: await presence() };
  assert.is(before.presence.length, 6);
  const { deleted } = watchChanges(store, ['subnets', 'addresses', 'hosts', 'nodes', 'instances']);
  await settle();
  await pass(store, time, 10 * MINUTE_MS);
  slow.clock.step(HOUR_MS);
  fast.clock.step(-HOUR_MS);
  await pass(store, time, 10 * MINUTE_MS);
  slow.clock.step(-HOUR_MS);
  right.clock.step(HOUR_MS);
  for (const { kv } of worlds) kv.partitioned = true;
  await pass(store, time, 3_000);
  for (const { kv } of worlds) kv.partitioned = false;
  // What ran slow runs fast from here on.
  slow.clock.rate = 1.25;
  fast.clock.rate = 0.8;
  await pass(store, time, 20 * MINUTE_MS);
  assert.equal(deleted, []);
  assert.equal({ claims: await claims(), presence: await presence() }, before);
});

test('a host whose clock runs slow and that outlives its tenure publishes nothing under what another holds', async () => {
  const { time, store, worlds, direct } = await fleet([0.8], { ...config, tenureTtlS: 3_600 });
  const [world] = worlds as [World];
  const [old] = (await direct.range(keys.prefix('subnets'))).entries;
  const parsed = unwrap(keys.parse(old!.key));
  assert.is(parsed.kind, 'subnet');
  const subnet = (parsed as Extract<typeof parsed, { kind: 'subnet' }>).subnet;
  world.kv.partitioned = true;
  await pass(store, time, 3_700_000);
  assert.ok(world.clock.monotonicMs() < 3_600_000, 'by its own clock it still holds everything');
  const heir = { node: 'n2', cluster: 'default' };
  const claim = await claimSubnet(direct, keys, config, heir, { exact: subnet });
  const { put } = watchChanges(store, ['nodes', 'instances', 'subnets']);
  await settle();
  world.kv.partitioned = false;
  await pass(store, time, 2 * MINUTE_MS);
  const told = (await direct.range(keys.prefix('subnets'))).entries;
  const owners = told.map(({ value }) => unwrap(decodeSubnet(value)).node);
  assert.equal(owners.sort(), ['n1', 'n2']);
  assert.is((await direct.get(old!.key))?.createRevision, claim.epoch, 'the heir stands untouched');
  const epochs = put.flatMap(({ value }) => JSON.parse(value).epoch ?? []);
  assert.ok(epochs.length >= 2, 'the node and its instance are published');
  assert.ok(epochs.every((epoch) => epoch > claim.epoch));
});

test('a host whose clock runs fast gives its tenure up early, and takes up again what it held', async () => {
  const { time, store, worlds, claims } = await fleet([1.25], { ...config, tenureTtlS: 3_600 });
  const [world] = worlds as [World];
  const held = (entries: readonly KvEntry[]) =>
    entries.map(({ key, value, createRevision }) => ({ key, value, createRevision }));
  const before = held(await claims());
  const { deleted } = watchChanges(store, ['subnets', 'addresses', 'hosts']);
  await settle();
  const [lease] = new Set((await claims()).map((entry) => entry.lease).filter((id) => id !== undefined));
  world.kv.partitioned = true;
  await pass(store, time, 3_000_000);
  assert.ok(world.clock.monotonicMs() > 3_600_000);
  world.kv.partitioned = false;
  await pass(store, time, MINUTE_MS);
  assert.equal(held(await claims()), before, 'the same claims with the same epochs');
  assert.not.ok(
    (await claims()).some((entry) => entry.lease === lease),
    'on another lease',
  );
  assert.equal(deleted, []);
});

test('a restart without etcd after the date was set by an hour goes on with what the last run held', async () => {
  for (const ms of [HOUR_MS, -HOUR_MS]) {
    const { time, store, worlds, claims } = await fleet([1]);
    const [first] = worlds as [World];
    await pass(store, time, 2 * HOUR_MS);
    const before = await claims();
    first.clock.step(ms);
    first.kv.partitioned = true;
    const again = start({ node: 'n1' }, first);
    again.kv.partitioned = true;
    await during(again, again.agent.restore(), MINUTE_MS);
    assert.ok(again.host.attached.has(`${CART}/1`));
    again.kv.partitioned = false;
    await pass(store, time, MINUTE_MS);
    assert.equal(
      (await claims()).map(({ key, value, createRevision }) => ({ key, value, createRevision })),
      before.map(({ key, value, createRevision }) => ({ key, value, createRevision })),
    );
  }
});

test.run();
