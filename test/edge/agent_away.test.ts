// etcd away for a day, for one agent that follows what it needs and for a follower of everything, while another client
// goes on changing the store.
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  applyService,
  claimInstance,
  claimSubnet,
  deleteService,
  publishInstance,
  publishNode,
  releaseInstance,
  type SubnetClaim,
} from '../../coordinator/claims.ts';
import { Keyspace } from '../../coordinator/keyspace.ts';
import type { Kv, LeaseId } from '../../coordinator/kv.ts';
import { RouteFollower } from '../../edge/routes/follow.ts';
import type { RouteTable } from '../../edge/routes/table.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import { DNS_LOOKUP_WAIT_MS } from '../../src/limits.ts';
import { SILENT } from '../../src/log.ts';
import type { Node } from '../../src/model.ts';
import type { ServiceId } from '../../src/name.ts';
import { DEFAULT_NETWORK_CONFIG as config, decodeRecord, type KeyRecord } from '../../src/records.ts';
import { CART, descriptor, instance, ip, node, sid } from '../support/sample.ts';
import { settle } from '../support/time.ts';
import { deployCart, during, keys, start } from './world.ts';

const HOUR_MS = 3_600_000;
/** Leases that no test outlives. */
const LONG_S = 1_000_000;
const [USED, IDLE, ENDED, LATER, UNHEARD] = ['used', 'idle', 'ended', 'later', 'unheard'].map((name) =>
  sid(`shop.prod.${name}.v1`),
) as [ServiceId, ServiceId, ServiceId, ServiceId, ServiceId];

/** A node without an agent, played by a client that etcd is never away for. */
class OtherNode {
  readonly #kv: Kv;
  readonly #id: string;
  #claim: SubnetClaim | undefined;
  #presence: LeaseId | undefined;
  #record: Node | undefined;

  constructor(kv: Kv, id: string) {
    this.#kv = kv;
    this.#id = id;
  }
  async publish(index: number): Promise<void> {
    const lease = await this.#kv.grant(LONG_S);
    this.#claim ??= await claimSubnet(this.#kv, keys, config, { node: this.#id, cluster: 'lab' }, { lease });
    this.#presence ??= lease;
    const { subnet, epoch } = this.#claim;
    this.#record = node(this.#id, index, { subnet, epoch });
    await publishNode(this.#kv, keys, this.#record, this.#presence);
  }
  async run(service: ServiceId, number: number): Promise<void> {
    const lease = this.#presence!;
    const wish = { service, instance: number, node: this.#id, lease };
    const { instanceIp } = await claimInstance(this.#kv, keys, config, wish);
    const record = instance(this.#record!, service, number, { instanceIp });
    await publishInstance(this.#kv, keys, this.#claim!.subnet, record, lease);
  }
  async end(service: ServiceId, number: number): Promise<void> {
    await releaseInstance(this.#kv, keys, config, { service, instance: number, node: this.#id });
  }
}

const byText = (values: Iterable<unknown>): string[] =>
  [...values].map((value) => JSON.stringify(value)).sort();

/** Everything that a table holds. */
function held(table: RouteTable) {
  const [services, instances, nodes] = [table.services(), table.instances(), table.nodes()].map(byText);
  return { services, instances, nodes };
}

/** What it has to hold, read from the store: of those services, or of all. */
async function stored(kv: Kv, only?: ReadonlySet<ServiceId>) {
  const read = async (subtree: 'services' | 'instances' | 'nodes'): Promise<KeyRecord[]> =>
    (await kv.range(keys.prefix(subtree))).entries.map(({ key, value }) =>
      unwrap(decodeRecord(unwrap(keys.parse(key)), value)),
    );
  const follows = (service: ServiceId): boolean => only?.has(service) ?? true;
  const services = (await read('services')).flatMap((one) => (one.kind === 'service' ? [one.value] : []));
  const instances = (await read('instances')).flatMap((one) => (one.kind === 'instance' ? [one.value] : []));
  const nodes = (await read('nodes')).flatMap((one) => (one.kind === 'node' ? [one.value] : []));
  const followed = instances.filter(({ service }) => follows(service));
  const homes = new Set(followed.map((one) => one.node));
  return {
    services: byText(services.filter(({ id }) => follows(id))),
    instances: byText(followed),
    nodes: byText(nodes.filter((one) => only === undefined || homes.has(one.node))),
  };
}

test('etcd away for 24 h: what was followed is answered, nothing ends; within 10 s of its return the tables are etcd’s', async () => {
  const world = start({}, {}, { interest: true });
  const { time, store, kv, agent, routes, host } = world;
  const writer = store.connect();
  const allKv = store.connect();
  const all = new RouteFollower({
    keys,
    open: (listener) => new Keyspace(allKv, keys, SILENT, listener),
    after: (ms, run) => time.after(ms, run),
  });
  await during(world, agent.restore());
  await during(world, deployCart(agent));
  const [n7, n8] = [new OtherNode(writer, 'n7'), new OtherNode(writer, 'n8')];
  await n7.publish(7);
  for (const service of [USED, IDLE, ENDED]) {
    await applyService(writer, keys, config, descriptor(service));
    await n7.run(service, 1);
  }
  await n7.run(USED, 2);
  for (const service of [USED, IDLE, ENDED, LATER]) await routes.ask(service);
  await settle();
  const followed = new Set([CART, USED, IDLE, ENDED]);
  assert.equal(held(routes.table), await stored(writer, followed));
  assert.equal(held(all.table), await stored(writer));
  const before = held(routes.table);
  let { interests = 0 } = routes;

  kv.partitioned = true;
  allKv.partitioned = true;
  for (let hour = 1; hour <= 24; hour++) {
    await time.coast(HOUR_MS);
    store.expire();
    assert.equal(held(routes.table), before, `after ${hour} h`);
    assert.is(routes.interests, interests, 'no interest ends, used or not');
    // Names and addresses are answered at once: also that there was no such service.
    for (const service of [CART, USED, LATER]) assert.is(routes.ask(service), undefined);
    assert.is(
      await agent.resolve(`${USED}.any.roundrobin.local`).then(({ instances }) => instances.length),
      2,
    );
    assert.equal([...host.attached.keys()], [`${CART}/1`]);
    switch (hour) {
      case 1:
        await applyService(writer, keys, config, descriptor(USED, { ports: [443], needs: [LATER] }));
        await n7.end(USED, 2);
        break;
      case 2:
        await deleteService(writer, keys, config, ENDED, { force: true });
        await n7.end(ENDED, 1);
        await n8.publish(8);
        for (const service of [LATER, UNHEARD]) {
          await applyService(writer, keys, config, descriptor(service));
          await n8.run(service, 1);
        }
        break;
      case 3:
        await n8.run(USED, 3);
        store.compact();
        // It has moved; every record of it says so.
        await n7.publish(17);
        break;
      case 4: {
        const asked = routes.ask(UNHEARD);
        await time.advance(DNS_LOOKUP_WAIT_MS + 1);
        assert.is(await asked, false, 'what was never followed cannot be told');
        assert.is(routes.interests, ++interests, 'but is waited for');
        break;
      }
      case 12: {
        const target = { kind: 'netns', name: 'other' } as const;
        const refused = await during(
          world,
          agent.deploy({ service: USED, instance: 9, target, addresses: {} }).then(
            () => undefined,
            (error: unknown) => error,
          ),
        );
        assert.instance(refused, EdgewayError);
        assert.is((refused as EdgewayError).code, 'coordination_unavailable', 'only new claims wait');
      }
    }
  }

  assert.is.not((await stored(writer)).nodes.length, 0);
  kv.partitioned = false;
  allKv.partitioned = false;
  await time.advance(10_000);
  for (const service of [IDLE, ENDED]) followed.delete(service);
  followed.add(LATER);
  assert.equal(held(routes.table), await stored(writer, followed), 'who follows what it needs');
  assert.equal(held(all.table), await stored(writer), 'who follows everything');
  assert.is(routes.table.node('n7')?.nodeIp, ip('10.0.0.18'));
  assert.ok(routes.table.instance(CART, 1), 'what it hosts is published anew');
  await time.advance(120_000);
  assert.equal(held(routes.table), await stored(writer, followed), 'and stays so');
  await all.close();
  await routes.close();
});

test.run();
