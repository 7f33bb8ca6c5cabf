import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { applyService, claimInstance, deleteService, releaseInstance } from '../../coordinator/claims.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { restExtraS } from '../../coordinator/rest.ts';
import { Keys } from '../../src/keys.ts';
import { REST_KEYS_MAX } from '../../src/limits.ts';
import { DEFAULT_NETWORK_CONFIG as config } from '../../src/records.ts';
import { CART, descriptor, sid } from '../support/sample.ts';
import { settle } from '../support/time.ts';

const keys = new Keys();
const MINUTE_MS = 60_000;
const LONG_S = 1_000_000;

/** A store by true time, and a client whose clocks run and jump as the test says. */
function world() {
  const clock = { trueMs: 0, monotonicMs: 0, wallMs: 1_800_000_000_000 };
  const store = new MemoryStore(() => clock.trueMs);
  const kv = store.connect({ monotonicMs: () => clock.monotonicMs, wallMs: () => clock.wallMs });
  return {
    ...{ clock, store, kv },
    /** Lets true time pass; the client's clocks show `rate` as much. */
    pass: (ms: number, rate = 1): void => {
      clock.trueMs += ms;
      clock.monotonicMs += ms * rate;
      clock.wallMs += ms * rate;
      store.expire();
    },
  };
}
type World = ReturnType<typeof world>;

/** An instance comes and goes: one key more that rests. */
async function release({ kv, clock }: World, instance: number, rested: Map<string, number>): Promise<void> {
  const wish = { service: CART, instance, node: 'n1', lease: await kv.grant(LONG_S) };
  const { instanceIp } = await claimInstance(kv, keys, config, wish);
  await releaseInstance(kv, keys, config, { ...wish, instanceIp });
  await kv.revoke(wish.lease);
  rested.set(keys.build({ kind: 'address', address: instanceIp }), clock.trueMs);
}

/** Follows the addresses and says of each how long it rested. */
function witness({ store, clock }: World, since: ReadonlyMap<string, number>) {
  const rests: number[] = [];
  store.connect().follow(keys.prefix('addresses'), {
    live: () => {},
    batch: (batch) => {
      for (const change of batch.kind === 'changes' ? batch.changes : [])
        if (change.kind === 'delete') rests.push(clock.trueMs - since.get(change.key)!);
    },
  });
  return rests;
}

test('what one client gives back shares a lease for each half minute, and each address rests in full', async () => {
  const it = world();
  const since = new Map<string, number>();
  const rests = witness(it, since);
  let most = 0;
  for (let i = 0; i < 1_000; i++) {
    await release(it, i + 1, since);
    it.pass(1_000);
    await settle();
    most = Math.max(most, it.store.leases);
  }
  assert.ok(most <= 13, `${most} leases at a time for 300 and more addresses that rest`);
  for (let s = 0; s < 400; s++) {
    it.pass(1_000);
    await settle();
  }
  assert.is(rests.length, 1_000);
  const [least, longest] = [Math.min(...rests), Math.max(...rests)];
  assert.ok(least >= config.quarantineS * 1_000, `${least} ms`);
  assert.ok(
    longest <= (config.quarantineS + restExtraS(config.quarantineS)) * 1_000 + 1_000,
    `${longest} ms`,
  );
  assert.is(it.store.leases, 0, 'none is left');
});

test('a client whose clock runs at half or double speed, jumps or stood still shortens no rest', async () => {
  for (const [what, rate, disturb] of [
    ['half speed', 0.5, () => {}],
    ['double speed', 2, () => {}],
    [
      'set forward',
      1,
      ({ clock }: World) => {
        clock.wallMs += 60 * MINUTE_MS;
      },
    ],
    [
      'set back',
      1,
      ({ clock }: World) => {
        clock.wallMs -= 60 * MINUTE_MS;
      },
    ],
    // Asleep: monotonic time stands, the other one is right again at once.
    [
      'asleep',
      1,
      ({ clock, store }: World) => {
        clock.trueMs += 4 * MINUTE_MS;
        clock.wallMs += 4 * MINUTE_MS;
        store.expire();
      },
    ],
  ] as const) {
    const it = world();
    const since = new Map<string, number>();
    const rests = witness(it, since);
    for (let i = 0; i < 40; i++) {
      await release(it, i + 1, since);
      it.pass(2_000, rate);
      if (i === 20) disturb(it);
      await settle();
    }
    for (let s = 0; s < 400; s++) {
      it.pass(1_000, rate);
      await settle();
    }
    assert.is(rests.length, 40, what);
    assert.ok(Math.min(...rests) >= config.quarantineS * 1_000, `${what}: ${Math.min(...rests)} ms`);
  }
});

test('a shared lease that the store has forgotten is replaced within the same release', async () => {
  const it = world();
  const { kv, store } = it;
  const since = new Map<string, number>();
  await release(it, 1, since);
  store.wipe();
  await release(it, 2, since);
  const [address] = (await kv.range(keys.prefix('addresses'))).entries;
  assert.match(address!.value, '"resting":true');
  assert.ok(address!.lease);
});

test('a lease takes a bounded number of keys', async () => {
  const { kv, store } = world();
  const ids = new Set<string>();
  for (let i = 0; i < REST_KEYS_MAX + 1; i++) ids.add(await kv.grantShared(config.quarantineS));
  assert.is(ids.size, 2);
  assert.is(store.leases, 2);
});

test('the addresses of a service rest on the lease of what else was given back', async () => {
  const it = world();
  const { kv, store } = it;
  await release(it, 1, new Map());
  for (const id of ['a.b.c.d', 'e.f.g.h']) {
    await applyService(kv, keys, config, descriptor(sid(id)));
    await deleteService(kv, keys, config, sid(id));
  }
  assert.is((await kv.keys(keys.prefix('addresses'))).length, 7);
  assert.is(store.leases, 1);
});

test.run();
