// `Kv` over etcd: etcd3 for connections, credentials and single calls, tuned; listing and watching are our own
// (watch.ts), and so is the judgement of leases (../lease.ts). Requests and watches travel on separate connections,
// so a burst of events never delays a renewal. It refuses to repeat a write that may have been applied, and to go on
// with what one etcd cluster said when another one answers.
import { InterceptingCall, type Interceptor } from '@grpc/grpc-js';
import { ExponentialBackoff, handleWhen, noop, type RetryPolicy, retry } from 'cockatiel';
import {
  Etcd3,
  EtcdInvalidAuthTokenError,
  EtcdLeaseInvalidError,
  EtcdPermissionDeniedError,
  type IKeyValue,
  type IOptions,
  type IResponseHeader,
  isRecoverableError,
} from 'etcd3';
import { EdgewayError } from '../../src/error.ts';
import {
  AUDIT_INTERVAL_MS,
  LISTINGS_MAX,
  PING_INTERVAL_MS,
  PING_TIMEOUT_MS,
  RANGE_PAGE,
  REQUEST_TIMEOUT_MS,
  RESYNC_PAUSE_CAP_MS,
  RESYNC_PAUSE_MAX_MS,
  RESYNC_PAUSE_MIN_MS,
  WATCH_CREATE_MS,
} from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import {
  type Compare,
  endOfPath,
  type Follower,
  type FollowListener,
  type KeyWindow,
  type Kv,
  type KvAudit,
  type KvChange,
  type KvEntry,
  type LeaseId,
  type Operation,
  TXN_OPERATIONS_MAX,
  type TxnResult,
} from '../kv.ts';
import { SharedLeases } from '../rest.ts';
import { systemTime } from './time.ts';
import { type Watch, WatchStream } from './watch.ts';

export interface EtcdCredentials {
  readonly username?: string;
  readonly password?: string;
  /** PEM. A root certificate turns TLS on; certificate and key together identify this client. */
  readonly rootCertificate?: string;
  readonly certificate?: string;
  readonly privateKey?: string;
}

export interface EtcdOptions {
  /** `host:port` or `http(s)://host:port`; all of one kind. With TLS the host must be a name, not an address. */
  readonly endpoints: readonly string[];
  readonly credentials?: EtcdCredentials;
  readonly log: Logger;
  /** Per request, milliseconds; defaults to REQUEST_TIMEOUT_MS. */
  readonly requestTimeoutMs?: number;
  /** How often a follower compares itself with etcd, milliseconds; defaults to AUDIT_INTERVAL_MS. */
  readonly auditIntervalMs?: number;
}

/** Connects lazily: a store that is away is met by the first call. Rejects what cannot be an endpoint at once. */
export function connectEtcd(options: EtcdOptions): Kv {
  return new EtcdKv(options);
}

const GRPC_OPTIONS = {
  'grpc.keepalive_time_ms': PING_INTERVAL_MS,
  'grpc.keepalive_timeout_ms': PING_TIMEOUT_MS,
  // etcd counts pings on a connection without calls as abuse and ends it at the third (GOAWAY), which on Deno 2.9 can
  // end the process (an assertion in nghttp2). A watch is a call; without one there is nothing to learn.
  'grpc.keepalive_permit_without_calls': 0,
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 1_000,
  // A page of a listing: RANGE_PAGE entries, of which a hand-written one may have etcd's limit of 1.5 MiB.
  'grpc.max_receive_message_length': 64 * 1024 * 1024,
} as const;

/** Makes etcd end a stream when its member has lost the leader, instead of falling silent (etcd `hasleader`). */
const REQUIRE_LEADER: Interceptor[] = [
  (options, next) =>
    new InterceptingCall(next(options), {
      start: (metadata, listener, proceed) => {
        metadata.set('hasleader', 'true');
        proceed(metadata, listener);
      },
    }),
];

/** What every answer carries. */
interface Answer {
  readonly header: IResponseHeader;
}

/** A listing, and the id of the cluster that gave it. */
interface Listing {
  readonly entries: readonly KvEntry[];
  readonly revision: number;
  readonly cluster: string;
}

class EtcdKv implements Kv {
  readonly #base: IOptions;
  #requests: Etcd3;
  #watches: Etcd3;
  /** How often the two were replaced, and when last. */
  #generation = 0;
  #replacedMs = Number.NEGATIVE_INFINITY;
  /** The id of the cluster that answers, and the changes of it that were logged. */
  #cluster: string | undefined;
  readonly #moves = new Set<string>();
  readonly #stream: WatchStream;
  readonly #options: EtcdOptions;
  readonly #timeoutMs: number;
  readonly #shared = new SharedLeases((ttlS) => this.grant(ttlS), {
    monotonicMs: () => systemTime.monotonicMs(),
    wallMs: () => Date.now(),
  });
  readonly #followers = new Set<EtcdFollower>();
  readonly #reads = retry(handleWhen(isRecoverableError), {
    maxAttempts: 2,
    backoff: new ExponentialBackoff({ initialDelay: 50, maxDelay: 500 }),
  });
  readonly #writes = retry(handleWhen(surelyNotApplied), {
    maxAttempts: 2,
    backoff: new ExponentialBackoff({ initialDelay: 50, maxDelay: 500 }),
  });
  /** Followers' listings under way, and who waits for a turn, first come first served. */
  #listings = 0;
  readonly #turns: (() => void)[] = [];
  #closed = false;

  constructor(options: EtcdOptions) {
    this.#options = options;
    this.#timeoutMs = options.requestTimeoutMs ?? REQUEST_TIMEOUT_MS;
    const hosts = options.endpoints.map(checkEndpoint);
    if (hosts.length === 0) throw new EdgewayError('invalid_request', 'no etcd endpoint given');
    const { username, password, rootCertificate, certificate, privateKey } = options.credentials ?? {};
    this.#base = {
      hosts,
      defaultCallOptions: (context) =>
        context.isStream ? { interceptors: REQUIRE_LEADER } : { deadline: Date.now() + this.#timeoutMs },
      faultHandling: { host: () => noop, global: noop },
      ...(rootCertificate === undefined
        ? {}
        : {
            credentials: {
              rootCertificate: Buffer.from(rootCertificate),
              ...(certificate === undefined ? {} : { certChain: Buffer.from(certificate) }),
              ...(privateKey === undefined ? {} : { privateKey: Buffer.from(privateKey) }),
            },
          }),
      ...(username === undefined ? {} : { auth: { username, password: password ?? '' } }),
    };
    [this.#requests, this.#watches] = this.#connect();
    this.#stream = new WatchStream(async () => {
      // A token dies with its server; only a single call makes etcd3 fetch another (streams do not).
      if (username !== undefined) await touch(this.#watches);
      return this.#watches.watchClient.watch();
    });
  }

  async get(key: string): Promise<KvEntry | undefined> {
    const response = await this.#read(() => this.#requests.kv.range({ key: Buffer.from(key) }));
    const kv = response.kvs[0];
    return kv === undefined ? undefined : entryOf(kv);
  }

  async range(path: string): Promise<Listing> {
    const { kvs, revision, cluster } = await this.#list(path, false);
    return { entries: kvs.map(entryOf), revision, cluster };
  }

  /** `range` for a follower: after a heal all of them want one. */
  async rangeInTurn(path: string): Promise<Listing> {
    if (this.#listings < LISTINGS_MAX) this.#listings++;
    else await new Promise<void>((resolve) => this.#turns.push(resolve));
    try {
      return await this.range(path);
    } finally {
      const next = this.#turns.shift();
      if (next === undefined) this.#listings--;
      else next();
    }
  }

  async keys(path: string, window?: KeyWindow): Promise<readonly string[]> {
    if (window !== undefined) {
      const range = { ...rangeOf(path), key: Buffer.from(window.from), limit: window.limit, keys_only: true };
      const { kvs } = await this.#read(() => this.#requests.kv.range(range));
      return kvs.map(({ key }) => key.toString());
    }
    const { kvs } = await this.#list(path, true);
    return kvs.map(({ key }) => key.toString());
  }

  async audit(path: string, revision: number): Promise<KvAudit | undefined> {
    try {
      const response = await this.#read(() =>
        this.#requests.kv.range({
          ...rangeOf(path),
          revision,
          limit: 1,
          keys_only: true,
          sort_order: 'Descend',
          sort_target: 'Mod',
        }),
      );
      return { count: Number(response.count), newest: Number(response.kvs[0]?.mod_revision ?? 0) };
    } catch (error) {
      if (isCompacted(error)) return undefined;
      throw error;
    }
  }

  async txn(compares: readonly Compare[], operations: readonly Operation[]): Promise<TxnResult> {
    if (operations.length > TXN_OPERATIONS_MAX || compares.length > TXN_OPERATIONS_MAX)
      throw new EdgewayError(
        'internal',
        `a transaction holds at most ${TXN_OPERATIONS_MAX} operations, this one ${operations.length}`,
      );
    const response = await this.#write(() =>
      this.#requests.kv.txn({
        compare: compares.map((compare) =>
          'createRevision' in compare
            ? {
                key: Buffer.from(compare.key),
                result: 'Equal',
                target: 'Create',
                create_revision: compare.createRevision,
              }
            : {
                key: Buffer.from(compare.key),
                result: 'Equal',
                target: 'Mod',
                mod_revision: compare.modRevision,
              },
        ),
        success: operations.map((operation) =>
          operation.kind === 'put'
            ? {
                request_put: {
                  key: Buffer.from(operation.key),
                  value: Buffer.from(operation.value),
                  ...(operation.lease === undefined ? {} : { lease: operation.lease }),
                },
              }
            : { request_delete_range: { key: Buffer.from(operation.key) } },
        ),
        failure: compares.map(({ key }) => ({ request_range: { key: Buffer.from(key) } })),
      }),
    );
    const { succeeded } = response;
    const seen = (response.responses ?? []).map((answer) => {
      const kv = answer.response_range?.kvs[0];
      return kv === undefined ? undefined : entryOf(kv);
    });
    return { succeeded, revision: Number(response.header.revision), seen: succeeded ? [] : seen };
  }

  async grant(ttlS: number): Promise<LeaseId> {
    // A grant that was applied unseen only leaves a lease that nobody renews.
    const response = await this.#read(() => this.#requests.leaseClient.leaseGrant({ TTL: ttlS }));
    return response.ID as LeaseId;
  }

  grantShared(ttlS: number, ended?: LeaseId): Promise<LeaseId> {
    return this.#shared.take(ttlS, ended);
  }

  async keepAlive(lease: LeaseId): Promise<number> {
    try {
      return await this.#renew(lease);
    } catch (error) {
      if (!(error instanceof EtcdInvalidAuthTokenError)) throw mapped(error);
      await touch(this.#requests).catch(() => {});
      return await this.#renew(lease).catch((again: unknown) => {
        throw mapped(again);
      });
    }
  }

  async revoke(lease: LeaseId): Promise<void> {
    try {
      await this.#read(() => this.#requests.leaseClient.leaseRevoke({ ID: lease }));
    } catch (error) {
      if (!(error instanceof EdgewayError && error.code === 'lease_lost')) throw error;
    }
  }

  follow(path: string, listener: FollowListener): Follower {
    const follower = new EtcdFollower(path, listener, this, this.#stream, this.#options, (gone) =>
      this.#followers.delete(gone),
    );
    this.#followers.add(follower);
    return follower;
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await Promise.all([...this.#followers].map((follower) => follower.close()));
    this.#stream.close();
    this.#requests.close();
    this.#watches.close();
  }

  /**
   * Every answer passes here with the id of its cluster. Another id means that an endpoint leads elsewhere now, or that
   * its etcd began anew. Requests and watches may have gone there one without the other, so both connect again and
   * every follower lists again: nothing from before is compared with what comes.
   */
  hear(cluster: string, generation = this.#generation): void {
    if (cluster === this.#cluster || generation !== this.#generation || this.#closed) return;
    const before = this.#cluster;
    // With endpoints of two clusters ids alternate: within the pause the change stays news.
    if (before !== undefined && systemTime.monotonicMs() - this.#replacedMs < RESYNC_PAUSE_CAP_MS) return;
    this.#cluster = cluster;
    if (before === undefined) return;
    const move = `etcd cluster ${hex(cluster)} answers where ${hex(before)} did`;
    if (!this.#moves.has(move))
      this.#options.log.warn({ reason: move }, 'another etcd answers; listing everything again');
    this.#moves.add(move);
    this.#generation++;
    this.#replacedMs = systemTime.monotonicMs();
    const old = [this.#requests, this.#watches];
    [this.#requests, this.#watches] = this.#connect();
    this.#stream.reset(move);
    for (const client of old) client.close();
  }

  #connect(): [requests: Etcd3, watches: Etcd3] {
    // gRPC shares one connection between channels of equal options, closed ones among them. A number that means nothing
    // to it keeps clients from the connections of those they replace, and a pool of their own keeps watches from requests.
    const grpcOptions = { ...GRPC_OPTIONS, 'edgeway.generation': this.#generation };
    return [
      new Etcd3({ ...this.#base, grpcOptions }),
      new Etcd3({ ...this.#base, grpcOptions: { ...grpcOptions, 'grpc.use_local_subchannel_pool': 1 } }),
    ];
  }

  async #list(
    path: string,
    keysOnly: boolean,
  ): Promise<{ kvs: IKeyValue[]; revision: number; cluster: string }> {
    const range = rangeOf(path);
    for (let restarts = 0; ; restarts++) {
      const kvs: IKeyValue[] = [];
      let revision = 0;
      let cluster = '';
      try {
        for (let key = range.key; ; ) {
          const page = await this.#read(() =>
            this.#requests.kv.range({
              ...range,
              key,
              limit: RANGE_PAGE,
              keys_only: keysOnly,
              ...(revision === 0 ? {} : { revision }),
            }),
          );
          if (revision === 0) {
            revision = Number(page.header.revision);
            cluster = page.header.cluster_id;
          } else if (page.header.cluster_id !== cluster)
            throw new EdgewayError('coordination_unavailable', 'two etcd clusters answered one listing');
          kvs.push(...page.kvs);
          const last = page.kvs.at(-1);
          if (!page.more || last === undefined) return { kvs, revision, cluster };
          key = Buffer.concat([last.key, Buffer.of(0)]);
        }
      } catch (error) {
        // Compacted between two pages: the listing begins again at the present.
        if (!isCompacted(error) || restarts >= 3) throw error;
      }
    }
  }

  /** One keep-alive on a stream of its own, bounded; etcd answers TTL 0 for a lease that has ended. */
  async #renew(lease: LeaseId): Promise<number> {
    const generation = this.#generation;
    const stream = await this.#requests.leaseClient.leaseKeepAlive({
      deadline: Date.now() + this.#timeoutMs,
    });
    try {
      return await new Promise<number>((resolve, reject) => {
        stream.on('error', reject);
        stream.on('end', () => reject(new EdgewayError('coordination_unavailable', 'the stream ended')));
        stream.on('data', ({ TTL, header }) => {
          this.hear(header.cluster_id, generation);
          if (Number(TTL) > 0) resolve(Number(TTL));
          else reject(new EdgewayError('lease_lost', `lease ${lease} has ended`));
        });
        stream.write({ ID: lease });
      });
    } finally {
      stream.end();
    }
  }

  #read<T extends Answer>(call: () => Promise<T>): Promise<T> {
    return this.#ask(this.#reads, call);
  }
  #write<T extends Answer>(call: () => Promise<T>): Promise<T> {
    return this.#ask(this.#writes, call);
  }

  async #ask<T extends Answer>(policy: RetryPolicy, call: () => Promise<T>): Promise<T> {
    let generation = this.#generation;
    try {
      const answer = await policy.execute(() => {
        generation = this.#generation;
        return call();
      });
      this.hear(answer.header.cluster_id, generation);
      return answer;
    } catch (error) {
      throw mapped(error);
    }
  }
}

/**
 * Lists, then watches from the next revision; after any end of the watch it pauses and lists again. Listing
 * again costs one read and is right in every case: compaction, another leader, a member restored to an older or
 * unrelated state under the same identity.
 */
class EtcdFollower implements Follower {
  readonly #path: string;
  readonly #listener: FollowListener;
  readonly #kv: EtcdKv;
  readonly #stream: WatchStream;
  readonly #options: EtcdOptions;
  readonly #forget: (self: EtcdFollower) => void;
  #closed = false;
  #live = false;
  /** Attempts since it was last live. */
  #vain = 0;
  #watch: Watch | undefined;
  /** Ends the wait that is under way, whatever it waits for. */
  #wake: (() => void) | undefined;

  constructor(
    path: string,
    listener: FollowListener,
    kv: EtcdKv,
    stream: WatchStream,
    options: EtcdOptions,
    forget: (self: EtcdFollower) => void,
  ) {
    this.#path = path;
    this.#listener = listener;
    this.#kv = kv;
    this.#stream = stream;
    this.#options = options;
    this.#forget = forget;
    void this.#run();
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.#forget(this);
    this.#watch?.cancel();
    this.#wake?.();
  }

  async #run(): Promise<void> {
    while (!this.#closed) {
      let reason: string;
      try {
        const listing = await this.#kv.rangeInTurn(this.#path);
        if (this.#closed) return;
        const { entries, revision } = listing;
        this.#listener.batch({ kind: 'snapshot', entries, revision });
        reason = await this.#follow(listing);
      } catch (error) {
        reason = error instanceof Error ? error.message : String(error);
      }
      if (this.#closed) return;
      this.#turn(false);
      this.#options.log.debug({ key: this.#path, reason }, 'following again from a new listing');
      await this.#pause(resyncPauseMs(this.#vain++, Math.random()));
    }
  }

  /** Resolves with the reason when the watch is over. */
  #follow({ entries, revision: from, cluster }: Listing): Promise<string> {
    return new Promise((resolve) => {
      const held = new Map(entries.map(({ key, modRevision }) => [key, modRevision]));
      let reached = from;
      let over = false;
      const end = (reason: string): void => {
        if (over) return;
        over = true;
        clearTimeout(created);
        clearTimeout(audit);
        this.#watch?.cancel();
        this.#watch = undefined;
        this.#wake = undefined;
        resolve(reason);
      };
      this.#wake = () => end('closed');
      const created = setTimeout(() => end('etcd did not confirm the watch'), WATCH_CREATE_MS);
      let audit: ReturnType<typeof setTimeout> | undefined;
      const later = (): void => {
        const every = this.#options.auditIntervalMs ?? AUDIT_INTERVAL_MS;
        audit = setTimeout(check, every * (0.8 + 0.4 * Math.random()));
      };
      const check = async (): Promise<void> => {
        const expected = { revision: reached, count: held.size, newest: Math.max(0, ...held.values()) };
        try {
          const found = await this.#kv.audit(this.#path, expected.revision);
          if (found && (found.count !== expected.count || found.newest !== expected.newest)) {
            this.#options.log.warn(
              { key: this.#path, count: found.count, revision: String(expected.revision) },
              'held state differs from etcd; listing again',
            );
            return end('held state differs from etcd');
          }
        } catch (error) {
          this.#options.log.debug({ key: this.#path, error: String(error) }, 'no answer to the comparison');
        }
        if (!over) later();
      };
      const end_ = endOfPath(this.#path);
      this.#watch = this.#stream.watch(
        { key: this.#path, ...(end_ === undefined ? {} : { end: end_ }) },
        from + 1,
        {
          created: (revision, answering) => {
            clearTimeout(created);
            this.#kv.hear(answering);
            if (over) return;
            if (answering !== cluster) return end('the listing is of another etcd cluster than the watch');
            if (revision < from) return end(`etcd went back from revision ${from} to ${revision}`);
            this.#turn(true);
            later();
          },
          events: (events, revision) => {
            if (over || this.#closed) return;
            const changes: KvChange[] = [];
            for (const event of events) {
              const entry = entryOf(event.kv);
              if (event.type === 'Put') {
                held.set(entry.key, entry.modRevision);
                changes.push({ kind: 'put', entry });
              } else {
                held.delete(entry.key);
                changes.push({ kind: 'delete', key: entry.key, revision: entry.modRevision });
              }
            }
            reached = Math.max(reached, revision);
            this.#listener.batch({ kind: 'changes', changes, revision: reached });
          },
          ended: (reason) => end(reason),
        },
      );
    });
  }

  #turn(live: boolean): void {
    if (live) this.#vain = 0;
    if (this.#live === live || this.#closed) return;
    this.#live = live;
    this.#listener.live(live);
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(done, ms);
      const self = this;
      function done(): void {
        clearTimeout(timer);
        self.#wake = undefined;
        resolve();
      }
      this.#wake = done;
    });
  }
}

/** `vain`: attempts before this one; `random`: 0…1. */
export function resyncPauseMs(vain: number, random: number): number {
  const longest = Math.min(RESYNC_PAUSE_CAP_MS, RESYNC_PAUSE_MAX_MS * 2 ** vain);
  const shortest = (longest * RESYNC_PAUSE_MIN_MS) / RESYNC_PAUSE_MAX_MS;
  return shortest + random * (longest - shortest);
}

/** Any single call refreshes the token; that this key may not be read is an answer, too. */
async function touch(etcd: Etcd3): Promise<void> {
  try {
    await etcd.kv.range({ key: Buffer.from('edgeway'), limit: 1 });
  } catch (error) {
    if (!(error instanceof EtcdPermissionDeniedError)) throw error;
  }
}

function rangeOf(path: string): { key: Buffer; range_end?: Buffer } {
  const end = endOfPath(path);
  return { key: Buffer.from(path), ...(end === undefined ? {} : { range_end: Buffer.from(end) }) };
}

function entryOf(kv: IKeyValue): KvEntry {
  return {
    key: kv.key.toString(),
    value: kv.value.toString(),
    createRevision: Number(kv.create_revision),
    modRevision: Number(kv.mod_revision),
    ...(kv.lease === '0' ? {} : { lease: kv.lease as LeaseId }),
  };
}

/** True for failures to connect at all: the request never left, so a write may be tried again. */
function surelyNotApplied(error: Error): boolean {
  return isRecoverableError(error) && /No connection established|ECONNREFUSED/.test(error.message);
}

/** As etcd's own log has it; the client gives decimal digits. */
function hex(cluster: string): string {
  return BigInt(cluster).toString(16);
}

function isCompacted(error: unknown): boolean {
  return error instanceof Error && error.message.includes('required revision has been compacted');
}

function mapped(error: unknown): EdgewayError {
  if (error instanceof EdgewayError) return error;
  const message = error instanceof Error ? error.message : String(error);
  if (error instanceof EtcdLeaseInvalidError)
    return new EdgewayError('lease_lost', 'the lease has ended', { cause: error });
  if (error instanceof EtcdPermissionDeniedError)
    return new EdgewayError('permission_denied', `etcd refuses: ${message}`, { cause: error });
  return new EdgewayError('coordination_unavailable', `etcd: ${message}`, { cause: error });
}

function checkEndpoint(endpoint: string): string {
  if (/^(https?:\/\/)?(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9._-]+):[0-9]{1,5}$/.test(endpoint)) return endpoint;
  throw new EdgewayError(
    'invalid_request',
    `etcd endpoint "${endpoint}" must be host:port, http://host:port or https://host:port`,
  );
}
