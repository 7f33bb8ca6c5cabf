// The agent on a store in memory, a clock moved by hand and a host that only remembers: what it holds, publishes and
// gives back when the store goes away, forgets, or somebody deletes what was the agent's.
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { ORIGIN } from '../../src/coordinate.ts';
import { EdgewayError } from '../../src/error.ts';
import { FLOWS_MS, INTEREST_IDLE_MS } from '../../src/limits.ts';
import { SILENT } from '../../src/log.ts';
import {
  DEFAULT_NETWORK_CONFIG as config,
  encodeCoordinate,
  encodeHost,
  encodeNode,
} from '../../src/records.ts';
import { decodeProbeStatus } from '../../src/wire/probe.ts';
import { CART, descriptor, ip, node } from '../support/sample.ts';
import { settle } from '../support/time.ts';
import { deployCart, during, keys, keysOf, start, type World } from './world.ts';

/** Instances that the packet loop was last told of. */
function routesTold({ loops }: World): unknown {
  const told = loops[0]!.commands.filter((command) => command.kind === 'service').at(-1);
  return told?.kind === 'service' ? told.instances : undefined;
}
const everything = async (world: World): Promise<string[]> =>
  (await world.store.connect().range('/edgeway/')).entries.map(({ key }) => key);

test('Agent: a deploy that the host refuses leaves nothing in the keyspace', async () => {
  const world = start();
  await during(world, world.agent.restore());
  const before = await everything(world);
  world.host.refuse = 'no such namespace';
  await during(world, assertRejects(deployCart(world.agent), 'host_command_failed'));
  world.host.refuse = undefined;
  await world.time.advance(10_000);
  assert.equal(await everything(world), before);
});

test('Agent: a node behind a NAT says so in its record', async () => {
  const world = start({}, {}, { nat: true });
  await during(world, world.agent.restore());
  const key = keys.build({ kind: 'node', cluster: 'default', node: 'n1' });
  assert.match((await world.store.connect().get(key))!.value, '"nat":true');
});

test('Agent: a deploy whose InstanceIP is taken leaves no service behind', async () => {
  const world = start();
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  const [address] = await keysOf(world, 'addresses');
  const taken = ip(address!.split('/').at(-1)!);
  const wanted = { service: 'new.new.new.new' as typeof CART, instance: 1, instanceIp: taken };
  const target = { kind: 'netns', name: 'other' } as const;
  await during(
    world,
    assertRejects(world.agent.deploy({ ...wanted, target, addresses: {} }), 'address_taken'),
  );
  assert.equal((await keysOf(world, 'services')).length, 1);
  assert.equal([...world.host.attached.keys()], [`${CART}/1`]);
});

test('Agent: after an etcd that was away at the start comes back, a deploy works within seconds', async () => {
  const first = start();
  await during(first, first.agent.restore());
  await during(first, deployCart(first.agent));
  const world = start({}, first);
  world.kv.partitioned = true;
  await during(world, world.agent.restore(), 60_000);
  assert.ok(world.host.attached.has(`${CART}/1`), 'what it hosted goes on');
  world.kv.partitioned = false;
  await world.time.advance(10_000);
  const second = {
    service: CART,
    instance: 2,
    target: { kind: 'netns', name: 'web2' } as const,
    addresses: {},
  };
  await during(world, world.agent.deploy(second), 10_000);
  assert.is((await keysOf(world, 'instances')).length, 2);
});

test('Agent: an undeploy while etcd is away takes effect here at once and in the keyspace when it can', async () => {
  const world = start();
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  world.kv.partitioned = true;
  await during(world, world.agent.undeploy(CART, 1), 3_000);
  assert.is(world.host.attached.size, 0);
  assert.equal(routesTold(world), [], 'its flows are ended');
  assert.is((await keysOf(world, 'instances')).length, 1, 'nobody could tell the store');
  world.kv.partitioned = false;
  await world.time.advance(8_000);
  assert.equal(await keysOf(world, 'instances'), []);
  await during(world, world.agent.undeploy(CART, 1));
});

test('Agent: what was leaving when it was killed is taken away by the next run', async () => {
  const first = start();
  await during(first, first.agent.restore());
  await during(first, deployCart(first.agent));
  first.kv.partitioned = true;
  await during(first, first.agent.undeploy(CART, 1), 1_000);
  const world = start({}, first);
  await during(world, world.agent.restore());
  assert.equal(await keysOf(world, 'instances'), []);
  assert.is(world.host.attached.size, 0);
});

test('Agent: an instance that died leaves by itself, also while etcd is away', async () => {
  const world = start();
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  world.kv.partitioned = true;
  world.host.gone.add('web');
  await world.time.advance(3_000);
  assert.is(world.host.attached.size, 0);
  assert.equal(routesTold(world), []);
  world.kv.partitioned = false;
  await world.time.advance(10_000);
  assert.equal(await keysOf(world, 'instances'), []);
});

test('Agent: presence that ended is published anew with every instance, also when the first tries fail', async () => {
  const world = start();
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  world.kv.partitioned = true;
  for (let s = 0; s < 40; s++) {
    await world.time.advance(1_000);
    world.store.expire();
  }
  assert.equal([...(await keysOf(world, 'nodes')), ...(await keysOf(world, 'instances'))], []);
  // The store is back for a moment, too short for all that is to be published.
  for (let flap = 0; flap < 4; flap++) {
    world.kv.partitioned = false;
    await settle();
    world.kv.partitioned = true;
    await world.time.advance(700);
  }
  world.kv.partitioned = false;
  await world.time.advance(15_000);
  assert.is((await keysOf(world, 'nodes')).length, 1);
  assert.is((await keysOf(world, 'instances')).length, 1);
});

test('Agent: a store that came back empty is filled again within seconds, with one owner for everything', async () => {
  const world = start();
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  const [subnet] = await keysOf(world, 'subnets');
  world.store.wipe();
  await world.time.advance(30_000);
  assert.equal(await keysOf(world, 'subnets'), [subnet], 'the same subnet, since nobody else took it');
  assert.is((await keysOf(world, 'nodes')).length, 1);
  assert.is((await keysOf(world, 'instances')).length, 1);
  assert.ok(world.host.attached.has(`${CART}/1`));
});

test('Agent: a subnet claim that somebody deleted is noticed within two minutes', async () => {
  const world = start();
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  const [subnet] = await keysOf(world, 'subnets');
  const before = await world.store.connect().get(subnet!);
  await world.store.connect().txn([], [{ kind: 'delete', key: subnet! }]);
  await world.time.advance(120_000);
  const [again] = await keysOf(world, 'subnets');
  assert.is(again, subnet);
  const claim = await world.store.connect().get(subnet!);
  assert.ok(claim!.createRevision > before!.createRevision);
  const [key] = await keysOf(world, 'instances');
  const entry = await world.store.connect().get(key!);
  assert.is(JSON.parse(entry!.value).epoch, claim!.createRevision, 'published under the new epoch');
});

test('Agent: a node whose id passed to another host while etcd was away does not publish what it held', async () => {
  const world = start({}, {}, { network: { ...config, tenureTtlS: 3_600 } });
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  world.kv.partitioned = true;
  await world.time.advance(3_700_000);
  world.store.expire();
  assert.equal(await keysOf(world, 'subnets'), []);
  const other = node('n1', 9, { cluster: 'default', nodeIp: ip('10.0.0.99') });
  const puts = [
    [keys.build({ kind: 'host', node: 'n1' }), encodeHost({ cluster: 'default', nodeIp: other.nodeIp })],
    [keys.build({ kind: 'node', cluster: 'default', node: 'n1' }), encodeNode(other)],
  ] as const;
  const operations = puts.map(([key, value]) => ({ kind: 'put', key, value }) as const);
  await world.store.connect().txn([], operations);
  world.kv.partitioned = false;
  await world.time.advance(60_000);
  const [published] = (await world.store.connect().range(keys.prefix('nodes'))).entries;
  assert.equal(published?.value, encodeNode(other), 'the other host stands untouched');
  assert.equal(await keysOf(world, 'instances'), []);
  assert.is(world.host.attached.size, 0, 'its instances have no network of that id');
});

test('Agent: a claim that may have ended while the node was off is not used without etcd', async () => {
  const first = start();
  await during(first, first.agent.restore());
  await during(first, deployCart(first.agent));
  const end = first.agent.stop();
  await during(first, end);
  await first.time.advance(25 * 3_600_000);
  const world = start({}, first);
  world.kv.partitioned = true;
  await during(world, assertRejects(world.agent.restore(), 'coordination_unavailable'));
  assert.is(world.host.attached.size, 0);
});

test('Agent: a restart goes on from its coordinate; a damaged file is reported once and costs only that', async () => {
  const position = { vec: [3, -4, 0, 0, 0, 0, 0, 12.5], height: 2.5, adjustment: 0.25, error: 0.125 };
  const path = '/data/coordinate.json';
  const first = start();
  await first.files.write(path, encodeCoordinate(position));
  /** What its answers to probes say, and what is said of the file. */
  const run = async (): Promise<{ told: unknown; warned: number }> => {
    const lines: unknown[] = [];
    const note = (fields: object): void => void ('file' in fields && lines.push(fields));
    const world = start({}, first, { log: { ...SILENT, warn: note, error: note } });
    await during(world, world.agent.restore(), 2_000);
    const command = world.loops[0]!.commands.find(({ kind }) => kind === 'probeStatus');
    const status = command?.kind === 'probeStatus' ? decodeProbeStatus(command.status) : undefined;
    await during(world, world.agent.stop(), 2_000);
    assert.ok(status?.ok);
    return { told: status.value.coordinate, warned: lines.length };
  };
  for (let restart = 0; restart < 2; restart++) assert.equal(await run(), { told: position, warned: 0 });
  for (const damaged of ['', '{', '{"v":1,"vec":[1]}', encodeCoordinate({ ...position, error: 9 })]) {
    await first.files.write(path, damaged);
    const { told, warned } = await run();
    assert.is((told as typeof position).error, ORIGIN.error, damaged);
    assert.is(warned, 1, damaged);
  }
  await first.files.remove(path);
  assert.is((await run()).warned, 0, 'a first start');
});

test('Agent: a service that flows lead to stays followed, however long ago it was chosen; another one ends', async () => {
  const other = start({ node: 'n2' });
  await during(other, other.agent.restore());
  await during(other, deployCart(other.agent));
  const world = start({}, { time: other.time, store: other.store }, { interest: true });
  await during(world, world.agent.restore());
  await during(world, Promise.resolve(world.agent.asked(CART)), 1_000);
  const { report } = world.loops[0]!;
  const stays = (): boolean => world.routes.table.service(CART) !== undefined;
  for (let ms = 0; ms < 2 * INTEREST_IDLE_MS; ms += FLOWS_MS) {
    report({ kind: 'flows', services: [CART], subnets: [] });
    await world.time.advance(FLOWS_MS);
  }
  assert.ok(stays());
  await world.time.advance(2 * INTEREST_IDLE_MS);
  assert.not.ok(stays());
});

test('Agent: a packet loop that ended is started again and told everything', async () => {
  const world = start();
  await during(world, world.agent.restore());
  await during(world, deployCart(world.agent));
  assert.is(world.agent.ailment(), undefined);
  world.loops[0]!.report({ kind: 'stopped', error: 'the TUN device is gone' });
  assert.is(world.agent.ailment(), 'the TUN device is gone');
  await world.time.advance(1_000);
  assert.is(world.loops.length, 2);
  assert.is(world.agent.ailment(), undefined);
  const kinds = new Set(world.loops[1]!.commands.map((command) => command.kind));
  for (const kind of ['service', 'local', 'weights', 'probeStatus'] as const)
    assert.ok(kinds.has(kind), kind);
});

test('Agent: a question about a name brings the nodes of its service under watch, one by the node itself does not', async () => {
  const other = start({ node: 'n2' });
  await during(other, other.agent.restore());
  await during(other, deployCart(other.agent));
  const world = start({}, { time: other.time, store: other.store });
  await during(world, world.agent.restore(), 20_000);
  const { commands } = world.loops[0]!;
  const probed = async (asker?: ReturnType<typeof ip>): Promise<number> => {
    const before = commands.length;
    await world.agent.asked(CART, asker);
    return commands.slice(before).filter(({ kind }) => kind === 'probe').length;
  };
  assert.is(await probed(), 0);
  assert.is(await probed(ip('172.16.0.66')), 1);
});

test('Agent: addresses given before a restart are the last to be given again', async () => {
  const first = start();
  await during(first, first.agent.restore());
  const { namespaceIp } = await during(first, deployCart(first.agent));
  await during(first, first.agent.undeploy(CART, 1));
  const world = start({}, first);
  await during(world, world.agent.restore());
  assert.is.not((await during(world, deployCart(world.agent))).namespaceIp, namespaceIp);
});

test('Agent: the names of the network itself are refused', async () => {
  const world = start();
  await during(world, world.agent.restore());
  const id = 'edgeway.system.ingress.v1' as typeof CART;
  assert.throws(() => world.agent.apply({ id, descriptor: descriptor(id) }), /reserved/);
});

async function assertRejects(work: Promise<unknown>, code: string): Promise<void> {
  const thrown = await work.then(
    () => undefined,
    (error: unknown) => error,
  );
  assert.instance(thrown, EdgewayError);
  assert.is((thrown as EdgewayError).code, code, String(thrown));
}

test.run();
