// A key-value store in memory with etcd's own semantics: one revision per transaction, leases on an injected clock,
// a history that can be compacted, followers that can be cut off. It exists for tests and simulation; nothing that
// ships uses it, and it keeps nothing on disk.
import { EdgewayError } from '../src/error.ts';
import {
  type Compare,
  endOfPath,
  type Follower,
  type FollowListener,
  type KeyWindow,
  type Kv,
  type KvAudit,
  type KvBatch,
  type KvChange,
  type KvEntry,
  type LeaseId,
  type Operation,
  TXN_OPERATIONS_MAX,
  type TxnResult,
} from './kv.ts';
import { type SharedClock, SharedLeases } from './rest.ts';

interface Lease {
  readonly ttlS: number;
  expiresMs: number;
  readonly keys: Set<string>;
}

/** Changes of one revision, for those who catch up. */
interface Revision {
  readonly revision: number;
  readonly changes: readonly KvChange[];
}

/** The store itself; `connect` gives as many clients as a test wants. */
export class MemoryStore {
  readonly #now: () => number;
  #entries = new Map<string, KvEntry>();
  /** Keys by their first three segments, so that listing one subtree does not walk all of them. */
  #subtrees = new Map<string, Set<string>>();
  readonly #leases = new Map<LeaseId, Lease>();
  #history: Revision[] = [];
  #compacted = 0;
  #revision = 1;
  #leaseCount = 0;
  readonly #clients = new Set<MemoryKv>();

  /** `now`: monotonic milliseconds; the test moves it and then calls `expire`. */
  constructor(now: () => number) {
    this.#now = now;
  }

  get revision(): number {
    return this.#revision;
  }
  get compacted(): number {
    return this.#compacted;
  }
  /** Leases that live. */
  get leases(): number {
    return this.#leases.size;
  }

  /** `clock`: what the client's host has for one; the store's own otherwise. */
  connect(clock: SharedClock = { monotonicMs: this.#now, wallMs: this.#now }): MemoryKv {
    const client = new MemoryKv(this, clock, (gone) => this.#clients.delete(gone));
    this.#clients.add(client);
    return client;
  }

  get(key: string): KvEntry | undefined {
    this.expire();
    return this.#entries.get(key);
  }

  range(path: string): { entries: KvEntry[]; revision: number } {
    this.expire();
    const matches = matcher(path);
    const subtree = subtreeOf(path);
    const candidates = subtree === undefined ? this.#entries.keys() : (this.#subtrees.get(subtree) ?? []);
    const entries: KvEntry[] = [];
    for (const key of candidates) if (matches(key)) entries.push(this.#entries.get(key)!);
    entries.sort((a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : 0));
    return { entries, revision: this.#revision };
  }

  audit(path: string, revision: number): KvAudit | undefined {
    this.expire();
    if (revision < this.#compacted) return undefined;
    if (revision > this.#revision)
      throw new EdgewayError('coordination_unavailable', `revision ${revision} has not come yet`);
    // Walk back from the present: undo every change later than the revision.
    const matches = matcher(path);
    const at = new Map<string, number>();
    for (const entry of this.#entries.values()) at.set(entry.key, entry.modRevision);
    const before = new Map<string, number | undefined>();
    for (const { revision: past, changes } of this.#history)
      for (const change of changes) {
        const key = keyOf(change);
        if (past <= revision) before.set(key, change.kind === 'put' ? change.entry.modRevision : undefined);
        else if (!before.has(key)) before.set(key, this.#beforeHistory.get(key));
      }
    for (const [key, mod] of before)
      if (mod === undefined) at.delete(key);
      else at.set(key, mod);
    const held = [...at].filter(([key]) => matches(key)).map(([, mod]) => mod);
    return { count: held.length, newest: held.reduce((most, mod) => Math.max(most, mod), 0) };
  }

  /** modRevision of keys as they were when the history that is still held began. */
  #beforeHistory = new Map<string, number>();

  txn(compares: readonly Compare[], operations: readonly Operation[]): TxnResult {
    this.expire();
    if (operations.length > TXN_OPERATIONS_MAX || compares.length > TXN_OPERATIONS_MAX)
      throw new EdgewayError(
        'internal',
        `a transaction holds at most ${TXN_OPERATIONS_MAX} operations, this one ${operations.length}`,
      );
    if (new Set(operations.map(({ key }) => key)).size < operations.length)
      throw new EdgewayError('internal', 'a transaction writes one key twice');
    const holds = compares.every((compare) => {
      const entry = this.#entries.get(compare.key);
      return 'createRevision' in compare
        ? (entry?.createRevision ?? 0) === compare.createRevision
        : (entry?.modRevision ?? 0) === compare.modRevision;
    });
    if (!holds)
      return {
        succeeded: false,
        revision: this.#revision,
        seen: compares.map(({ key }) => this.#entries.get(key)),
      };
    for (const operation of operations)
      if (operation.kind === 'put' && operation.lease !== undefined && !this.#leases.has(operation.lease))
        throw new EdgewayError('lease_lost', `lease ${operation.lease} has ended`);
    this.#apply(operations);
    return { succeeded: true, revision: this.#revision, seen: [] };
  }

  grant(ttlS: number): LeaseId {
    this.expire();
    const id = String(++this.#leaseCount) as LeaseId;
    this.#leases.set(id, { ttlS, expiresMs: this.#now() + ttlS * 1000, keys: new Set() });
    return id;
  }

  keepAlive(id: LeaseId): number {
    this.expire();
    const lease = this.#leases.get(id);
    if (lease === undefined) throw new EdgewayError('lease_lost', `lease ${id} has ended`);
    lease.expiresMs = this.#now() + lease.ttlS * 1000;
    return lease.ttlS;
  }

  revoke(id: LeaseId): void {
    const lease = this.#leases.get(id);
    if (lease === undefined) return;
    this.#leases.delete(id);
    this.#apply([...lease.keys].sort().map((key) => ({ kind: 'delete', key })));
  }

  /** Ends the leases whose time has come. Every call does it; a test calls it after moving the clock. */
  expire(): void {
    for (const [id, lease] of this.#leases) if (lease.expiresMs <= this.#now()) this.revoke(id);
  }

  /** Forgets the history up to and including that revision. */
  compact(revision: number = this.#revision): void {
    this.#compacted = revision;
    for (const { revision: past, changes } of this.#history)
      if (past <= revision)
        for (const change of changes)
          if (change.kind === 'put') this.#beforeHistory.set(change.entry.key, past);
          else this.#beforeHistory.delete(change.key);
    this.#history = this.#history.filter((past) => past.revision > revision);
  }

  /** The store as a member that was wiped or restored empty: revisions begin again. Followers are cut. */
  wipe(): void {
    this.#entries = new Map();
    this.#subtrees = new Map();
    this.#leases.clear();
    this.#history = [];
    this.#beforeHistory = new Map();
    this.#compacted = 0;
    this.#revision = 1;
    for (const client of this.#clients) client.cut();
  }

  /** Batches after `revision` for a path; undefined when they were compacted away or never happened here. */
  since(path: string, revision: number): KvBatch[] | undefined {
    if (revision < this.#compacted || revision > this.#revision) return undefined;
    const matches = matcher(path);
    return this.#history
      .filter((past) => past.revision > revision)
      .map((past) => ({ ...past, changes: past.changes.filter((change) => matches(keyOf(change))) }))
      .filter(({ changes }) => changes.length > 0)
      .map((past) => ({ kind: 'changes', ...past }));
  }

  #apply(operations: readonly Operation[]): void {
    const revision = this.#revision + 1;
    const changes: KvChange[] = [];
    for (const operation of operations) {
      const old = this.#entries.get(operation.key);
      if (operation.kind === 'delete') {
        if (old === undefined) continue;
        this.#detach(old);
        this.#entries.delete(operation.key);
        this.#subtrees.get(subtreeOf(operation.key) ?? '')?.delete(operation.key);
        changes.push({ kind: 'delete', key: operation.key, revision });
        continue;
      }
      if (old !== undefined) this.#detach(old);
      const { key, value, lease } = operation;
      const entry: KvEntry = {
        key,
        value,
        createRevision: old?.createRevision ?? revision,
        modRevision: revision,
        ...(lease === undefined ? {} : { lease }),
      };
      if (lease !== undefined) this.#leases.get(lease)?.keys.add(key);
      this.#entries.set(key, entry);
      const subtree = subtreeOf(key) ?? '';
      const beside = this.#subtrees.get(subtree);
      if (beside === undefined) this.#subtrees.set(subtree, new Set([key]));
      else beside.add(key);
      changes.push({ kind: 'put', entry });
    }
    if (changes.length === 0) return;
    this.#revision = revision;
    this.#history.push({ revision, changes });
    for (const client of this.#clients) client.pump();
  }

  #detach(entry: KvEntry): void {
    if (entry.lease !== undefined) this.#leases.get(entry.lease)?.keys.delete(entry.key);
  }
}

interface MemoryFollower {
  readonly path: string;
  readonly listener: FollowListener;
  /** Undefined until the first snapshot, and after a wipe. */
  revision: number | undefined;
  live: boolean;
  closed: boolean;
}

/** One client. `partitioned` makes it unreachable: calls reject, followers hear nothing until it heals. */
export class MemoryKv implements Kv {
  readonly #store: MemoryStore;
  readonly #forget: (self: MemoryKv) => void;
  readonly #shared: SharedLeases;
  readonly #followers = new Set<MemoryFollower>();
  #partitioned = false;
  #pumping = false;

  constructor(store: MemoryStore, clock: SharedClock, forget: (self: MemoryKv) => void) {
    this.#store = store;
    this.#shared = new SharedLeases((ttlS) => this.grant(ttlS), clock);
    this.#forget = forget;
  }

  get partitioned(): boolean {
    return this.#partitioned;
  }
  set partitioned(value: boolean) {
    this.#partitioned = value;
    this.pump();
  }

  async get(key: string): Promise<KvEntry | undefined> {
    return this.#reach().get(key);
  }
  async range(path: string): Promise<{ entries: readonly KvEntry[]; revision: number }> {
    return this.#reach().range(path);
  }
  async keys(path: string, window?: KeyWindow): Promise<readonly string[]> {
    const keys = this.#reach()
      .range(path)
      .entries.map(({ key }) => key);
    if (window === undefined) return keys;
    return keys.filter((key) => key >= window.from).slice(0, window.limit);
  }
  async audit(path: string, revision: number): Promise<KvAudit | undefined> {
    return this.#reach().audit(path, revision);
  }
  async txn(compares: readonly Compare[], operations: readonly Operation[]): Promise<TxnResult> {
    return this.#reach().txn(compares, operations);
  }
  async grant(ttlS: number): Promise<LeaseId> {
    return this.#reach().grant(ttlS);
  }
  async grantShared(ttlS: number, ended?: LeaseId): Promise<LeaseId> {
    this.#reach();
    return this.#shared.take(ttlS, ended);
  }
  async keepAlive(lease: LeaseId): Promise<number> {
    return this.#reach().keepAlive(lease);
  }
  async revoke(lease: LeaseId): Promise<void> {
    this.#reach().revoke(lease);
  }

  follow(path: string, listener: FollowListener): Follower {
    const follower: MemoryFollower = { path, listener, revision: undefined, live: false, closed: false };
    this.#followers.add(follower);
    this.pump();
    return {
      close: async () => {
        follower.closed = true;
        this.#followers.delete(follower);
      },
    };
  }

  async close(): Promise<void> {
    for (const follower of this.#followers) follower.closed = true;
    this.#followers.clear();
    this.#forget(this);
  }

  /** Makes every follower list again, as after a lost connection. */
  cut(): void {
    for (const follower of this.#followers) follower.revision = undefined;
    this.pump();
  }

  /** Brings followers up to date, asynchronously and in order, as a socket would. */
  pump(): void {
    if (this.#pumping) return;
    this.#pumping = true;
    queueMicrotask(() => {
      this.#pumping = false;
      for (const follower of this.#followers) this.#bring(follower);
    });
  }

  #bring(follower: MemoryFollower): void {
    const turn = (live: boolean): void => {
      if (follower.live === live || follower.closed) return;
      follower.live = live;
      follower.listener.live(live);
    };
    if (this.#partitioned) {
      turn(false);
      return;
    }
    const batches =
      follower.revision === undefined ? undefined : this.#store.since(follower.path, follower.revision);
    if (batches === undefined) {
      turn(false);
      const { entries, revision } = this.#store.range(follower.path);
      follower.revision = revision;
      if (!follower.closed) follower.listener.batch({ kind: 'snapshot', entries, revision });
    } else
      for (const batch of batches) {
        follower.revision = batch.revision;
        if (!follower.closed) follower.listener.batch(batch);
      }
    turn(true);
  }

  #reach(): MemoryStore {
    if (this.#partitioned)
      throw new EdgewayError('coordination_unavailable', 'the store does not answer (partitioned)');
    return this.#store;
  }
}

/** `/a/b/c/` of `/a/b/c/…`; undefined for what has fewer segments. */
function subtreeOf(path: string): string | undefined {
  const end = path.indexOf('/', path.indexOf('/', path.indexOf('/', 1) + 1) + 1);
  return end > 0 && path.split('/', 4).length === 4 ? path.slice(0, end + 1) : undefined;
}

function matcher(path: string): (key: string) => boolean {
  const end = endOfPath(path);
  return end === undefined ? (key) => key === path : (key) => key.startsWith(path);
}

const keyOf = (change: KvChange): string => (change.kind === 'put' ? change.entry.key : change.key);
