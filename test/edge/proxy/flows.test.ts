import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Contacts } from '../../../edge/proxy/contacts.ts';
import { FLOW_STATE, Flow, FlowTable, isStale, TupleIndex } from '../../../edge/proxy/flows.ts';
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
    const [victim] = this.#of(owner).sort((x, y) => rank(x) - rank(y) || x.touchedMs - y.touchedMs);
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
  let now = 0;
  for (let i = 0; i < 60_000; i++) {
    now += 1_000; // beyond the grain of recency, so that both orders are the same
    const local = rng.below(3);
    const port = rng.below(40);
    const dialled = 100 + rng.below(3);
    const expected = twin.byDialled(local, port, dialled);
    const found = table.byDialled(6, local, port, dialled, 80);
    assert.is(found, expected);
    if (found !== undefined && isStale(found, now)) {
      table.remove(found);
      twin.remove(found);
      continue;
    }
    if (found !== undefined) {
      if (rng.below(10) === 0) {
        table.remove(found);
        twin.remove(found);
      } else {
        // Changed as the proxy does: with a packet, so at the time of its use.
        if (rng.below(3) === 0) table.setState(found, states[rng.below(states.length)]!);
        table.use(found, now);
      }
      continue;
    }
    const instance = instances[rng.below(3)]!;
    let wirePort = port;
    while (twin.byWire(local, wirePort, instance.instanceIp) !== undefined) wirePort++;
    const flow = new Flow(6, local, port, dialled, 80, wirePort, instance, now);
    table.add(flow);
    twin.add(flow);
    assert.is(table.size, twin.list.length);
    const probe = rng.below(60);
    assert.is(
      table.byWire(6, local, probe, instance.instanceIp, 80),
      twin.byWire(local, probe, instance.instanceIp),
    );
  }
  assert.ok(table.evicted > 100, `${table.evicted}`);
  assert.equal(new Set(table), new Set(twin.list));
  assert.is(
    instances.reduce((sum, i) => sum + i.flows, 0),
    table.size,
  );
  table.sweep(10_000, now + 1e9);
  assert.is(table.size, 0);
  assert.throws(() => {
    for (let i = 0; i < 2; i++) table.add(new Flow(6, 1, 2, 3, 80, 2, instances[0]!, now));
  }, /one flow per face/);
});

test('FlowTable: short connections of one instance do not evict the idle ones of any', () => {
  const table = new FlowTable(100);
  const instance = entry(9);
  const live = (local: number, port: number): Flow => {
    const flow = new Flow(6, local, port, 2, 80, port, instance, 0);
    table.add(flow);
    table.setState(flow, FLOW_STATE.established);
    return flow;
  };
  const idle = [1, 2].flatMap((local) => Array.from({ length: 20 }, (_, port) => live(local, port)));
  for (let i = 0; i < 10_000; i++) {
    const flow = live(1, 1_000 + i);
    table.setState(flow, FLOW_STATE.closed);
  }
  // And a flood that is never answered costs the others nothing.
  for (let i = 0; i < 10_000; i++) table.add(new Flow(17, 3, i, 2, 80, i, instance, 0));
  assert.ok(idle.every((flow) => flow.slot >= 0));
  assert.is(table.size, 100);
});

test('FlowTable stays within its bound and frees what it drops', () => {
  const table = new FlowTable(100);
  const instance = entry(9);
  for (let i = 0; i < 10_000; i++) {
    table.add(new Flow(6, 1, i & 0xffff, 2, 80, i & 0xffff, instance, i));
    assert.ok(table.size <= 100);
  }
  assert.is(table.evicted, 9_900);
  assert.is(instance.flows, 100);
  assert.is([...table].length, 100);
});

test('isStale: each protocol and state has its own patience', () => {
  const make = (protocol: number): Flow => new Flow(protocol, 1, 2, 3, 4, 2, entry(1), 0);
  const udp = make(17);
  assert.not(isStale(udp, 30_000));
  assert.ok(isStale(udp, 30_001), 'UDP seen one way: 30 s');
  udp.state = FLOW_STATE.established;
  assert.not(isStale(udp, 180_000));
  assert.ok(isStale(udp, 180_001), 'UDP seen both ways: 180 s');
  const tcp = make(6);
  assert.ok(isStale(tcp, 130_001));
  tcp.state = FLOW_STATE.established;
  assert.not(isStale(tcp, 23 * 3_600_000));
  tcp.state = FLOW_STATE.reset;
  assert.ok(isStale(tcp, 10_001));
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
