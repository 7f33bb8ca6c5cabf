// A typed view of the keyspace: follows paths of a Kv and turns what it is told into batches of decoded records.
// A listing and a stream become the same thing here: after any gap the listener gets the difference, deletions
// included. It judges no content beyond each record's own schema, and nothing found in the store can make it throw:
// a value that cannot be read counts as absent, is reported once with its key and the reason, and is kept in
// `problems` until it is mended or deleted.
import type { EdgewayError } from '../src/error.ts';
import { hash32 } from '../src/hash.ts';
import type { Key, Keys } from '../src/keys.ts';
import type { Logger } from '../src/log.ts';
import { decodeRecord, type KeyRecord, recordError } from '../src/records.ts';
import type { Follower, Kv, KvBatch, KvChange, KvEntry, LeaseId } from './kv.ts';

/** A record with its place in the store's history. */
export type Held = KeyRecord & {
  /** Revision at which the key came into being: the fence of a role, the epoch of a subnet. */
  readonly createRevision: number;
  readonly modRevision: number;
  readonly lease?: LeaseId;
};

export interface KeyspaceBatch {
  /** `snapshot`: the path is complete at `revision`. Either way only what differs from before is listed. */
  readonly kind: 'snapshot' | 'changes';
  readonly path: string;
  readonly revision: number;
  readonly puts: readonly Held[];
  readonly deletes: readonly Key[];
  /** Revisions of the changes that this batch brought, rising; none in a snapshot. */
  readonly brought: readonly number[];
}

export interface KeyspaceListener {
  batch(batch: KeyspaceBatch): void;
  /** False while a path is cut off from the store; what was told stays valid. */
  live(path: string, live: boolean): void;
}

/** Tells a value from another. Revisions alone do only while the store's history is one: in a store that was restored
 *  from a backup and written to, they have come again. */
interface Mark {
  readonly modRevision: number;
  readonly hash: number;
}
const markOf = ({ value, modRevision }: KvEntry): Mark => ({ modRevision, hash: hash32(value) });

/** What a follower of one path remembers: enough to tell news from old, not the records themselves. */
interface PathState {
  readonly follower: Follower;
  /** What of every key the listener holds. */
  readonly held: Map<string, Mark>;
  reached: number;
  complete: boolean;
  live: boolean;
  /** A path that has never been watched yet says nothing about the store. */
  wasLive: boolean;
}

/** Follows any set of paths, which may change at any time. */
export class Keyspace {
  readonly #kv: Kv;
  readonly #keys: Keys;
  readonly #listener: KeyspaceListener;
  readonly #log: Logger;
  readonly #paths = new Map<string, PathState>();
  /** By key: why its value (or the key itself) is ignored. */
  readonly problems = new Map<string, EdgewayError>();
  /** Events thrown away because something at least as new was held already. */
  staleEvents = 0;

  constructor(kv: Kv, keys: Keys, log: Logger, listener: KeyspaceListener) {
    this.#kv = kv;
    this.#keys = keys;
    this.#log = log;
    this.#listener = listener;
  }

  /**
   * Follows one more path; does nothing when it is followed already. `known`: keys that the listener holds from
   * before (a snapshot on disk); those that the first listing lacks are told as deletions, the others anew.
   */
  follow(path: string, known: readonly string[] = []): void {
    if (this.#paths.has(path)) return;
    const state: PathState = {
      follower: this.#kv.follow(path, {
        batch: (batch) => {
          if (this.#paths.get(path) === state) this.#take(path, state, batch);
        },
        live: (live) => {
          if (this.#paths.get(path) !== state) return;
          state.live = live;
          state.wasLive ||= live;
          this.#listener.live(path, live);
        },
      }),
      // No revision is 0: what was known before is old, whatever the listing says.
      held: new Map(known.map((key) => [key, { modRevision: 0, hash: 0 }])),
      reached: 0,
      complete: false,
      live: false,
      wasLive: false,
    };
    this.#paths.set(path, state);
  }

  /** Stops following; the listener is told to forget what it held below the path. */
  async unfollow(path: string): Promise<void> {
    const state = this.#paths.get(path);
    if (state === undefined) return;
    this.#paths.delete(path);
    const deletes = this.#parsed(state.held.keys());
    for (const key of this.problems.keys())
      if (key === path || (path.endsWith('/') && key.startsWith(path))) this.problems.delete(key);
    if (deletes.length > 0)
      this.#listener.batch({
        kind: 'changes',
        path,
        revision: state.reached,
        puts: [],
        deletes,
        brought: [],
      });
    await state.follower.close();
  }

  paths(): IterableIterator<string> {
    return this.#paths.keys();
  }

  /** True when every path has had its first complete listing. */
  get complete(): boolean {
    for (const { complete } of this.#paths.values()) if (!complete) return false;
    return true;
  }
  /** True when the store is there: every path that was ever watched is being watched, and there is one. */
  get live(): boolean {
    let some = false;
    for (const { live, wasLive } of this.#paths.values()) {
      if (wasLive && !live) return false;
      some ||= live;
    }
    return some;
  }
  /** True when the listener holds a record that was last written at exactly this revision. */
  holds(revision: number): boolean {
    for (const { held } of this.#paths.values())
      for (const { modRevision } of held.values()) if (modRevision === revision) return true;
    return false;
  }
  /** True when the path has had its first complete listing. */
  isComplete(path: string): boolean {
    return this.#paths.get(path)?.complete ?? false;
  }
  /** The revision that a path has reached; 0 before its first listing. */
  reachedOf(path: string): number {
    return this.#paths.get(path)?.reached ?? 0;
  }
  /** The revision that every path has reached. */
  get reached(): number {
    let least = Number.POSITIVE_INFINITY;
    for (const { reached } of this.#paths.values()) least = Math.min(least, reached);
    return least === Number.POSITIVE_INFINITY ? 0 : least;
  }
  /** Keys that the listener holds, over all paths. */
  get size(): number {
    let size = 0;
    for (const { held } of this.#paths.values()) size += held.size;
    return size;
  }

  async close(): Promise<void> {
    const states = [...this.#paths.values()];
    this.#paths.clear();
    await Promise.all(states.map(({ follower }) => follower.close()));
  }

  #take(path: string, state: PathState, batch: KvBatch): void {
    const puts: Held[] = [];
    const deletes: Key[] = [];
    const brought: number[] = [];
    if (batch.kind === 'snapshot') {
      const missing = new Set(state.held.keys());
      for (const key of this.problems.keys())
        if (key === path || (path.endsWith('/') && key.startsWith(path))) missing.add(key);
      for (const entry of batch.entries) {
        missing.delete(entry.key);
        const held = state.held.get(entry.key);
        const { modRevision, hash } = markOf(entry);
        // Below what was reached, history began again: whatever comes is told, even if it looks the same.
        const same = held?.modRevision === modRevision && held.hash === hash;
        if (!same || batch.revision < state.reached) this.#put(state, entry, puts, deletes);
      }
      for (const key of missing) this.#delete(state, key, deletes);
      state.reached = batch.revision;
      state.complete = true;
    } else {
      // One batch may tell of several revisions, and its reader takes deletions before puts: of each key the last counts.
      const last = new Map<string, KvChange>();
      for (const change of batch.changes) {
        const revision = change.kind === 'put' ? change.entry.modRevision : change.revision;
        // Everything up to `reached` is held: an event that old has been sent twice or out of turn.
        if (revision <= state.reached) {
          this.staleEvents++;
          continue;
        }
        if (brought.at(-1) !== revision) brought.push(revision);
        last.set(change.kind === 'put' ? change.entry.key : change.key, change);
      }
      for (const change of last.values())
        if (change.kind === 'put') this.#put(state, change.entry, puts, deletes);
        else this.#delete(state, change.key, deletes);
      state.reached = Math.max(state.reached, batch.revision);
    }
    this.#listener.batch({ kind: batch.kind, path, revision: state.reached, puts, deletes, brought });
  }

  #put(state: PathState, entry: KvEntry, puts: Held[], deletes: Key[]): void {
    const key = this.#keys.parse(entry.key);
    const decoded = key.ok ? decodeRecord(key.value, entry.value) : key;
    if (decoded.ok) {
      this.problems.delete(entry.key);
      state.held.set(entry.key, markOf(entry));
      const { createRevision, modRevision, lease } = entry;
      puts.push({ ...decoded.value, createRevision, modRevision, ...(lease === undefined ? {} : { lease }) });
      return;
    }
    const known = this.problems.get(entry.key);
    this.#delete(state, entry.key, deletes);
    const problem = key.ok ? recordError(entry.key, decoded.error) : decoded.error;
    if (known?.message !== problem.message)
      this.#log.warn(
        { key: entry.key, reason: decoded.error.message, revision: String(entry.modRevision) },
        'ignoring a record that cannot be read',
      );
    this.problems.set(entry.key, problem);
  }

  #delete(state: PathState, text: string, deletes: Key[]): void {
    this.problems.delete(text);
    if (!state.held.delete(text)) return;
    const key = this.#keys.parse(text);
    if (key.ok) deletes.push(key.value);
  }

  #parsed(texts: Iterable<string>): Key[] {
    const keys: Key[] = [];
    for (const text of texts) {
      const key = this.#keys.parse(text);
      if (key.ok) keys.push(key.value);
    }
    return keys;
  }
}

/** A `Keyspace` that follows the given paths from the start. */
export function followKeyspace(
  kv: Kv,
  keys: Keys,
  paths: readonly string[],
  log: Logger,
  listener: KeyspaceListener,
): Keyspace {
  const keyspace = new Keyspace(kv, keys, log, listener);
  for (const path of paths) keyspace.follow(path);
  return keyspace;
}
