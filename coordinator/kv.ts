// The key-value store as the rest of the code sees it: strings, revisions, leases, transactions, and one way to
// follow a path. Two implementations exist: etcd (etcd/client.ts) and, for tests and simulation, memory.ts; one
// conformance suite runs over both. Every call rejects with an EdgewayError: `coordination_unavailable` when the
// store does not answer within its deadline, `lease_lost` when a lease is gone, `permission_denied` when the store's
// access rules refuse it. A transaction that ends in `coordination_unavailable` may or may not have been applied:
// whoever writes must be able to recognise its own write.
//
// A path that ends in a slash means everything below it; any other path means exactly that key.

/** A lease as the store names it. */
export type LeaseId = string & { readonly __brand: 'LeaseId' };

export interface KvEntry {
  readonly key: string;
  readonly value: string;
  /** Revision at which the key came into being; 0 never occurs. */
  readonly createRevision: number;
  /** Revision of the last put. */
  readonly modRevision: number;
  /** Undefined when the key is durable. */
  readonly lease?: LeaseId;
}

/** A condition of a transaction. Revision 0 means "the key does not exist". */
export type Compare =
  | { readonly key: string; readonly createRevision: number }
  | { readonly key: string; readonly modRevision: number };

export type Operation =
  | { readonly kind: 'put'; readonly key: string; readonly value: string; readonly lease?: LeaseId }
  | { readonly kind: 'delete'; readonly key: string };

export interface TxnResult {
  readonly succeeded: boolean;
  /** The store's revision after the transaction: what a reader must reach to see it. */
  readonly revision: number;
  /** What stood under each compared key when the transaction was refused, in their order; empty when it was applied. */
  readonly seen: readonly (KvEntry | undefined)[];
}

/** A change seen by a follower. */
export type KvChange =
  | { readonly kind: 'put'; readonly entry: KvEntry }
  | { readonly kind: 'delete'; readonly key: string; readonly revision: number };

/**
 * What a follower is told. A snapshot replaces everything that was known below the path, deletions included; it
 * comes first, and again after any gap (compaction, a member restored empty). `revision` never goes back while the
 * cluster is the same one.
 */
export type KvBatch =
  | { readonly kind: 'snapshot'; readonly entries: readonly KvEntry[]; readonly revision: number }
  | { readonly kind: 'changes'; readonly changes: readonly KvChange[]; readonly revision: number };

export interface Follower {
  /** Stops; no callback follows. */
  close(): Promise<void>;
}

export interface FollowListener {
  batch(batch: KvBatch): void;
  /** `live` turns false when the stream is cut and true when it is whole again; what was told stays valid. */
  live(live: boolean): void;
}

export interface KeyWindow {
  /** Inclusive. */
  readonly from: string;
  readonly limit: number;
}

export interface KvAudit {
  readonly count: number;
  /** Highest modRevision among the entries; 0 when there are none. */
  readonly newest: number;
}

export interface Kv {
  get(key: string): Promise<KvEntry | undefined>;
  /** All entries of the path, in key order, at one revision. */
  range(path: string): Promise<{ readonly entries: readonly KvEntry[]; readonly revision: number }>;
  /**
   * The keys of the path without their values, in key order: a cheap look at what is taken. `window`: only those from
   * a key on, at most so many.
   */
  keys(path: string, window?: KeyWindow): Promise<readonly string[]>;
  /** How the path looked at a revision, for comparing with what a follower holds. Undefined: compacted away. */
  audit(path: string, revision: number): Promise<KvAudit | undefined>;
  /**
   * Applies `operations` when all `compares` hold; all or nothing. At most 128 of each, no key written twice
   * (etcd's own limits).
   */
  txn(compares: readonly Compare[], operations: readonly Operation[]): Promise<TxnResult>;
  /** A new lease of that many seconds. */
  grant(ttlS: number): Promise<LeaseId>;
  /**
   * A lease for keys that are to go by themselves no sooner than in that many seconds, nor much later. What one client
   * asks for within a short time is one lease, so nobody renews or revokes it. `ended`: one of these that is no more.
   */
  grantShared(ttlS: number, ended?: LeaseId): Promise<LeaseId>;
  /** Renews; resolves to the seconds granted, rejects with `lease_lost` when it has ended. */
  keepAlive(lease: LeaseId): Promise<number>;
  /** Ends a lease and deletes its keys; succeeds when it has ended already. */
  revoke(lease: LeaseId): Promise<void>;
  /** Lists, then watches, for ever; survives outages, compaction and restored members by itself. */
  follow(path: string, listener: FollowListener): Follower;
  close(): Promise<void>;
}

/** etcd's own limit of operations (and of compares) in one transaction. */
export const TXN_OPERATIONS_MAX = 128;

/** Exclusive upper end of a subtree's keys, or undefined when the path is a single key. `/` + 1 is `0`. */
export function endOfPath(path: string): string | undefined {
  return path.endsWith('/') ? `${path.slice(0, -1)}0` : undefined;
}
