import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { EXPECTED_MS, WARM_MS } from '../../edge/balance.ts';
import type { Home } from '../../edge/ports.ts';
import type { ProxyCommand } from '../../edge/proxy/command.ts';
import { RouteTable } from '../../edge/routes/table.ts';
import { type Position, PUBLISH_MS, QUIET_MS, Steering } from '../../edge/steering.ts';
import { ipv4 } from '../../src/addr.ts';
import { ORIGIN } from '../../src/coordinate.ts';
import { EXPECTED_ASKER_BURST, EXPECTED_BURST, FLOWS_MS } from '../../src/limits.ts';
import { SILENT } from '../../src/log.ts';
import type { ServiceId } from '../../src/name.ts';
import { Rng } from '../../src/rng.ts';
import { decodeProbeStatus, encodeProbeStatus } from '../../src/wire/probe.ts';

const CART = 'shop.prod.cart.v1' as ServiceId;
const subnet = (i: number) => ipv4(0xac100000 + i * 64);
const nodeIp = (i: number) => ipv4(0x0a4d0000 + i);

/** A steering on a simulated clock; nodes answer its probes after their RTT unless they are silent. */
class Bench {
  now = 0;
  readonly timers: { at: number; run: () => void }[] = [];
  readonly commands: ProxyCommand[] = [];
  readonly published: { at: number; position: Position }[] = [];
  readonly gone: string[] = [];
  readonly homes = new Map<string, string>();
  readonly rtt = new Map<number, number>();
  readonly silent = new Set<number>();
  readonly liveLow = new Map<number, number>();
  readonly table = new RouteTable();
  readonly steering: Steering;
  load = 0.1;
  checkOk = true;

  constructor(resuming = false) {
    const rng = new Rng(1);
    this.steering = new Steering({
      node: 'n0',
      subnet: subnet(0),
      subnetBits: 26,
      table: this.table,
      clock: { monotonicMs: () => this.now, wallMs: () => this.now },
      timers: { after: (ms, run) => this.after(ms, run) },
      vitals: {
        load: () => this.load,
        identify: (home: Home) => this.homes.get(home.kind === 'pid' ? String(home.pid) : home.name),
        check: async () => ({ ok: this.checkOk, detail: this.checkOk ? 'fine' : 'not fine' }),
      },
      log: SILENT,
      seed: 1,
      nonce: () => rng.u32(),
      send: (command) => this.take(command),
      publish: (position) => this.published.push({ at: this.now, position }),
      gone: (id) => this.gone.push(id),
    });
    this.steering.start(resuming);
  }

  after(ms: number, run: () => void): () => void {
    const timer = { at: this.now + ms, run };
    this.timers.push(timer);
    return () => {
      const i = this.timers.indexOf(timer);
      if (i >= 0) this.timers.splice(i, 1);
    };
  }
  async run(until: number): Promise<void> {
    for (;;) {
      const next = this.timers.reduce<{ at: number; run: () => void } | undefined>(
        (least, t) => (t.at <= until && (least === undefined || t.at < least.at) ? t : least),
        undefined,
      );
      if (next === undefined) break;
      this.timers.splice(this.timers.indexOf(next), 1);
      this.now = Math.max(this.now, next.at);
      next.run();
      await Promise.resolve();
      await Promise.resolve();
    }
    this.now = until;
  }
  take(command: ProxyCommand): void {
    this.commands.push(command);
    if (command.kind !== 'probe') return;
    const i = command.nodeIp - nodeIp(0);
    const rtt = this.rtt.get(i);
    if (rtt === undefined) return;
    this.after(rtt, () => {
      if (this.silent.has(i)) return;
      const status = encodeProbeStatus({
        subnet: subnet(i),
        load: 0.2,
        liveLow: this.liveLow.get(i) ?? 0xffffffff,
        liveHigh: 0,
        coordinate: { ...ORIGIN, vec: [rtt, 0, 0, 0, 0, 0, 0, 0], error: 0.1 },
      });
      this.steering.report({
        kind: 'probed',
        token: command.token,
        nodeIp: command.nodeIp,
        rttNs: rtt * 1e6,
        status,
      });
    });
  }
  last<K extends ProxyCommand['kind']>(kind: K): Extract<ProxyCommand, { kind: K }> | undefined {
    return this.commands.findLast((c): c is Extract<ProxyCommand, { kind: K }> => c.kind === kind);
  }
  /** Instances 1… of the service on these nodes. */
  place(service: ServiceId, nodes: readonly number[], descriptor: object = {}): void {
    this.table.putService({
      id: service,
      addresses: {},
      descriptor: {
        appname: 'a',
        appnamespace: 'b',
        servicename: 'c',
        servicenamespace: 'd',
        exposed: false,
        ports: [],
        statefull: false,
        ...descriptor,
      },
    });
    for (const [k, i] of nodes.entries())
      this.table.putInstance({
        service,
        instance: k + 1,
        node: `n${i}`,
        cluster: 'x',
        nodeIp: nodeIp(i),
        ewp: 4790,
        nsp: 0,
        namespaceIp: ipv4(subnet(i) + 2 + k),
        instanceIp: ipv4(0xac1e0000 + k),
        ports: [],
        epoch: 1,
      });
    this.steering.routesChanged([service], true);
  }
  use(instance: number): void {
    this.steering.report({
      kind: 'chosen',
      unlisted: [],
      choices: [{ service: CART, policy: 'closest', instance, client: ipv4(1) }],
    });
  }
}

test('Steering: a service that is used is probed, weighed by RTT, and a silent node gets no new flows within 3 s and is dead at 13 s', async () => {
  const bench = new Bench();
  bench.rtt.set(1, 30).set(2, 10);
  bench.place(CART, [1, 2]);
  await bench.run(100);
  bench.use(1);
  await bench.run(5_000);
  assert.equal(bench.last('weights')?.weights.closest, [0, 1]);
  assert.equal(bench.last('weights')?.weights.roundrobin, [1, 1]);
  bench.silent.add(2);
  await bench.run(8_000);
  assert.equal(bench.last('weights')?.weights, { roundrobin: [1, 0], closest: [1, 0], fastest: [1, 0] });
  assert.is(bench.last('nodeDead'), undefined);
  await bench.run(18_000);
  assert.equal(bench.last('nodeDead'), { kind: 'nodeDead', nodeIp: nodeIp(2), ewp: 4790 });
  bench.silent.clear();
  await bench.run(23_000);
  assert.equal(bench.last('weights')?.weights.closest, [0, 1]);
});

test('Steering: a node that old flows lead to is watched and found dead, however long ago the last new flow was', async () => {
  const bench = new Bench();
  for (let i = 1; i <= 12; i++) bench.rtt.set(i, 10 * i);
  bench.place(CART, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
  bench.use(12);
  const live = async (until: number): Promise<void> => {
    for (; bench.now < until; await bench.run(bench.now + FLOWS_MS))
      bench.steering.report({ kind: 'flows', services: [CART], subnets: [subnet(12), subnet(99)] });
  };
  await live(WARM_MS + 60_000);
  assert.equal(bench.steering.watched(), ['n12']);
  bench.silent.add(12);
  await live(bench.now + 20_000);
  assert.equal(bench.last('nodeDead'), { kind: 'nodeDead', nodeIp: nodeIp(12), ewp: 4790 });
});

test('Steering: a dead instance on a live node loses its flows, an unhealthy one only its new ones; back, both are seen within seconds', async () => {
  const health = { probe: { kind: 'tcp', port: 1 }, intervalMs: 500, timeoutMs: 100, fall: 2, rise: 1 };
  for (const descriptor of [{}, { health }]) {
    const bench = new Bench();
    for (let i = 1; i <= 12; i++) bench.rtt.set(i, 10 * i);
    bench.place(CART, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], descriptor);
    bench.use(12);
    await bench.run(5_000);
    bench.liveLow.set(12, 0);
    await bench.run(7_000);
    assert.is(bench.last('weights')?.weights.roundrobin[11], 0);
    const dead = bench.commands.filter((c) => c.kind === 'instanceDead');
    assert.equal(dead, 'health' in descriptor ? [] : [{ kind: 'instanceDead', service: CART, instance: 12 }]);
    // Nobody uses the node any more.
    await bench.run(300_000);
    assert.is(bench.commands.filter((c) => c.kind === 'instanceDead').length, dead.length);
    bench.liveLow.delete(12);
    await bench.run(302_000);
    assert.is(bench.last('weights')?.weights.roundrobin[11], 1);
  }
});

test('Steering: choices are kept with their reason and counted', async () => {
  const bench = new Bench();
  bench.rtt.set(1, 30);
  bench.place(CART, [1]);
  for (let i = 0; i < 300; i++) bench.use(1);
  assert.is(bench.steering.choices().length, 256);
  assert.match(bench.steering.choices(CART)[0]!.why, /RTT/);
  assert.equal([...bench.steering.chosen()], [[`${CART}/1 closest`, 300]]);
  const unlisted = [{ service: CART, policy: 'closest' as const, instance: 1, count: 7 }];
  bench.steering.report({ kind: 'chosen', choices: [], unlisted });
  assert.equal([...bench.steering.chosen()], [[`${CART}/1 closest`, 307]]);
  assert.is(bench.steering.counters()['choices_unlisted'], 7);
  assert.is(bench.steering.explain(CART, 'closest')?.candidates.length, 1);
  bench.table.deleteInstance(CART, 1);
  bench.table.deleteService(CART);
  bench.steering.routesChanged([CART], false);
  bench.use(1);
  assert.is(bench.steering.chosen().size, 0, 'a late report brings no counter back');
});

test('Steering: a home that became another one is gone, whatever routes change before it is looked at', async () => {
  const bench = new Bench();
  bench.homes.set('77', 'started');
  bench.place(CART, [0]);
  const ip = ipv4(subnet(0) + 2);
  bench.steering.admit({ id: 'a', service: CART, namespaceIp: ip, home: { kind: 'pid', pid: 77 } });
  await bench.run(1_000);
  bench.homes.set('77', 'started later');
  bench.steering.routesChanged([CART], false);
  await bench.run(1_300);
  assert.equal(bench.gone, ['a']);
});

test('Steering: a failing health check here is heeded at once, however cold its service', async () => {
  const bench = new Bench();
  bench.homes.set('77', 'started');
  const health = { probe: { kind: 'tcp', port: 1 }, intervalMs: 500, timeoutMs: 100, fall: 2, rise: 1 };
  bench.place(CART, [0], { health });
  for (let s = 0; s < 2_000; s++) bench.place(`shop.prod.s${s}.v1` as ServiceId, [1]);
  const ip = ipv4(subnet(0) + 2);
  bench.steering.admit({ id: 'a', service: CART, namespaceIp: ip, home: { kind: 'pid', pid: 77 } });
  await bench.run(2_000);
  const weights = (): unknown => bench.commands.findLast((c) => c.kind === 'weights' && c.service === CART);
  assert.match(JSON.stringify(weights()), '"roundrobin":[1]');
  bench.checkOk = false;
  await bench.run(3_500);
  assert.match(JSON.stringify(weights()), '"roundrobin":[0]');
});

test('Steering: an instance whose process dies leaves the live bits and the local weights at once, and the agent is told once', async () => {
  const bench = new Bench();
  bench.homes.set('77', 'started');
  bench.place(CART, [0, 1]);
  const ip = ipv4(subnet(0) + 2);
  assert.ok(
    bench.steering.admit({ id: 'a', service: CART, namespaceIp: ip, home: { kind: 'pid', pid: 77 } }),
  );
  bench.use(1);
  await bench.run(1_000);
  const live = (): number => {
    const status = decodeProbeStatus(bench.last('probeStatus')!.status);
    return status.ok ? status.value.liveLow : -1;
  };
  assert.is(live(), 0b100);
  assert.equal(bench.last('weights')?.weights.closest, [1, 0]);
  bench.homes.clear();
  await bench.run(1_300);
  assert.is(live(), 0);
  assert.equal(bench.last('weights')?.weights.closest, [0, 1]);
  assert.equal(bench.gone, ['a']);
  bench.steering.discharge('a');
  await bench.run(3_000);
  assert.equal(bench.gone, ['a']);
  assert.is(
    bench.steering.admit({ id: 'b', service: CART, namespaceIp: ip, home: { kind: 'pid', pid: 78 } }),
    false,
  );
});

test('Steering: while the last run`s instances are attached again nothing is said about any, for 8 s at most', async () => {
  const bench = new Bench(true);
  bench.homes.set('77', 'started');
  bench.place(CART, [0]);
  const ip = ipv4(subnet(0) + 2);
  await bench.run(2_000);
  bench.steering.admit({ id: 'a', service: CART, namespaceIp: ip, home: { kind: 'pid', pid: 77 } });
  assert.is(bench.last('probeStatus'), undefined);
  bench.steering.resumed();
  const status = decodeProbeStatus(bench.last('probeStatus')!.status);
  assert.ok(status.ok && status.value.liveLow === 0b100);
  const stuck = new Bench(true);
  await stuck.run(QUIET_MS - 100);
  assert.is(stuck.last('probeStatus'), undefined);
  await stuck.run(QUIET_MS + 600);
  assert.ok(stuck.last('probeStatus') !== undefined);
});

test('Steering: an instance of this node is chosen only while it is admitted, whatever the keyspace says', async () => {
  const bench = new Bench();
  bench.homes.set('77', 'started');
  bench.place(CART, [0, 1]);
  const ip = ipv4(subnet(0) + 2);
  bench.use(2);
  await bench.run(100);
  assert.equal(bench.last('weights')?.weights.roundrobin, [0, 1]);
  bench.steering.admit({ id: 'a', service: CART, namespaceIp: ip, home: { kind: 'pid', pid: 77 } });
  assert.equal(bench.last('weights')?.weights.roundrobin, [1, 1]);
  bench.steering.discharge('a');
  assert.equal(bench.last('weights')?.weights.roundrobin, [0, 1]);
  await bench.run(5_000);
  assert.equal(bench.last('weights')?.weights.roundrobin, [0, 1]);
});

test('Steering: a failing health check takes an instance out of the choice and back, without the agent', async () => {
  const bench = new Bench();
  bench.homes.set('77', 'started');
  const health = { probe: { kind: 'tcp', port: 1 }, intervalMs: 500, timeoutMs: 100, fall: 2, rise: 1 };
  bench.place(CART, [0], { health });
  const ip = ipv4(subnet(0) + 2);
  bench.steering.admit({ id: 'a', service: CART, namespaceIp: ip, home: { kind: 'pid', pid: 77 } });
  bench.use(1);
  await bench.run(1_000);
  assert.equal(bench.last('weights')?.weights.roundrobin, [1]);
  bench.checkOk = false;
  await bench.run(3_000);
  assert.equal(bench.last('weights')?.weights.roundrobin, [0]);
  assert.match(bench.steering.health('a')!.why, 'not fine');
  bench.checkOk = true;
  await bench.run(5_000);
  assert.equal(bench.last('weights')?.weights.roundrobin, [1]);
  assert.equal(bench.gone, []);
});

test('Steering: what a used service needs is watched before its first flow', async () => {
  const bench = new Bench();
  bench.rtt.set(1, 30);
  bench.homes.set('77', 'started');
  bench.place(CART, [1]);
  bench.place('shop.prod.web.v1' as ServiceId, [0], { needs: [CART] });
  bench.steering.admit({
    id: 'web',
    service: 'shop.prod.web.v1' as ServiceId,
    namespaceIp: ipv4(subnet(0) + 2),
    home: { kind: 'pid', pid: 77 },
  });
  await bench.run(3_000);
  assert.is(bench.steering.watched().length, 1);
  assert.is(bench.steering.status('n1'), 'alive');
});

test('Steering.expect: who is asked for by name is probed at once and weighed by RTT before its first flow, for 30 s', async () => {
  const bench = new Bench();
  bench.rtt.set(1, 40);
  bench.rtt.set(2, 5);
  bench.place(CART, [1, 2]);
  const sent = bench.commands.length;
  bench.steering.expect(CART, ipv4(1));
  const asked = bench.commands.slice(sent).map((c) => (c.kind === 'probe' ? c.nodeIp - nodeIp(0) : 0));
  assert.equal(
    asked.sort((a, b) => a - b),
    [1, 2],
  );
  await bench.run(45);
  assert.equal([...bench.last('weights')!.weights.closest], [0, 1]);
  await bench.run(EXPECTED_MS - 1_000);
  assert.is(bench.steering.watched().length, 2);
  await bench.run(EXPECTED_MS + 12_000);
  assert.equal(bench.steering.watched(), []);
});

test('Steering.expect: no number of names makes it watch more than its budget, nor takes the watch from what is used', async () => {
  const bench = new Bench();
  const services = Array.from({ length: 200 }, (_, i) => `shop.prod.s${i}.v1` as ServiceId);
  for (const [i, service] of services.entries()) bench.place(service, [i + 2]);
  bench.place(CART, [1]);
  for (const service of services) bench.steering.expect(service, ipv4(1));
  await bench.run(1_000);
  assert.is(bench.steering.watched().length, EXPECTED_ASKER_BURST);
  for (const [i, service] of services.entries()) bench.steering.expect(service, ipv4(i));
  bench.use(1);
  await bench.run(2_000);
  assert.ok(bench.steering.watched().includes('n1'));
  assert.ok(bench.steering.watched().length <= EXPECTED_BURST + 3, String(bench.steering.watched().length));
  bench.steering.expect('shop.prod.nobody.v1' as ServiceId, ipv4(9));
});

test('Steering publishes once it knows where it is, then at most every 30 s and only news; a great load at once', async () => {
  const bench = new Bench();
  bench.rtt.set(1, 30).set(2, 50).set(3, 5);
  bench.place(CART, [1, 2, 3]);
  await bench.run(120_000);
  assert.ok(bench.published.length >= 1 && bench.published.length <= 4, String(bench.published.length));
  for (let i = 1; i < bench.published.length; i++)
    assert.ok(bench.published[i]!.at - bench.published[i - 1]!.at >= PUBLISH_MS);
  const before = bench.published.length;
  bench.load = 2;
  await bench.run(121_000);
  assert.is(bench.published.length, before + 1);
  assert.is(bench.published.at(-1)!.position.load, 2);
  for (let i = 0; i < 20; i++) {
    bench.load = i % 2 === 0 ? 0.1 : 2;
    await bench.run(bench.now + 1_000);
  }
  assert.ok(bench.published.length <= before + 1 + 3, 'the pause grows');
  const swung = bench.published.length;
  for (let i = 0; i < 300; i++) {
    bench.load = i % 2 === 0 ? 0.1 : 2;
    await bench.run(bench.now + 1_000);
  }
  assert.ok(bench.published.length - swung <= 300 / (PUBLISH_MS / 1_000) + 1, 'as rarely as any other news');
  bench.load = 0.1;
  await bench.run(bench.now + 3 * PUBLISH_MS);
  bench.load = 2;
  await bench.run(bench.now + 1_000);
  assert.is(bench.published.at(-1)!.position.load, 2, 'after a quiet time at once again');
});

test('Steering ignores bytes that are no probe status', async () => {
  const bench = new Bench();
  bench.place(CART, [1]);
  for (let n = 0; n < 100; n++)
    bench.steering.report({
      kind: 'probed',
      token: n,
      nodeIp: nodeIp(1),
      rttNs: 1,
      status: new Uint8Array(n),
    });
  await bench.run(1_000);
  assert.is(bench.steering.status('n1'), 'unknown');
});

test('Steering.stop ends its timer', async () => {
  const bench = new Bench();
  bench.place(CART, [1]);
  await bench.run(1_000);
  bench.steering.stop();
  assert.is(bench.timers.filter((t) => t.at > bench.now).length, 0);
});

test.run();
