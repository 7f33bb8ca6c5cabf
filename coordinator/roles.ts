// Runs roles: any number of processes may ask for the same ones, exactly one acts in each, and a standby takes over
// within the role's lease time. One lease per process carries all of its roles.
import { fail, ok, type Result, toEdgewayError } from '../src/error.ts';
import type { Key, Keys } from '../src/keys.ts';
import { ROLE_TTL_S } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import type { NetworkConfig } from '../src/model.ts';
import { encodeLeader } from '../src/records.ts';
import { followKeyspace, type Keyspace } from './keyspace.ts';
import type { Kv, LeaseId } from './kv.ts';
import { keepLease, type LeaseKeeper, type Time } from './lease.ts';
import { Reconciler } from './reconcile.ts';
import { type RoleAction, RoleMachine } from './role.ts';

export const ROLES = ['root', 'cluster'] as const;
export type Role = (typeof ROLES)[number];

/** `root`, `cluster`, `root,cluster`, or empty for none. */
export function parseRoles(text: string): Result<readonly Role[]> {
  const names = text
    .split(',')
    .map((name) => name.trim())
    .filter((name) => name !== '');
  for (const name of names)
    if (!(ROLES as readonly string[]).includes(name))
      return fail('invalid_request', `role "${name}" must be one of ${ROLES.join(', ')}`);
  return ok(ROLES.filter((role) => names.includes(role)));
}

export interface RolesOptions {
  readonly kv: Kv;
  readonly keys: Keys;
  readonly time: Time;
  /** 0…1, uniform. */
  readonly random: () => number;
  readonly log: Logger;
  /** What stands in the leader key: the node's id. */
  readonly holder: string;
  readonly roles: readonly Role[];
  readonly cluster: string;
  /** The plan to write when there is none. */
  readonly network: NetworkConfig;
  /** Seconds; defaults to ROLE_TTL_S. */
  readonly ttlS?: number;
}

export interface RunningRoles {
  /** Roles that this process acts in now. */
  acting(): readonly Role[];
  /** Who holds a role, as far as is known here. */
  holder(role: Role): string | undefined;
  /** Gives the roles up at once, so that a standby need not wait for the lease. */
  stop(): Promise<void>;
}

/** After a campaign whose answer did not come. */
const CAMPAIGN_RETRY_MS = 1_000;

export function startRoles(options: RolesOptions): RunningRoles {
  const lives = options.roles.map((role) => new RoleLife(role, options));
  // Followers and leases try for ever and quietly; a wrong password would look like a standby.
  options.kv.get(options.keys.build({ kind: 'config' })).catch((error: unknown) => {
    const { code, message } = toEdgewayError(error);
    options.log.warn({ code, error: message }, 'the roles cannot reach the keyspace; trying again');
  });
  const lease: LeaseKeeper = keepLease({
    kv: options.kv,
    ttlS: options.ttlS ?? ROLE_TTL_S,
    time: options.time,
    random: options.random,
    log: options.log,
    onHeld: (held) => {
      for (const life of lives) life.leaseHeld(held);
    },
    onLost: (_, cause) => {
      for (const life of lives) life.leaseLost(cause);
    },
  });
  return {
    acting: () => lives.filter(({ acting }) => acting).map(({ role }) => role),
    holder: (role) => lives.find((life) => life.role === role)?.holder,
    stop: async () => {
      await Promise.all(lives.map((life) => life.stop()));
      await lease.stop(true).catch((error: unknown) => {
        options.log.warn({ error: toEdgewayError(error).message }, 'the roles end with their lease');
      });
    },
  };
}

class RoleLife {
  readonly role: Role;
  readonly #options: RolesOptions;
  readonly #machine = new RoleMachine();
  readonly #leader: Extract<Key, { kind: 'rootLeader' | 'clusterLeader' }>;
  readonly #key: string;
  readonly #keyspace: Keyspace;
  #reconciler: Reconciler | undefined;
  #cancelRetry: () => void = () => {};
  /** Why the last campaign failed, as far as it was logged. */
  #failure: string | undefined;
  #stopped = false;

  constructor(role: Role, options: RolesOptions) {
    this.role = role;
    this.#options = options;
    const { kv, keys, log, cluster } = options;
    this.#leader = role === 'root' ? { kind: 'rootLeader' } : { kind: 'clusterLeader', cluster };
    this.#key = keys.build(this.#leader);
    this.#keyspace = followKeyspace(kv, keys, [this.#key], log, {
      batch: ({ puts, brought, kind }) => {
        for (const put of puts)
          if (put.kind === 'rootLeader' || put.kind === 'clusterLeader') {
            const { createRevision, lease, value } = put;
            this.#perform(
              this.#machine.saw({
                holder: value.holder,
                createRevision,
                ...(lease === undefined ? {} : { lease }),
              }),
            );
          }
        const told = kind === 'snapshot' || brought.length > 0;
        // A leader key that cannot be read is somebody's all the same; deleting it frees the role.
        if (told && this.#keyspace.size === 0 && !this.#keyspace.problems.has(this.#key))
          this.#perform(this.#machine.saw(undefined));
      },
      live: () => {},
    });
  }

  get acting(): boolean {
    return this.#machine.state.kind === 'acting';
  }
  get holder(): string | undefined {
    return this.acting ? this.#options.holder : this.#machine.leader?.holder;
  }

  leaseHeld(lease: LeaseId): void {
    this.#perform(this.#machine.leaseHeld(lease));
  }
  leaseLost(cause: string): void {
    this.#perform(this.#machine.leaseLost(cause));
  }

  async stop(): Promise<void> {
    this.#stopped = true;
    this.#cancelRetry();
    await this.#keyspace.close();
    await this.#reconciler?.stop();
    this.#reconciler = undefined;
  }

  #perform(actions: readonly RoleAction[]): void {
    if (this.#stopped) return;
    const { log, kv, keys, time, cluster, network } = this.#options;
    for (const action of actions)
      switch (action.kind) {
        case 'campaign':
          void this.#campaign(action.lease);
          break;
        case 'act': {
          log.info({ name: this.role, revision: String(action.fence) }, 'acting in the role');
          void this.#reconciler?.stop();
          this.#reconciler = new Reconciler({
            kv,
            keys,
            time,
            log,
            role: this.role,
            cluster,
            network,
            fence: { key: this.#key, createRevision: action.fence },
            onFenced: () => this.#perform(this.#machine.fenced()),
          });
          break;
        }
        case 'yield':
          log.warn({ name: this.role, reason: action.why }, 'no longer acting in the role');
          void this.#reconciler?.stop();
          this.#reconciler = undefined;
          break;
      }
  }

  async #campaign(lease: LeaseId): Promise<void> {
    const { kv, holder, time } = this.#options;
    try {
      const { succeeded, revision } = await kv.txn(
        [{ key: this.#key, createRevision: 0 }],
        [{ kind: 'put', key: this.#key, value: encodeLeader({ holder }), lease }],
      );
      this.#failure = undefined;
      this.#perform(this.#machine.campaigned(lease, succeeded, revision));
    } catch (error) {
      const { code, message } = toEdgewayError(error);
      if (this.#failure !== message && !this.#stopped)
        this.#options.log.warn({ name: this.role, code, error: message }, 'no answer to a campaign');
      this.#failure = message;
      this.#cancelRetry();
      this.#cancelRetry = time.after(CAMPAIGN_RETRY_MS, () => this.#perform(this.#machine.retry()));
    }
  }
}
