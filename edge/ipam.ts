// Namespace addresses inside this node's subnet: take, give back, rest before reuse. Pure: time is an argument. It
// refuses to hand out an address that a peer may still hold a flow to.
import { type Cidr, contains, formatCidr, formatIpv4, type Ipv4, ipv4 } from '../src/addr.ts';
import { fail, ok, type Result } from '../src/error.ts';
import { QUARANTINE_S } from '../src/limits.ts';
import { layoutOf, type SubnetLayout } from '../src/plan.ts';

interface Slot {
  readonly owner: string;
  /** Undefined while the owner holds it; then the time, in milliseconds, at which anybody may have it. */
  freeAtMs: number | undefined;
}

/** One row per address of the subnet that was ever given: at most `layoutOf(subnet).instancesMax`. */
export class NamespaceAddresses {
  readonly subnet: Cidr;
  readonly #layout: SubnetLayout;
  readonly #restMs: number;
  readonly #slots = new Map<Ipv4, Slot>();
  #next: Ipv4;

  /** `next`: where an earlier life would have looked next; what it gave before rests longest that way. */
  constructor(subnet: Cidr, restMs: number = QUARANTINE_S * 1000, next?: Ipv4) {
    this.subnet = subnet;
    this.#layout = layoutOf(subnet);
    this.#restMs = restMs;
    const { firstInstance, lastInstance } = this.#layout;
    this.#next = next !== undefined && next >= firstInstance && next <= lastInstance ? next : firstInstance;
  }

  /** Where the next address is looked for first. */
  get next(): Ipv4 {
    return this.#next;
  }

  /** The address that `owner` held before, even while it rests; else the next one that is free. Taking again what
   *  one holds is a success. */
  take(owner: string, nowMs: number): Result<Ipv4> {
    for (const [address, slot] of this.#slots) {
      if (slot.owner !== owner) continue;
      slot.freeAtMs = undefined;
      return ok(address);
    }
    const { firstInstance, lastInstance, instancesMax } = this.#layout;
    let resting = 0;
    for (let tried = 0; tried < instancesMax; tried++) {
      const address = this.#next;
      this.#next = address === lastInstance ? firstInstance : ipv4(address + 1);
      const slot = this.#slots.get(address);
      if (slot !== undefined && (slot.freeAtMs === undefined || slot.freeAtMs > nowMs)) {
        if (slot.freeAtMs !== undefined) resting += 1;
        continue;
      }
      this.#slots.set(address, { owner, freeAtMs: undefined });
      return ok(address);
    }
    return fail(
      'addresses_exhausted',
      `subnet ${formatCidr(this.subnet)} has no free address: ${instancesMax - resting} are in use and ${resting} rest before reuse`,
    );
  }

  /** Records what is in use already, as after a restart; another address of that owner begins to rest. */
  hold(owner: string, address: Ipv4, nowMs: number): Result<Ipv4> {
    const { firstInstance, lastInstance } = this.#layout;
    if (!contains(this.subnet, address) || address < firstInstance || address > lastInstance)
      return fail(
        'address_not_in_plan',
        `${formatIpv4(address)} is no instance address of ${formatCidr(this.subnet)}: those are ${formatIpv4(firstInstance)} to ${formatIpv4(lastInstance)}`,
      );
    const slot = this.#slots.get(address);
    if (slot !== undefined && slot.owner !== owner && slot.freeAtMs === undefined)
      return fail('address_taken', `${formatIpv4(address)} is held by ${slot.owner}`);
    const former = this.of(owner);
    if (former !== undefined && former !== address)
      this.#slots.set(former, { owner: '', freeAtMs: nowMs + this.#restMs });
    this.#slots.set(address, { owner, freeAtMs: undefined });
    return ok(address);
  }

  /** The address begins to rest. Succeeds when the owner holds none. */
  giveBack(owner: string, nowMs: number): void {
    for (const slot of this.#slots.values())
      if (slot.owner === owner && slot.freeAtMs === undefined) slot.freeAtMs = nowMs + this.#restMs;
  }

  /** What the owner holds, or held last. */
  of(owner: string): Ipv4 | undefined {
    for (const [address, slot] of this.#slots) if (slot.owner === owner) return address;
    return undefined;
  }

  /** Addresses in use, resting ones not among them. */
  inUse(): number {
    let count = 0;
    for (const slot of this.#slots.values()) if (slot.freeAtMs === undefined) count += 1;
    return count;
  }
}
