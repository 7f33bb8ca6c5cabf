// Calls on a store in memory: n1 knows an instance on n2, which a NAT hides, and n2 has no route to n1.
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { claimInstance, claimSubnet, publishInstance, publishNode } from '../../coordinator/claims.ts';
import { Keyspace } from '../../coordinator/keyspace.ts';
import type { Kv, LeaseId } from '../../coordinator/kv.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { Calls } from '../../edge/calls.ts';
import type { ProxyCommand } from '../../edge/proxy/command.ts';
import { RouteFollower } from '../../edge/routes/follow.ts';
import { decodeSnapshot, encodeSnapshot, type Snapshot } from '../../edge/routes/snapshot.ts';
import { RouteTable } from '../../edge/routes/table.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { CALLS_MAX } from '../../src/limits.ts';
import { SILENT } from '../../src/log.ts';
import { DEFAULT_NETWORK_CONFIG as config } from '../../src/records.ts';
import { CART, instance, node, sid } from '../support/sample.ts';
import { settle, VirtualTime } from '../support/time.ts';

const keys = new Keys();
/** Leases that no test outlives: what ends is ended by what is tested. */
const LONG_S = 100_000;

class TestNode {
  readonly id: string;
  readonly kv: ReturnType<MemoryStore['connect']>;
  readonly routes: RouteFollower;
  readonly calls: Calls;
  readonly commands: ProxyCommand[] = [];
  lease: LeaseId | undefined;
  /** Why there is no lease. */
  refuse: string | undefined;

  constructor(id: string, time: VirtualTime, store: MemoryStore, nat: boolean, restored?: Snapshot) {
    const after = (ms: number, run: () => void) => time.after(ms, run);
    this.id = id;
    this.kv = store.connect();
    this.routes = new RouteFollower({
      keys,
      open: (listener) => new Keyspace(this.kv, keys, SILENT, listener),
      after,
      interest: {
        ...{
          idleMs: 600_000,
          negativeMs: 10_000,
          max: 100,
          ownerOf: async () => undefined,
          subnetTaken: async () => false,
        },
        now: () => time.monotonicMs(),
        ...(nat ? { called: id } : {}),
      },
      ...(restored === undefined ? {} : { restored }),
    });
    this.calls = new Calls({
      ...{ kv: this.kv, keys, node: id, cluster: 'lab', routes: this.routes, timers: { after }, log: SILENT },
      presence: {
        held: async () => {
          if (this.refuse !== undefined) throw new EdgewayError('coordination_unavailable', this.refuse);
          this.lease ??= await this.kv.grant(LONG_S);
          return this.lease;
        },
      },
      send: (command) => void this.commands.push(command),
    });
    this.routes.onDelta(() => this.calls.update());
  }

  /** Whom its loop was last told to greet. */
  get greeted(): unknown {
    const told = this.commands.filter((command) => command.kind === 'callers').at(-1);
    return told?.kind === 'callers' ? told.nodes.map(({ nodeIp }) => nodeIp) : undefined;
  }
}

async function publish(kv: Kv, id: string, index: number, nat: boolean, number?: number) {
  const claim = await claimSubnet(kv, keys, config, { node: id, cluster: 'lab' });
  const lease = await kv.grant(LONG_S);
  const host = node(id, index, {
    ...{ subnet: claim.subnet, epoch: claim.epoch },
    ...(nat ? { nat } : {}),
  });
  await publishNode(kv, keys, host, lease);
  if (number === undefined) return host;
  const wish = { service: CART, instance: number, node: id, lease: claim.lease };
  const { instanceIp } = await claimInstance(kv, keys, config, wish);
  await publishInstance(kv, keys, claim.subnet, instance(host, CART, number, { instanceIp }), lease);
  return host;
}

async function world() {
  const time = new VirtualTime();
  const store = new MemoryStore(() => time.monotonicMs());
  const writer = store.connect();
  const [one, two] = [new TestNode('n1', time, store, false), new TestNode('n2', time, store, true)];
  const host = await publish(writer, 'n1', 1, false);
  await publish(writer, 'n2', 2, true, 1);
  const calls = (): Promise<readonly string[]> => writer.keys(keys.prefix('calls'));
  await settle();
  return { time, store, writer, one, two, host, calls };
}
const CALL = keys.build({ kind: 'call', node: 'n2', caller: 'n1' });

test('Calls: a node that a NAT hides greets who knows an instance on it, for as long as that is so', async () => {
  const { time, writer, one, two, host, calls } = await world();
  assert.equal(await calls(), []);
  one.routes.ask(CART);
  await settle();
  assert.equal(await calls(), [CALL]);
  await settle();
  assert.equal(two.greeted, [host.nodeIp]);
  assert.equal(two.routes.table.node('n1'), host, 'the caller’s record is followed');
  const moved = await publish(writer, 'n1', 7, false);
  await settle();
  assert.equal(two.greeted, [moved.nodeIp], 'also where it moves');
  two.commands.length = 0;
  two.calls.loopStarted();
  assert.equal(two.greeted, [moved.nodeIp], 'and by a new packet loop');
  await time.advance(700_000);
  assert.equal(await calls(), []);
  assert.equal(two.greeted, []);
  assert.is(two.routes.table.node('n1'), undefined);
});

test('Calls: nobody calls a node that others reach as it is, and a call is no route', async () => {
  const { one, two, calls, writer } = await world();
  await publish(writer, 'n1', 1, false, 2);
  two.routes.pin(new Set([CART]));
  await settle();
  assert.ok(two.routes.table.instance(CART, 2));
  assert.equal(await calls(), []);
  await publish(writer, 'n1', 1, true);
  await settle();
  assert.equal(await calls(), [keys.build({ kind: 'call', node: 'n1', caller: 'n2' })]);
  assert.is(one.greeted, undefined, 'n1 does not know that a NAT hides it');
});

test('Calls: they are written again under a new lease, and when the store is back', async () => {
  const { time, one, two, calls, writer, host } = await world();
  one.refuse = 'no lease was granted';
  one.routes.pin(new Set([CART]));
  await time.advance(60_000);
  assert.equal(await calls(), []);
  one.refuse = undefined;
  await time.advance(10_000);
  assert.equal(await calls(), [CALL]);
  await writer.revoke(one.lease!);
  await settle();
  assert.equal(two.greeted, []);
  one.lease = undefined;
  one.calls.update();
  await settle();
  assert.equal(await calls(), [CALL]);
  assert.equal(two.greeted, [host.nodeIp]);
});

test('Calls: what a restart read of a caller whose call has ended is not kept', async () => {
  const { time, store, one, two } = await world();
  one.routes.ask(CART);
  two.routes.ask(CART);
  await settle();
  await settle();
  const snapshot = unwrap(decodeSnapshot(encodeSnapshot(two.routes.table, keys), keys));
  assert.ok(snapshot.records.some(({ kind, key }) => kind === 'node' && key.node === 'n1'));
  await one.kv.revoke(one.lease!);
  const again = new TestNode('n2', time, store, true, snapshot);
  await settle();
  assert.equal(
    [...again.routes.table.nodes()].map(({ node }) => node),
    ['n2'],
  );
});

/** A table that counts how often somebody looks at a node or an instance of it. */
class CountedTable extends RouteTable {
  looked = 0;

  *#counted<T>(values: Iterable<T>): IterableIterator<T> {
    for (const value of values) {
      this.looked++;
      yield value;
    }
  }
  override nodes() {
    return this.#counted(super.nodes());
  }
  override instances() {
    return this.#counted(super.instances());
  }
  override get hidden(): ReadonlySet<string> {
    const hidden = super.hidden;
    const iterate = () => this.#counted(hidden);
    return new Proxy(hidden, {
      get: (target, name) => {
        if (name === Symbol.iterator) return iterate;
        if (name === 'has') this.looked++;
        const value: unknown = Reflect.get(target, name, target);
        return typeof value === 'function' ? value.bind(target) : value;
      },
    });
  }
}

test('Calls: among 15,360 nodes a route change that is no call’s looks at none of them, one that is at those called', async () => {
  const time = new VirtualTime();
  const kv = new MemoryStore(() => time.monotonicMs()).connect();
  const table = new CountedTable();
  const hosts = Array.from({ length: 15_360 }, (_, i) => node(`n${i}`, i, i % 3 === 0 ? { nat: true } : {}));
  for (const [i, host] of hosts.entries()) {
    table.putNode(host);
    table.putInstance(instance(host, sid(`a.b.c${i % 3_000}.d`), 1 + Math.floor(i / 3_000)));
  }
  const lease = await kv.grant(LONG_S);
  const calls = new Calls({
    ...{ kv, keys, node: 'n0', cluster: 'lab', log: SILENT },
    routes: { table, callers: () => new Map<string, string>().keys() },
    presence: { held: async () => lease },
    send: () => {},
    timers: { after: (ms, run) => time.after(ms, run) },
  });
  const looks = async (change: () => void): Promise<number> => {
    change();
    table.looked = 0;
    calls.update();
    await settle();
    return table.looked;
  };
  const called = async (): Promise<Set<string>> => new Set(await kv.keys(keys.prefix('calls')));
  const callTo = (id: string): string => keys.build({ kind: 'call', node: id, caller: 'n0' });
  await looks(() => {});
  const first = await called();
  assert.is(first.size, CALLS_MAX);
  assert.not.ok(first.has(callTo('n0')), 'nobody calls itself');
  for (let i = 0; i < 100; i++) {
    const host = hosts[i * 3 + 1]!;
    assert.ok((await looks(() => table.putInstance(instance(host, CART, i + 1)))) <= 1);
    assert.ok((await looks(() => table.putNode({ ...host, nsp: i }))) <= 1);
  }
  const ended = [...first][0]!.split('/').at(-2)!;
  assert.ok((await looks(() => table.deleteNode(ended))) <= 4 * CALLS_MAX);
  const second = await called();
  assert.is(second.size, CALLS_MAX, 'another one has its place');
  assert.not.ok(second.has(callTo(ended)));
  assert.is([...second].filter((key) => first.has(key)).length, CALLS_MAX - 1, 'those called stay');
  calls.stop();
});

test.run();
