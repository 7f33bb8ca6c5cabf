// From the keyspace to the routing table: a reducer that applies typed batches, and the follower that feeds it, tells
// others what changed, and answers "has my own write arrived?". It is the table's only author. It decides nothing
// about policies and opens no connection itself.
import type { Keyspace, KeyspaceBatch, KeyspaceListener } from '../../coordinator/keyspace.ts';
import { EdgewayError } from '../../src/error.ts';
import type { Key, Keys } from '../../src/keys.ts';
import type { ServiceId } from '../../src/name.ts';
import { type RouteDelta, RouteTable } from './table.ts';

/** Applies a batch to the table and says what changed. Keys that are no routes pass unnoticed. */
export function applyBatch(table: RouteTable, batch: KeyspaceBatch): RouteDelta {
  const services = new Set<ServiceId>();
  const nodes = new Set<string>();
  // Deletions first: an address that moved within one batch ends with its new owner.
  for (const key of batch.deletes) remove(table, key, services, nodes);
  for (const put of batch.puts)
    switch (put.kind) {
      case 'service':
        table.putService(put.value);
        services.add(put.value.id);
        break;
      case 'instance':
        table.putInstance(put.value);
        services.add(put.value.service);
        break;
      case 'node':
        table.putNode(put.value);
        nodes.add(put.value.node);
        break;
    }
  table.revision = Math.max(table.revision, batch.revision);
  return { services, nodes };
}

function remove(table: RouteTable, key: Key, services: Set<ServiceId>, nodes: Set<string>): void {
  switch (key.kind) {
    case 'service':
      table.deleteService(key.service);
      services.add(key.service);
      break;
    case 'instance':
      table.deleteInstance(key.service, key.instance);
      services.add(key.service);
      break;
    case 'node':
      table.deleteNode(key.node);
      nodes.add(key.node);
      break;
  }
}

export interface RouteFollowerOptions {
  readonly keys: Keys;
  /** Makes the keyspace that tells us; `main.ts` and the agent know the store, we do not. */
  readonly open: (listener: KeyspaceListener) => Keyspace;
  /** Runs once after that long; the returned function calls it off. */
  readonly after: (ms: number, run: () => void) => () => void;
  readonly table?: RouteTable;
}

interface Waiter {
  readonly revision: number;
  readonly resolve: () => void;
}

/** Revisions remembered for `waitFor`: a burst of deploys waits for far fewer. */
const RECENT_MAX = 4_096;

export class RouteFollower {
  readonly table: RouteTable;
  readonly keyspace: Keyspace;
  readonly #after: RouteFollowerOptions['after'];
  readonly #deltas = new Set<(delta: RouteDelta) => void>();
  readonly #liveness = new Set<(live: boolean) => void>();
  readonly #waiters = new Set<Waiter>();
  readonly #recent = new Set<number>();
  #live = false;

  constructor(options: RouteFollowerOptions) {
    this.table = options.table ?? new RouteTable();
    this.#after = options.after;
    this.keyspace = options.open({
      batch: (batch) => this.#take(batch),
      live: () => this.#judgeLive(),
    });
    for (const subtree of ['nodes', 'services', 'instances'] as const)
      this.keyspace.follow(options.keys.prefix(subtree));
  }

  /** True while everything that is followed is whole and watched. The table stays valid either way. */
  get live(): boolean {
    return this.#live;
  }
  /** Records that are ignored, by key, with the reason. */
  get problems(): ReadonlyMap<string, EdgewayError> {
    return this.keyspace.problems;
  }

  /** Told after each batch, with the table already changed. Returns the way to stop. */
  onDelta(listener: (delta: RouteDelta) => void): () => void {
    this.#deltas.add(listener);
    return () => this.#deltas.delete(listener);
  }
  onLive(listener: (live: boolean) => void): () => void {
    this.#liveness.add(listener);
    return () => this.#liveness.delete(listener);
  }

  /**
   * Resolves when the table shows the write that had this revision (read your writes); at once for 0. Rejects
   * `timeout`. The write must have touched something that is followed.
   */
  waitFor(revision: number, timeoutMs: number): Promise<void> {
    if (this.#reached(revision)) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const waiter: Waiter = {
        revision,
        resolve: () => {
          cancel();
          this.#waiters.delete(waiter);
          resolve();
        },
      };
      const cancel = this.#after(timeoutMs, () => {
        this.#waiters.delete(waiter);
        reject(
          new EdgewayError(
            'timeout',
            `the watch did not bring revision ${revision} within ${timeoutMs} ms; it stands at ${this.table.revision}`,
          ),
        );
      });
      this.#waiters.add(waiter);
    });
  }

  async close(): Promise<void> {
    this.#deltas.clear();
    this.#liveness.clear();
    await this.keyspace.close();
  }

  #take(batch: KeyspaceBatch): void {
    const delta = applyBatch(this.table, batch);
    const wasSynced = this.table.synced;
    this.table.synced ||= this.keyspace.complete;
    for (const revision of batch.brought) this.#remember(revision);
    // A listing that swallowed the change somebody waits for still shows its revision.
    if (this.#waiters.size > 0) for (const { modRevision } of batch.puts) this.#remember(modRevision);
    if (delta.services.size > 0 || delta.nodes.size > 0 || wasSynced !== this.table.synced)
      for (const listener of this.#deltas) listener(delta);
    for (const waiter of this.#waiters) if (this.#reached(waiter.revision)) waiter.resolve();
  }

  #reached(revision: number): boolean {
    return revision <= this.keyspace.reached || this.#recent.has(revision);
  }

  #remember(revision: number): void {
    this.#recent.add(revision);
    if (this.#recent.size <= RECENT_MAX) return;
    for (const oldest of this.#recent) {
      this.#recent.delete(oldest);
      return;
    }
  }

  #judgeLive(): void {
    const live = this.keyspace.live;
    if (live === this.#live) return;
    this.#live = live;
    for (const listener of this.#liveness) listener(live);
  }
}
