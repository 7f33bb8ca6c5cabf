import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { Publication } from '../../edge/host/rules.ts';
import { NorthSouth, publicationsFor } from '../../edge/north_south.ts';
import { RouteTable } from '../../edge/routes/table.ts';
import { formatIpv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import { type Logger, SILENT } from '../../src/log.ts';
import type { PortMapping, Service } from '../../src/model.ts';
import { CART, descriptor, instance, ip, node, sid } from '../support/sample.ts';

const HERE = node('here', 0);
const THERE = node('there', 1);
const web: PortMapping = { source: 8080, destination: 80, protocol: 'tcp' };

function service(id = CART, ports: readonly PortMapping[] = [web], more: Partial<Service> = {}): Service {
  return {
    id,
    descriptor: descriptor(id, { exposed: true, ports: [443, ...ports] }),
    addresses: { roundrobin: ip('172.30.0.9') },
    ...more,
  };
}

function tableOf(...parts: (Service | ReturnType<typeof instance>)[]): RouteTable {
  const table = new RouteTable();
  table.synced = true;
  for (const part of parts) 'descriptor' in part ? table.putService(part) : table.putInstance(part);
  return table;
}

const show = (publications: readonly Publication[]): string[] =>
  publications.map(
    ({ protocol, source, targets, hairpin }) =>
      `${protocol}/${source} → ${targets.map((one) => `${formatIpv4(one.address)}:${one.port}`).join(' | ')}; inside ${hairpin === undefined ? 'the same' : formatIpv4(hairpin.address)}`,
  );
const at = (table: RouteTable) => show(publicationsFor(table, 'here'));

test('publicationsFor leads to the instances while all are here, else to the ServiceIP, and nowhere without any', () => {
  const [one, two] = [instance(HERE, CART, 1), instance(HERE, CART, 2)];
  const [a, b] = [formatIpv4(one.namespaceIp), formatIpv4(two.namespaceIp)];
  assert.equal(at(tableOf(service())), []);
  assert.equal(at(tableOf(service(), one)), [`tcp/8080 → ${a}:80; inside 172.30.0.9`]);
  assert.equal(at(tableOf(service(), one, two)), [`tcp/8080 → ${a}:80 | ${b}:80; inside 172.30.0.9`]);
  const byName = ['tcp/8080 → 172.30.0.9:80; inside 172.30.0.9'];
  assert.equal(at(tableOf(service(), one, instance(THERE, CART, 3))), byName);
  assert.equal(at(tableOf(service(), instance(THERE, CART, 3))), byName);
  const hidden = service(CART, [web], { descriptor: descriptor(CART, { exposed: false, ports: [web] }) });
  assert.equal(at(tableOf(hidden, one)), []);
});

test('publicationsFor does without a ServiceIP while it can, and gives a port to one service only', () => {
  const bare = service(CART, [web], { addresses: {} });
  assert.equal(at(tableOf(bare, instance(THERE, CART, 1))), []);
  assert.match(at(tableOf(bare, instance(HERE, CART, 1)))[0] ?? '', 'inside the same');
  const other = sid('shop.prod.aaa.v1');
  const both = tableOf(service(), instance(HERE, CART, 1), service(other), instance(HERE, other, 2));
  assert.is(publicationsFor(both, 'here').length, 1);
  assert.is(publicationsFor(both, 'here')[0]?.targets[0]?.address, instance(HERE, other, 2).namespaceIp);
});

/** A host that remembers, and that can be told to refuse. */
function host(table: RouteTable, log: Logger = SILENT) {
  const told: string[][] = [];
  const timers: (() => void)[] = [];
  const state = { refuse: false, ingress: 0 };
  const northSouth = new NorthSouth({
    table,
    node: 'here',
    log,
    timers: {
      after: (_ms: number, act: () => void) => {
        timers.push(act);
        return () => {};
      },
    },
    openIngress: async () => {
      if (state.refuse) throw new EdgewayError('coordination_unavailable', 'away');
      state.ingress += 1;
    },
    environment: {
      expose: async (publications) => {
        told.push(show(publications));
        return [];
      },
    },
  });
  const settled = async (): Promise<void> => {
    for (let turn = 0; turn < 20; turn++) await Promise.resolve();
  };
  return { northSouth, told, timers, state, settled };
}

test('NorthSouth tells the host only what changed, opens the ingress once, and joins changes that come meanwhile', async () => {
  const table = tableOf(service());
  const { northSouth, told, state, settled } = host(table);
  northSouth.update();
  await settled();
  assert.equal(told, [[]], 'once, so that what an earlier life published goes');
  assert.is(state.ingress, 0);
  table.putInstance(instance(HERE, CART, 1));
  northSouth.update();
  table.putInstance(instance(HERE, CART, 2));
  northSouth.update();
  northSouth.update();
  await settled();
  northSouth.update();
  await settled();
  assert.is(told.length, 3);
  assert.match(told[2]?.[0] ?? '', '|');
  assert.is(state.ingress, 1);
});

test('NorthSouth waits for a complete table, tries again what failed, and begins nothing after stop', async () => {
  const table = tableOf(service(), instance(HERE, CART, 1));
  table.synced = false;
  const { northSouth, told, timers, state, settled } = host(table);
  northSouth.update();
  await settled();
  assert.equal(told, []);
  table.synced = true;
  state.refuse = true;
  northSouth.update();
  await settled();
  assert.equal(told, []);
  assert.is(timers.length, 1);
  state.refuse = false;
  timers[0]?.();
  await settled();
  assert.is(told.length, 1);
  await northSouth.stop();
  table.putInstance(instance(HERE, CART, 2));
  northSouth.update();
  await settled();
  assert.is(told.length, 1);
});

test.run();
