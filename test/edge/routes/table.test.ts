import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { KeyspaceBatch } from '../../../coordinator/keyspace.ts';
import { projectService } from '../../../edge/project.ts';
import { applyBatch } from '../../../edge/routes/follow.ts';
import { RouteTable } from '../../../edge/routes/table.ts';
import type { Service } from '../../../src/model.ts';
import type { ServiceId } from '../../../src/name.ts';
import { Rng } from '../../../src/rng.ts';
import { CART, descriptor, instance, ip, node, sid } from '../../support/sample.ts';

const THIEF = sid('shop.prod.thief.v1');
const ADDRESS = ip('172.30.9.9');

function service(id: ServiceId, more: Partial<Service['addresses']> = {}, ports = [80]): Service {
  return { id, descriptor: descriptor(id, { ports }), addresses: { closest: ADDRESS, ...more } };
}
/** Applies records as the keyspace tells them; the services whose routes changed. */
function tell(table: RouteTable, change: { puts?: readonly Service[]; deletes?: readonly ServiceId[] }) {
  const batch = {
    kind: 'changes',
    path: '/',
    revision: 1,
    brought: [],
    puts: (change.puts ?? []).map((value) => ({ kind: 'service', key: {}, value })),
    deletes: (change.deletes ?? []).map((id) => ({ kind: 'service', service: id })),
  } as unknown as KeyspaceBatch;
  return [...applyBatch(table, batch).services].sort();
}
function closest(table: RouteTable, id: ServiceId) {
  const command = projectService(table, id, 'n1');
  return command.kind === 'service' ? command.addresses.closest : undefined;
}

test('a record that lists another service’s address takes nothing, whatever the other one does, and loses nothing', () => {
  const table = new RouteTable();
  tell(table, { puts: [service(CART)] });
  tell(table, { puts: [service(THIEF)] });
  tell(table, { puts: [service(CART, {}, [443]), service(THIEF, {}, [443])] });
  assert.equal(table.nameOf(ADDRESS), { service: CART, policy: 'closest' });
  assert.equal([closest(table, CART), closest(table, THIEF)], [ADDRESS, undefined]);
  tell(table, { puts: [service(THIEF, { closest: ip('172.30.8.8') })] });
  assert.equal([closest(table, CART), closest(table, THIEF)], [ADDRESS, ip('172.30.8.8')]);
  tell(table, { deletes: [THIEF] });
  assert.equal(table.nameOf(ADDRESS), { service: CART, policy: 'closest' });
});

test('an address passes to who waits for it when its holder lets it go, and the delta says so', () => {
  for (const letGo of [{ deletes: [CART] }, { puts: [service(CART, { closest: ip('172.30.8.8') })] }]) {
    const table = new RouteTable();
    const third = sid('shop.prod.third.v1');
    tell(table, { puts: [service(CART)] });
    tell(table, { puts: [service(THIEF), service(third)] });
    assert.equal(tell(table, letGo), [CART, THIEF].sort());
    assert.equal(table.nameOf(ADDRESS), { service: THIEF, policy: 'closest' });
    assert.is(closest(table, THIEF), ADDRESS);
    tell(table, { deletes: [third, THIEF] });
    assert.is(table.nameOf(ADDRESS), undefined);
  }
});

test('an instance that lists a ServiceIP or another’s InstanceIP takes nothing', () => {
  const table = new RouteTable();
  const n1 = node('n1', 1);
  table.putService(service(CART));
  table.putInstance(instance(n1, CART, 1));
  const mine = instance(n1, CART, 1).instanceIp;
  table.putInstance(instance(n1, THIEF, 1, { instanceIp: mine, namespaceIp: ADDRESS }));
  table.putInstance(instance(n1, CART, 1, { ports: [443] }));
  assert.equal(table.nameOf(mine), { service: CART, instance: 1 });
  assert.equal(table.nameOf(ADDRESS), { service: CART, policy: 'closest' });
  const command = projectService(table, THIEF, 'n1');
  assert.is(command.kind === 'service' && command.instances.length, 0);
  table.deleteInstance(THIEF, 1);
  assert.equal(table.nameOf(mine), { service: CART, instance: 1 });
});

test('hidden is what a walk over all nodes and instances finds, whatever came in which order', () => {
  const table = new RouteTable();
  const rng = new Rng(5, 1);
  let changes = 0;
  for (let step = 0; step < 5_000; step++) {
    const before = [...table.hidden].sort();
    const id = `n${rng.below(12)}`;
    const service = [CART, THIEF][rng.below(2)]!;
    const number = 1 + rng.below(5);
    if (rng.below(3) > 0) {
      const host = node(id, 1 + rng.below(20), rng.below(2) === 0 ? { nat: true } : {});
      if (rng.below(2) === 0) table.putNode(host);
      else table.putInstance(instance(host, service, number));
    } else if (rng.below(2) === 0) table.deleteNode(id);
    else table.deleteInstance(service, number);
    const homes = new Set([...table.instances()].map((one) => one.node));
    const nodes = [...table.nodes()].filter(({ node: name, nat }) => nat === true && homes.has(name));
    const expected = nodes.map(({ node: name }) => name).sort();
    assert.equal([...table.hidden].sort(), expected);
    const changed = JSON.stringify(before) !== JSON.stringify(expected);
    assert.is(table.hiddenChanges > changes, changed);
    changes = table.hiddenChanges;
  }
});

test.run();
