// Keeping a lease: when to renew, when to call it lost, when to ask for another. `LeaseMachine` decides and touches
// nothing; `keepLease` is the small shell that asks the store. Loss is judged by our own monotonic clock: the store
// counts from the moment it handled a renewal, we from the moment we sent it, so we stop before it does. Losing a
// lease frees nothing by itself; what hangs on the lease is the caller's affair.
import { EdgewayError, toEdgewayError } from '../src/error.ts';
import { RENEW_FRACTION, RENEW_JITTER, RENEW_MAX_MS } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import type { Kv, LeaseId } from './kv.ts';

/** Monotonic milliseconds and timers; a test moves them by hand. */
export interface Time {
  monotonicMs(): number;
  /** Runs once after that long; the returned function calls it off. */
  after(ms: number, run: () => void): () => void;
}

export type LeaseAction =
  | { readonly kind: 'grant' }
  | { readonly kind: 'renew'; readonly lease: LeaseId }
  /** The lease may have ended at the store: act as if it had. */
  | { readonly kind: 'lost'; readonly lease: LeaseId; readonly cause: string };

/** When the machine wants to be asked again, and why. */
export interface LeaseDeadline {
  readonly atMs: number;
  readonly why: 'grant' | 'renew' | 'loss';
}

interface HeldLease {
  readonly lease: LeaseId;
  /** When the last answered request was sent. */
  okMs: number;
  renewMs: number;
  asking: boolean;
}

/** Pause after a refused or unanswered request: a third of the renewal interval, within these bounds. A tenure lease
 *  of a day is asked for again as soon as a presence lease is: every deploy waits for it. */
const RETRY_MIN_MS = 250;
const RETRY_MAX_MS = 5_000;

export class LeaseMachine {
  readonly #ttlMs: number;
  readonly #random: () => number;
  #held: HeldLease | undefined;
  #grantMs: number | undefined;

  /** `random` gives 0…1 and spreads renewals; the first grant is due at once. */
  constructor(ttlS: number, random: () => number) {
    this.#ttlMs = ttlS * 1000;
    this.#random = random;
    this.#grantMs = Number.NEGATIVE_INFINITY;
  }

  get lease(): LeaseId | undefined {
    return this.#held?.lease;
  }

  /** What is due now. A request is under way until its answer is handed in. */
  handleTimeout(nowMs: number): LeaseAction[] {
    const held = this.#held;
    if (held === undefined) {
      if (this.#grantMs === undefined || nowMs < this.#grantMs) return [];
      this.#grantMs = undefined;
      return [{ kind: 'grant' }];
    }
    if (nowMs - held.okMs >= this.#ttlMs)
      return this.#lose(nowMs, `no renewal was answered for ${this.#ttlMs / 1000} s`);
    if (held.asking || nowMs < held.renewMs) return [];
    held.asking = true;
    return [{ kind: 'renew', lease: held.lease }];
  }

  granted(lease: LeaseId, sentMs: number): void {
    this.#held = { lease, okMs: sentMs, renewMs: sentMs + this.#interval(), asking: false };
  }
  grantFailed(nowMs: number): void {
    this.#grantMs = nowMs + this.#retry();
  }

  renewed(lease: LeaseId, sentMs: number): void {
    const held = this.#held;
    if (held?.lease !== lease) return;
    held.asking = false;
    held.okMs = sentMs;
    held.renewMs = sentMs + this.#interval();
  }
  /** `ended`: the store says that the lease is no more; otherwise it did not answer. */
  renewFailed(lease: LeaseId, ended: boolean, nowMs: number): LeaseAction[] {
    const held = this.#held;
    if (held?.lease !== lease) return [];
    if (ended) return this.#lose(nowMs, 'the store has ended it');
    held.asking = false;
    held.renewMs = nowMs + this.#retry();
    return [];
  }

  /** Gives the lease up in favour of a new one: somebody met `lease_lost` while using it. One that was hardly used
   *  is followed after a pause, so that a use which always fails does not become a loop. */
  replace(lease: LeaseId, nowMs: number, cause: string): LeaseAction[] {
    const held = this.#held;
    if (held?.lease !== lease) return [];
    return this.#lose(nowMs, cause, nowMs - held.okMs < RETRY_MIN_MS ? this.#retry() : 0);
  }

  deadline(): LeaseDeadline | undefined {
    if (this.#held === undefined)
      return this.#grantMs === undefined ? undefined : { atMs: this.#grantMs, why: 'grant' };
    const lossMs = this.#held.okMs + this.#ttlMs;
    if (this.#held.asking || lossMs < this.#held.renewMs) return { atMs: lossMs, why: 'loss' };
    return { atMs: this.#held.renewMs, why: 'renew' };
  }

  #lose(nowMs: number, cause: string, pauseMs = 0): LeaseAction[] {
    const lease = this.#held?.lease;
    if (lease === undefined) return [];
    this.#held = undefined;
    this.#grantMs = nowMs + pauseMs;
    return [{ kind: 'lost', lease, cause }, ...this.handleTimeout(nowMs)];
  }

  #interval(): number {
    const mean = Math.min(RENEW_MAX_MS, this.#ttlMs * RENEW_FRACTION);
    return mean * (1 + RENEW_JITTER * (2 * this.#random() - 1));
  }
  #retry(): number {
    return Math.min(RETRY_MAX_MS, Math.max(RETRY_MIN_MS, this.#interval() / 3));
  }
}

export interface LeaseOptions {
  readonly kv: Kv;
  readonly ttlS: number;
  readonly time: Time;
  readonly random: () => number;
  readonly log: Logger;
  /** A lease that an earlier run held, to go on with if it still lives. */
  readonly resume?: LeaseId;
  /** A lease is held, for the first time or again: publish everything that hangs on it. When it fails it is called
   *  again for as long as that lease is held, at growing intervals; when it fails with `lease_lost` the lease is
   *  given up for another. */
  readonly onHeld: (lease: LeaseId) => void | Promise<void>;
  /** A renewal was answered. */
  readonly onRenewed?: () => void;
  /** The lease is, or must be taken for, ended. */
  readonly onLost?: (lease: LeaseId, cause: string) => void;
}

export interface LeaseKeeper {
  /** The lease that is held now, if any. */
  readonly lease: LeaseId | undefined;
  /** Renewals answered so far. */
  readonly renewals: number;
  /** Call when a write was refused with `lease_lost`: another lease is asked for at once. */
  lost(lease: LeaseId): void;
  /** Resolves with the lease as soon as one is held; rejects with `coordination_unavailable` after that long. */
  held(timeoutMs: number): Promise<LeaseId>;
  /** Stops renewing. `revoke` ends the lease and its keys at once; otherwise it runs out by itself. */
  stop(revoke: boolean): Promise<void>;
}

/** Keeps a lease for as long as it is not stopped. */
export function keepLease(options: LeaseOptions): LeaseKeeper {
  const { kv, ttlS, time, log } = options;
  const machine = new LeaseMachine(ttlS, options.random);
  let stopped = false;
  let renewals = 0;
  let cancel = (): void => {};
  const waiting = new Set<(lease: LeaseId) => void>();

  const arm = (): void => {
    cancel();
    const deadline = stopped ? undefined : machine.deadline();
    cancel =
      deadline === undefined
        ? () => {}
        : time.after(Math.max(0, deadline.atMs - time.monotonicMs()), () =>
            perform(machine.handleTimeout(time.monotonicMs())),
          );
  };

  const hold = (lease: LeaseId, sentMs: number): void => {
    machine.granted(lease, sentMs);
    for (const resolve of waiting) resolve(lease);
    waiting.clear();
    publish(lease, RETRY_MIN_MS);
  };

  const publish = (lease: LeaseId, pauseMs: number): void => {
    Promise.resolve()
      .then(() => options.onHeld(lease))
      .catch((thrown: unknown) => {
        const error = toEdgewayError(thrown);
        if (stopped || machine.lease !== lease) return;
        log.warn({ lease, code: error.code, error: error.message }, 'publishing under this lease failed');
        if (error.code === 'lease_lost') return keeper.lost(lease);
        time.after(pauseMs * (1 + RENEW_JITTER * (2 * options.random() - 1)), () => {
          if (!stopped && machine.lease === lease) publish(lease, Math.min(RETRY_MAX_MS, 2 * pauseMs));
        });
      });
  };

  const grant = async (): Promise<void> => {
    const sentMs = time.monotonicMs();
    try {
      const lease = await kv.grant(ttlS);
      if (stopped) void kv.revoke(lease).catch(() => {});
      else hold(lease, sentMs);
    } catch (error) {
      log.debug({ error: toEdgewayError(error).message }, 'no lease was granted; trying again');
      machine.grantFailed(time.monotonicMs());
    }
    arm();
  };

  const renew = async (lease: LeaseId): Promise<void> => {
    const sentMs = time.monotonicMs();
    try {
      await kv.keepAlive(lease);
      renewals++;
      machine.renewed(lease, sentMs);
      options.onRenewed?.();
      arm();
    } catch (error) {
      const ended = error instanceof EdgewayError && error.code === 'lease_lost';
      perform(machine.renewFailed(lease, ended, time.monotonicMs()));
    }
  };

  function perform(actions: readonly LeaseAction[]): void {
    if (stopped) return;
    for (const action of actions)
      switch (action.kind) {
        case 'grant':
          void grant();
          break;
        case 'renew':
          void renew(action.lease);
          break;
        case 'lost':
          log.warn({ lease: action.lease, reason: action.cause }, 'lease lost');
          options.onLost?.(action.lease, action.cause);
          break;
      }
    arm();
  }

  const keeper: LeaseKeeper = {
    get lease() {
      return machine.lease;
    },
    get renewals() {
      return renewals;
    },
    lost: (lease) => perform(machine.replace(lease, time.monotonicMs(), 'the store refused it')),
    held: (timeoutMs) =>
      machine.lease !== undefined
        ? Promise.resolve(machine.lease)
        : new Promise((resolve, reject) => {
            const give = (lease: LeaseId): void => {
              giveUp();
              resolve(lease);
            };
            const giveUp = time.after(timeoutMs, () => {
              waiting.delete(give);
              reject(
                new EdgewayError('coordination_unavailable', `no lease was granted within ${timeoutMs} ms`),
              );
            });
            waiting.add(give);
          }),
    stop: async (revoke) => {
      stopped = true;
      cancel();
      const lease = machine.lease;
      if (revoke && lease !== undefined) await kv.revoke(lease);
    },
  };

  const begin = async (): Promise<void> => {
    if (options.resume !== undefined) {
      const sentMs = time.monotonicMs();
      try {
        await kv.keepAlive(options.resume);
        machine.handleTimeout(sentMs); // takes back the grant that is due
        if (!stopped) hold(options.resume, sentMs);
        return arm();
      } catch (error) {
        log.debug({ error: toEdgewayError(error).message }, 'the earlier lease cannot be resumed');
      }
    }
    perform(machine.handleTimeout(time.monotonicMs()));
  };
  void begin();
  return keeper;
}
