// What goes wrong with a real etcd, and what followers, claims and leases make of it.
//
//   client ── relay ── etcd
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { applyService, claimSubnet, publishNode } from '../../coordinator/claims.ts';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import { systemTime } from '../../coordinator/etcd/time.ts';
import { followKeyspace } from '../../coordinator/keyspace.ts';
import type { Kv, LeaseId } from '../../coordinator/kv.ts';
import { keepLease } from '../../coordinator/lease.ts';
import { fencedKv } from '../../coordinator/reconcile.ts';
import { startPrivateEtcd } from '../../edge/io/etcd_private.ts';
import type { EdgewayError } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { PING_INTERVAL_MS, PING_TIMEOUT_MS, REQUEST_TIMEOUT_MS } from '../../src/limits.ts';
import { SILENT } from '../../src/log.ts';
import { DEFAULT_NETWORK_CONFIG as config, encodeService } from '../../src/records.ts';
import { Mirror, rejectsWith } from '../conformance/kv.ts';
import { startTestEtcd, startTwinEtcds, type TestEtcd } from '../support/etcd.ts';
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

function connect(
  more: { auditIntervalMs?: number; requestTimeoutMs?: number; log?: typeof SILENT } = {},
): Kv {
  const kv = connectEtcd({ endpoints: [relay.endpoint], log: SILENT, ...more });
  clients.push(kv);
  return kv;
}

test.before(async () => {
  etcd = await startTestEtcd();
  relay = await Relay.to(etcd.endpoint);
  direct = connectEtcd({ endpoints: [etcd.endpoint], log: SILENT });
});
// What one test broke is whole for the next.
test.after.each(() => relay.mend());
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
  assert.ok(performance.now() - started < 5 * REQUEST_TIMEOUT_MS, 'it does not wait for the member');
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

test('a lease that ends while a transaction is on its way: the put is refused whole', async () => {
  const kv = connect({ requestTimeoutMs: 60_000 });
  // A connection that stands still for longer than a ping may be given up; then the transaction never arrives.
  for (let tries = 0; ; tries++) {
    const lease = await kv.grant(2);
    await kv.txn([], [{ ...put('/lease/probe', '1'), lease }]);
    relay.freeze();
    const late = kv.txn([], [put('/lease/durable', '1'), { ...put('/lease/a', '1'), lease }]).then(
      () => 'applied',
      (error: EdgewayError) => error.code,
    );
    await eventually(async () => (await direct.get('/lease/probe')) === undefined, 'its end', 30_000);
    relay.mend();
    const outcome = await late;
    assert.is(await direct.get('/lease/durable'), undefined, 'all or nothing');
    if (outcome === 'coordination_unavailable' && tries < 5) continue;
    assert.is(outcome, 'lease_lost');
    return;
  }
});

test('claims under a lease that has ended say lease_lost', async () => {
  const kv = connect();
  const lease = await kv.grant(60);
  await kv.revoke(lease);
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

test('a holder whose role lease ran out writes nothing once another holds the role', async () => {
  const kv = connect();
  const leader = keys.build({ kind: 'rootLeader' });
  const lease = await kv.grant(2);
  const { revision } = await kv.txn([], [{ ...put(leader, '{"v":1,"holder":"a"}'), lease }]);
  let fenced = 0;
  const late = fencedKv(kv, { key: leader, createRevision: revision }, () => fenced++);
  await eventually(async () => (await kv.get(leader)) === undefined, 'the lease to run out', 30_000);
  await kv.txn([{ key: leader, createRevision: 0 }], [put(leader, '{"v":1,"holder":"b"}')]);
  await rejectsWith('lease_lost', () => applyService(late, keys, config, descriptor()));
  assert.is(fenced, 1);
  assert.equal([await kv.keys(keys.prefix('services')), await kv.keys(keys.prefix('addresses'))], [[], []]);
  await kv.txn([], [{ kind: 'delete', key: leader }]);
});

test('clocks do not matter: a keeper judges by its own monotonic clock, whatever time it is elsewhere', async () => {
  const kv = connect();
  const held: LeaseId[] = [];
  const lost: string[] = [];
  const store = new Mirror(direct, '/clock/');
  let stoppedFirst = false;
  // This node's clock started a year away from everybody's; only differences count.
  const keeper = keepLease({
    kv,
    ttlS: 10,
    time: { monotonicMs: () => systemTime.monotonicMs() + 31_536_000_000, after: systemTime.after },
    random: () => 0.5,
    log: SILENT,
    onHeld: async (lease) => {
      held.push(lease);
      await kv.txn([], [{ ...put('/clock/node', 'here'), lease }]);
    },
    onLost: (_, cause) => {
      lost.push(cause);
      stoppedFirst = store.entries.has('/clock/node');
    },
  });
  await eventually(() => keeper.renewals >= 3, 'three renewals', 60_000);
  assert.equal([held.length, lost.length], [1, 0]);
  relay.cut();
  await eventually(() => lost.length === 1, 'the loss', 30_000);
  assert.ok(stoppedFirst, 'the keeper stops before the store ends it');
  relay.mend();
  await eventually(
    async () => held.length === 2 && (await direct.get('/clock/node'))?.lease === held[1],
    'publishing under another lease',
    20_000,
  );
  await keeper.stop(true);
  assert.is(await direct.get('/clock/node'), undefined);
  await store.follower.close();
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

test('a follower among changes raises no false alarm when it compares itself with etcd', async () => {
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

test('a follower that drifted from etcd is found by comparison and listed again', async () => {
  // Its requests go to one etcd and its watch to its twin, whose events are none of the first one's: the way that a
  // lost or invented event looks from here. It works because the two travel on connections of their own.
  const logs = keepLogs();
  const [told, twin] = await startTwinEtcds();
  const teller = connectEtcd({ endpoints: [told.endpoint], log: SILENT });
  const stranger = connectEtcd({ endpoints: [twin.endpoint], log: SILENT });
  const crossed = await Relay.to(told.endpoint);
  const kv = connectEtcd({ endpoints: [crossed.endpoint], log: logs.log, auditIntervalMs: 200 });
  try {
    const { revision: head } = await teller.txn([], [put('/drift/a', '1')]);
    for (let ahead = 0; ahead < head; )
      ahead = (await stranger.txn([], [put('/elsewhere', String(ahead))])).revision;
    await kv.get('/drift/a');
    crossed.target(twin.endpoint);
    const mirror = new Mirror(kv, '/drift/');
    await eventually(() => mirror.live, 'live');
    const { revision } = await stranger.txn([], [put('/drift/invented', '1')]);
    await eventually(() => mirror.entries.has('/drift/invented'), 'the event that never was');
    // Both must know the revision to compare.
    for (let mine = head; mine < revision; )
      mine = (await teller.txn([], [put('/elsewhere', String(mine))])).revision;
    await eventually(
      () => mirror.batches.filter(({ kind }) => kind === 'snapshot').length >= 2,
      'a new listing',
      30_000,
    );
    assert.equal(mirror.values(), { '/drift/a': '1' });
    assert.match(logs.of('warn')[0]?.message ?? '', 'held state differs from etcd');
    await mirror.follower.close();
  } finally {
    await Promise.all([kv.close(), teller.close(), stranger.close()]);
    await crossed.close();
    await Promise.all([told.remove(), twin.remove()]);
  }
});

test('an endpoint that leads to another cluster for requests or for the watch alone: both follow, said once', async () => {
  const other = await startTestEtcd();
  const stranger = connectEtcd({ endpoints: [other.endpoint], log: SILENT });
  try {
    await direct.txn([], [put('/moved/old', '1')]);
    await stranger.txn([], [put('/moved/new', '1')]);
    // The requests' connection is the older one.
    for (const [what, from, to] of [
      ['requests', 0, 1],
      ['watch', 1, 2],
    ] as const) {
      const logs = keepLogs();
      const crossed = await Relay.to(etcd.endpoint);
      const kv = connectEtcd({ endpoints: [crossed.endpoint], log: logs.log });
      const mirror = new Mirror(kv, '/moved/');
      await eventually(() => mirror.live && mirror.entries.has('/moved/old'), 'live');
      assert.is(crossed.connections, 2);
      crossed.target(other.endpoint);
      crossed.drop(from, to);
      await eventually(
        async () => {
          // A node renews its lease every few seconds; whatever is asked for tells.
          await kv.get('/elsewhere').catch(() => {});
          return mirror.live && mirror.entries.has('/moved/new');
        },
        `${what}: what the other one holds`,
        10_000,
      );
      assert.equal(mirror.values(), { '/moved/new': '1' });
      const { revision } = await kv.txn([], [put(`/moved/${what}`, '1')]);
      await eventually(() => mirror.revision === revision, 'its own write');
      assert.ok(await stranger.get(`/moved/${what}`));
      await stranger.txn([], [{ kind: 'delete', key: `/moved/${what}` }]);
      const warned = logs.of('warn');
      assert.equal(
        warned.map(({ message }) => message),
        ['another etcd answers; listing everything again'],
      );
      assert.match(warned[0]?.reason ?? '', /etcd cluster ([0-9a-f]+) answers where (?!\1)[0-9a-f]+ did/);
      await kv.close();
      await crossed.close();
    }
  } finally {
    await stranger.close();
    await other.remove();
  }
});

test('compaction between two pages of a listing: it begins again and is whole', async () => {
  const kv = connect();
  const count = 20_000;
  for (let i = 0; i < count; i += 100)
    await direct.txn(
      [],
      Array.from({ length: 100 }, (_, j) => put(`/pages/${i + j}`, 'x'.repeat(200))),
    );
  await kv.get('/pages/0');
  for (let tries = 0; ; tries++) {
    const { revision: before } = await direct.txn([], [put('/elsewhere', 'before')]);
    const answered = relay.answered;
    const listing = kv.range('/pages/');
    await eventually(() => relay.answered - answered > 100_000, 'a page');
    const { revision } = await direct.txn([], [put('/elsewhere', 'after')]);
    await etcd.etcdctl('compact', String(revision));
    const listed = await listing;
    assert.is(listed.entries.length, count);
    assert.is(new Set(listed.entries.map(({ key }) => key)).size, count);
    // The first page had been answered: a later revision can only come from a second beginning.
    if (listed.revision > before) return;
    assert.ok(tries < 20, 'no listing was ever caught by a compaction');
  }
});

test('a member restarted empty: followers show exactly what it holds, revisions begin again, it is said once', async () => {
  const logs = keepLogs();
  const kv = connect({ log: logs.log });
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
    assert.equal(
      logs.of('warn').map(({ message }) => message),
      ['another etcd answers; listing everything again'],
    );
    await mirror.follower.close();
  } finally {
    await empty.stop();
  }
});

test.run();
