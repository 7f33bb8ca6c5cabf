// The shell around a role's decisions: mirrors the paths that the role needs, gathers changes, decides, commits each
// action as a fenced transaction, and looks again from time to time. One pass runs at a time and is bounded; an
// action that lost a race is simply decided anew from what the watch shows next.
import { EdgewayError, toEdgewayError } from '../src/error.ts';
import type { Keys } from '../src/keys.ts';
import {
  FOREIGN_INTERVAL_MS,
  RECONCILE_ACTIONS_MAX,
  RECONCILE_INTERVAL_MS,
  RECONCILE_PAUSE_MS,
  RECONCILE_RETRY_MS,
} from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import type { NetworkConfig } from '../src/model.ts';
import { ensureService } from './claims.ts';
import { decideCluster } from './cluster.ts';
import { followKeyspace, type Keyspace } from './keyspace.ts';
import type { Compare, Kv, Operation, TxnResult } from './kv.ts';
import type { Time } from './lease.ts';
import { txnWithRest } from './rest.ts';
import { type Action, blockFaults, decideRoot } from './root.ts';
import { View } from './view.ts';

/** A store whose every write also compares the fence; `onFenced` is told when a write was refused because of it. */
export function fencedKv(kv: Kv, fence: Compare, onFenced: () => void): Kv {
  const txn = async (compares: readonly Compare[], operations: readonly Operation[]): Promise<TxnResult> => {
    const result = await kv.txn([fence, ...compares], operations);
    if (result.succeeded) return result;
    const held = await kv.get(fence.key);
    if ('createRevision' in fence && held?.createRevision === fence.createRevision) return result;
    onFenced();
    throw new EdgewayError('lease_lost', `the role behind ${fence.key} has another holder`);
  };
  return {
    get: (key) => kv.get(key),
    range: (path) => kv.range(path),
    keys: (path, window) => kv.keys(path, window),
    audit: (path, revision) => kv.audit(path, revision),
    txn,
    grant: (ttlS) => kv.grant(ttlS),
    grantShared: (ttlS, ended) => kv.grantShared(ttlS, ended),
    keepAlive: (lease) => kv.keepAlive(lease),
    revoke: (lease) => kv.revoke(lease),
    follow: (path, listener) => kv.follow(path, listener),
    close: () => kv.close(),
  };
}

export interface ReconcilerOptions {
  readonly kv: Kv;
  readonly keys: Keys;
  readonly time: Time;
  readonly log: Logger;
  readonly fence: Compare;
  readonly onFenced: () => void;
  readonly role: 'root' | 'cluster';
  readonly cluster: string;
  /** The plan to write when there is none. */
  readonly network: NetworkConfig;
}

const PATHS = {
  root: ['config', 'root', 'clusters', 'subnets', 'hosts'],
  cluster: ['config', 'clusters', 'services', 'exposed', 'ports', 'addresses', 'instances', 'nodes'],
} as const;

export class Reconciler {
  readonly #options: ReconcilerOptions;
  readonly #kv: Kv;
  readonly #view: View;
  readonly #keyspace: Keyspace;
  #cancel: () => void = () => {};
  #running = false;
  #dirty = false;
  #stopped = false;
  #idle: (() => void) | undefined;
  /** What could not be done, by its name, and when it is due again. */
  readonly #failing = new Map<string, { untilMs: number; pauseMs: number; reason: string }>();
  /** Names of what the pass under way would do. */
  readonly #wanted = new Set<string>();
  #foreignDueMs = Number.NEGATIVE_INFINITY;
  readonly #foreign = new Map<string, string>();
  #reported: ReadonlyMap<string, string> = new Map();
  /** Actions committed so far. */
  committed = 0;

  constructor(options: ReconcilerOptions) {
    this.#options = options;
    const { keys, log } = options;
    this.#view = new View(keys);
    this.#kv = fencedKv(options.kv, options.fence, () => {
      if (!this.#stopped) options.onFenced();
    });
    this.#keyspace = followKeyspace(
      options.kv,
      keys,
      PATHS[options.role].map((subtree) => keys.prefix(subtree)),
      log,
      {
        batch: (batch) => {
          this.#view.apply(batch);
          this.#soon(RECONCILE_PAUSE_MS);
        },
        live: () => {},
      },
    );
  }

  /** Begins no further action; the one under way is fenced. */
  async stop(): Promise<void> {
    this.#stopped = true;
    this.#cancel();
    if (this.#running) await new Promise<void>((resolve) => (this.#idle = resolve));
    await this.#keyspace.close();
  }

  #soon(ms: number): void {
    if (this.#stopped) return;
    if (this.#running) {
      this.#dirty = true;
      return;
    }
    this.#cancel();
    this.#cancel = this.#options.time.after(ms, () => void this.#run());
  }

  async #run(): Promise<void> {
    // Half a listing would make everything that it lacks look like an orphan.
    if (this.#stopped || this.#running || !this.#keyspace.complete) return;
    this.#running = true;
    this.#dirty = false;
    try {
      await this.#pass();
    } catch (error) {
      const { code, message } = toEdgewayError(error);
      this.#options.log.warn({ code, error: message }, `a pass of role ${this.#options.role} ended early`);
    }
    this.#running = false;
    this.#idle?.();
    this.#soon(this.#dirty ? RECONCILE_PAUSE_MS : this.#pauseMs());
  }

  async #pass(): Promise<void> {
    const { role, keys, cluster, network, log } = this.#options;
    const unreadable = new Set(this.#keyspace.problems.keys());
    this.#wanted.clear();
    if (role === 'root') {
      await this.#commit(decideRoot(this.#view, keys, network, unreadable));
      await this.#report();
    } else {
      const { complete, actions } = decideCluster(this.#view, keys, cluster, unreadable);
      await this.#commit(actions);
      const config = this.#view.get('config', keys.build({ kind: 'config' }))?.value;
      if (config !== undefined)
        // A record that changed is another task: it is tried at once, whatever became of the one before.
        await this.#each(
          complete,
          ({ service, revision }) => `complete ${service} of revision ${revision}`,
          async ({ service }) => {
            await ensureService(this.#kv, keys, config, service);
            log.info({ service }, 'claimed the addresses that a service lacked');
            return true;
          },
        );
    }
    for (const task of this.#failing.keys()) if (!this.#wanted.has(task)) this.#failing.delete(task);
  }

  async #commit(actions: readonly Action[]): Promise<void> {
    const { log, network, keys, role } = this.#options;
    const quarantineS =
      this.#view.get('config', keys.build({ kind: 'config' }))?.value.quarantineS ?? network.quarantineS;
    await this.#each(
      actions,
      ({ why }) => why,
      async ({ why, compares, operations }) => {
        const { succeeded } = await txnWithRest(this.#kv, quarantineS, compares, operations);
        if (succeeded) log.info({ reason: why }, `role ${role} acts`);
        return succeeded; // otherwise the watch will show what changed
      },
    );
  }

  /**
   * Does what is due, at most RECONCILE_ACTIONS_MAX of it. What fails is logged once for each reason and left alone
   * for a while, so that it neither fills the log nor takes the turn of what can be done.
   */
  async #each<T>(tasks: readonly T[], name: (task: T) => string, work: (task: T) => Promise<boolean>) {
    const { time, log, role } = this.#options;
    for (const task of tasks) this.#wanted.add(name(task));
    let left = RECONCILE_ACTIONS_MAX;
    for (const task of tasks) {
      const what = name(task);
      const failed = this.#failing.get(what);
      if (failed !== undefined && time.monotonicMs() < failed.untilMs) continue;
      if (this.#stopped) return;
      if (left-- === 0) {
        this.#dirty = true;
        return;
      }
      try {
        if (await work(task)) this.committed++;
        this.#failing.delete(what);
      } catch (error) {
        const { code, message } = toEdgewayError(error);
        // Without the role or the store nothing else would fare better.
        if (code === 'lease_lost' || code === 'coordination_unavailable') throw error;
        const pauseMs = Math.min(
          RECONCILE_INTERVAL_MS,
          failed === undefined ? RECONCILE_RETRY_MS : 2 * failed.pauseMs,
        );
        this.#failing.set(what, { untilMs: time.monotonicMs() + pauseMs, pauseMs, reason: message });
        if (failed?.reason !== message)
          log.warn({ name: what, code, error: message }, `role ${role} cannot do this; trying again later`);
      }
    }
  }

  /** When the first of what failed is due again, at the latest when everything is looked at anyway. */
  #pauseMs(): number {
    const now = this.#options.time.monotonicMs();
    let pauseMs = RECONCILE_INTERVAL_MS;
    for (const { untilMs } of this.#failing.values())
      pauseMs = Math.min(pauseMs, Math.max(RECONCILE_PAUSE_MS, untilMs - now));
    return pauseMs;
  }

  /** What a person wrote that no role and no agent takes notice of: once each, until it is gone. */
  async #report(): Promise<void> {
    const { kv, keys, time, log } = this.#options;
    const faults = new Map(blockFaults(this.#view, keys));
    if (time.monotonicMs() >= this.#foreignDueMs) {
      this.#foreignDueMs = time.monotonicMs() + FOREIGN_INTERVAL_MS;
      this.#foreign.clear();
      for (const text of await kv.keys(`${keys.root}/`)) {
        const key = keys.parse(text);
        if (!key.ok && !this.#keyspace.problems.has(text)) this.#foreign.set(text, key.error.message);
      }
    }
    for (const [key, reason] of this.#foreign) faults.set(key, reason);
    for (const [key, reason] of faults)
      if (this.#reported.get(key) !== reason) log.warn({ key, reason }, 'nothing takes notice of this key');
    this.#reported = faults;
  }
}
