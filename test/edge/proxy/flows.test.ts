import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Contacts } from '../../../edge/proxy/contacts.ts';
import { FLOW_STATE, FlowTable, TupleIndex } from '../../../edge/proxy/flows.ts';
import type { InstanceEntry } from '../../../edge/proxy/routes.ts';
import { Rng } from '../../../src/rng.ts';

function entry(instanceIp: number): InstanceEntry {
  return { instanceIp, flows: 0, dialled: 0 } as InstanceEntry;
}

test('TupleIndex equals a Map through 200,000 random operations on keys that collide', () => {
  const rng = new Rng(11);
  const index = new TupleIndex(600, 77);
  const twin = new Map<string, number>();
  for (let i = 0; i < 200_000; i++) {
    const key = [rng.below(4) + 0xac100042, rng.below(4) + 0xac1e0000, rng.below(40) << 16, 6] as const;
    const text = key.join();
    assert.is(index.find(...key), twin.get(text) ?? -1);
    if (twin.has(text)) {
      if (rng.below(2) === 0) {
        index.remove(...key);
        twin.delete(text);
      }
    } else if (twin.size < 600) {
      index.add(...key, i);
      twin.set(text, i);
    }
  }
  for (const [text, slot] of twin) {
    const [x, y, z, w] = text.split(',').map(Number) as [number, number, number, number];
    assert.is(index.find(x, y, z, w), slot);
  }
});

interface Flow {
  readonly flow: number;
  readonly local: number;
  readonly port: number;
  readonly dialled: number;
  readonly wirePort: number;
  readonly instance: InstanceEntry;
  state: number;
  usedMs: number;
}

/** A list that is searched from end to end. */
class ListTable {
  readonly list: Flow[] = [];
  /** Instances that have flows, by when they got their first. */
  readonly #owners: number[] = [];
  readonly #max: number;
  constructor(max: number) {
    this.#max = max;
  }
  byDialled(local: number, port: number, dialled: number): Flow | undefined {
    return this.list.find((f) => f.local === local && f.port === port && f.dialled === dialled);
  }
  byWire(local: number, wirePort: number, ip: number): Flow | undefined {
    return this.list.find(
      (f) => f.local === local && f.wirePort === wirePort && f.instance.instanceIp === ip,
    );
  }
  #of(local: number): Flow[] {
    return this.list.filter((flow) => flow.local === local);
  }
  remove(flow: Flow): void {
    this.list.splice(this.list.indexOf(flow), 1);
    if (this.#of(flow.local).length === 0) this.#owners.splice(this.#owners.indexOf(flow.local), 1);
  }
  /** The instance with most flows gives one up, if any has ended flows one of those: ended, opening, live, least recent. */
  #evict(): void {
    const ended = (local: number): boolean => this.#of(local).some((f) => f.state >= FLOW_STATE.closed);
    const willing = this.#owners.some(ended) ? this.#owners.filter(ended) : this.#owners;
    const owner = willing.reduce((most, local) =>
      this.#of(local).length > this.#of(most).length ? local : most,
    );
    const rank = (f: Flow): number =>
      f.state >= FLOW_STATE.closed ? 0 : f.state === FLOW_STATE.opening ? 1 : 2;
    const [victim] = this.#of(owner).sort((x, y) => rank(x) - rank(y) || x.usedMs - y.usedMs);
    this.remove(victim!);
  }
  add(flow: Flow): void {
    if (this.list.length >= this.#max) this.#evict();
    if (!this.#owners.includes(flow.local)) this.#owners.push(flow.local);
    this.list.push(flow);
  }
}

test('FlowTable equals a list: both faces, removal, expiry, and who goes first when it is full', () => {
  const rng = new Rng(5);
  const table = new FlowTable(64);
  const twin = new ListTable(64);
  const instances = [entry(1), entry(2), entry(3)];
  const states = Object.values(FLOW_STATE);
  const removed = (flow: Flow): void => {
    table.remove(flow.flow);
    twin.remove(flow);
  };
  let now = 0;
  for (let i = 0; i < 60_000; i++) {
    now += 1_000; // beyond the grain of recency, so that both orders are the same
    const local = rng.below(3);
    const port = rng.below(40);
    const dialled = 100 + rng.below(3);
    const found = twin.byDialled(local, port, dialled);
    assert.is(table.byDialled(6, local, port, dialled, 80), found?.flow ?? -1);
    if (found !== undefined) {
      const { flow } = found;
      assert.is(table.instance(flow), found.instance);
      assert.is(table.wirePort[flow], found.wirePort);
      assert.is(table.state[flow], found.state);
      if (table.isStale(flow, now) || rng.below(10) === 0) {
        removed(found);
        continue;
      }
      // Changed as the proxy does: with a packet, so at the time of its use.
      if (rng.below(3) === 0) {
        found.state = states[rng.below(states.length)]!;
        table.setState(flow, found.state as (typeof states)[number]);
      }
      found.usedMs = now;
      table.use(flow, now);
      continue;
    }
    const instance = instances[rng.below(3)]!;
    let wirePort = port;
    while (twin.byWire(local, wirePort, instance.instanceIp) !== undefined) wirePort++;
    const flow = table.open(6, local, port, dialled, 80, wirePort, instance, now);
    twin.add({ flow, local, port, dialled, wirePort, instance, state: FLOW_STATE.opening, usedMs: now });
    assert.is(table.size, twin.list.length);
    const probe = rng.below(60);
    assert.is(
      table.byWire(6, local, probe, instance.instanceIp, 80),
      twin.byWire(local, probe, instance.instanceIp)?.flow ?? -1,
    );
  }
  assert.ok(table.evicted > 100, `${table.evicted}`);
  assert.equal(new Set(table), new Set(twin.list.map(({ flow }) => flow)));
  assert.is(
    instances.reduce((sum, i) => sum + i.flows, 0),
    table.size,
  );
  table.sweep(10_000, now + 1e9);
  assert.is(table.size, 0);
  assert.equal([...table], []);
  assert.throws(() => {
    for (let i = 0; i < 2; i++) table.open(6, 1, 2, 3, 80, 2, instances[0]!, now);
  }, /one flow per face/);
  const [only] = table;
  table.remove(only!);
  assert.throws(() => table.remove(only!), /removed once/);
});

test('FlowTable: a slot that was given up tells nothing of who had it', () => {
  const table = new FlowTable(1);
  const first = table.open(6, 1, 2, 3, 80, 2, entry(9), 5);
  table.serverNext[first] = 7;
  table.clientNext[first] = 8;
  table.close(first, true, true, false);
  assert.is(table.state[first], FLOW_STATE.halfClosed);
  const second = table.open(6, 1, 4, 3, 80, 4, entry(9), 10);
  assert.is(second, first);
  assert.is(table.byDialled(6, 1, 2, 3, 80), -1);
  assert.equal([table.serverNext[second], table.clientNext[second], table.state[second]], [0, 0, 0]);
  table.close(second, false, true, false);
  assert.is(table.state[second], FLOW_STATE.halfClosed, 'the other side has not said FIN');
  table.close(second, true, true, false);
  assert.is(table.state[second], FLOW_STATE.closed);
});

test('FlowTable: short connections of one instance do not evict the idle ones of any', () => {
  const table = new FlowTable(100);
  const instance = entry(9);
  const live = (local: number, port: number): number => {
    const flow = table.open(6, local, port, 2, 80, port, instance, 0);
    table.setState(flow, FLOW_STATE.established);
    return flow;
  };
  const ports = Array.from({ length: 20 }, (_, port) => port);
  for (const local of [1, 2]) for (const port of ports) live(local, port);
  for (let i = 0; i < 10_000; i++) table.setState(live(1, 1_000 + i), FLOW_STATE.closed);
  // And a flood that is never answered costs the others nothing.
  for (let i = 0; i < 10_000; i++) table.open(17, 3, i, 2, 80, i, instance, 0);
  for (const local of [1, 2]) assert.ok(ports.every((port) => table.byDialled(6, local, port, 2, 80) >= 0));
  assert.is(table.size, 100);
});

test('FlowTable stays within its bound and frees what it drops', () => {
  const table = new FlowTable(100);
  const instance = entry(9);
  for (let i = 0; i < 10_000; i++) {
    table.open(6, 1, i & 0xffff, 2, 80, i & 0xffff, instance, i);
    assert.ok(table.size <= 100);
  }
  assert.is(table.evicted, 9_900);
  assert.is(instance.flows, 100);
  assert.is([...table].length, 100);
});

test('isStale: each protocol and state has its own patience', () => {
  const table = new FlowTable(2);
  const udp = table.open(17, 1, 2, 3, 4, 2, entry(1), 0);
  assert.not(table.isStale(udp, 30_000));
  assert.ok(table.isStale(udp, 30_001), 'UDP seen one way: 30 s');
  table.setState(udp, FLOW_STATE.established);
  assert.not(table.isStale(udp, 180_000));
  assert.ok(table.isStale(udp, 180_001), 'UDP seen both ways: 180 s');
  const tcp = table.open(6, 1, 2, 3, 4, 2, entry(1), 0);
  assert.ok(table.isStale(tcp, 130_001));
  table.setState(tcp, FLOW_STATE.established);
  assert.not(table.isStale(tcp, 23 * 3_600_000));
  table.reset(tcp, 5);
  assert.not(table.isStale(tcp, 10_005));
  assert.ok(table.isStale(tcp, 10_006));
});

test('Contacts: fresh ones are found, old and forgotten ones are not, the oldest makes room', () => {
  const contacts = new Contacts(4, 1);
  for (let port = 1; port <= 5; port++) contacts.note(17, 1, port, 2, 80, port % 2 === 0, port);
  assert.is(contacts.find(17, 1, 1, 2, 80, 6), -1);
  const slot = contacts.find(17, 1, 2, 2, 80, 6);
  assert.ok(slot >= 0 && contacts.isDialled(slot));
  assert.not(contacts.isDialled(contacts.find(17, 1, 3, 2, 80, 6)));
  assert.is(contacts.find(17, 1, 5, 2, 80, 200_000), -1);
  contacts.forget(1);
  assert.is(contacts.find(17, 1, 2, 2, 80, 7), -1);
});

test.run();
