// A role's life: follow the leader key, campaign when it is free, act while the lease holds, stop before it can have
// ended. Who acts is fenced: every write of a role compares the create revision of the leader key in the same
// transaction, so a holder that was paused past its lease changes nothing. `RoleMachine` decides; roles.ts does.
import type { LeaseId } from './kv.ts';

export type RoleState =
  | { readonly kind: 'standby' }
  | { readonly kind: 'campaigning'; readonly lease: LeaseId }
  | { readonly kind: 'acting'; readonly lease: LeaseId; readonly fence: number };

export type RoleAction =
  /** Create the leader key if it is absent, under that lease. */
  | { readonly kind: 'campaign'; readonly lease: LeaseId }
  /** We hold the role; `fence` is the leader key's create revision. */
  | { readonly kind: 'act'; readonly fence: number }
  /** We do not hold it any more: stop at once. */
  | { readonly kind: 'yield'; readonly why: string };

/** What is seen under the leader key: undefined when nobody holds the role. */
export interface SeenLeader {
  readonly holder: string;
  readonly createRevision: number;
  readonly lease?: LeaseId;
}

export class RoleMachine {
  #state: RoleState = { kind: 'standby' };
  #lease: LeaseId | undefined;
  /** Undefined until the leader key has been listed once. */
  #seen: SeenLeader | undefined | null = null;

  get state(): RoleState {
    return this.#state;
  }
  get leader(): SeenLeader | undefined {
    return this.#seen ?? undefined;
  }

  leaseHeld(lease: LeaseId): RoleAction[] {
    this.#lease = lease;
    return this.#campaign();
  }

  leaseLost(why: string): RoleAction[] {
    this.#lease = undefined;
    return this.#yield(why);
  }

  /** The leader key as the watch shows it now. */
  saw(leader: SeenLeader | undefined): RoleAction[] {
    this.#seen = leader;
    // Our own key: a campaign whose answer was lost had been won.
    if (leader?.lease !== undefined && leader.lease === this.#lease && this.#state.kind !== 'acting') {
      this.#state = { kind: 'acting', lease: this.#lease, fence: leader.createRevision };
      return [{ kind: 'act', fence: leader.createRevision }];
    }
    if (this.#state.kind === 'acting') {
      // An echo of our own campaign is older news than what we know; only another key ends the role.
      if (leader !== undefined && leader.createRevision <= this.#state.fence) return [];
      return [
        ...this.#yield(leader === undefined ? 'the leader key was deleted' : `${leader.holder} holds it`),
        ...this.#campaign(),
      ];
    }
    return this.#campaign();
  }

  /** The campaign's transaction was answered. `revision` is that of the created key when it was won. */
  campaigned(lease: LeaseId, won: boolean, revision: number): RoleAction[] {
    if (this.#state.kind !== 'campaigning' || this.#state.lease !== lease) return [];
    if (!won) {
      this.#state = { kind: 'standby' };
      return [];
    }
    this.#state = { kind: 'acting', lease, fence: revision };
    return [{ kind: 'act', fence: revision }];
  }

  /** A fenced write was refused because of the fence. */
  fenced(): RoleAction[] {
    return [...this.#yield('a write was refused: the role has another holder'), ...this.#campaign()];
  }

  /** Tries again when the key is free: after a campaign whose outcome is unknown, and from time to time. */
  retry(): RoleAction[] {
    if (this.#state.kind === 'campaigning') this.#state = { kind: 'standby' };
    return this.#campaign();
  }

  #campaign(): RoleAction[] {
    if (this.#state.kind !== 'standby' || this.#lease === undefined || this.#seen !== undefined) return [];
    this.#state = { kind: 'campaigning', lease: this.#lease };
    return [{ kind: 'campaign', lease: this.#lease }];
  }

  #yield(why: string): RoleAction[] {
    const acting = this.#state.kind === 'acting';
    this.#state = { kind: 'standby' };
    return acting ? [{ kind: 'yield', why }] : [];
  }
}
