// What goes wrong with a real etcd, and what followers, claims and leases make of it.
//
//   client ── relay ── etcd
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { claimSubnet, publishNode } from '../../coordinator/claims.ts';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import { systemTime } from '../../coordinator/etcd/time.ts';
import { followKeyspace } from '../../coordinator/keyspace.ts';
import type { Kv, LeaseId } from '../../coordinator/kv.ts';
import { keepLease } from '../../coordinator/lease.ts';
import { startPrivateEtcd } from '../../edge/io/etcd_private.ts';
import { Keys } from '../../src/keys.ts';
import { PING_INTERVAL_MS, PING_TIMEOUT_MS, REQUEST_TIMEOUT_MS } from '../../src/limits.ts';
import { SILENT } from '../../src/log.ts';
import { DEFAULT_NETWORK_CONFIG as config, encodeService } from '../../src/records.ts';
import { Mirror, rejectsWith } from '../conformance/kv.ts';
import { startTestEtcd, type TestEtcd } from '../support/etcd.ts';
import { eventually } from '../support/eventually.ts';
import { keepLogs } from '../support/logs.ts';
import { Relay } from '../support/relay.ts';
import { descriptor, node, sid } from '../support/sample.ts';

const test = suite('etcd faults');
const keys = new Keys();
const put = (key: string, value: string) => ({ kind: 'put', key, value }) as const;

let etcd: TestEtcd;
let relay: Relay;
let direct: Kv;
const clients: Kv[] = [];

function connect(more: { auditIntervalMs?: number; log?: typeof SILENT } = {}): Kv {
  const kv = connectEtcd({ endpoints: [relay.endpoint], log: SILENT, ...more });
  clients.push(kv);
  return kv;
}

test.before(async () => {
  etcd = await startTestEtcd();
  relay = await Relay.to(etcd.endpoint);
  direct = connectEtcd({ endpoints: [etcd.endpoint], log: SILENT });
});
test.after(async () => {
  await Promise.all([direct, ...clients].map((kv) => kv.close()));
  await relay.close();
  await etcd.remove();
});

test('a member that hangs: requests end at their deadline, the watch ends by ping and is whole again after', async () => {
  const kv = connect();
  const mirror = new Mirror(kv, '/hang/');
  await eventually(() => mirror.live, 'live');
  relay.freeze();
  const started = performance.now();
  await rejectsWith('coordination_unavailable', () => kv.txn([], [put('/hang/a', '1')]));
  assert.ok(performance.now() - started < 2 * REQUEST_TIMEOUT_MS, 'a write is tried once');
  await direct.txn([], [put('/hang/b', '1')]);
  await eventually(() => !mirror.live, 'the watch to notice', PING_INTERVAL_MS + PING_TIMEOUT_MS + 6_000);
  relay.mend();
  await eventually(() => mirror.live && mirror.entries.has('/hang/b'), 'whole again', 20_000);
  await mirror.follower.close();
});

test('compaction during a watch: nothing is lost, not even a deletion', async () => {
  const kv = connect();
  const mirror = new Mirror(kv, '/compact/');
  await direct.txn([], [put('/compact/gone', '1')]);
  await eventually(() => mirror.live && mirror.entries.has('/compact/gone'), 'live');
  relay.cut();
  for (let i = 0; i < 1_200; i += 100)
    await direct.txn(
      [],
      Array.from({ length: 100 }, (_, j) => put(`/compact/${i + j}`, String(i))),
    );
  const { revision } = await direct.txn([], [{ kind: 'delete', key: '/compact/gone' }]);
  await etcd.etcdctl('compact', String(revision));
  relay.mend();
  await eventually(() => mirror.live && mirror.entries.size === 1_200, 'the difference', 20_000);
  assert.not.ok(mirror.entries.has('/compact/gone'));
  await mirror.follower.close();
});

test('a lease that ends during a transaction: the put is refused whole, and claims say lease_lost', async () => {
  const kv = connect();
  const lease = await kv.grant(60);
  await kv.revoke(lease);
  await rejectsWith('lease_lost', () =>
    kv.txn([], [put('/lease/durable', '1'), { ...put('/lease/a', '1'), lease }]),
  );
  assert.is(await kv.get('/lease/durable'), undefined, 'all or nothing');
  await rejectsWith('lease_lost', () =>
    claimSubnet(kv, keys, config, { node: 'late', cluster: 'lab' }, { lease }),
  );
  const claim = await claimSubnet(kv, keys, config, { node: 'early', cluster: 'lab' });
  await kv.revoke(claim.lease);
  const presence = await kv.grant(60);
  await rejectsWith('lease_lost', () =>
    publishNode(kv, keys, node('early', 1, { subnet: claim.subnet, epoch: claim.epoch }), presence),
  );
  await kv.revoke(presence);
});

test('clocks do not matter: a keeper judges by its own monotonic clock, whatever time it is elsewhere', async () => {
  const kv = connect();
  const held: LeaseId[] = [];
  const lost: string[] = [];
  // This node's clock started a year away from everybody's; only differences count.
  const keeper = keepLease({
    kv,
    ttlS: 3,
    time: { monotonicMs: () => systemTime.monotonicMs() + 31_536_000_000, after: systemTime.after },
    random: () => 0.5,
    log: SILENT,
    onHeld: async (lease) => {
      held.push(lease);
      await kv.txn([], [{ ...put('/clock/node', 'here'), lease }]);
    },
    onLost: (_, cause) => void lost.push(cause),
  });
  await eventually(() => keeper.renewals >= 3, 'three renewals', 20_000);
  assert.equal([held.length, lost.length], [1, 0]);
  relay.cut();
  await eventually(() => lost.length === 1, 'the loss', 10_000);
  assert.ok(await direct.get('/clock/node'), 'the keeper stops before the store ends it');
  relay.mend();
  await eventually(
    async () => held.length === 2 && (await direct.get('/clock/node'))?.lease === held[1],
    'publishing under another lease',
    20_000,
  );
  await keeper.stop(true);
  assert.is(await direct.get('/clock/node'), undefined);
});

test('hand-edited values: each fault is logged once with its key, others are untouched', async () => {
  const logs = keepLogs();
  const kv = connect({ log: logs.log });
  const seen = new Set<string>();
  const keyspace = followKeyspace(kv, keys, [keys.prefix('services')], logs.log, {
    batch: ({ puts }) => {
      for (const { key } of puts) seen.add(keys.build(key));
    },
    live: () => {},
  });
  await eventually(() => keyspace.live, 'live');
  const key = (id: string) => keys.build({ kind: 'service', service: sid(id) });
  const good = (id: string) => encodeService({ id: sid(id), descriptor: descriptor(sid(id)), addresses: {} });
  const faults: readonly (readonly [string, string])[] = [
    [key('a.a.a.a'), '{"v":1,'],
    [key('b.b.b.b'), good('b.b.b.b').replace('"v":1', '"v":2')],
    [key('c.c.c.c'), good('d.d.d.d')],
    [key('e.e.e.e'), good('e.e.e.e').replace('[80]', '[70000]')],
    [`${keys.prefix('services')}UPPER.prod.cart.v1`, '{}'],
    [`${keys.prefix('services')}wine/bottle`, '\u0000\u0001'],
  ];
  for (const [at, value] of faults) await etcd.etcdctl('put', at, '--', value.replaceAll('\u0000', '?'));
  await etcd.etcdctl('put', key('good.one.two.three'), good('good.one.two.three'));
  await eventually(() => seen.has(key('good.one.two.three')), 'the good one');
  await eventually(() => keyspace.problems.size === faults.length, 'all faults');
  relay.cut();
  relay.mend();
  await eventually(() => !keyspace.live, 'the cut');
  await eventually(() => keyspace.live, 'whole again', 20_000);
  const warned = logs.of('warn').filter(({ message }) => message.includes('cannot be read'));
  assert.equal(warned.map((line) => line.key).sort(), faults.map(([at]) => at).sort());
  assert.ok(warned.every(({ reason }) => (reason ?? '').length > 10));
  await keyspace.close();
});

test('a follower that drifted from etcd is found by comparison and listed again', async () => {
  const logs = keepLogs();
  const inner = connect({ auditIntervalMs: 200, log: logs.log });
  const mirror = new Mirror(inner, '/audit/');
  await direct.txn([], [put('/audit/a', '1')]);
  await eventually(() => mirror.entries.size === 1, 'the entry');
  await eventually(
    async () => {
      await direct.txn([], [put('/audit/b', String(Math.random()))]);
      return mirror.batches.length > 8;
    },
    'several comparisons among changes',
    10_000,
  );
  assert.is(mirror.batches.filter(({ kind }) => kind === 'snapshot').length, 1, 'no false alarm');
  assert.is(logs.of('warn').length, 0);
  await mirror.follower.close();
});

test('a member restarted empty: followers show exactly what it holds, and revisions begin again', async () => {
  const kv = connect();
  const mirror = new Mirror(kv, '/wipe/');
  for (let i = 0; i < 50; i++) await direct.txn([], [put('/wipe/old', String(i))]);
  await eventually(() => mirror.live && mirror.entries.has('/wipe/old'), 'live');
  const before = mirror.revision;
  relay.cut();
  await etcd.stop();
  await rm(join(etcd.dataDir, 'member'), { recursive: true, force: true });
  const empty = await startPrivateEtcd({ dataDir: etcd.dataDir, log: SILENT });
  relay.target(empty.endpoint);
  relay.mend();
  const fresh = connectEtcd({ endpoints: [empty.endpoint], log: SILENT });
  clients.push(fresh);
  try {
    await eventually(() => mirror.live && mirror.entries.size === 0, 'the emptiness', 20_000);
    const { revision } = await fresh.txn([], [put('/wipe/new', '1')]);
    assert.ok(revision < before);
    await eventually(() => mirror.entries.has('/wipe/new'), 'the new entry');
    assert.is(mirror.revision, revision);
    await mirror.follower.close();
  } finally {
    await empty.stop();
  }
});

test.run();
