// What every Kv must do, run over the store in memory and over a real etcd. Each case gets a prefix of its own, so the
// cases need no order. Waiting is polling for a condition with a bound.
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { Follower, Kv, KvBatch, KvEntry } from '../../coordinator/kv.ts';
import { EdgewayError, type ErrorCode } from '../../src/error.ts';
import { eventually } from '../support/eventually.ts';

export interface KvUnderTest {
  /** A client; the second and later ones are other clients of the same store. */
  connect(): Kv;
  /** Lets that much time pass for leases. */
  advance(ms: number): Promise<void>;
  /** Forgets the history so far. */
  compact(): Promise<void>;
  /** Breaks the connections of that client for a while, then restores them; `meanwhile` runs in between. */
  interrupt(kv: Kv, meanwhile: () => Promise<void>): Promise<void>;
  close(): Promise<void>;
}

/** A mirror of a path, made only of what a follower is told. */
export class Mirror {
  readonly entries = new Map<string, KvEntry>();
  readonly batches: KvBatch[] = [];
  live = false;
  revision = 0;
  readonly follower: Follower;

  constructor(kv: Kv, path: string) {
    this.follower = kv.follow(path, {
      batch: (batch) => {
        this.batches.push(batch);
        this.revision = batch.revision;
        if (batch.kind === 'snapshot') {
          this.entries.clear();
          for (const entry of batch.entries) this.entries.set(entry.key, entry);
        } else
          for (const change of batch.changes)
            if (change.kind === 'put') this.entries.set(change.entry.key, change.entry);
            else this.entries.delete(change.key);
      },
      live: (live) => {
        this.live = live;
      },
    });
  }
  values(): Record<string, string> {
    return Object.fromEntries([...this.entries].map(([key, { value }]) => [key, value]));
  }
}

export async function rejectsWith(code: ErrorCode, call: () => Promise<unknown>): Promise<EdgewayError> {
  try {
    await call();
  } catch (error) {
    assert.instance(error, EdgewayError);
    assert.is((error as EdgewayError).code, code, (error as EdgewayError).message);
    return error as EdgewayError;
  }
  throw new Error(`expected a rejection with ${code}`);
}

export function kvSuite(name: string, open: () => Promise<KvUnderTest>): void {
  const test = suite<{ under: KvUnderTest; kv: Kv }>(`Kv conformance: ${name}`);
  let cases = 0;
  const fresh = (): string => `/conformance/${process.pid}-${++cases}/`;
  const put = (key: string, value: string) => ({ kind: 'put', key, value }) as const;

  test.before(async (context) => {
    context.under = await open();
    context.kv = context.under.connect();
  });
  test.after(async ({ under }) => under.close());

  test('txn creates only what is absent, at one revision for all its writes', async ({ kv }) => {
    const at = fresh();
    const first = await kv.txn(
      [{ key: `${at}a`, createRevision: 0 }],
      [put(`${at}a`, '1'), put(`${at}b`, '2')],
    );
    assert.ok(first.succeeded);
    const second = await kv.txn([{ key: `${at}a`, createRevision: 0 }], [put(`${at}a`, 'x')]);
    assert.not.ok(second.succeeded);
    const entry = await kv.get(`${at}a`);
    assert.equal(entry, {
      key: `${at}a`,
      value: '1',
      createRevision: first.revision,
      modRevision: first.revision,
    });
    assert.equal(second.seen, [entry], 'a refusal shows what stood in the way');
    const third = await kv.txn(
      [
        { key: `${at}none`, createRevision: 0 },
        { key: `${at}a`, modRevision: 1 },
      ],
      [],
    );
    assert.equal(third.seen, [undefined, entry]);
    assert.is((await kv.get(`${at}b`))?.modRevision, first.revision);
  });

  test('txn compares modRevision, keeps createRevision on change, begins anew after a delete', async ({
    kv,
  }) => {
    const key = `${fresh()}k`;
    const one = await kv.txn([], [put(key, '1')]);
    const two = await kv.txn([{ key, modRevision: one.revision }], [put(key, '2')]);
    assert.ok(two.succeeded);
    assert.not.ok((await kv.txn([{ key, modRevision: one.revision }], [put(key, '3')])).succeeded);
    const entry = await kv.get(key);
    assert.is(entry?.createRevision, one.revision);
    assert.is(entry?.modRevision, two.revision);
    await kv.txn([], [{ kind: 'delete', key }]);
    assert.is(await kv.get(key), undefined);
    const three = await kv.txn([{ key, createRevision: 0 }], [put(key, '4')]);
    assert.is((await kv.get(key))?.createRevision, three.revision);
  });

  test('txn with nothing to delete leaves the revision alone', async ({ kv }) => {
    const at = fresh();
    const before = (await kv.txn([], [put(`${at}x`, '')])).revision;
    assert.is((await kv.txn([], [{ kind: 'delete', key: `${at}none` }])).revision, before);
  });

  test('txn refuses more than 128 operations and one key twice', async ({ kv }) => {
    const at = fresh();
    await rejectsWith('internal', () =>
      kv.txn(
        [],
        Array.from({ length: 129 }, (_, i) => put(`${at}${i}`, '')),
      ),
    );
    const twice = await kv.txn([], [put(`${at}k`, '1'), put(`${at}k`, '2')]).then(
      () => undefined,
      (error: unknown) => error,
    );
    assert.instance(twice, EdgewayError);
    assert.is((await kv.range(at)).entries.length, 0);
  });

  test('range and keys list a subtree in key order, more than a page of it, and nothing beside it', async ({
    kv,
  }) => {
    const at = fresh();
    const count = 2_300;
    for (let i = 0; i < count; i += 100)
      await kv.txn(
        [],
        Array.from({ length: 100 }, (_, j) => put(`${at}${String(i + j).padStart(5, '0')}`, String(i + j))),
      );
    await kv.txn([], [put(`${at.slice(0, -1)}-beside`, ''), put(`${at.slice(0, -1)}0`, '')]);
    const { entries, revision } = await kv.range(at);
    assert.is(entries.length, count);
    assert.ok(entries.every((entry, i) => entry.value === String(i)));
    assert.ok(entries.every((entry) => entry.modRevision <= revision));
    assert.equal(
      await kv.keys(at),
      entries.map(({ key }) => key),
    );
    assert.equal(await kv.keys(at, { from: `${at}00010`, limit: 2 }), [`${at}00010`, `${at}00011`]);
    assert.equal(await kv.keys(at, { from: `${at}02299x`, limit: 2 }), []);
    assert.is((await kv.range(`${at}00007`)).entries.length, 1, 'without a slash: exactly that key');
  });

  test('follow tells a snapshot, then changes in order, deletions included', async ({ kv }) => {
    const at = fresh();
    await kv.txn([], [put(`${at}a`, '1'), put(`${at}b`, '1')]);
    const mirror = new Mirror(kv, at);
    await eventually(() => mirror.live, 'live');
    assert.is(mirror.batches[0]?.kind, 'snapshot');
    await kv.txn([], [put(`${at}a`, '2'), { kind: 'delete', key: `${at}b` }]);
    const last = await kv.txn([], [put(`${at}c`, '3')]);
    await eventually(() => mirror.revision === last.revision, 'the last change');
    assert.equal(mirror.values(), { [`${at}a`]: '2', [`${at}c`]: '3' });
    assert.is(mirror.batches.filter(({ kind }) => kind === 'snapshot').length, 1);
    await mirror.follower.close();
    const told = mirror.batches.length;
    await kv.txn([], [put(`${at}d`, '4')]);
    const other = new Mirror(kv, at);
    await eventually(() => other.entries.size === 3, 'the other follower');
    assert.is(mirror.batches.length, told, 'a closed follower hears nothing');
    await other.follower.close();
  });

  test('follow of one key does not tell of a key that begins with it', async ({ kv }) => {
    const at = fresh();
    const mirror = new Mirror(kv, `${at}a`);
    await eventually(() => mirror.live, 'live');
    await kv.txn([], [put(`${at}ab`, 'x')]);
    const { revision } = await kv.txn([], [put(`${at}a`, 'y')]);
    await eventually(() => mirror.revision === revision, 'the key');
    assert.equal(mirror.values(), { [`${at}a`]: 'y' });
    await mirror.follower.close();
  });

  test('follow keeps many paths of one client apart, and a burst of 3,000 changes whole', async ({ kv }) => {
    const at = fresh();
    const mirrors = Array.from({ length: 30 }, (_, i) => new Mirror(kv, `${at}${i}/`));
    await eventually(() => mirrors.every(({ live }) => live), 'all live');
    for (let round = 0; round < 25; round++)
      await kv.txn(
        [],
        Array.from({ length: 120 }, (_, i) => put(`${at}${i % 30}/${round}-${i}`, String(i))),
      );
    await eventually(() => mirrors.every(({ entries }) => entries.size === 100), 'all 3,000');
    for (const [i, mirror] of mirrors.entries())
      assert.ok([...mirror.entries.keys()].every((key) => key.startsWith(`${at}${i}/`)));
    await Promise.all(mirrors.map(({ follower }) => follower.close()));
  });

  test('follow survives an interruption with compaction and shows deletions that it missed', async ({
    under,
  }) => {
    const at = fresh();
    const watcher = under.connect();
    const writer = under.connect();
    await writer.txn([], [put(`${at}old`, '1'), put(`${at}kept`, '1')]);
    const mirror = new Mirror(watcher, at);
    await eventually(() => mirror.live, 'live');
    await under.interrupt(watcher, async () => {
      await writer.txn([], [{ kind: 'delete', key: `${at}old` }, put(`${at}new`, '1')]);
      await under.compact();
    });
    await eventually(() => mirror.live && mirror.entries.has(`${at}new`), 'whole again', 20_000);
    assert.equal(mirror.values(), { [`${at}kept`]: '1', [`${at}new`]: '1' });
    const { revision } = await writer.txn([], [put(`${at}after`, '1')]);
    await eventually(() => mirror.revision === revision, 'changes flow again');
    await mirror.follower.close();
    await watcher.close();
    await writer.close();
  });

  test('grant, keepAlive and revoke: keys live as long as their lease', async ({ kv, under }) => {
    const at = fresh();
    const lease = await kv.grant(60);
    await kv.txn([], [{ ...put(`${at}leased`, '1'), lease }, put(`${at}durable`, '1')]);
    assert.is((await kv.get(`${at}leased`))?.lease, lease);
    assert.is((await kv.get(`${at}durable`))?.lease, undefined);
    assert.is(await kv.keepAlive(lease), 60);
    await kv.revoke(lease);
    await kv.revoke(lease);
    assert.is(await kv.get(`${at}leased`), undefined);
    assert.ok(await kv.get(`${at}durable`));
    await rejectsWith('lease_lost', () => kv.keepAlive(lease));
    await rejectsWith('lease_lost', () => kv.txn([], [{ ...put(`${at}late`, '1'), lease }]));
    assert.is(await kv.get(`${at}late`), undefined);
    const short = await kv.grant(5);
    await kv.txn([], [{ ...put(`${at}short`, '1'), lease: short }]);
    const mirror = new Mirror(kv, at);
    await eventually(() => mirror.entries.has(`${at}short`), 'the leased key');
    await under.advance(6_000);
    await eventually(async () => (await kv.get(`${at}short`)) === undefined, 'the lease to end', 20_000);
    await eventually(() => !mirror.entries.has(`${at}short`), 'its deletion to be told');
    await rejectsWith('lease_lost', () => kv.keepAlive(short));
    await mirror.follower.close();
  });

  test('grantShared: one lease for many keys, for no longer than it may be, and another once it has ended', async ({
    kv,
    under,
  }) => {
    const at = fresh();
    const both = await Promise.all([kv.grantShared(60), kv.grantShared(60)]);
    assert.is(both[0], both[1]);
    await kv.txn([], [{ ...put(`${at}a`, '1'), lease: both[0] }]);
    assert.is.not(await kv.grantShared(59), both[0], 'another time, another lease');
    const other = under.connect();
    const [one] = [await other.grantShared(60)];
    assert.is.not(one, both[0], 'a client shares with itself');
    await other.revoke(one);
    const next = await other.grantShared(60, one);
    assert.is.not(next, one);
    assert.is(await other.grantShared(60, one), next, 'who met the ended one later gets the same');
    await other.txn([], [{ ...put(`${at}b`, '1'), lease: next }]);
    await other.revoke(next);
    assert.ok(await kv.get(`${at}a`));
    await other.close();
  });

  test('a put without a lease, or under another, leaves the first lease nothing to delete', async ({
    kv,
  }) => {
    const at = fresh();
    const [one, two] = [await kv.grant(60), await kv.grant(60)];
    await kv.txn(
      [],
      [
        { ...put(`${at}a`, '1'), lease: one },
        { ...put(`${at}b`, '1'), lease: one },
      ],
    );
    await kv.txn([], [put(`${at}a`, '2'), { ...put(`${at}b`, '2'), lease: two }]);
    await kv.revoke(one);
    assert.is((await kv.get(`${at}a`))?.value, '2');
    assert.is((await kv.get(`${at}b`))?.lease, two);
    await kv.revoke(two);
    assert.is(await kv.get(`${at}b`), undefined);
  });

  test('audit counts a path as it was at a revision, and knows what was compacted', async ({ kv, under }) => {
    const at = fresh();
    const one = await kv.txn([], [put(`${at}a`, '1'), put(`${at}b`, '1')]);
    const two = await kv.txn([], [{ kind: 'delete', key: `${at}a` }]);
    assert.equal(await kv.audit(at, one.revision), { count: 2, newest: one.revision });
    assert.equal(await kv.audit(at, two.revision), { count: 1, newest: one.revision });
    await kv.txn([], [put(`${at}c`, '1')]);
    await under.compact();
    assert.is(await kv.audit(at, one.revision), undefined);
  });

  test('clients see each other, and 16 racing creators have one winner', async ({ under }) => {
    const at = fresh();
    const clients = Array.from({ length: 4 }, () => under.connect());
    const results = await Promise.all(
      Array.from({ length: 16 }, (_, i) =>
        clients[i % 4]!.txn([{ key: `${at}one`, createRevision: 0 }], [put(`${at}one`, String(i))]),
      ),
    );
    assert.is(results.filter(({ succeeded }) => succeeded).length, 1);
    const winner = results.findIndex(({ succeeded }) => succeeded);
    assert.is((await clients[0]!.get(`${at}one`))?.value, String(winner));
    await Promise.all(clients.map((client) => client.close()));
  });

  test.run();
}
