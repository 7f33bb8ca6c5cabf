import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  applyService,
  claimInstance,
  claimSubnet,
  publishInstance,
  publishNode,
} from '../../../coordinator/claims.ts';
import { Keyspace, type KeyspaceListener } from '../../../coordinator/keyspace.ts';
import { MemoryStore } from '../../../coordinator/memory.ts';
import { RouteFollower } from '../../../edge/routes/follow.ts';
import { Keys } from '../../../src/keys.ts';
import { SILENT } from '../../../src/log.ts';
import { DEFAULT_NETWORK_CONFIG as config } from '../../../src/records.ts';
import { rejectsWith } from '../../conformance/kv.ts';
import { CART, descriptor, instance, node } from '../../support/sample.ts';
import { settle, VirtualTime } from '../../support/time.ts';

const keys = new Keys();

function world() {
  const time = new VirtualTime();
  const store = new MemoryStore(() => time.monotonicMs());
  const kv = store.connect();
  const follow = () =>
    new RouteFollower({
      keys,
      open: (listener) => new Keyspace(kv, keys, SILENT, listener),
      after: (ms, run) => time.after(ms, run),
    });
  return { time, store, kv, follow };
}

test('RouteFollower: the table is synced after the first listing and then follows', async () => {
  const { kv, follow, store } = world();
  const before = await applyService(kv, keys, config, descriptor());
  const routes = follow();
  assert.not.ok(routes.table.synced, '"I do not know yet" is another answer than "there is none"');
  const deltas: string[] = [];
  routes.onDelta(({ services, nodes }) => void deltas.push([...services, ...nodes].join(' ')));
  await settle();
  assert.ok(routes.table.synced && routes.live);
  assert.equal(routes.table.service(CART), before.service);
  const claim = await claimSubnet(kv, keys, config, { node: 'n1', cluster: 'lab' });
  const presence = await kv.grant(15);
  const n1 = node('n1', 1, { subnet: claim.subnet, epoch: claim.epoch });
  await publishNode(kv, keys, n1, presence);
  const held = await claimInstance(kv, keys, config, {
    service: CART,
    instance: 1,
    node: 'n1',
    lease: claim.lease,
  });
  const one = instance(n1, CART, 1, { instanceIp: held.instanceIp });
  const revision = await publishInstance(kv, keys, claim.subnet, one, presence);
  await routes.waitFor(revision, 1_000);
  assert.equal(routes.table.instance(CART, 1), one);
  assert.equal(routes.table.nameOf(held.instanceIp), { service: CART, instance: 1 });
  assert.ok(deltas.includes(CART) && deltas.includes('n1'));
  await kv.revoke(presence);
  await settle();
  assert.is(routes.table.instance(CART, 1), undefined);
  assert.is(routes.table.node('n1'), undefined);
  assert.ok(routes.table.service(CART));
  assert.is(routes.table.revision, store.revision);
  await routes.close();
});

test('RouteFollower.waitFor resolves with the write itself, and rejects with timeout when it does not come', async () => {
  const { kv, follow, time } = world();
  const routes = follow();
  await settle();
  const { revision } = await applyService(kv, keys, config, descriptor());
  await routes.waitFor(revision, 1_000);
  assert.ok(routes.table.service(CART));
  await routes.waitFor(revision, 1_000);
  await routes.waitFor(0, 1_000);
  kv.partitioned = true;
  const late = rejectsWith('timeout', () => routes.waitFor(revision + 1, 1_000));
  await time.advance(1_000);
  const error = await late;
  assert.match(error.message, `did not bring revision ${revision + 1} within 1000 ms`);
  await routes.close();
});

test('RouteFollower shows after an outage exactly what etcd holds, deletions included', async () => {
  const { store, follow, kv } = world();
  const other = store.connect();
  const routes = follow();
  const lives: boolean[] = [];
  routes.onLive((live) => void lives.push(live));
  const gone = await applyService(other, keys, config, descriptor());
  await settle();
  kv.partitioned = true;
  await settle();
  assert.not.ok(routes.live);
  assert.ok(routes.table.service(CART), 'etcd away changes nothing');
  await other.txn([], [{ kind: 'delete', key: keys.build({ kind: 'service', service: CART }) }]);
  store.compact();
  kv.partitioned = false;
  await settle();
  assert.is(routes.table.service(CART), undefined);
  assert.is(routes.table.nameOf(gone.service.addresses.closest!), undefined);
  assert.equal(lives, [true, false, true]);
  await routes.close();
});

test('RouteFollower: a listing of some subtrees asks for no others', async () => {
  const { kv, time } = world();
  await applyService(kv, keys, config, descriptor());
  const open = (listener: KeyspaceListener) => new Keyspace(kv, keys, SILENT, listener);
  const after = (ms: number, run: () => void) => time.after(ms, run);
  const routes = new RouteFollower({ keys, open, after, subtrees: ['nodes'] });
  await settle();
  assert.ok(routes.table.synced);
  assert.equal([...routes.keyspace.paths()].sort(), [keys.prefix('config'), keys.prefix('nodes')]);
  assert.is([...routes.table.services()].length, 0);
  await routes.close();
});

test('RouteFollower.problems tells what is ignored', async () => {
  const { kv, follow } = world();
  const routes = follow();
  await kv.txn([], [{ kind: 'put', key: keys.build({ kind: 'service', service: CART }), value: '{}' }]);
  await settle();
  assert.is(routes.problems.size, 1);
  assert.is(routes.table.service(CART), undefined);
  await routes.close();
});

test.run();
