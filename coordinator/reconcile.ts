// The shell around a role's decisions: mirrors the paths that the role needs, gathers changes, decides, commits each
// action as a fenced transaction, and looks again from time to time. One pass runs at a time and is bounded; an
// action that lost a race is simply decided anew from what the watch shows next.
import { EdgewayError, toEdgewayError } from '../src/error.ts';
import type { Keys } from '../src/keys.ts';
import { RECONCILE_ACTIONS_MAX, RECONCILE_INTERVAL_MS, RECONCILE_PAUSE_MS } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import type { NetworkConfig } from '../src/model.ts';
import { ensureService } from './claims.ts';
import { decideCluster, RESTING_LEASE } from './cluster.ts';
import { followKeyspace, type Keyspace } from './keyspace.ts';
import type { Compare, Kv, LeaseId, Operation, TxnResult } from './kv.ts';
import type { Time } from './lease.ts';
import { type Action, decideRoot } from './root.ts';
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
  root: ['config', 'root', 'clusters', 'subnets'],
  cluster: ['config', 'clusters', 'services', 'exposed', 'addresses', 'instances', 'nodes'],
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
    this.#soon(this.#dirty ? RECONCILE_PAUSE_MS : RECONCILE_INTERVAL_MS);
  }

  async #pass(): Promise<void> {
    const { role, keys, cluster, network, log } = this.#options;
    const unreadable = new Set(this.#keyspace.problems.keys());
    if (role === 'root') {
      await this.#commit(decideRoot(this.#view, keys, network, unreadable));
      return;
    }
    const { complete, actions } = decideCluster(this.#view, keys, cluster, unreadable);
    await this.#commit(actions);
    const config = this.#view.get('config', keys.build({ kind: 'config' }))?.value;
    if (config === undefined) return;
    for (const service of complete.slice(0, RECONCILE_ACTIONS_MAX)) {
      if (this.#stopped) return;
      try {
        await ensureService(this.#kv, keys, config, service);
        this.committed++;
        log.info({ service }, 'claimed the addresses that a service lacked');
      } catch (error) {
        const { code, message } = toEdgewayError(error);
        if (code === 'lease_lost') throw error;
        log.warn({ service, code, error: message }, 'a service stays without its addresses');
      }
    }
    if (complete.length > RECONCILE_ACTIONS_MAX) this.#dirty = true;
  }

  async #commit(actions: readonly Action[]): Promise<void> {
    let rest: LeaseId | undefined;
    const { kv, log, network, keys } = this.#options;
    const quarantineS =
      this.#view.get('config', keys.build({ kind: 'config' }))?.value.quarantineS ?? network.quarantineS;
    for (const { why, compares, operations } of actions.slice(0, RECONCILE_ACTIONS_MAX)) {
      if (this.#stopped) return;
      const real: Operation[] = [];
      for (const operation of operations) {
        if (operation.kind !== 'put' || operation.lease !== RESTING_LEASE) real.push(operation);
        else if (quarantineS === 0) real.push({ kind: 'delete', key: operation.key });
        else {
          rest ??= await kv.grant(quarantineS);
          real.push({ ...operation, lease: rest });
        }
      }
      const { succeeded } = await this.#kv.txn(compares, real);
      if (!succeeded) continue; // the watch will show what changed
      this.committed++;
      log.info({ reason: why }, `role ${this.#options.role} acts`);
    }
    if (actions.length > RECONCILE_ACTIONS_MAX) this.#dirty = true;
  }
}
