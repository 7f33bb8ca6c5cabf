import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  applyService,
  claimInstance,
  claimSubnet,
  deleteService,
  ownerOf,
  publishInstance,
  publishNode,
  releaseInstance,
} from '../../../coordinator/claims.ts';
import { Keyspace } from '../../../coordinator/keyspace.ts';
import type { Kv } from '../../../coordinator/kv.ts';
import { MemoryStore } from '../../../coordinator/memory.ts';
import { RouteFollower } from '../../../edge/routes/follow.ts';
import { Interest } from '../../../edge/routes/interest.ts';

import type { Cidr, Ipv4 } from '../../../src/addr.ts';
import { Keys } from '../../../src/keys.ts';
import { DNS_LOOKUP_WAIT_MS, INTEREST_ASKER_BURST, INTEREST_ASKER_PER_S } from '../../../src/limits.ts';
import { SILENT } from '../../../src/log.ts';
import type { ServiceId } from '../../../src/name.ts';
import { subnetAt } from '../../../src/plan.ts';
import { DEFAULT_NETWORK_CONFIG as config } from '../../../src/records.ts';
import { CART, descriptor, instance, ip, node, sid } from '../../support/sample.ts';
import { settle, VirtualTime } from '../../support/time.ts';

const keys = new Keys();
const limits = { idleMs: 600_000, negativeMs: 10_000, max: 100 };
const [A, B, C] = ['a.a.a.a', 'b.b.b.b', 'c.c.c.c'].map(sid) as [ServiceId, ServiceId, ServiceId];
const yes = (): boolean => true;
const no = (): boolean => false;

test('Interest begins with the first use and ends when idle, never while pinned or cut off', () => {
  const interest = new Interest(limits);
  assert.equal(interest.pin(new Set([A]), 0), [A]);
  assert.equal(interest.pin(new Set([A]), 0), []);
  assert.is(interest.use(B, 0, true, yes).kind, 'begin');
  assert.is(interest.use(B, 1_000, true, yes).kind, 'followed');
  assert.equal(interest.expire(600_999, true, yes), []);
  assert.equal(interest.expire(601_000, false, yes), [], 'the store is away');
  assert.equal(interest.expire(601_000, true, yes), [B]);
  assert.ok(interest.has(A) && !interest.has(B));
  interest.pin(new Set(), 700_000);
  assert.ok(interest.has(A), 'what is no longer declared stays for its idle time');
  assert.equal(interest.expire(1_300_000, true, yes), [A]);
  assert.is(interest.size, 0);
});

test('Interest keeps a negative answer briefly', () => {
  const interest = new Interest(limits);
  interest.use(A, 0, true, no);
  interest.use(B, 5_000, true, no);
  assert.equal(interest.expire(9_999, true, no), []);
  assert.equal(interest.expire(10_000, true, no), [A]);
  assert.equal(interest.expire(15_000, true, no), [B]);
});

test('Interest has a bound, and what was used longest ago makes room', () => {
  const interest = new Interest({ ...limits, max: 3 });
  interest.pin(new Set([A]), 0);
  interest.use(B, 1, true, yes);
  interest.use(C, 2, true, yes);
  interest.use(B, 3, true, yes);
  assert.equal(interest.use(CART, 4, true, yes), { kind: 'begin', end: C });
  assert.is(interest.size, 3);
  assert.equal([...interest.services()], [A, B, CART]);
});

test('Interest spares what exists while something does not, and forgets nothing while the store is away', () => {
  const interest = new Interest({ ...limits, max: 3 });
  const exists = (service: ServiceId): boolean => service !== C;
  interest.use(A, 0, true, exists);
  interest.use(B, 1, true, exists);
  interest.use(C, 2, true, exists);
  assert.equal(interest.use(CART, 3, false, exists), { kind: 'refused' });
  assert.equal([...interest.services()], [A, B, C]);
  assert.equal(interest.use(A, 4, false, exists), { kind: 'followed' });
  assert.equal(interest.use(CART, 5, true, exists), { kind: 'begin', end: C });
});

test('Interest gives every asker a budget for what is new, and what is known costs none', () => {
  const interest = new Interest({ ...limits, max: 10_000 });
  const begun = (asker: number, nowMs: number): number => {
    let count = 0;
    for (let i = 0; i < 1_000; i++)
      if (interest.use(sid(`a.b.c${asker}.t${nowMs}n${i}`), nowMs, true, no, asker).kind === 'begin') count++;
    return count;
  };
  assert.is(begun(1, 0), INTEREST_ASKER_BURST);
  assert.is(begun(2, 0), INTEREST_ASKER_BURST, 'another asker has its own');
  assert.is(begun(1, 1_000), INTEREST_ASKER_PER_S);
  for (let i = 0; i < 1_000; i++)
    assert.is(interest.use(sid('a.b.c1.t0n0'), 1_000, true, no, 1).kind, 'followed');
  assert.is(interest.use(A, 1_000, true, no).kind, 'begin', 'the node itself has none');
});

type Listener = Parameters<Kv['follow']>[1];

/** Counts what a client is told, and what it asks for; who listens to which path. */
function counting(kv: Kv): { kv: Kv; events: string[]; gets: string[]; listeners: Map<string, Listener> } {
  const listeners = new Map<string, Listener>();
  const events: string[] = [];
  const gets: string[] = [];
  return {
    events,
    gets,
    listeners,
    kv: new Proxy(kv, {
      get: (target, name) => {
        if (name === 'follow')
          return (path: string, listener: Listener) => {
            listeners.set(path, listener);
            return target.follow(path, {
              live: (live) => listener.live(live),
              batch: (batch) => {
                if (batch.kind === 'changes')
                  for (const change of batch.changes)
                    events.push(change.kind === 'put' ? change.entry.key : change.key);
                else for (const { key } of batch.entries) events.push(key);
                listener.batch(batch);
              },
            });
          };
        if (name === 'get')
          return (key: string) => {
            gets.push(key);
            return target.get(key);
          };
        return Reflect.get(target, name).bind(target);
      },
    }),
  };
}

function world(more: Partial<typeof limits> = {}) {
  const time = new VirtualTime();
  const store = new MemoryStore(() => time.monotonicMs());
  const writer = store.connect();
  const client = store.connect();
  const { kv, events, gets, listeners } = counting(client);
  const routes = new RouteFollower({
    keys,
    open: (listener) => new Keyspace(kv, keys, SILENT, listener),
    after: (ms, run) => time.after(ms, run),
    interest: {
      ...limits,
      ...more,
      now: () => time.monotonicMs(),
      ownerOf: async (address: Ipv4) => (await ownerOf(kv, keys, address))?.service,
      subnetTaken: async (subnet: Cidr) =>
        (await kv.get(keys.build({ kind: 'subnet', subnet }))) !== undefined,
    },
  });
  return { time, store, writer, client, routes, events, gets, listeners };
}

async function deploy(kv: Kv, id: string, index: number, service: ServiceId, number: number) {
  const claim = await claimSubnet(kv, keys, config, { node: id, cluster: 'lab' });
  const presence = await kv.grant(15);
  const host = node(id, index, { subnet: claim.subnet, epoch: claim.epoch });
  await publishNode(kv, keys, host, presence);
  const { instanceIp } = await claimInstance(kv, keys, config, {
    service,
    instance: number,
    node: id,
    lease: claim.lease,
  });
  const revision = await publishInstance(
    kv,
    keys,
    claim.subnet,
    instance(host, service, number, { instanceIp }),
    presence,
  );
  return { instanceIp, revision, presence, subnet: claim.subnet };
}

test('RouteFollower with interest hears nothing of services that nobody here asked for', async () => {
  const { writer, routes, events } = world();
  for (const id of [A, B, C]) await applyService(writer, keys, config, descriptor(id));
  await settle();
  assert.ok(routes.table.synced && routes.live);
  routes.pin(new Set([A]));
  await settle();
  await deploy(writer, 'n1', 1, A, 1);
  await deploy(writer, 'n2', 2, B, 1);
  await applyService(writer, keys, config, descriptor(C, { ports: [81] }));
  await settle();
  assert.ok(routes.table.service(A) && routes.table.instance(A, 1));
  assert.ok(routes.table.node('n1'), 'the node of an instance is followed with it');
  assert.is(routes.table.service(B), undefined);
  const foreign = events.filter((key) => !key.includes(A) && !key.endsWith('/n1'));
  assert.equal(foreign, []);
  await routes.close();
});

test('RouteFollower.ask follows an unknown service; others are answered meanwhile', async () => {
  const { writer, routes } = world();
  const { service } = await applyService(writer, keys, config, descriptor(A));
  const { revision } = await deploy(writer, 'n1', 1, A, 1);
  await settle();
  const waiting = routes.ask(A);
  assert.ok(waiting, 'not known yet');
  await waiting;
  assert.equal(routes.table.service(A), service);
  assert.ok(routes.table.instance(A, 1));
  assert.is(routes.ask(A), undefined, 'now it is');
  await routes.waitFor(revision, 1_000);
  const nothing = routes.ask(B);
  await nothing;
  assert.is(routes.ask(B), undefined, 'that there is none is known too');
  assert.is(routes.table.service(B), undefined);
  await applyService(writer, keys, config, descriptor(B));
  await settle();
  assert.ok(routes.table.service(B), 'and corrected by the watch at once');
  await routes.close();
});

test('RouteFollower.waitFor sees a deletion that a new listing swallowed, though other paths are not new', async () => {
  const { writer, client, routes, listeners } = world();
  for (const id of [A, B]) await applyService(writer, keys, config, descriptor(id));
  routes.pin(new Set([A, B]));
  await settle();
  await deploy(writer, 'n1', 1, A, 1);
  await settle();
  assert.ok(routes.table.instance(A, 1));
  client.partitioned = true;
  const revision = await releaseInstance(writer, keys, config, { service: A, instance: 1, node: 'n1' });
  let told = false;
  const waiting = routes.waitFor(revision, 1_000, A).then(() => {
    told = true;
  });
  // The connection is back: A is listed anew, B was a moment before the deletion.
  const again = (path: string): void => {
    const entries = path.endsWith('/') ? [] : serviceEntries;
    listeners.get(path)!.batch({ kind: 'snapshot', entries, revision });
  };
  const serviceEntries = [(await writer.get(keys.build({ kind: 'service', service: A })))!];
  again(keys.instancesOf(A));
  await settle();
  assert.not(told, 'its own record is not listed yet');
  again(keys.build({ kind: 'service', service: A }));
  await waiting;
  assert.is(routes.table.instance(A, 1), undefined);
  assert.ok(routes.table.service(A));
  await routes.close();
});

test('RouteFollower ends an idle interest, and none while the store is away', async () => {
  const { time, writer, client, routes } = world();
  await applyService(writer, keys, config, descriptor(A));
  await routes.ask(A);
  await time.advance(300_000);
  routes.ask(A);
  client.partitioned = true;
  await time.advance(900_000);
  assert.ok(routes.table.service(A));
  assert.is(routes.ask(A), undefined);
  client.partitioned = false;
  await time.advance(590_000);
  assert.ok(routes.table.service(A));
  const gone: ServiceId[] = [];
  routes.onDelta(({ services }) => void gone.push(...services));
  await time.advance(20_000);
  assert.is(routes.table.service(A), undefined);
  assert.ok(gone.includes(A), 'those who hold a projection are told');
  assert.is(routes.interests, 0);
  assert.equal([...routes.keyspace.paths()], [keys.prefix('config'), keys.prefix('exposed')]);
  await routes.close();
});

test('RouteFollower.askAddress finds the service of a ServiceIP and of a sender, asking the store once', async () => {
  const { time, writer, routes, gets } = world();
  const { service } = await applyService(writer, keys, config, descriptor(A));
  await applyService(writer, keys, config, descriptor(B));
  const { instanceIp } = await deploy(writer, 'n1', 1, B, 1);
  await settle();
  await routes.askAddress(service.addresses.closest!);
  assert.ok(routes.table.service(A));
  await routes.askAddress(instanceIp);
  assert.equal(routes.table.nameOf(instanceIp), { service: B, instance: 1 });
  assert.ok(routes.table.node('n1'));
  const before = gets.length;
  const nobody = ip('172.30.200.200');
  for (let i = 0; i < 50; i++) await routes.askAddress(nobody);
  assert.is(gets.length - before, 1, 'a negative answer is kept');
  await time.advance(10_000);
  await routes.askAddress(nobody);
  assert.is(gets.length - before, 2);
  await routes.close();
});

test('RouteFollower.askAddress says whether the table can tell, one look-up for all who ask at once', async () => {
  const { writer, client, routes, gets } = world();
  const { service } = await applyService(writer, keys, config, descriptor(A));
  await settle();
  const before = gets.length;
  const nobody = ip('172.30.200.200');
  assert.equal(
    await Promise.all([1, 2, 3].map(() => routes.askAddress(nobody))),
    [true, true, true],
    'it is nobody’s',
  );
  assert.is(gets.length - before, 1);
  client.partitioned = true;
  await settle();
  const address = service.addresses.closest!;
  assert.is(await routes.askAddress(address), false);
  client.partitioned = false;
  await settle();
  assert.is(await routes.askAddress(address), true);
  assert.equal(routes.table.nameOf(address), { service: A, policy: 'closest' });
  await routes.close();
});

test('RouteFollower.askSubnet says whether a node holds a subnet, asking the store once in five seconds', async () => {
  const { time, writer, client, routes, gets } = world();
  await applyService(writer, keys, config, descriptor(A));
  const { subnet: taken } = await deploy(writer, 'n1', 1, A, 1);
  const free = subnetAt(config.plan, 7);
  await settle();
  const before = gets.length;
  assert.is(routes.table.isNodeSubnet(taken.base), undefined);
  for (let i = 0; i < 50; i++) {
    const told = await Promise.all([routes.askSubnet(taken, 1), routes.askSubnet(free, 1)]);
    assert.equal(told, [true, true]);
  }
  assert.is(gets.length - before, 2);
  assert.is(routes.table.isNodeSubnet(taken.base), true);
  assert.is(routes.table.isNodeSubnet(free.base), false);
  await time.advance(10_000);
  assert.is(routes.table.isNodeSubnet(free.base), undefined, 'a node may have come');
  client.partitioned = true;
  assert.is(await routes.askSubnet(free), false);
  client.partitioned = false;
  await settle();
  let refused = 0;
  for (let i = 8; i < 400; i++) if (!(await routes.askSubnet(subnetAt(config.plan, i), 2))) refused++;
  assert.ok(refused > 200, 'no asker looks up more than its budget');
  routes.pin(new Set([A]));
  await settle();
  assert.is(routes.table.isNodeSubnet(taken.base), true, 'a node that is followed needs no look-up');
  await routes.close();
});

test('RouteFollower with interest shows a node’s leaving and a service’s end', async () => {
  const { writer, routes } = world();
  await applyService(writer, keys, config, descriptor(A));
  const { presence } = await deploy(writer, 'n1', 1, A, 1);
  routes.pin(new Set([A]));
  await settle();
  assert.ok(routes.table.node('n1'));
  await writer.revoke(presence);
  await settle();
  assert.is(routes.table.node('n1'), undefined);
  assert.is(routes.table.instance(A, 1), undefined);
  await deleteService(writer, keys, config, A);
  await settle();
  assert.is(routes.table.service(A), undefined);
  await routes.close();
});

test('RouteFollower with interest follows exposed services, and those that nothing exposes any more end', async () => {
  const { time, writer, routes } = world();
  await applyService(writer, keys, config, descriptor(A, { exposed: true }));
  await applyService(writer, keys, config, descriptor(B));
  await deploy(writer, 'n1', 1, A, 1);
  await settle();
  assert.ok(routes.table.service(A)?.descriptor.exposed && routes.table.instance(A, 1));
  assert.is(routes.table.service(B), undefined);
  await applyService(writer, keys, config, descriptor(B, { exposed: true }));
  await settle();
  assert.ok(routes.table.service(B));
  await applyService(writer, keys, config, descriptor(A));
  await deleteService(writer, keys, config, B);
  assert.equal(await writer.keys(keys.prefix('exposed')), []);
  await time.advance(700_000);
  assert.is(routes.table.service(A), undefined);
  await routes.close();
});

test('RouteFollower.ask waits while the store is away, and is answered when it is back', async () => {
  const { writer, client, routes } = world();
  await applyService(writer, keys, config, descriptor(A));
  await settle();
  client.partitioned = true;
  let answered = false;
  const waiting = routes.ask(A);
  void waiting?.then(() => {
    answered = true;
  });
  await settle();
  assert.not.ok(answered);
  client.partitioned = false;
  await settle();
  assert.ok(answered && routes.table.service(A));
  await routes.close();
});

test('RouteFollower.ask gives all who wait one promise, and up after a second', async () => {
  const { time, client, routes } = world();
  await settle();
  client.partitioned = true;
  const waiting = routes.ask(A);
  for (let i = 0; i < 1_000; i++) assert.is(routes.ask(A), waiting);
  await time.advance(DNS_LOOKUP_WAIT_MS);
  assert.is(await waiting, false);
  const again = routes.ask(A);
  assert.is.not(again, waiting);
  client.partitioned = false;
  await settle();
  assert.is(await again, true);
  assert.is(routes.ask(A), undefined);
  await routes.close();
});

test('RouteFollower forgets nothing for made-up names while the store is away, and follows few of them when it is not', async () => {
  const { writer, client, routes } = world({ max: 4 });
  for (const service of [A, B]) {
    await applyService(writer, keys, config, descriptor(service));
    await routes.ask(service);
  }
  await settle();
  const flood = (asker: number): void => {
    for (let i = 0; i < 1_000; i++) void routes.ask(sid(`made.up.n${i}.a${asker}`), asker);
  };
  client.partitioned = true;
  await settle();
  flood(1);
  assert.is(routes.interests, 4);
  assert.ok(routes.table.service(A) && routes.table.service(B));
  assert.is(await routes.ask(C, 2), false, 'there is no room');
  client.partitioned = false;
  await settle();
  flood(3);
  await settle();
  assert.is(routes.interests, 4);
  assert.ok(routes.table.service(A) && routes.table.service(B), 'made-up names make room for each other');
  assert.ok(routes.ask(A) === undefined && routes.ask(B) === undefined);
  await routes.close();
});

test.run();
