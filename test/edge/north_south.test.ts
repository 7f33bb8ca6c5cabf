import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { Publication } from '../../edge/host/rules.ts';
import { NorthSouth, publicationsFor } from '../../edge/north_south.ts';
import { RouteTable } from '../../edge/routes/table.ts';
import { formatIpv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import { type Logger, SILENT } from '../../src/log.ts';
import type { PortMapping, Service } from '../../src/model.ts';
import { POLICIES, type Policy } from '../../src/policy.ts';
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
const up = () => true;
const at = (table: RouteTable) => show(publicationsFor(table, 'here', up));

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

test('publicationsFor leads to the ServiceIP of the service’s policy; to closest what is here and healthy is closest', () => {
  const addresses = { roundrobin: ip('172.30.0.9'), closest: ip('172.30.0.10'), fastest: ip('172.30.0.11') };
  const under = (policy: Policy) =>
    service(CART, [web], {
      addresses,
      descriptor: descriptor(CART, { exposed: true, ports: [web], policy }),
    });
  const [one, there] = [instance(HERE, CART, 1), instance(THERE, CART, 3)];
  for (const policy of POLICIES) {
    const to = formatIpv4(addresses[policy]);
    const hairpin = `; inside ${to}`;
    assert.equal(at(tableOf(under(policy), there)), [`tcp/8080 → ${to}:80${hairpin}`]);
    const both = publicationsFor(tableOf(under(policy), one, there), 'here', up);
    const first = policy === 'closest' ? formatIpv4(one.namespaceIp) : to;
    assert.equal(show(both), [`tcp/8080 → ${first}:80${hairpin}`]);
    assert.equal(
      both[0]?.kept?.map(({ address }) => address),
      [one.namespaceIp, ...Object.values(addresses)],
      'a conversation outlives another policy',
    );
    const unhealthy = publicationsFor(tableOf(under(policy), one, there), 'here', () => false);
    assert.equal(show(unhealthy), [`tcp/8080 → ${to}:80${hairpin}`]);
  }
});

test('publicationsFor does without a ServiceIP while it can, and gives a port to one service only', () => {
  const bare = service(CART, [web], { addresses: {} });
  assert.equal(at(tableOf(bare, instance(THERE, CART, 1))), []);
  assert.match(at(tableOf(bare, instance(HERE, CART, 1)))[0] ?? '', 'inside the same');
  const other = sid('shop.prod.aaa.v1');
  const both = tableOf(service(), instance(HERE, CART, 1), service(other), instance(HERE, other, 2));
  assert.is(publicationsFor(both, 'here', up).length, 1);
  const [first] = publicationsFor(both, 'here', up);
  assert.is(first?.targets[0]?.address, instance(HERE, other, 2).namespaceIp);
  assert.is(first?.service, other);
});

test('publicationsFor leaves out what is unhealthy here, and lets begun conversations go on', () => {
  const [one, two, there] = [instance(HERE, CART, 1), instance(HERE, CART, 2), instance(THERE, CART, 3)];
  const kept = (table: RouteTable, isUp: (number: number) => boolean) =>
    publicationsFor(table, 'here', ({ instance: number }) => isUp(number)).map((publication) => [
      show([publication])[0]?.replace(/^.*→ (.*);.*$/, '$1'),
      publication.kept?.map((target) => formatIpv4(target.address)).join(' '),
    ]);
  const [a, b] = [formatIpv4(one.namespaceIp), formatIpv4(two.namespaceIp)];
  const all = `${a} ${b} 172.30.0.9`;
  assert.equal(
    kept(tableOf(service(), one, two), (number) => number === 2),
    [[`${b}:80`, all]],
  );
  assert.equal(
    kept(tableOf(service(), one, two), () => false),
    [['', all]],
  );
  // With instances elsewhere the proxy knows of health.
  assert.equal(
    kept(tableOf(service(), one, there), () => false),
    [['172.30.0.9:80', `${a} 172.30.0.9`]],
  );
});

/** A host that remembers, and that can be told to refuse. */
function host(table: RouteTable, log: Logger = SILENT) {
  const told: string[][] = [];
  const timers: { readonly ms: number; readonly act: () => void }[] = [];
  const tunnels: (readonly number[])[] = [];
  const state = { refuse: false, ingress: 0, taken: false, up: true };
  const northSouth = new NorthSouth({
    table,
    node: 'here',
    log,
    timers: {
      after: (ms: number, act: () => void) => {
        const timer = { ms, act };
        timers.push(timer);
        return () => {
          if (timers.includes(timer)) timers.splice(timers.indexOf(timer), 1);
        };
      },
    },
    isUp: () => state.up,
    openIngress: async () => {
      if (state.refuse) throw new EdgewayError('coordination_unavailable', 'away');
      state.ingress += 1;
    },
    environment: {
      expose: async (publications, ports = []) => {
        told.push(show(publications));
        tunnels.push(ports);
        return state.taken
          ? publications.map((publication) => ({
              publication,
              reason: `${publication.protocol}/${publication.source} belongs to somebody`,
            }))
          : [];
      },
    },
  });
  const settled = async (): Promise<void> => {
    for (let turn = 0; turn < 20; turn++) await Promise.resolve();
  };
  return { northSouth, told, timers, tunnels, state, settled };
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
  timers.shift()?.act();
  await settled();
  assert.is(told.length, 1);
  await northSouth.stop();
  table.putInstance(instance(HERE, CART, 2));
  northSouth.update();
  await settled();
  assert.is(told.length, 1);
});

test('NorthSouth asks again for a port that somebody has, names all meanwhile, and warns once', async () => {
  const warnings: string[] = [];
  const log = { ...SILENT, warn: (_fields: unknown, text: string) => warnings.push(text) } as Logger;
  const dns: PortMapping = { source: 53, destination: 53, protocol: 'udp' };
  const table = tableOf(service(CART, [web, dns]), instance(HERE, CART, 1));
  const { northSouth, told, timers, state, settled } = host(table, log);
  state.taken = true;
  northSouth.update();
  await settled();
  for (let times = 0; times < 3; times++) {
    assert.is(
      northSouth.refused().get(CART)?.message,
      'node here does not publish it: tcp/8080 belongs to somebody; udp/53 belongs to somebody',
    );
    assert.is(timers.length, 1);
    timers.shift()?.act();
    await settled();
  }
  assert.is(told.length, 4);
  assert.is(warnings.length, 2, 'one per port');
  state.taken = false;
  timers.shift()?.act();
  await settled();
  assert.is(northSouth.refused().size, 0);
  assert.is(timers.length, 0);
  await northSouth.stop();
});

test('NorthSouth follows health, and tells the host the tunnel ports of all nodes', async () => {
  const table = tableOf(service(), instance(HERE, CART, 1));
  const { northSouth, told, tunnels, state, settled } = host(table);
  northSouth.update();
  await settled();
  state.up = false;
  northSouth.update();
  await settled();
  assert.match(told[1]?.[0] ?? '', '8080 → ;');
  table.putNode({ ...THERE, ewp: 4999 });
  northSouth.update();
  await settled();
  assert.ok(tunnels.at(-1)?.includes(4999));
  assert.ok(tunnels.at(-1)?.includes(instance(HERE, CART, 1).ewp));
});

test.run();
