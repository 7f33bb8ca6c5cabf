// Calls through NATs, both ways. A NAT lets in only what answers a packet from inside. So this node asks each node that
// a NAT hides, and that has instances it knows of, to greet it (`calls/<that node>/<this one>` in the keyspace); and
// itself behind a NAT it has its packet loop greet those who ask. It chooses no route and sends no packet.
import { type Kv, type LeaseId, type Operation, TXN_OPERATIONS_MAX } from '../coordinator/kv.ts';
import type { LeaseKeeper } from '../coordinator/lease.ts';
import { toEdgewayError } from '../src/error.ts';
import type { Keys } from '../src/keys.ts';
import { CALLS_MAX, READ_YOUR_WRITES_MS } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import { encodeCall } from '../src/records.ts';
import type { Timers } from './ports.ts';
import type { NodePlace, ProxyCommand } from './proxy/command.ts';
import type { RouteFollower } from './routes/follow.ts';

/** Pause before what could not be written is tried again. */
const RETRY_MS = 5_000;

export interface CallsParts {
  readonly kv: Kv;
  readonly keys: Keys;
  readonly node: string;
  readonly cluster: string;
  readonly routes: Pick<RouteFollower, 'table' | 'callers'>;
  /** Calls end with it. */
  readonly presence: Pick<LeaseKeeper, 'held'>;
  readonly send: (command: ProxyCommand) => void;
  readonly timers: Timers;
  readonly log: Logger;
}

export class Calls {
  readonly #parts: CallsParts;
  /** Whom this node calls, and under which lease it was written. */
  readonly #called = new Map<string, LeaseId>();
  /** What was last written in full: the table's `hiddenChanges` of then, and the lease. */
  #written: { readonly changes: number; readonly lease: LeaseId | undefined } | undefined;
  #stale = false;
  #running = false;
  #stopped = false;
  #cancel = (): void => {};
  /** Why the last writing failed, as far as it was logged. */
  #failure: string | undefined;
  /** Callers as the loop knows them. */
  #told = '[]';

  constructor(parts: CallsParts) {
    this.#parts = parts;
  }

  /** Routes, callers or the presence lease changed. */
  update(): void {
    this.#tell();
    this.#stale = true;
    if (!this.#running && !this.#stopped) void this.#run();
  }

  /** A new packet loop knows nobody. */
  loopStarted(): void {
    this.#told = '[]';
    this.#tell();
  }

  /** What was written ends with the presence lease. */
  stop(): void {
    this.#stopped = true;
    this.#cancel();
  }

  #tell(): void {
    const { routes, node: self, send } = this.#parts;
    const nodes: NodePlace[] = [];
    for (const caller of routes.callers()) {
      const node = routes.table.node(caller);
      if (node === undefined || caller === self) continue;
      nodes.push({ subnet: node.subnet.base, nodeIp: node.nodeIp, ewp: node.ewp });
    }
    const text = JSON.stringify(nodes);
    if (text === this.#told) return;
    this.#told = text;
    send({ kind: 'callers', nodes });
  }

  async #run(): Promise<void> {
    this.#running = true;
    this.#cancel();
    try {
      while (this.#stale && !this.#stopped) {
        this.#stale = false;
        await this.#write();
      }
      this.#failure = undefined;
    } catch (thrown) {
      const { code, message } = toEdgewayError(thrown);
      if (message !== this.#failure && !this.#stopped)
        this.#parts.log.warn({ code, error: message }, 'nodes behind NATs are not called yet');
      this.#failure = message;
      if (!this.#stopped) this.#cancel = this.#parts.timers.after(RETRY_MS, () => this.update());
    } finally {
      this.#running = false;
    }
  }

  /** Brings the keyspace in step with whom this node has to call. Most route changes change nothing of that, and every
   *  one of a whole platform comes here: those are told apart without a look at any node. */
  async #write(): Promise<void> {
    const { kv, keys, node: caller, cluster, presence, routes } = this.#parts;
    const { hidden, hiddenChanges: changes } = routes.table;
    const some = hidden.size > (hidden.has(caller) ? 1 : 0);
    const lease = some ? await presence.held(READ_YOUR_WRITES_MS) : undefined;
    if (this.#written?.changes === changes && this.#written.lease === lease) return;
    const wanted = this.#wanted();
    const keyOf = (node: string): string => keys.build({ kind: 'call', node, caller });
    const value = encodeCall({ cluster });
    const changed = [...new Set([...this.#called.keys(), ...wanted])].filter((node) =>
      wanted.has(node) ? this.#called.get(node) !== lease : true,
    );
    for (let at = 0; at < changed.length; at += TXN_OPERATIONS_MAX) {
      const nodes = changed.slice(at, at + TXN_OPERATIONS_MAX);
      const operations = nodes.map(
        (node): Operation =>
          lease !== undefined && wanted.has(node)
            ? { kind: 'put', key: keyOf(node), value, lease }
            : { kind: 'delete', key: keyOf(node) },
      );
      await kv.txn([], operations);
      for (const node of nodes)
        if (lease !== undefined && wanted.has(node)) this.#called.set(node, lease);
        else this.#called.delete(node);
    }
    this.#written = { changes, lease };
  }

  /** Nodes behind NATs that have instances; of too many, those that are called already come first. */
  #wanted(): ReadonlySet<string> {
    const { routes, node: self } = this.#parts;
    const { hidden } = routes.table;
    const wanted = new Set<string>();
    const want = (nodes: Iterable<string>): void => {
      for (const node of nodes) {
        if (wanted.size === CALLS_MAX) return;
        if (node !== self && hidden.has(node)) wanted.add(node);
      }
    };
    if (hidden.size > CALLS_MAX) want(this.#called.keys());
    want(hidden);
    return wanted;
  }
}
