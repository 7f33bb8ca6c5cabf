import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  applyService,
  type Claimant,
  claimInstance,
  claimSubnet,
  deleteService,
  ensureConfig,
  ensureService,
  publishInstance,
  publishNode,
  releaseInstance,
  releaseSubnet,
  type SubnetClaim,
} from '../../coordinator/claims.ts';
import type { Kv, LeaseId, TxnResult } from '../../coordinator/kv.ts';
import { type MemoryKv, MemoryStore } from '../../coordinator/memory.ts';
import { restExtraS } from '../../coordinator/rest.ts';
import { formatCidr, formatIpv4, type Ipv4, parseCidr } from '../../src/addr.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { bareDescriptor } from '../../src/model.ts';
import type { ServiceId } from '../../src/name.ts';
import { DEFAULT_PLAN, subnetCount } from '../../src/plan.ts';
import { POLICIES } from '../../src/policy.ts';
import {
  DEFAULT_NETWORK_CONFIG,
  decodeAddress,
  decodeSubnet,
  encodeAddress,
  encodeBlock,
  encodeService,
  encodeSubnet,
} from '../../src/records.ts';
import { Rng } from '../../src/rng.ts';
import { rejectsWith } from '../conformance/kv.ts';
import { CART, descriptor, instance, ip, node, sid } from '../support/sample.ts';
import { settle } from '../support/time.ts';

const keys = new Keys();
const config = DEFAULT_NETWORK_CONFIG;
const cidr = (text: string) => unwrap(parseCidr(text));
const put = (key: string, value: string) => ({ kind: 'put', key, value }) as const;

function world(): { store: MemoryStore; kv: MemoryKv; pass: (ms: number) => void } {
  let now = 0;
  const store = new MemoryStore(() => now);
  return {
    store,
    kv: store.connect(),
    pass: (ms) => {
      now += ms;
      store.expire();
    },
  };
}
const owner = (id: string, cluster = 'lab') => ({ node: id, cluster });
const at = (id: string, nodeIp: string, cluster = 'lab'): Claimant => ({
  ...owner(id, cluster),
  nodeIp: ip(nodeIp),
});
const addressKey = (text: string) => keys.build({ kind: 'address', address: ip(text) });

test('ensureConfig writes the plan once; the second caller gets what is there', async () => {
  const { kv } = world();
  assert.equal(await ensureConfig(kv, keys, config), config);
  assert.equal(await ensureConfig(kv, keys, { ...config, vni: 7 }), config);
  await kv.txn([], [put(keys.build({ kind: 'config' }), '{"v":1}')]);
  const error = await rejectsWith('invalid_record', () => ensureConfig(kv, keys, config));
  assert.match(error.message, '/edgeway/v1/config/network: platform');
});

test('claimSubnet gives each node its own, under its tenure lease, with the create revision as epoch', async () => {
  const { kv, pass } = world();
  const claims = await Promise.all(
    Array.from({ length: 200 }, (_, i) => claimSubnet(kv, keys, config, owner(`n${i}`))),
  );
  assert.is(new Set(claims.map(({ subnet }) => formatCidr(subnet))).size, 200);
  for (const { subnet, epoch, lease } of claims) {
    const entry = await kv.get(keys.build({ kind: 'subnet', subnet }));
    assert.is(entry?.createRevision, epoch);
    assert.is(entry?.lease, lease);
  }
  pass(config.tenureTtlS * 1000 + 1);
  assert.is((await kv.keys(keys.prefix('subnets'))).length, 0, 'tenure frees them');
});

test('claimSubnet finds the node’s own claim again, without being told, and keeps its epoch', async () => {
  const { kv } = world();
  const first = await claimSubnet(kv, keys, config, owner('n1'));
  const again = await claimSubnet(kv, keys, config, owner('n1'));
  assert.equal(again.subnet, first.subnet);
  assert.is(again.epoch, first.epoch);
  const entry = await kv.get(keys.build({ kind: 'subnet', subnet: first.subnet }));
  assert.is(entry?.lease, again.lease, 'it hangs on the new tenure lease');
  const preferred = cidr('172.20.1.64/26');
  const other = await claimSubnet(kv, keys, config, owner('n2'), { preferred });
  assert.equal(other.subnet, preferred);
});

test('claimSubnet recognises a claim whose answer was lost', async () => {
  const { kv } = world();
  let lose = true;
  const flaky = new Proxy(kv, {
    get: (target, name) =>
      name === 'txn'
        ? async (...args: Parameters<Kv['txn']>): Promise<TxnResult> => {
            const result = await target.txn(...args);
            if (lose && result.succeeded) {
              lose = false;
              throw new EdgewayError('coordination_unavailable', 'the connection broke');
            }
            return result;
          }
        : Reflect.get(target, name).bind(target),
  }) as Kv;
  await rejectsWith('coordination_unavailable', () => claimSubnet(flaky, keys, config, owner('n1')));
  const claim = await claimSubnet(flaky, keys, config, owner('n1'));
  assert.is((await kv.keys(keys.prefix('subnets'))).length, 1, 'nothing leaked');
  assert.ok(claim.epoch > 0);
});

test('claimSubnet exact: subnet_taken names the holder, address_not_in_plan the rule', async () => {
  const { kv } = world();
  const exact = cidr('172.16.3.64/26');
  await claimSubnet(kv, keys, config, owner('n1'), { exact });
  assert.equal((await claimSubnet(kv, keys, config, owner('n1'), { exact })).subnet, exact);
  const taken = await rejectsWith('subnet_taken', () =>
    claimSubnet(kv, keys, config, owner('n2'), { exact }),
  );
  assert.match(taken.message, 'subnet 172.16.3.64/26 is held by node n1 of cluster lab');
  for (const text of ['172.30.0.0/26', '10.0.0.0/26', '172.16.0.0/24'])
    await rejectsWith('address_not_in_plan', () =>
      claimSubnet(kv, keys, config, owner('n2'), { exact: cidr(text) }),
    );
  const route = await rejectsWith('subnet_taken', () =>
    claimSubnet(kv, keys, config, owner('n2'), {
      exact: cidr('172.17.0.64/26'),
      avoid: [cidr('172.17.0.0/16')],
    }),
  );
  assert.match(route.message, 'collides with this host’s route 172.17.0.0/16'.replace('’', "'"));
});

test('claimSubnet avoids the host’s routes', async () => {
  const { kv } = world();
  const avoid = [cidr('172.16.0.0/13'), cidr('172.24.0.0/14'), cidr('172.28.0.0/15')];
  for (let i = 0; i < 40; i++) {
    const { subnet } = await claimSubnet(kv, keys, config, owner(`n${i}`), {
      avoid,
      preferred: cidr('172.17.0.0/26'),
    });
    assert.match(formatCidr(subnet), /^172\.31\./);
  }
});

test('claimSubnet prefers its cluster’s blocks and never takes from another’s', async () => {
  const { kv } = world();
  const block = cidr('172.18.0.0/24');
  await kv.txn(
    [],
    [
      put(keys.build({ kind: 'block', block }), encodeBlock({ cluster: 'lab' })),
      put(keys.build({ kind: 'block', block: cidr('172.16.0.0/15') }), encodeBlock({ cluster: 'other' })),
      put(keys.build({ kind: 'block', block: cidr('172.24.0.0/14') }), 'who knows'),
    ],
  );
  const claims = [];
  for (let i = 0; i < 12; i++) claims.push(await claimSubnet(kv, keys, config, owner(`n${i}`)));
  const inside = claims.filter(({ subnet }) => formatCidr(subnet).startsWith('172.18.0.'));
  assert.is(inside.length, 4, 'a /24 holds four');
  assert.ok(claims.every(({ subnet }) => !/^172\.(16|17|24|25|26|27)\./.test(formatCidr(subnet))));
});

test('claimSubnet: all of a plan can be claimed by racing nodes, none twice, and the next gets a clear error', async () => {
  const { kv } = world();
  const small = {
    ...config,
    plan: { ...DEFAULT_PLAN, platform: cidr('10.0.0.0/20'), services: cidr('10.0.4.0/22') },
  };
  const count = subnetCount(small.plan);
  assert.is(count, 48);
  const claims = await Promise.all(
    Array.from({ length: count }, (_, i) => claimSubnet(kv, keys, small, owner(`n${i}`))),
  );
  assert.is(new Set(claims.map(({ subnet }) => subnet.base)).size, count);
  const error = await rejectsWith('subnets_exhausted', () => claimSubnet(kv, keys, small, owner('late')));
  assert.match(error.message, 'all 48 of 48 in 10.0.0.0/20');
});

test('claimSubnet refuses a second live host with the same node id', async () => {
  const { kv } = world();
  const [one, two] = [at('n1', '10.0.0.1'), at('n1', '10.0.0.2')];
  const claim = await claimSubnet(kv, keys, config, one);
  const here = node('n1', 0, { nodeIp: ip('10.0.0.1'), subnet: claim.subnet, epoch: claim.epoch });
  const presence = await kv.grant(15);
  await publishNode(kv, keys, here, presence);
  await claimSubnet(kv, keys, config, one);
  const error = await rejectsWith('conflict', () => claimSubnet(kv, keys, config, two));
  assert.match(error.message, 'in use by a live node at 10.0.0.1');
  await kv.revoke(presence);
  await claimSubnet(kv, keys, config, two);
  const late = await rejectsWith('conflict', async () => publishNode(kv, keys, here, await kv.grant(15)));
  assert.match(late.message, 'node id n1 has passed to a host of cluster lab at 10.0.0.2');
  await rejectsWith('conflict', async () =>
    publishInstance(kv, keys, claim.subnet, instance(here, CART, 1), await kv.grant(15)),
  );
});

test('two hosts with one node id that join together: exactly one is published, whatever their order', async () => {
  for (const order of ['claim claim publish publish', 'claim publish claim publish', 'together']) {
    const { store, kv } = world();
    const hosts = [at('n1', '10.0.0.1'), at('n1', '10.0.0.2')];
    const claims = new Map<Claimant, SubnetClaim>();
    const claim = async (host: Claimant) => {
      claims.set(host, await claimSubnet(store.connect(), keys, config, host));
    };
    const publish = async (host: Claimant) => {
      const held = claims.get(host);
      if (held === undefined) throw new EdgewayError('conflict', 'its claim was refused');
      const record = node('n1', 0, { nodeIp: host.nodeIp!, subnet: held.subnet, epoch: held.epoch });
      await publishNode(kv, keys, record, await kv.grant(15));
    };
    const outcomes: PromiseSettledResult<void>[] = [];
    if (order === 'together')
      outcomes.push(
        ...(await Promise.allSettled(hosts.map((host) => claim(host).then(() => publish(host))))),
      );
    else {
      const turns = { claim: [...hosts], publish: [...hosts] };
      for (const step of order.split(' ') as ('claim' | 'publish')[]) {
        const host = turns[step].shift()!;
        const [outcome] = await Promise.allSettled([step === 'claim' ? claim(host) : publish(host)]);
        if (step === 'publish') outcomes.push(outcome);
        else if (outcome.status === 'rejected') assert.is(outcome.reason.code, 'conflict');
      }
    }
    assert.is(outcomes.filter(({ status }) => status === 'fulfilled').length, 1, order);
    // The one that was refused undoes its join, which takes nothing from the other.
    const winner = hosts[outcomes.findIndex(({ status }) => status === 'fulfilled')]!;
    const loser = hosts.find((host) => host !== winner)!;
    const { subnet } = claims.get(winner)!;
    await releaseSubnet(kv, keys, config, loser, subnet);
    const held = await kv.get(keys.build({ kind: 'subnet', subnet }));
    assert.equal(unwrap(decodeSubnet(held?.value ?? '')), owner('n1'), order);
  }
});

test('a node id belongs to one cluster: another’s node of that id is refused while the first has its tenure', async () => {
  const { kv, pass } = world();
  const mine = at('edge-1', '10.0.0.1');
  const claim = await claimSubnet(kv, keys, config, mine);
  for (const other of [at('edge-1', '10.0.0.2', 'west'), owner('edge-1', 'west')]) {
    const error = await rejectsWith('conflict', () => claimSubnet(kv, keys, config, other));
    assert.match(error.message, 'node id edge-1 belongs to a host of cluster lab at 10.0.0.1');
  }
  assert.is((await kv.keys(keys.prefix('subnets'))).length, 1);
  const moved = await claimSubnet(kv, keys, config, { ...mine, cluster: 'west' });
  assert.is.not(moved.subnet.base, claim.subnet.base, 'the same host may change its cluster');
  await releaseSubnet(kv, keys, config, { ...mine, cluster: 'west' }, moved.subnet);
  const third = await claimSubnet(kv, keys, config, at('edge-1', '10.0.0.3', 'north'));
  await rejectsWith('conflict', () => claimSubnet(kv, keys, config, mine));
  await kv.txn([], [put(keys.build({ kind: 'host', node: 'edge-1' }), 'scribble')]);
  await rejectsWith('invalid_record', () => claimSubnet(kv, keys, config, mine));
  await kv.revoke(third.lease);
  pass(config.tenureTtlS * 1_000 + 1);
  await rejectsWith('invalid_record', () => claimSubnet(kv, keys, config, mine));
});

test('claimSubnet leaves no lease behind when it refuses', async () => {
  const { kv, store } = world();
  const exact = cidr('172.16.3.64/26');
  await claimSubnet(kv, keys, config, owner('n1'), { exact });
  const before = store.leases;
  await rejectsWith('subnet_taken', () => claimSubnet(kv, keys, config, owner('n2'), { exact }));
  await rejectsWith('conflict', () => claimSubnet(kv, keys, config, owner('n1', 'west')));
  assert.is(store.leases, before);
});

test('releaseSubnet lets it rest for others; its last holder takes it up again, without a moment in which it is anybody’s', async () => {
  const { kv, store, pass } = world();
  const exact = cidr('172.16.3.64/26');
  const first = await claimSubnet(kv, keys, config, owner('n1'), { exact });
  await releaseSubnet(kv, keys, config, owner('n2'), exact);
  const holder = async () =>
    unwrap(decodeSubnet((await kv.get(keys.build({ kind: 'subnet', subnet: exact })))?.value ?? ''));
  assert.equal(await holder(), owner('n1'), 'somebody else cannot release it');
  await releaseSubnet(kv, keys, config, owner('n1'), exact);
  await releaseSubnet(kv, keys, config, owner('n1'), exact);
  const resting = await rejectsWith('subnet_taken', () =>
    claimSubnet(kv, keys, config, owner('n2'), { exact }),
  );
  assert.match(resting.message, 'rests');
  const presence = await kv.grant(15);
  await rejectsWith('lease_lost', () =>
    publishNode(kv, keys, node('n1', 1, { subnet: exact, epoch: first.epoch }), presence),
  );
  const { revision } = store;
  const back = await claimSubnet(kv, keys, config, owner('n1'), { exact });
  assert.is(back.epoch, first.epoch, 'the same holder goes on');
  assert.is(store.revision, revision + 1, 'in one transaction');
  await releaseSubnet(kv, keys, config, owner('n1'), exact);
  pass(config.quarantineS * 1000 - 1);
  await rejectsWith('subnet_taken', () => claimSubnet(kv, keys, config, owner('n2'), { exact }));
  pass(restExtraS(config.quarantineS) * 1000 + 1);
  assert.equal((await claimSubnet(kv, keys, config, owner('n2'), { exact })).subnet, exact);
});

test('applyService claims three ServiceIPs once, and applying again changes nothing', async () => {
  const { kv, store } = world();
  const first = await applyService(kv, keys, config, descriptor());
  assert.is(new Set(Object.values(first.service.addresses)).size, 3);
  for (const policy of POLICIES) {
    const entry = await kv.get(keys.build({ kind: 'address', address: first.service.addresses[policy]! }));
    assert.equal(unwrap(decodeAddress(entry?.value ?? '')), { kind: 'service', service: CART, policy });
    assert.is(entry?.lease, undefined, 'durable');
  }
  const revision = store.revision;
  const again = await applyService(kv, keys, config, descriptor());
  assert.equal(again, first);
  assert.is(store.revision, revision);
  const changed = await applyService(kv, keys, config, descriptor(CART, { ports: [443] }));
  assert.equal(changed.service.addresses, first.service.addresses);
  assert.ok(changed.revision > first.revision);
});

test('applyService completes a record that a person wrote without addresses, and keeps those it has', async () => {
  const { kv } = world();
  const [app, appNs, service, serviceNs] = CART.split('.');
  await kv.txn(
    [],
    [
      put(
        keys.build({ kind: 'service', service: CART }),
        JSON.stringify({
          v: 1,
          appname: app,
          appnamespace: appNs,
          servicename: service,
          servicenamespace: serviceNs,
          addresses: { closest: '172.30.7.7' },
        }),
      ),
    ],
  );
  const applied = await applyService(kv, keys, config, descriptor());
  assert.is(formatIpv4(applied.service.addresses.closest!), '172.30.7.7');
  assert.is(Object.keys(applied.service.addresses).length, 3);
  assert.ok(await kv.get(addressKey('172.30.7.7')));
});

test('applyService leaves a complete record alone however it is spelled, and keeps fields that it does not know', async () => {
  const { kv, store } = world();
  const key = keys.build({ kind: 'service', service: CART });
  await applyService(kv, keys, config, descriptor());
  const stands = JSON.parse((await kv.get(key))?.value ?? '') as { ports: number[] };
  const spaced = JSON.stringify({ team: 'blue', ...stands, needs: undefined }, undefined, 2);
  await kv.txn([], [put(key, spaced)]);
  const { revision } = store;
  await applyService(kv, keys, config, descriptor());
  await ensureService(kv, keys, config, CART);
  assert.is(store.revision, revision, 'nothing to write');
  await applyService(kv, keys, config, descriptor(CART, { ports: [443] }));
  const now = JSON.parse((await kv.get(key))?.value ?? '') as { ports: number[]; team: string };
  assert.equal([now.team, now.ports], ['blue', [443]]);
});

test('ensureService keeps what a person writes while it is at work', async () => {
  const { kv } = world();
  const key = keys.build({ kind: 'service', service: CART });
  let edits = 2;
  const raced = Object.assign(Object.create(kv) as Kv, {
    txn: async (...args: Parameters<Kv['txn']>) => {
      if (edits-- > 0) {
        const edited = descriptor(CART, { ports: [8_000 + edits] });
        await kv.txn([], [put(key, encodeService({ id: CART, descriptor: edited, addresses: {} }))]);
      }
      return kv.txn(...args);
    },
  });
  raced.get = kv.get.bind(kv);
  const { service } = await ensureService(raced, keys, config, CART, bareDescriptor(CART));
  assert.equal(service.descriptor.ports, [8_000], 'the last edit');
  assert.is(Object.keys(service.addresses).length, 3);
  await rejectsWith('not_found', () => ensureService(kv, keys, config, sid('no.such.service.v1')));
  await kv.txn([], [put(key, 'scribble')]);
  await rejectsWith('invalid_record', () => ensureService(kv, keys, config, CART, bareDescriptor(CART)));
});

test('a service keeps a ServiceIP whose claim somebody scribbled on, and gets its claim back when it is deleted', async () => {
  const { kv } = world();
  const before = (await applyService(kv, keys, config, descriptor())).service.addresses;
  const scribbled = keys.build({ kind: 'address', address: before.closest! });
  await kv.txn([], [put(scribbled, 'scribble')]);
  for (let round = 0; round < 2; round++)
    assert.equal((await ensureService(kv, keys, config, CART)).service.addresses, before);
  assert.is((await kv.get(scribbled))?.value, 'scribble', 'not overwritten');
  await kv.txn([], [{ kind: 'delete', key: scribbled }]);
  assert.equal((await ensureService(kv, keys, config, CART)).service.addresses, before);
  assert.ok(unwrap(decodeAddress((await kv.get(scribbled))?.value ?? '')));
});

test('applyService claims a wanted address, and refuses one that somebody else holds', async () => {
  const { kv } = world();
  const wanted = { closest: ip('172.30.9.9') };
  const before = await applyService(kv, keys, config, descriptor());
  const moved = await applyService(kv, keys, config, descriptor(), wanted);
  assert.is(moved.service.addresses.closest, wanted.closest);
  assert.is(moved.service.addresses.roundrobin, before.service.addresses.roundrobin);
  const old = await kv.get(keys.build({ kind: 'address', address: before.service.addresses.closest! }));
  assert.ok(unwrap(decodeAddress(old?.value ?? '')).resting, 'the replaced address rests');
  const error = await rejectsWith('address_taken', () =>
    applyService(kv, keys, config, descriptor(sid('a.b.c.d')), wanted),
  );
  assert.match(error.message, 'address 172.30.9.9 is held by policy closest of shop.prod.cart.v1');
  assert.is(await kv.get(keys.build({ kind: 'service', service: sid('a.b.c.d') })), undefined);
  for (const text of ['172.16.0.1', '172.30.0.0', '172.30.255.255', '8.8.8.8'])
    await rejectsWith('address_not_in_plan', () =>
      applyService(kv, keys, config, descriptor(), { closest: ip(text) }),
    );
  await rejectsWith('invalid_request', () =>
    applyService(kv, keys, config, descriptor(), {
      closest: wanted.closest,
      fastest: wanted.closest,
    }),
  );
});

test('applyService claims node ports, refuses those of another service, and gives back what is no longer published', async () => {
  const { kv } = world();
  const SHOP = sid('shop.prod.front.v1');
  const web = (source: number, protocol: 'tcp' | 'udp' = 'tcp') => ({ source, destination: 80, protocol });
  const apply = (id: typeof SHOP, ports: ReturnType<typeof web>[], exposed = true) =>
    applyService(kv, keys, config, descriptor(id, { exposed, ports }));
  const held = () => kv.keys(keys.prefix('ports'));
  await apply(CART, [web(80), web(53, 'udp')]);
  assert.equal(await held(), ['/edgeway/v1/ports/tcp/80', '/edgeway/v1/ports/udp/53']);
  const error = await rejectsWith('port_taken', () => apply(SHOP, [web(81), web(80)]));
  assert.match(error.message, 'tcp port 80 leads to service shop.prod.cart.v1 already');
  assert.is((await held()).length, 2, 'all or nothing');
  await apply(SHOP, [web(80)], false);
  await apply(SHOP, [web(80, 'udp'), web(81)]);
  await apply(CART, [web(53, 'udp')]);
  assert.equal(await held(), [
    '/edgeway/v1/ports/tcp/81',
    '/edgeway/v1/ports/udp/53',
    '/edgeway/v1/ports/udp/80',
  ]);
  await apply(SHOP, [web(80)]);
  await deleteService(kv, keys, config, SHOP);
  assert.equal(await held(), ['/edgeway/v1/ports/udp/53']);
  // A record that somebody deleted by hand holds nothing.
  await kv.txn([], [{ kind: 'delete', key: keys.build({ kind: 'service', service: CART }) }]);
  await apply(SHOP, [web(53, 'udp')]);
});

test('applyService under racing services: a node port has one owner', async () => {
  const { store } = world();
  const ids = Array.from({ length: 8 }, (_, n) => sid(`shop.prod.s${n}.v1`));
  const ports = [{ source: 443, destination: 8443, protocol: 'tcp' as const }];
  const outcomes = await Promise.allSettled(
    ids.map((id) => applyService(store.connect(), keys, config, descriptor(id, { exposed: true, ports }))),
  );
  assert.is(outcomes.filter(({ status }) => status === 'fulfilled').length, 1);
});

test('applyService under racing services and racing appliers of one service: no address twice', async () => {
  const { store, kv } = world();
  const small = {
    ...config,
    plan: { platform: cidr('10.0.0.0/16'), services: cidr('10.0.1.0/24'), nodeBits: 26 },
  };
  const clients = Array.from({ length: 4 }, () => store.connect());
  const services = Array.from({ length: 60 }, (_, i) => sid(`app.ns.s${i}.v1`));
  const applied = await Promise.all(
    services.flatMap((id) =>
      clients.slice(0, 2).map((client) => applyService(client, keys, small, descriptor(id))),
    ),
  );
  const owners = new Map<number, string>();
  for (const { service } of applied)
    for (const address of Object.values(service.addresses)) {
      assert.ok((owners.get(address) ?? service.id) === service.id, `${formatIpv4(address)} twice`);
      owners.set(address, service.id);
    }
  assert.is(owners.size, 180);
  assert.is((await kv.keys(keys.prefix('addresses'))).length, 180, 'racing leaves nothing behind');
  for (let i = 60; i < 84; i++) await applyService(kv, keys, small, descriptor(sid(`app.ns.s${i}.v1`)));
  const error = await rejectsWith('addresses_exhausted', () =>
    applyService(kv, keys, small, descriptor(sid('app.ns.late.v1'))),
  );
  assert.match(error.message, 'no free address in 10.0.1.0/24: 252 addresses');
});

test('deleteService rests its addresses, wants its instances gone first, and says not_found', async () => {
  const { kv } = world();
  const { service } = await applyService(kv, keys, config, descriptor());
  const claim = await claimSubnet(kv, keys, config, owner('n1'));
  const here = node('n1', 0, { subnet: claim.subnet, epoch: claim.epoch });
  const presence = await kv.grant(15);
  await publishInstance(kv, keys, claim.subnet, instance(here, CART, 1), presence);
  await rejectsWith('instance_exists', () => deleteService(kv, keys, config, CART));
  await releaseInstance(kv, keys, config, { service: CART, instance: 1, node: 'n1' });
  await deleteService(kv, keys, config, CART);
  await rejectsWith('not_found', () => deleteService(kv, keys, config, CART));
  await rejectsWith('address_taken', () =>
    applyService(kv, keys, config, descriptor(sid('a.b.c.d')), {
      closest: service.addresses.closest!,
    }),
  );
  const back = await applyService(kv, keys, config, descriptor());
  assert.equal(back.service.addresses, service.addresses, 'the same service gets the same addresses');
});

test('claimInstance, publishInstance, releaseInstance: one number, one node, one address', async () => {
  const { kv } = world();
  const [one, two] = [
    await claimSubnet(kv, keys, config, owner('n1')),
    await claimSubnet(kv, keys, config, owner('n2')),
  ];
  const n1 = node('n1', 1, { subnet: one.subnet, epoch: one.epoch });
  const n2 = node('n2', 2, { subnet: two.subnet, epoch: two.epoch });
  const [p1, p2] = [await kv.grant(15), await kv.grant(15)];
  const wish = { service: CART, instance: 1 };
  const held = await claimInstance(kv, keys, config, { ...wish, node: 'n1', lease: one.lease });
  assert.is((await kv.get(keys.build({ kind: 'address', address: held.instanceIp })))?.lease, one.lease);
  const mine = instance(n1, CART, 1, { instanceIp: held.instanceIp });
  const revision = await publishInstance(kv, keys, one.subnet, mine, p1);
  assert.ok(revision > held.revision);
  const error = await rejectsWith('instance_exists', () =>
    claimInstance(kv, keys, config, { ...wish, node: 'n2', lease: two.lease }),
  );
  assert.match(error.message, 'instance 1 of shop.prod.cart.v1 lives on node n1');
  await rejectsWith('instance_exists', () =>
    publishInstance(kv, keys, two.subnet, instance(n2, CART, 1), p2),
  );
  const again = await claimInstance(kv, keys, config, { ...wish, node: 'n1', lease: one.lease });
  assert.equal(again, held, 'claiming again changes nothing');
  await kv.revoke(p1);
  assert.is(await kv.get(keys.build({ kind: 'instance', service: CART, instance: 1 })), undefined);
  const other = await claimInstance(kv, keys, config, { ...wish, node: 'n2', lease: two.lease });
  assert.is.not(other.instanceIp, held.instanceIp, 'lost presence frees no address');
  await releaseInstance(kv, keys, config, { ...wish, node: 'n2', instanceIp: other.instanceIp });
  await releaseInstance(kv, keys, config, { ...wish, node: 'n1', instanceIp: held.instanceIp });
  const moved = await claimInstance(kv, keys, config, { ...wish, node: 'n2', lease: two.lease });
  assert.is(moved.instanceIp, held.instanceIp, 'once given back, the number takes its address along');
});

test('claimInstance insists on a wanted address or says who has it', async () => {
  const { kv } = world();
  const { lease } = await claimSubnet(kv, keys, config, owner('n1'));
  const wanted = ip('172.30.5.5');
  const wish = { service: CART, instance: 1, node: 'n1', lease, wanted };
  assert.is((await claimInstance(kv, keys, config, wish)).instanceIp, wanted);
  const error = await rejectsWith('address_taken', () =>
    claimInstance(kv, keys, config, { ...wish, instance: 2 }),
  );
  assert.match(error.message, 'is held by instance 1 of shop.prod.cart.v1 on node n1');
  await kv.txn([], [put(addressKey('172.30.5.6'), 'scribble')]);
  const scribble = await rejectsWith('address_taken', () =>
    claimInstance(kv, keys, config, { ...wish, wanted: ip('172.30.5.6') }),
  );
  assert.match(scribble.message, 'cannot be read');
});

test('publishInstance and publishNode are fenced by the subnet’s epoch', async () => {
  const { kv } = world();
  const claim = await claimSubnet(kv, keys, config, owner('n1'));
  const here = node('n1', 1, { subnet: claim.subnet, epoch: claim.epoch });
  const presence = await kv.grant(15);
  await kv.revoke(claim.lease);
  await rejectsWith('lease_lost', () => publishNode(kv, keys, here, presence));
  await rejectsWith('lease_lost', () =>
    publishInstance(kv, keys, claim.subnet, instance(here, CART, 1), presence),
  );
  await claimSubnet(kv, keys, config, owner('n2'), { exact: claim.subnet });
  await rejectsWith('lease_lost', () => publishNode(kv, keys, here, presence));
  await kv.revoke(presence);
  const mine = await claimSubnet(kv, keys, config, owner('n3'));
  await rejectsWith('lease_lost', () =>
    publishNode(kv, keys, node('n3', 3, { subnet: mine.subnet, epoch: mine.epoch }), presence),
  );
});

test('claims never overwrite a value that cannot be read', async () => {
  const { kv } = world();
  const exact = cidr('172.16.3.64/26');
  await kv.txn([], [put(keys.build({ kind: 'subnet', subnet: exact }), '{"v":9}')]);
  await rejectsWith('subnet_taken', () => claimSubnet(kv, keys, config, owner('n1'), { exact }));
  assert.is((await kv.get(keys.build({ kind: 'subnet', subnet: exact })))?.value, '{"v":9}');
  assert.ok(
    encodeSubnet(owner('n1')) !== encodeAddress({ kind: 'service', service: CART, policy: 'closest' }),
  );
});

test('10,000 random claims and releases by 40 nodes: no address has two owners, none leaks', async () => {
  const { kv, pass } = world();
  const small = {
    ...config,
    plan: { platform: cidr('10.0.0.0/20'), services: cidr('10.0.4.0/22'), nodeBits: 26 },
  };
  let state = 42;
  const below = (n: number): number => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    return (state >>> 8) % n;
  };
  const held = new Map<string, Awaited<ReturnType<typeof claimSubnet>>>();
  for (let step = 0; step < 10_000; step++) {
    const id = `n${below(40)}`;
    const had = held.get(id);
    if (had === undefined) held.set(id, await claimSubnet(kv, keys, small, owner(id)));
    else if (below(3) === 0) {
      await releaseSubnet(kv, keys, small, owner(id), had.subnet);
      await kv.revoke(had.lease);
      held.delete(id);
    } else if (below(20) === 0) {
      await kv.revoke(had.lease);
      held.delete(id);
    }
    pass(below(20_000));
    const bases = new Set([...held.values()].map(({ subnet }) => subnet.base));
    assert.is(bases.size, held.size);
    for (const { lease } of held.values()) await kv.keepAlive(lease);
  }
  pass((small.quarantineS + restExtraS(small.quarantineS)) * 1000 + 1);
  assert.is((await kv.keys(keys.prefix('subnets'))).length, held.size);
});

test('10,000 random adds, deletes, crashes and lost answers: no address has two owners or is given before it rested, none leaks', async () => {
  const { kv, pass } = world();
  const small = {
    ...config,
    plan: { platform: cidr('10.0.0.0/16'), services: cidr('10.0.1.0/24'), nodeBits: 26 },
    tenureTtlS: 1_200,
    quarantineS: 60,
  };
  const rng = new Rng(7, 1);
  let now = 0;
  /** Leases end only here, so a deletion at any other time is a release that was no rest. */
  let waiting = false;
  const wait = async (ms: number): Promise<void> => {
    waiting = true;
    now += ms;
    pass(ms);
    await settle();
    waiting = false;
  };
  // One in twelve writes is applied and its answer lost; one in twelve never arrives.
  const flaky = new Proxy(kv, {
    get: (target, name) =>
      name === 'txn'
        ? async (...args: Parameters<Kv['txn']>): Promise<TxnResult> => {
            const luck = rng.below(12);
            if (luck === 0) throw new EdgewayError('coordination_unavailable', 'it never arrived');
            const result = await target.txn(...args);
            if (luck === 1) throw new EdgewayError('coordination_unavailable', 'the answer was lost');
            return result;
          }
        : Reflect.get(target, name).bind(target),
  }) as Kv;

  // The witness sees every change: who holds an address, or held it last, and since when it rests or is free.
  const breaches: string[] = [];
  const owners = new Map<string, { owner: string; resting: boolean; sinceMs?: number }>();
  const witness = kv.follow(keys.prefix('addresses'), {
    live: () => {},
    batch: (batch) => {
      for (const change of batch.kind === 'changes' ? batch.changes : []) {
        const key = change.kind === 'put' ? change.entry.key : change.key;
        const was = owners.get(key);
        if (change.kind === 'delete') {
          if (!waiting) breaches.push(`${key} was freed at once`);
          if (was !== undefined) owners.set(key, { ...was, sinceMs: was.sinceMs ?? now });
          continue;
        }
        const { resting = false, ...held } = unwrap(decodeAddress(change.entry.value));
        const owner = JSON.stringify({ ...held, node: undefined });
        if (was !== undefined && was.owner !== owner) {
          if (was.sinceMs === undefined) breaches.push(`${key} passed from ${was.owner} to ${owner}`);
          else if (was.resting && now - was.sinceMs < 60_000) breaches.push(`${key} did not rest`);
        }
        owners.set(key, { owner, resting, ...(resting ? { sinceMs: now } : {}) });
      }
    },
  });

  interface Crashable {
    lease: LeaseId;
    readonly instances: Map<number, { service: ServiceId; ip: Ipv4 | undefined }>;
  }
  const services = Array.from({ length: 20 }, (_, i) => sid(`app.ns.s${i}.v1`));
  const applied = new Set<ServiceId>();
  const nodes = new Map<string, Crashable>();
  /** Goes on until the outcome is known, as an agent does. */
  const surely = async <T>(call: () => Promise<T>): Promise<T | undefined> => {
    for (;;)
      try {
        return await call();
      } catch (error) {
        const { code } = error as EdgewayError;
        if (code === 'coordination_unavailable') continue;
        if (code === 'address_taken' || code === 'addresses_exhausted' || code === 'not_found')
          return undefined;
        throw error;
      }
  };
  for (let step = 0; step < 10_000; step++) {
    const service = services[rng.below(services.length)]!;
    const name = `n${rng.below(12)}`;
    const here = nodes.get(name) ?? { lease: await kv.grant(small.tenureTtlS), instances: new Map() };
    nodes.set(name, here);
    // Numbers are a node's own, so that no two ask for one.
    const instance = 1 + Number(name.slice(1)) * 10 + rng.below(10);
    const wish = { service: services[instance % services.length]!, instance, node: name };
    switch (rng.below(8)) {
      case 0:
        if ((await surely(() => applyService(flaky, keys, small, descriptor(service)))) !== undefined)
          applied.add(service);
        break;
      case 1:
        await surely(() => deleteService(flaky, keys, small, service, { force: true }));
        applied.delete(service);
        break;
      case 2:
      case 3:
      case 4: {
        const preferred = here.instances.get(instance)?.ip;
        const claim = await surely(() =>
          claimInstance(flaky, keys, small, {
            ...{ ...wish, lease: here.lease },
            ...(preferred === undefined ? {} : { preferred }),
          }),
        );
        if (claim !== undefined)
          here.instances.set(instance, { service: wish.service, ip: claim.instanceIp });
        break;
      }
      case 5:
      case 6: {
        const held = here.instances.get(instance);
        if (held?.ip === undefined) break;
        const instanceIp = held.ip;
        await surely(() => releaseInstance(flaky, keys, small, { ...wish, instanceIp }));
        here.instances.delete(instance);
        break;
      }
      case 7:
        // Gone without a word, or for longer than its tenure.
        if (rng.below(10) === 0) nodes.delete(name);
        break;
    }
    await wait(rng.below(4_000));
    for (const { lease } of nodes.values()) await kv.keepAlive(lease);
  }
  await wait(small.tenureTtlS * 1_000 - 1);
  for (const { lease } of nodes.values()) await kv.keepAlive(lease);
  await wait(2);
  const expected = [...nodes.values()].reduce((sum, { instances }) => sum + instances.size, 3 * applied.size);
  assert.equal(breaches.slice(0, 3), []);
  assert.is((await kv.keys(keys.prefix('addresses'))).length, expected, 'what is held, and nothing else');
  await witness.close();
});

test.run();
