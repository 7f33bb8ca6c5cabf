import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { LeaseId } from '../../coordinator/kv.ts';
import { keepLease, type LeaseKeeper, LeaseMachine, type LeaseOptions } from '../../coordinator/lease.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { EdgewayError } from '../../src/error.ts';
import { SILENT } from '../../src/log.ts';
import { settle, VirtualTime } from '../support/time.ts';

const A = 'a' as LeaseId;
const B = 'b' as LeaseId;

test('LeaseMachine renews at a third of the TTL, ±20 %', () => {
  for (const [random, expected] of [
    [0, 4_000],
    [0.5, 5_000],
    [1, 6_000],
  ] as const) {
    const machine = new LeaseMachine(15, () => random);
    assert.equal(machine.handleTimeout(0), [{ kind: 'grant' }]);
    assert.equal(machine.handleTimeout(0), [], 'one grant is under way');
    machine.granted(A, 0);
    assert.equal(machine.deadline(), { atMs: expected, why: 'renew' });
    assert.equal(machine.handleTimeout(expected - 1), []);
    assert.equal(machine.handleTimeout(expected), [{ kind: 'renew', lease: A }]);
  }
});

test('LeaseMachine counts from when a request was sent, and loses the lease by its own clock', () => {
  const machine = new LeaseMachine(15, () => 0.5);
  machine.handleTimeout(0);
  machine.granted(A, 1_000);
  assert.equal(machine.handleTimeout(6_000), [{ kind: 'renew', lease: A }]);
  assert.equal(machine.deadline(), { atMs: 16_000, why: 'loss' });
  assert.equal(machine.handleTimeout(15_999), []);
  assert.equal(machine.handleTimeout(16_000), [
    { kind: 'lost', lease: A, cause: 'no renewal was answered for 15 s' },
    { kind: 'grant' },
  ]);
  machine.renewed(A, 6_000);
  assert.is(machine.lease, undefined, 'an answer that comes after the loss changes nothing');
  machine.granted(B, 16_100);
  assert.is(machine.lease, B);
});

test('LeaseMachine tries an unanswered renewal again well before the loss', () => {
  const machine = new LeaseMachine(15, () => 0.5);
  machine.handleTimeout(0);
  machine.granted(A, 0);
  let now = 5_000;
  let tries = 0;
  for (;;) {
    const actions = machine.handleTimeout(now);
    if (actions[0]?.kind === 'lost') break;
    if (actions[0]?.kind === 'renew') {
      tries++;
      now += 2_000;
      assert.equal(machine.renewFailed(A, false, now), []);
    }
    now = machine.deadline()!.atMs;
  }
  assert.ok(tries >= 3, `${tries} tries`);
  assert.is(now, 15_000);
});

test('LeaseMachine takes the store’s word that a lease has ended, and asks for another at once', () => {
  const machine = new LeaseMachine(15, () => 0.5);
  machine.handleTimeout(0);
  machine.granted(A, 0);
  machine.handleTimeout(5_000);
  assert.equal(machine.renewFailed(A, true, 5_010), [
    { kind: 'lost', lease: A, cause: 'the store has ended it' },
    { kind: 'grant' },
  ]);
  machine.grantFailed(5_100);
  const { atMs, why } = machine.deadline()!;
  assert.is(why, 'grant');
  assert.ok(atMs >= 5_350, 'a refused grant is not repeated in a tight loop');
});

test('LeaseMachine asks again within seconds and renews within minutes, however long the lease', () => {
  const machine = new LeaseMachine(86_400, () => 0.5);
  machine.handleTimeout(0);
  machine.grantFailed(2_000);
  assert.equal(machine.deadline(), { atMs: 7_000, why: 'grant' });
  machine.handleTimeout(7_000);
  machine.granted(A, 7_000);
  assert.equal(machine.deadline(), { atMs: 607_000, why: 'renew' });
  machine.handleTimeout(607_000);
  machine.renewFailed(A, false, 609_000);
  assert.equal(machine.deadline(), { atMs: 614_000, why: 'renew' });
});

function world() {
  const time = new VirtualTime();
  const store = new MemoryStore(() => time.monotonicMs());
  return { time, store, kv: store.connect(), held: [] as LeaseId[], lost: [] as string[] };
}

/** Keeps a lease of 15 s in that world and notes what it is told. `onHeld` comes after the note. */
function keep(
  { time, kv, held, lost }: ReturnType<typeof world>,
  { onHeld, ...more }: Partial<LeaseOptions> = {},
): LeaseKeeper {
  return keepLease({
    ...{ kv, ttlS: 15, time, random: () => 0.5, log: SILENT },
    onHeld: (lease) => {
      held.push(lease);
      return onHeld?.(lease);
    },
    onLost: (_, cause) => void lost.push(cause),
    ...more,
  });
}

test('keepLease holds one lease through a short outage and renews it 0.2 times a second', async () => {
  const here = world();
  const { time, kv, held, lost } = here;
  const keeper = keep(here);
  await time.advance(60_000);
  kv.partitioned = true;
  await time.advance(8_000);
  kv.partitioned = false;
  await time.advance(32_000);
  assert.is(held.length, 1);
  assert.equal(lost, []);
  assert.ok(keeper.renewals >= 17 && keeper.renewals <= 21, `${keeper.renewals} renewals in 100 s`);
  await keeper.stop(true);
  await time.advance(100_000);
  assert.is(held.length, 1, 'a stopped keeper asks for nothing');
});

test('keepLease says that the lease is lost before the store ends it, and publishes under the next one', async () => {
  const here = world();
  const { time, store, kv, held, lost } = here;
  const other = store.connect();
  let lostAtMs = 0;
  const keeper = keep(here, {
    onHeld: async (lease) => {
      await kv.txn([], [{ kind: 'put', key: '/nodes/n1', value: 'here', lease }]);
    },
    onLost: (_, cause) => {
      lost.push(cause);
      lostAtMs = time.monotonicMs();
    },
  });
  await time.advance(12_000);
  kv.partitioned = true;
  let goneAtMs = 0;
  for (let i = 0; i < 200; i++) {
    await time.advance(100);
    store.expire();
    if (goneAtMs === 0 && (await other.get('/nodes/n1')) === undefined) goneAtMs = time.monotonicMs();
  }
  assert.is(lost.length, 1);
  assert.ok(lostAtMs > 0 && goneAtMs > 0 && lostAtMs <= goneAtMs, `lost at ${lostAtMs}, gone at ${goneAtMs}`);
  kv.partitioned = false;
  await time.advance(5_000);
  assert.is(held.length, 2);
  assert.is((await other.get('/nodes/n1'))?.lease, held[1]);
  await keeper.stop(true);
  assert.is(await other.get('/nodes/n1'), undefined);
});

test('keepLease replaces a lease that a write found ended, and resumes an earlier one that still lives', async () => {
  const here = world();
  const { time, kv, held } = here;
  const first = keep(here);
  await settle();
  await kv.revoke(held[0]!);
  await time.advance(1_000);
  first.lost(held[0]!);
  await settle();
  assert.is(held.length, 2);
  await first.stop(false);
  const second = keep(here, { resume: held[1]! });
  await settle();
  assert.is(second.lease, held[1]);
  await second.stop(true);
  const third = keep(here, { resume: held[1]! });
  await settle();
  assert.is.not(third.lease, held[1]);
  assert.is(await third.held(1_000), third.lease);
  await third.stop(true);
});

test('keepLease publishes until it succeeds, under the lease that is held', async () => {
  const here = world();
  const { time, kv, held, lost } = here;
  let refusals = 3;
  const keeper = keep(here, {
    onHeld: async (lease) => {
      if (refusals-- > 0) throw new EdgewayError('coordination_unavailable', 'etcd does not answer');
      await kv.txn([], [{ kind: 'put', key: '/nodes/n1', value: 'here', lease }]);
    },
  });
  await time.advance(4_000);
  assert.is(held.length, 4);
  assert.is(new Set(held).size, 1, 'the lease is not to blame');
  assert.equal(lost, []);
  assert.is((await kv.get('/nodes/n1'))?.lease, keeper.lease);
  await time.advance(60_000);
  assert.is(held.length, 4, 'once is enough');
  await keeper.stop(true);
});

test('keepLease publishes again when publishing itself met lease_lost', async () => {
  const here = world();
  const { time, kv, held } = here;
  const keeper = keep(here, {
    onHeld: async (lease) => {
      if (held.length === 1) await kv.revoke(lease);
      await kv.txn([], [{ kind: 'put', key: '/x', value: '', lease }]);
    },
  });
  await settle();
  assert.is(held.length, 1, 'not in a tight loop');
  await time.advance(3_000);
  assert.is(held.length, 2);
  assert.is((await kv.get('/x'))?.lease, held[1]);
  await keeper.stop(false);
});

test.run();
