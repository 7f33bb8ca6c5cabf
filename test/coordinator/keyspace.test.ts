import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { followKeyspace, type Keyspace, type KeyspaceBatch } from '../../coordinator/keyspace.ts';
import type { Follower, FollowListener, Kv, KvBatch, KvEntry } from '../../coordinator/kv.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { Keys } from '../../src/keys.ts';
import { encodeNode, encodeService } from '../../src/records.ts';
import { keepLogs } from '../support/logs.ts';
import { CART, descriptor, node, sid } from '../support/sample.ts';
import { settle } from '../support/time.ts';

const keys = new Keys();
const serviceKey = keys.build({ kind: 'service', service: CART });
const cart = encodeService({ id: CART, descriptor: descriptor(), addresses: {} });
const put = (key: string, value: string) => ({ kind: 'put', key, value }) as const;

function open(kv: Kv, paths: readonly string[]) {
  const logs = keepLogs();
  const batches: KeyspaceBatch[] = [];
  const lives: [string, boolean][] = [];
  const keyspace: Keyspace = followKeyspace(kv, keys, paths, logs.log, {
    batch: (batch) => void batches.push(batch),
    live: (path, live) => void lives.push([path, live]),
  });
  return { keyspace, batches, lives, logs };
}

/** A Kv of which only `follow` is asked, and which says exactly what the test wants, in any order. */
function script(): { kv: Kv; tell: (batch: KvBatch) => void } {
  let listener: FollowListener | undefined;
  const follower: Follower = { close: async () => {} };
  const kv = {
    follow: (_: string, given: FollowListener) => {
      listener = given;
      return follower;
    },
  } as unknown as Kv;
  return { kv, tell: (batch) => listener!.batch(batch) };
}
const entry = (key: string, value: string, modRevision: number, createRevision = modRevision): KvEntry => ({
  key,
  value,
  createRevision,
  modRevision,
});

test('followKeyspace decodes records with their revisions, and tells deletions as keys', async () => {
  const kv = new MemoryStore(() => 0).connect();
  const n1 = node('n1', 1);
  const nodeKey = keys.build({ kind: 'node', cluster: 'lab', node: 'n1' });
  const first = await kv.txn([], [put(nodeKey, encodeNode(n1))]);
  const { batches, keyspace } = open(kv, [keys.prefix('nodes'), keys.prefix('services')]);
  await settle();
  assert.ok(keyspace.complete && keyspace.live);
  const [seen] = batches.flatMap(({ puts }) => puts);
  assert.equal(seen, {
    kind: 'node',
    key: { kind: 'node', cluster: 'lab', node: 'n1' },
    value: n1,
    createRevision: first.revision,
    modRevision: first.revision,
  });
  await kv.txn([], [put(serviceKey, cart)]);
  const last = await kv.txn([], [{ kind: 'delete', key: nodeKey }]);
  await settle();
  assert.equal(batches.at(-1), {
    kind: 'changes',
    path: keys.prefix('nodes'),
    revision: last.revision,
    puts: [],
    deletes: [{ kind: 'node', cluster: 'lab', node: 'n1' }],
    brought: [last.revision],
  });
  await keyspace.close();
});

test('followKeyspace counts an unreadable value as absent, reports it once with its key, and forgets it when mended', async () => {
  const kv = new MemoryStore(() => 0).connect();
  await kv.txn([], [put(serviceKey, cart)]);
  const { keyspace, batches, logs } = open(kv, [keys.prefix('services')]);
  await settle();
  await kv.txn([], [put(serviceKey, '{"v":1,')]);
  await settle();
  assert.equal(batches.at(-1)?.deletes, [{ kind: 'service', service: CART }]);
  assert.match(keyspace.problems.get(serviceKey)?.message ?? '', `${serviceKey}: is not JSON`);
  await kv.txn([], [put(serviceKey, '{"v":1,')]);
  kv.cut();
  await settle();
  assert.is(logs.of('warn').length, 1, 'the same fault again, and a new listing, say nothing new');
  assert.is(logs.of('warn')[0]?.key, serviceKey);
  await kv.txn([], [put(serviceKey, cart.replace('"v":1', '"v":7'))]);
  await settle();
  assert.match(keyspace.problems.get(serviceKey)?.message ?? '', 'has version 7');
  assert.is(logs.of('warn').length, 2);
  await kv.txn([], [put(serviceKey, cart)]);
  await settle();
  assert.is(keyspace.problems.size, 0);
  assert.is(batches.at(-1)?.puts.length, 1);
  await kv.txn([], [put(serviceKey, 'x')]);
  await settle();
  await kv.txn([], [{ kind: 'delete', key: serviceKey }]);
  await settle();
  assert.is(keyspace.problems.size, 0);
});

test('followKeyspace reports foreign keys under our prefix and goes on', async () => {
  const kv = new MemoryStore(() => 0).connect();
  const foreign = `${keys.prefix('services')}wine/bottle`;
  await kv.txn([], [put(foreign, 'red'), put(serviceKey, cart)]);
  const { keyspace, batches } = open(kv, [keys.prefix('services')]);
  await settle();
  assert.is(batches[0]?.puts.length, 1);
  assert.match(keyspace.problems.get(foreign)?.message ?? '', foreign);
});

test('followKeyspace turns a new listing into the difference, deletions included', () => {
  const { kv, tell } = script();
  const { batches, keyspace } = open(kv, [keys.prefix('services')]);
  const ids = ['a.b.c.d', 'a.b.c.e', 'a.b.c.f'].map(sid);
  const [a, b, c] = ids.map((service) => keys.build({ kind: 'service', service })) as [
    string,
    string,
    string,
  ];
  const value = (i: number): string =>
    encodeService({ id: ids[i]!, descriptor: descriptor(ids[i]), addresses: {} });
  tell({ kind: 'snapshot', entries: [entry(a, value(0), 5), entry(b, value(1), 6)], revision: 6 });
  tell({ kind: 'snapshot', entries: [entry(a, value(0), 5), entry(c, value(2), 9)], revision: 10 });
  assert.equal(
    batches.map(({ puts, deletes }) => [puts.map(({ modRevision }) => modRevision), deletes.length]),
    [
      [[5, 6], 0],
      [[9], 1],
    ],
  );
  assert.equal(batches[1]?.deletes, [{ kind: 'service', service: ids[1] }]);
  assert.is(keyspace.size, 2);
});

test('followKeyspace sees that a restored store, written past the old head, holds another value under an old revision', () => {
  const { kv, tell } = script();
  const { batches } = open(kv, [keys.prefix('services')]);
  const other = encodeService({ id: CART, descriptor: descriptor(CART, { ports: [443] }), addresses: {} });
  tell({ kind: 'snapshot', entries: [entry(serviceKey, cart, 5)], revision: 6 });
  tell({ kind: 'snapshot', entries: [entry(serviceKey, cart, 5)], revision: 8 });
  tell({ kind: 'snapshot', entries: [entry(serviceKey, other, 5)], revision: 9 });
  assert.equal(
    batches.map(({ puts }) => puts.length),
    [1, 0, 1],
  );
});

test('followKeyspace throws away events that are older than what it holds', () => {
  const { kv, tell } = script();
  const { batches, keyspace } = open(kv, [keys.prefix('services')]);
  tell({ kind: 'snapshot', entries: [entry(serviceKey, cart, 5)], revision: 8 });
  tell({ kind: 'changes', changes: [{ kind: 'delete', key: serviceKey, revision: 4 }], revision: 4 });
  tell({ kind: 'changes', changes: [{ kind: 'put', entry: entry(serviceKey, 'old', 7) }], revision: 7 });
  assert.is(keyspace.staleEvents, 2);
  assert.is(keyspace.size, 1);
  assert.is(keyspace.problems.size, 0);
  assert.ok(batches.slice(1).every(({ puts, deletes }) => puts.length + deletes.length === 0));
  assert.is(keyspace.reached, 8, 'the revision never goes back with an event');
  tell({
    kind: 'changes',
    changes: [
      { kind: 'delete', key: serviceKey, revision: 9 },
      { kind: 'put', entry: entry(serviceKey, cart, 10) },
    ],
    revision: 10,
  });
  assert.equal(batches.at(-1)?.brought, [9, 10]);
});

test('followKeyspace believes a store that began again at a lower revision', async () => {
  const store = new MemoryStore(() => 0);
  const kv = store.connect();
  for (let i = 0; i < 10; i++) await kv.txn([], [put(serviceKey, cart)]);
  const { keyspace, batches } = open(kv, [keys.prefix('services')]);
  await settle();
  store.wipe();
  await settle();
  assert.equal(batches.at(-1)?.deletes, [{ kind: 'service', service: CART }]);
  await kv.txn([], [put(serviceKey, cart)]);
  await settle();
  assert.is(batches.at(-1)?.puts.length, 1, 'revision 2 is news again');
  assert.is(keyspace.reached, 2);
});

test('Keyspace.unfollow forgets what lies below the path, and only that', async () => {
  const kv = new MemoryStore(() => 0).connect();
  await kv.txn([], [put(serviceKey, cart), put(`${keys.prefix('nodes')}bad`, 'x')]);
  const { keyspace, batches } = open(kv, [keys.prefix('services'), keys.prefix('nodes')]);
  await settle();
  assert.is(keyspace.problems.size, 1);
  await keyspace.unfollow(keys.prefix('services'));
  assert.equal(batches.at(-1)?.deletes, [{ kind: 'service', service: CART }]);
  assert.is(keyspace.problems.size, 1);
  await keyspace.unfollow(keys.prefix('nodes'));
  assert.is(keyspace.problems.size, 0);
  const told = batches.length;
  await kv.txn([], [put(serviceKey, cart)]);
  await settle();
  assert.is(batches.length, told);
});

test('Keyspace.live is false while any path is cut off', async () => {
  const kv = new MemoryStore(() => 0).connect();
  const { keyspace, lives } = open(kv, [keys.prefix('services')]);
  await settle();
  kv.partitioned = true;
  await settle();
  assert.not.ok(keyspace.live);
  assert.ok(keyspace.complete, 'what was told stays valid');
  kv.partitioned = false;
  await settle();
  assert.equal(
    lives.map(([, live]) => live),
    [true, false, true],
  );
});

test('followKeyspace tells of each key its last state, however many revisions one batch holds', async () => {
  const { kv, tell } = script();
  const { batches, keyspace } = open(kv, [keys.prefix('services')]);
  const gone = keys.build({ kind: 'service', service: sid('a.a.a.a') });
  const other = encodeService({ id: sid('a.a.a.a'), descriptor: descriptor(sid('a.a.a.a')), addresses: {} });
  tell({ kind: 'snapshot', entries: [entry(gone, other, 1)], revision: 1 });
  tell({
    kind: 'changes',
    revision: 6,
    changes: [
      { kind: 'put', entry: entry(gone, other, 2) },
      { kind: 'put', entry: entry(serviceKey, cart, 3) },
      { kind: 'delete', key: serviceKey, revision: 4 },
      { kind: 'put', entry: entry(serviceKey, cart, 5) },
      { kind: 'delete', key: gone, revision: 6 },
    ],
  });
  const { puts, deletes, brought } = batches.at(-1)!;
  assert.equal(
    puts.map(({ key, modRevision }) => [key, modRevision]),
    [[{ kind: 'service', service: CART }, 5]],
  );
  assert.equal(deletes, [{ kind: 'service', service: sid('a.a.a.a') }]);
  assert.equal(brought, [2, 3, 4, 5, 6]);
  assert.is(keyspace.staleEvents, 0);
  await keyspace.close();
});

test.run();
