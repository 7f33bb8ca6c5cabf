import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  applyService,
  claimInstance,
  claimSubnet,
  deleteService,
  publishInstance,
  publishNode,
} from '../../coordinator/claims.ts';
import type { LeaseId } from '../../coordinator/kv.ts';
import { type MemoryKv, MemoryStore } from '../../coordinator/memory.ts';
import { fencedKv } from '../../coordinator/reconcile.ts';
import { restExtraS } from '../../coordinator/rest.ts';
import { RoleMachine } from '../../coordinator/role.ts';
import { type Role, type RunningRoles, startRoles } from '../../coordinator/roles.ts';
import { formatCidr, overlaps, parseCidr } from '../../src/addr.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { RECONCILE_ACTIONS_MAX, RECONCILE_INTERVAL_MS, ROLE_TTL_S } from '../../src/limits.ts';
import type { NetworkConfig } from '../../src/model.ts';
import type { ServiceId } from '../../src/name.ts';
import {
  DEFAULT_NETWORK_CONFIG,
  decodeAddress,
  decodeBlock,
  decodeCluster,
  decodeConfig,
  decodeLeader,
  decodeService,
  encodeAddress,
  encodeBlock,
  encodeConfig,
  encodeService,
} from '../../src/records.ts';
import { rejectsWith } from '../conformance/kv.ts';
import { keepLogs } from '../support/logs.ts';
import { CART, descriptor, instance, ip, node, sid } from '../support/sample.ts';
import { settle, VirtualTime } from '../support/time.ts';

const keys = new Keys();
const config = DEFAULT_NETWORK_CONFIG;
const cidr = (text: string) => unwrap(parseCidr(text));
const put = (key: string, value: string) => ({ kind: 'put', key, value }) as const;

function world() {
  const time = new VirtualTime();
  const store = new MemoryStore(() => time.monotonicMs());
  const logs = keepLogs();
  const candidates: { kv: MemoryKv; roles: RunningRoles }[] = [];
  const candidate = (
    holder: string,
    more: { roles?: Role[]; cluster?: string; network?: NetworkConfig } = {},
  ) => {
    const kv = store.connect();
    const roles = startRoles({
      kv,
      keys,
      time,
      random: () => 0.5,
      log: logs.log,
      holder,
      roles: more.roles ?? ['root', 'cluster'],
      cluster: more.cluster ?? 'lab',
      network: more.network ?? config,
    });
    candidates.push({ kv, roles });
    return { kv, roles };
  };
  return { time, store, kv: store.connect(), logs, candidate, candidates };
}
const leaderKey = keys.build({ kind: 'rootLeader' });

test('RoleMachine campaigns only when the key is known to be free, and acts behind its fence', () => {
  const machine = new RoleMachine();
  const lease = 'l' as LeaseId;
  assert.equal(machine.leaseHeld(lease), [], 'the key has not been seen yet');
  assert.equal(machine.saw({ holder: 'other', createRevision: 3 }), []);
  assert.equal(machine.saw(undefined), [{ kind: 'campaign', lease }]);
  assert.equal(machine.saw(undefined), [], 'one campaign at a time');
  assert.equal(machine.campaigned(lease, true, 9), [{ kind: 'act', fence: 9 }]);
  assert.equal(machine.saw({ holder: 'me', createRevision: 9, lease }), [], 'the echo of our own write');
  assert.equal(machine.leaseLost('too late'), [{ kind: 'yield', why: 'too late' }]);
  assert.equal(machine.saw(undefined), [], 'without a lease there is no campaign');
});

test('RoleMachine recognises a campaign that was won though its answer was lost', () => {
  const machine = new RoleMachine();
  const lease = 'l' as LeaseId;
  machine.saw(undefined);
  machine.leaseHeld(lease);
  assert.equal(machine.retry(), [{ kind: 'campaign', lease }]);
  assert.equal(machine.saw({ holder: 'me', createRevision: 4, lease }), [{ kind: 'act', fence: 4 }]);
  assert.equal(machine.campaigned(lease, false, 5), [], 'the retried campaign lost against ourselves');
  assert.is(machine.state.kind, 'acting');
});

test('RoleMachine yields when the key is deleted or taken, and campaigns again', () => {
  const machine = new RoleMachine();
  const lease = 'l' as LeaseId;
  machine.leaseHeld(lease);
  machine.saw(undefined);
  machine.campaigned(lease, true, 9);
  assert.equal(
    machine.saw(undefined).map(({ kind }) => kind),
    ['yield', 'campaign'],
  );
  machine.campaigned(lease, true, 12);
  assert.equal(
    machine.saw({ holder: 'other', createRevision: 15 }).map(({ kind }) => kind),
    ['yield'],
  );
});

test('startRoles: of five candidates exactly one acts; a standby takes over within the lease time', async () => {
  const { time, kv, candidate } = world();
  const all = ['a', 'b', 'c', 'd', 'e'].map((id) => candidate(id));
  const acting = () => all.filter(({ roles }) => roles.acting().includes('root'));
  await time.advance(100);
  assert.is(acting().length, 1);
  const first = acting()[0]!;
  assert.is(unwrap(decodeLeader((await kv.get(leaderKey))?.value ?? '')).holder, first.roles.holder('root'));
  first.kv.partitioned = true;
  let between = 0;
  for (let ms = 0; ms < ROLE_TTL_S * 2_000; ms += 100) {
    await time.advance(100);
    const count = acting().length;
    assert.ok(count <= 1, 'never two, not even for a moment');
    if (count === 0) between += 100;
  }
  assert.is(acting().length, 1);
  assert.is.not(acting()[0], first);
  assert.ok(between <= 1_000, `nobody acted for ${between} ms`);
  first.kv.partitioned = false;
  await time.advance(ROLE_TTL_S * 1_000);
  assert.is(acting().length, 1);
  await Promise.all(all.map(({ roles }) => roles.stop()));
});

test('startRoles: a holder that stops gives its roles up at once', async () => {
  const { time, candidate } = world();
  const a = candidate('a');
  await time.advance(100);
  const b = candidate('b');
  await time.advance(100);
  assert.equal(a.roles.acting(), ['root', 'cluster']);
  await a.roles.stop();
  await time.advance(100);
  assert.equal(b.roles.acting(), ['root', 'cluster']);
  await b.roles.stop();
});

test('fencedKv: a holder paused past its lease changes nothing', async () => {
  const { kv } = world();
  const lease = await kv.grant(5);
  const { revision } = await kv.txn([], [{ ...put(leaderKey, '{"v":1,"holder":"a"}'), lease }]);
  let told = 0;
  const fenced = fencedKv(kv, { key: leaderKey, createRevision: revision }, () => told++);
  assert.ok((await fenced.txn([], [put('/x', '1')])).succeeded);
  assert.not.ok((await fenced.txn([{ key: '/x', createRevision: 0 }], [put('/x', '2')])).succeeded);
  assert.is(told, 0, 'an ordinary refusal is not the fence');
  await kv.revoke(lease);
  await kv.txn([], [put(leaderKey, '{"v":1,"holder":"b"}')]);
  await rejectsWith('lease_lost', () => fenced.txn([], [put('/x', '3')]));
  await rejectsWith('lease_lost', () => applyService(fenced, keys, config, descriptor()));
  assert.is((await kv.get('/x'))?.value, '1');
  assert.is(told, 2);
  assert.is((await kv.keys(keys.prefix('addresses'))).length, 0);
});

test('role root writes the plan, admits clusters and grants each a block before its nodes need one', async () => {
  const { time, kv, candidate } = world();
  const lab = candidate('a');
  const west = candidate('b', { roles: ['cluster'], cluster: 'west' });
  await time.advance(1_000);
  assert.equal(unwrap(decodeConfig((await kv.get(keys.build({ kind: 'config' })))?.value ?? '')), config);
  for (const cluster of ['lab', 'west'])
    assert.ok(
      unwrap(decodeCluster((await kv.get(keys.build({ kind: 'cluster', cluster })))?.value ?? '')).admitted,
    );
  const blocks = (await kv.range(keys.prefix('root'))).entries.filter(({ key }) => key.includes('/blocks/'));
  assert.equal(
    blocks.map(({ key, value }) => [key.split('/blocks/')[1], unwrap(decodeBlock(value)).cluster]),
    [
      ['172.16.0.0/20', 'lab'],
      ['172.16.16.0/20', 'west'],
    ],
  );
  const { subnet } = await claimSubnet(kv, keys, config, { node: 'n1', cluster: 'west' });
  assert.match(formatCidr(subnet), /^172\.16\.(1[6-9]|2[0-9]|3[01])\./);
  await lab.roles.stop();
  await west.roles.stop();
});

test('role root grants another block when few subnets are left, and takes an empty one back', async () => {
  const { time, kv, candidate } = world();
  const { roles } = candidate('a');
  await time.advance(1_000);
  const claims = [];
  for (let i = 0; i < 60; i++) {
    claims.push(await claimSubnet(kv, keys, config, { node: `n${i}`, cluster: 'lab' }));
    await time.advance(100);
  }
  const blocks = async () =>
    (await kv.keys(keys.prefix('root'))).filter((key) => key.includes('/blocks/')).length;
  assert.is(await blocks(), 2);
  const inFirst = claims.filter(({ subnet }) => overlaps(cidr('172.16.0.0/20'), subnet));
  assert.ok(inFirst.length < 60, 'the second block is used');
  for (const { lease } of claims)
    if (!inFirst.slice(0, 5).some((kept) => kept.lease === lease)) await kv.revoke(lease);
  await time.advance(RECONCILE_INTERVAL_MS);
  assert.is(await blocks(), 1);
  await roles.stop();
});

test('with no role held at all, nodes join and services get addresses', async () => {
  const { kv } = world();
  await kv.txn([], [put(keys.build({ kind: 'config' }), encodeConfig(config))]);
  const { subnet } = await claimSubnet(kv, keys, config, { node: 'n1', cluster: 'lab' });
  assert.ok(subnet.bits === 26);
  const { service } = await applyService(kv, keys, config, descriptor());
  assert.is(Object.keys(service.addresses).length, 3);
});

test('role cluster gives a record written by hand its addresses, and one with a stolen address another', async () => {
  const { time, kv, candidate } = world();
  const { roles } = candidate('a');
  await time.advance(1_000);
  const byHand = (id: ServiceId, addresses: object) =>
    JSON.stringify({
      v: 1,
      appname: id.split('.')[0],
      appnamespace: id.split('.')[1],
      servicename: id.split('.')[2],
      servicenamespace: id.split('.')[3],
      addresses,
    });
  const read = async (id: ServiceId) =>
    unwrap(decodeService((await kv.get(keys.build({ kind: 'service', service: id })))?.value ?? '', id));
  const written = byHand(CART, {}).replace('{', '{"exposed":true,');
  await kv.txn([], [put(keys.build({ kind: 'service', service: CART }), written)]);
  await time.advance(1_000);
  const cart = await read(CART);
  assert.is(Object.keys(cart.addresses).length, 3);
  assert.equal(await kv.keys(keys.prefix('exposed')), [keys.build({ kind: 'exposed', service: CART })]);
  const thief = sid('shop.prod.thief.v1');
  const stolen = Object.values(cart.addresses)[0]!;
  await kv.txn(
    [],
    [
      put(
        keys.build({ kind: 'service', service: thief }),
        encodeService({ id: thief, descriptor: descriptor(thief), addresses: { closest: stolen } }),
      ),
    ],
  );
  await time.advance(1_000);
  const mended = await read(thief);
  assert.is(Object.keys(mended.addresses).length, 3);
  assert.not.ok(Object.values(mended.addresses).includes(stolen));
  assert.equal(await read(CART), cart);
  await roles.stop();
});

test('role cluster moves no ServiceIP because its claim cannot be read', async () => {
  const { time, kv, candidate, logs } = world();
  const { roles } = candidate('a');
  await time.advance(1_000);
  const { service, revision } = await applyService(kv, keys, config, descriptor());
  const scribbled = keys.build({ kind: 'address', address: service.addresses.fastest! });
  await kv.txn([], [put(scribbled, '{"v":1,')]);
  await time.advance(2 * RECONCILE_INTERVAL_MS);
  const entry = await kv.get(keys.build({ kind: 'service', service: CART }));
  assert.is(entry?.modRevision, revision);
  assert.is(logs.of('warn').filter(({ key }) => key === scribbled).length, 1, 'reported once');
  await kv.txn([], [{ kind: 'delete', key: scribbled }]);
  await time.advance(1_000);
  assert.ok(unwrap(decodeAddress((await kv.get(scribbled))?.value ?? '')), 'claimed again');
  await roles.stop();
});

test('role cluster sweeps what nothing owns any more, and leaves alone what it cannot read', async () => {
  const { time, kv, candidate, logs } = world();
  const { roles } = candidate('a');
  await time.advance(1_000);
  const { service } = await applyService(kv, keys, config, descriptor(CART, { exposed: true }));
  const other = await applyService(kv, keys, config, descriptor(sid('a.b.c.d')));
  await time.advance(1_000);
  const orphan = ip('172.30.44.44');
  const unowned = { kind: 'instance', service: CART, instance: 9, node: 'ghost' } as const;
  await kv.txn(
    [],
    [
      { kind: 'delete', key: keys.build({ kind: 'service', service: CART }) },
      put(keys.build({ kind: 'service', service: sid('a.b.c.d') }), 'a typo'),
      put(keys.build({ kind: 'address', address: orphan }), encodeAddress(unowned)),
    ],
  );
  await time.advance(1_000);
  const resting = async (address: number) => {
    const entry = await kv.get(keys.build({ kind: 'address', address: address as never }));
    return entry === undefined ? undefined : unwrap(decodeAddress(entry.value)).resting === true;
  };
  for (const address of [...Object.values(service.addresses), orphan]) assert.ok(await resting(address));
  assert.equal(await kv.keys(keys.prefix('exposed')), []);
  for (const address of Object.values(other.service.addresses)) assert.is(await resting(address), false);
  await time.advance((config.quarantineS + restExtraS(config.quarantineS)) * 1_000 + RECONCILE_INTERVAL_MS);
  for (const address of [...Object.values(service.addresses), orphan])
    assert.is(await resting(address), undefined, 'free again');
  assert.ok(logs.of('warn').some(({ key }) => key?.endsWith('a.b.c.d')));
  await roles.stop();
});

test('role cluster: what cannot be completed is logged once, waits longer each time, and keeps nobody from its turn', async () => {
  const { time, store, kv, candidate, logs } = world();
  const { roles } = candidate('a');
  await time.advance(1_000);
  const ports = [{ source: 443, destination: 1, protocol: 'tcp' as const }];
  await applyService(kv, keys, config, descriptor(CART, { exposed: true, ports }));
  const record = (id: ServiceId, more = {}) =>
    put(
      keys.build({ kind: 'service', service: id }),
      encodeService({ id, descriptor: descriptor(id, more), addresses: {} }),
    );
  // More of them than one pass takes, and all before the good one in key order.
  const hopeless = Array.from({ length: RECONCILE_ACTIONS_MAX + 20 }, (_, i) => sid(`a.a.a.s${i}`));
  for (let i = 0; i < hopeless.length; i += 100)
    await kv.txn(
      [],
      hopeless.slice(i, i + 100).map((id) => record(id, { exposed: true, ports })),
    );
  const good = sid('z.z.z.z');
  await kv.txn([], [record(good)]);
  await time.advance(1_000);
  const read = async (id: ServiceId) =>
    unwrap(decodeService((await kv.get(keys.build({ kind: 'service', service: id })))?.value ?? '', id));
  assert.is(Object.keys((await read(good)).addresses).length, 3);
  const warned = () => logs.of('warn').filter(({ code }) => code === 'port_taken').length;
  assert.is(warned(), hopeless.length);
  const { revision } = store;
  await time.advance(4 * RECONCILE_INTERVAL_MS);
  assert.is(warned(), hopeless.length, 'once each');
  assert.is(store.revision, revision, 'and nothing was written');
  // The port becomes free: what waited gets its turn, one of them the port.
  await deleteService(kv, keys, config, CART, { force: true });
  await time.advance(3 * RECONCILE_INTERVAL_MS);
  assert.is((await kv.keys(keys.prefix('ports'))).length, 1);
  await roles.stop();
});

test('role root reports keys that nothing takes notice of, once, and blocks outside the plan starve nobody', async () => {
  const { time, kv, candidate, logs } = world();
  const everything = keys.build({ kind: 'block', block: cidr('0.0.0.0/0') });
  const outside = keys.build({ kind: 'block', block: cidr('10.0.0.0/16') });
  await kv.txn(
    [],
    [
      put(everything, encodeBlock({ cluster: 'west' })),
      put(outside, encodeBlock({ cluster: 'west' })),
      put(`${keys.root}/servces/shop.prod.cart.v1`, '{}'),
      put(`${keys.prefix('ports')}tcp/http`, '{}'),
    ],
  );
  const { roles } = candidate('a');
  await time.advance(3 * RECONCILE_INTERVAL_MS);
  const blocks = (await kv.range(keys.prefix('root'))).entries.filter(({ key }) => key.includes('/172.'));
  assert.is(unwrap(decodeBlock(blocks[0]?.value ?? '')).cluster, 'lab', 'lab gets its block all the same');
  await claimSubnet(kv, keys, config, { node: 'n1', cluster: 'lab' });
  const warned = logs.of('warn').filter(({ message }) => message.includes('takes notice'));
  assert.equal(
    warned.map(({ key }) => key).sort(),
    [everything, outside, `${keys.prefix('ports')}tcp/http`, `${keys.root}/servces/shop.prod.cart.v1`].sort(),
  );
  await roles.stop();
});

test('a process that cannot reach the keyspace, or campaigns in vain, says so once', async () => {
  const { time, store, kv: reachable, logs } = world();
  const kv = Object.assign(Object.create(reachable) as MemoryKv, {
    get: () => Promise.reject(new EdgewayError('permission_denied', 'etcd: authentication failed')),
    txn: () => Promise.reject(new EdgewayError('permission_denied', 'etcd refuses')),
    grant: async () => store.grant(ROLE_TTL_S),
    keepAlive: async () => ROLE_TTL_S,
    revoke: async () => {},
    follow: reachable.follow.bind(reachable),
  });
  const { log } = logs;
  const common = { keys, time, random: () => 0.5, log, cluster: 'lab', network: config };
  const roles = startRoles({ ...common, kv, holder: 'a', roles: ['root'] });
  await time.advance(60_000);
  const warned = logs.of('warn').map(({ error }) => error);
  assert.equal(warned, ['etcd: authentication failed', 'etcd refuses']);
  await roles.stop();
});

test('role cluster: deleting a node key by hand takes its instances along', async () => {
  const { time, kv, candidate } = world();
  const { roles } = candidate('a');
  await time.advance(1_000);
  const claim = await claimSubnet(kv, keys, config, { node: 'n1', cluster: 'lab' });
  const n1 = node('n1', 1, { subnet: claim.subnet, epoch: claim.epoch });
  const presence = await kv.grant(3_600);
  await publishNode(kv, keys, n1, presence);
  const { instanceIp } = await claimInstance(kv, keys, config, {
    service: CART,
    instance: 1,
    node: 'n1',
    lease: claim.lease,
  });
  await publishInstance(kv, keys, claim.subnet, instance(n1, CART, 1, { instanceIp }), presence);
  await time.advance(60_000);
  const instanceKey = keys.build({ kind: 'instance', service: CART, instance: 1 });
  assert.ok(await kv.get(instanceKey), 'a live instance is left alone');
  await kv.txn([], [{ kind: 'delete', key: keys.build({ kind: 'node', cluster: 'lab', node: 'n1' }) }]);
  await time.advance(1_000);
  assert.is(await kv.get(instanceKey), undefined);
  assert.ok(
    await kv.get(keys.build({ kind: 'address', address: instanceIp })),
    'its address stays with its tenure',
  );
  await roles.stop();
});

test('a leader key that cannot be read is somebody’s; deleting it frees the role', async () => {
  const { time, kv, candidate } = world();
  await kv.txn([], [put(leaderKey, 'scribble')]);
  const { roles } = candidate('a', { roles: ['root'] });
  await time.advance(10_000);
  assert.equal(roles.acting(), []);
  await kv.txn([], [{ kind: 'delete', key: leaderKey }]);
  await time.advance(1_000);
  assert.equal(roles.acting(), ['root']);
  await roles.stop();
  await settle();
});

test('role root leaves a plan that it cannot read alone', async () => {
  const { time, kv, candidate } = world();
  const key = keys.build({ kind: 'config' });
  await kv.txn([], [put(key, '{"v":1,')]);
  const { roles } = candidate('a');
  await time.advance(2_000);
  assert.is((await kv.get(key))?.value, '{"v":1,');
  await kv.txn(
    [],
    [put(key, encodeConfig({ ...config, plan: { ...config.plan, platform: cidr('172.16.0.0/12') } }))],
  );
  await time.advance(2_000);
  assert.ok((await kv.keys(keys.prefix('root'))).some((name) => name.includes('/blocks/')));
  await roles.stop();
});

test.run();
