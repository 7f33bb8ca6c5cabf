// The watch stream against a real etcd: what etcd cancels, splits and is told too late.
import { Etcd3, type IEvent } from 'etcd3';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import { WatchStream } from '../../coordinator/etcd/watch.ts';
import type { Kv } from '../../coordinator/kv.ts';
import { SILENT } from '../../src/log.ts';
import { startTestEtcd, type TestEtcd } from '../support/etcd.ts';
import { eventually } from '../support/eventually.ts';

const test = suite('etcd watch');
const put = (key: string, value: string) => ({ kind: 'put', key, value }) as const;

let etcd: TestEtcd;
let kv: Kv;
let client: Etcd3;
let stream: WatchStream;
let fragments = 0;
let opened = 0;

/** What one watch was told. */
function watch(path: string, start: number) {
  const seen = { created: 0, batches: [] as IEvent[][], ended: [] as [string, boolean][] };
  const handle = stream.watch({ key: path, end: `${path.slice(0, -1)}0` }, start, {
    created: () => seen.created++,
    events: (events) => void seen.batches.push([...events]),
    ended: (reason, compacted) => void seen.ended.push([reason, compacted]),
  });
  return { seen, cancel: () => handle.cancel() };
}

test.before(async () => {
  etcd = await startTestEtcd();
  kv = connectEtcd({ endpoints: [etcd.endpoint], log: SILENT });
  client = new Etcd3({ hosts: etcd.endpoint });
  stream = new WatchStream(async () => {
    opened++;
    const open = await client.watchClient.watch();
    open.on('data', ({ fragment }) => {
      if (fragment) fragments++;
    });
    return open;
  });
});
test.after(async () => {
  stream.close();
  client.close();
  await kv.close();
  await etcd.remove();
});

test('a watch from before a compaction is ended with the reason; others on the stream go on', async () => {
  const { revision: first } = await kv.txn([], [put('/gone/a', '1')]);
  const { revision } = await kv.txn([], [put('/gone/a', '2')]);
  const beside = watch('/beside/', revision + 1);
  await eventually(() => beside.seen.created === 1, 'the other watch');
  await etcd.etcdctl('compact', String(revision));
  const late = watch('/gone/', first);
  await eventually(() => late.seen.ended.length === 1, 'its end');
  const [reason, compacted] = late.seen.ended[0]!;
  assert.ok(compacted);
  assert.match(reason, `history before revision ${revision} was compacted`);
  assert.is(late.seen.batches.length, 0);
  await kv.txn([], [put('/beside/b', '1')]);
  await eventually(() => beside.seen.batches.length === 1, 'an event of the other watch');
  assert.equal(beside.seen.ended, []);
  beside.cancel();
});

test('a response that etcd splits is told whole, each revision in one piece', async () => {
  const value = 'x'.repeat(10_000);
  let first = 0;
  for (let round = 0; round < 4; round++) {
    const { revision } = await kv.txn(
      [],
      Array.from({ length: 100 }, (_, i) => put(`/big/${i}`, `${round}${value}`)),
    );
    first ||= revision;
  }
  const { seen, cancel } = watch('/big/', first);
  await eventually(() => seen.batches.flat().length >= 400, 'all events');
  assert.ok(fragments > 0, 'etcd split nothing: the test is too small');
  const all = seen.batches.flat();
  assert.is(all.length, 400);
  for (const batch of seen.batches) {
    const counts = new Map<string, number>();
    for (const { kv: event } of batch)
      counts.set(event.mod_revision, (counts.get(event.mod_revision) ?? 0) + 1);
    for (const [revision, count] of counts) assert.is(count, 100, `revision ${revision} in pieces`);
  }
  cancel();
});

test('a watch that is cancelled while its stream opens hears nothing, and the next one works', async () => {
  stream.close();
  const before = opened;
  const early = watch('/early/', 0);
  early.cancel();
  early.cancel();
  const next = watch('/early/', 0);
  await eventually(() => next.seen.created === 1, 'the next watch');
  await kv.txn([], [put('/early/a', '1')]);
  await eventually(() => next.seen.batches.length === 1, 'its event');
  assert.equal(early.seen, { created: 0, batches: [], ended: [] });
  assert.is(opened, before + 2, 'the one that nobody waited for is given up');
  next.cancel();
});

test.run();
