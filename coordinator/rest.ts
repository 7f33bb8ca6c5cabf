// Rest: what is given back stays taken for the quarantine before anybody else gets it. Its value says so, and a lease
// that nobody renews takes it away. What a process gives back within a short time shares one lease: etcd ends a thousand
// leases a second at best, and a fleet that releases many addresses would keep as many alive for minutes. A rest is
// therefore up to a fifth longer than the quarantine, and never shorter.
import { EdgewayError } from '../src/error.ts';
import { REST_EXTRA, REST_EXTRA_MIN_S, REST_KEYS_MAX } from '../src/limits.ts';
import type { Compare, Kv, LeaseId, Operation, TxnResult } from './kv.ts';

/** Stands in an operation for the lease that ends the rest. */
export const RESTING_LEASE = 'resting' as LeaseId;

/** How much longer than asked for a shared lease lives. */
export function restExtraS(ttlS: number): number {
  return Math.max(REST_EXTRA_MIN_S, Math.ceil(ttlS * REST_EXTRA));
}

/** Applies what `kv.txn` would, with claims put to rest in it; without a quarantine they are deleted at once. */
export async function txnWithRest(
  kv: Kv,
  quarantineS: number,
  compares: readonly Compare[],
  operations: readonly Operation[],
): Promise<TxnResult> {
  const rests = (operation: Operation): boolean =>
    operation.kind === 'put' && operation.lease === RESTING_LEASE;
  if (!operations.some(rests)) return kv.txn(compares, operations);
  const apply = (lease: LeaseId | undefined): Promise<TxnResult> =>
    kv.txn(
      compares,
      operations.map((operation) => {
        if (!rests(operation)) return operation;
        return lease === undefined ? { kind: 'delete', key: operation.key } : { ...operation, lease };
      }),
    );
  if (quarantineS === 0) return apply(undefined);
  const lease = await kv.grantShared(quarantineS);
  try {
    return await apply(lease);
  } catch (error) {
    // The store may have forgotten it (restored, restarted empty); a lease of our own is no reason to fail.
    if (!(error instanceof EdgewayError) || error.code !== 'lease_lost') throw error;
    return apply(await kv.grantShared(quarantineS, lease));
  }
}

/** What one client shares: a lease, from when on, and by how many keys. */
interface Shared {
  readonly ttlS: number;
  readonly monotonicMs: number;
  readonly wallMs: number;
  readonly granted: Promise<LeaseId>;
  lease: LeaseId | undefined;
  keys: number;
}

/** `Kv.grantShared` over `grant`. */
export class SharedLeases {
  readonly #grant: (ttlS: number) => Promise<LeaseId>;
  readonly #clock: SharedClock;
  #held: Shared | undefined;

  constructor(grant: (ttlS: number) => Promise<LeaseId>, clock: SharedClock) {
    this.#grant = grant;
    this.#clock = clock;
  }

  async take(ttlS: number, ended?: LeaseId): Promise<LeaseId> {
    if (ended !== undefined && this.#held?.lease === ended) this.#held = undefined;
    let held = this.#held;
    if (held?.ttlS !== ttlS || held.keys >= REST_KEYS_MAX || !this.#isYoung(held)) {
      const now = { monotonicMs: this.#clock.monotonicMs(), wallMs: this.#clock.wallMs() };
      held = { ttlS, ...now, granted: this.#grant(ttlS + restExtraS(ttlS)), lease: undefined, keys: 0 };
      this.#held = held;
    }
    held.keys++;
    try {
      held.lease = await held.granted;
      return held.lease;
    } catch (error) {
      if (this.#held === held) this.#held = undefined;
      throw error;
    }
  }

  /**
   * Half of what the lease has to spare is for sharing it, the other half for transactions on their way and for a clock
   * that runs slow. The monotonic clock stands still while a host sleeps and the other one may be set: both must agree.
   */
  #isYoung({ ttlS, monotonicMs, wallMs }: Shared): boolean {
    const youngMs = (restExtraS(ttlS) * 1_000) / 2;
    const ageMs = this.#clock.wallMs() - wallMs;
    return this.#clock.monotonicMs() - monotonicMs < youngMs && ageMs >= 0 && ageMs < youngMs;
  }
}

export interface SharedClock {
  monotonicMs(): number;
  /** Milliseconds since 1970, as the host believes. */
  wallMs(): number;
}
