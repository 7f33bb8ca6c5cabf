// The packet path's own projection of the routing table, built from ProxyCommands: addresses to services and
// instances, instances to peers, local instances to their rights. It refuses to see packets and flows.
import type { Ipv4 } from '../../src/addr.ts';
import type { ChoiceState } from '../../src/choose.ts';
import type { ServiceId } from '../../src/name.ts';
import { POLICIES, type Policy } from '../../src/policy.ts';
import type { InstanceRank, InstanceRoute, ProxyCommand, ProxyConfig } from './command.ts';
import { Peer } from './peers.ts';

/** An instance that flows may point at; stays the same object while it is the same instance. */
export interface InstanceEntry {
  readonly service: ServiceEntry;
  readonly instance: number;
  readonly instanceIp: number;
  readonly namespaceIp: number;
  local: boolean;
  /** Undefined when it is local. */
  peer: Peer | undefined;
  healthy: boolean | undefined;
  closestMs: number | undefined;
  fastestMs: number | undefined;
  /** False once no route names it. */
  live: boolean;
  /** Flows that chose it. */
  flows: number;
}

export interface ServiceEntry {
  readonly id: ServiceId;
  instances: InstanceEntry[];
  addresses: Readonly<Partial<Record<Policy, Ipv4>>>;
}

/** What an address of the service range means. */
export interface Target {
  readonly address: number;
  readonly service: ServiceEntry;
  /** Of a ServiceIP; undefined for an InstanceIP. */
  readonly policy: Policy | undefined;
  readonly state: ChoiceState;
  /** Of an InstanceIP. */
  readonly instance: InstanceEntry | undefined;
}

/** An instance on this node. */
export interface LocalEntry {
  readonly namespaceIp: number;
  readonly instanceIp: number;
  readonly service: ServiceId;
  readonly needs: ReadonlySet<ServiceId> | undefined;
}

export class Routes {
  readonly #base: number;
  readonly #size: number;
  readonly #subnetBase: number;
  readonly #subnetMask: number;
  readonly #mtu: number;
  readonly #services = new Map<ServiceId, ServiceEntry>();
  /** By offset in the service range: a small integer is the cheapest key there is. */
  readonly #targets = new Map<number, Target>();
  readonly #byNamespaceIp = new Map<number, InstanceEntry>();
  readonly #locals: (LocalEntry | undefined)[];
  readonly peers = new Map<number, Peer>();
  #seed: number;

  constructor(config: ProxyConfig) {
    this.#base = config.servicesBase;
    this.#size = 2 ** (32 - config.servicesBits);
    this.#subnetBase = config.subnetBase;
    this.#subnetMask = config.subnetBits === 0 ? 0 : (0xffffffff << (32 - config.subnetBits)) >>> 0;
    this.#mtu = config.mtu;
    this.#locals = new Array<LocalEntry | undefined>(2 ** (32 - config.subnetBits)).fill(undefined);
    this.#seed = config.seed >>> 0;
  }

  inServices(address: number): boolean {
    const offset = address - this.#base;
    return offset >= 0 && offset < this.#size;
  }
  target(address: number): Target | undefined {
    return this.#targets.get(address - this.#base);
  }
  /** The route of an InstanceIP. */
  instance(address: number): InstanceEntry | undefined {
    const offset = address - this.#base;
    return offset >= 0 && offset < this.#size ? this.#targets.get(offset)?.instance : undefined;
  }
  /** The route whose namespace IP that is; not for every packet. */
  instanceAt(namespaceIp: number): InstanceEntry | undefined {
    return this.#byNamespaceIp.get(namespaceIp);
  }
  local(address: number): LocalEntry | undefined {
    const offset = address - this.#subnetBase;
    return offset >= 0 && offset < this.#locals.length ? this.#locals[offset] : undefined;
  }
  peerOf(subnet: number): Peer | undefined {
    return this.peers.get(subnet);
  }

  /** Takes a service as it now is; returns instances that are gone. */
  putService(command: Extract<ProxyCommand, { kind: 'service' }>): InstanceEntry[] {
    let service = this.#services.get(command.service);
    if (service === undefined) {
      service = { id: command.service, instances: [], addresses: {} };
      this.#services.set(command.service, service);
    }
    const before = service.instances;
    const states = new Map<number, ChoiceState>();
    for (const policy of POLICIES) {
      const address = service.addresses[policy];
      if (address === undefined) continue;
      const target = this.#own(address, service);
      if (target === undefined) continue;
      states.set(address, target.state);
      this.#targets.delete(address - this.#base);
    }
    service.addresses = command.addresses;
    for (const policy of POLICIES) {
      const address = command.addresses[policy];
      if (address === undefined || !this.inServices(address)) continue;
      const state = states.get(address) ?? { next: this.#random() % 0x10000 };
      this.#targets.set(address - this.#base, { address, service, policy, state, instance: undefined });
    }
    const owner = service;
    service.instances = command.instances
      .filter((route) => this.inServices(route.instanceIp))
      .map((route) => {
        const same = before.find(
          (old) =>
            old.instance === route.instance &&
            old.instanceIp === route.instanceIp &&
            old.namespaceIp === route.namespaceIp,
        );
        return this.#putInstance(owner, route, same);
      });
    const gone = before.filter((old) => !owner.instances.includes(old));
    for (const entry of gone) this.#forget(entry);
    return gone;
  }

  deleteService(id: ServiceId): InstanceEntry[] {
    const service = this.#services.get(id);
    if (service === undefined) return [];
    const gone = this.putService({ kind: 'service', service: id, addresses: {}, instances: [] });
    this.#services.delete(id);
    return gone;
  }

  rank(id: ServiceId, ranks: readonly InstanceRank[]): void {
    const service = this.#services.get(id);
    if (service === undefined) return;
    for (const rank of ranks) {
      const entry = service.instances.find((instance) => instance.instance === rank.instance);
      if (entry === undefined) continue;
      entry.healthy = rank.healthy;
      entry.closestMs = rank.closestMs;
      entry.fastestMs = rank.fastestMs;
    }
  }

  putLocal(command: Extract<ProxyCommand, { kind: 'local' }>): boolean {
    const offset = command.namespaceIp - this.#subnetBase;
    if (offset < 0 || offset >= this.#locals.length) return false;
    this.#locals[offset] = {
      namespaceIp: command.namespaceIp,
      instanceIp: command.instanceIp,
      service: command.service,
      needs: command.needs === undefined ? undefined : new Set(command.needs),
    };
    return true;
  }
  deleteLocal(namespaceIp: number): void {
    const offset = namespaceIp - this.#subnetBase;
    if (offset >= 0 && offset < this.#locals.length) this.#locals[offset] = undefined;
  }

  #putInstance(service: ServiceEntry, route: InstanceRoute, same: InstanceEntry | undefined): InstanceEntry {
    const entry: InstanceEntry = same ?? {
      service,
      instance: route.instance,
      instanceIp: route.instanceIp,
      namespaceIp: route.namespaceIp,
      local: route.local,
      peer: undefined,
      healthy: undefined,
      closestMs: undefined,
      fastestMs: undefined,
      live: true,
      flows: 0,
    };
    this.#release(entry);
    entry.local = route.local;
    entry.peer = route.local ? undefined : this.#peer(route);
    if (entry.peer !== undefined) entry.peer.routes++;
    entry.healthy = route.healthy;
    entry.closestMs = route.closestMs;
    entry.fastestMs = route.fastestMs;
    this.#targets.set(route.instanceIp - this.#base, {
      address: route.instanceIp,
      service,
      policy: undefined,
      state: { next: 0 },
      instance: entry,
    });
    this.#byNamespaceIp.set(route.namespaceIp, entry);
    return entry;
  }

  #peer(route: InstanceRoute): Peer {
    const subnet = (route.namespaceIp & this.#subnetMask) >>> 0;
    let peer = this.peers.get(subnet);
    if (peer === undefined) {
      peer = new Peer(subnet, route.nodeIp, route.ewp, this.#mtu);
      this.peers.set(subnet, peer);
    }
    peer.ip = route.nodeIp;
    peer.port = route.ewp;
    return peer;
  }

  #release(entry: InstanceEntry): void {
    const peer = entry.peer;
    if (peer === undefined) return;
    entry.peer = undefined;
    if (--peer.routes === 0) this.peers.delete(peer.subnet);
  }

  #forget(entry: InstanceEntry): void {
    entry.live = false;
    this.#release(entry);
    if (this.#targets.get(entry.instanceIp - this.#base)?.instance === entry)
      this.#targets.delete(entry.instanceIp - this.#base);
    if (this.#byNamespaceIp.get(entry.namespaceIp) === entry) this.#byNamespaceIp.delete(entry.namespaceIp);
  }

  /** The target of an address while it is still that service's. */
  #own(address: number, service: ServiceEntry): Target | undefined {
    const target = this.#targets.get(address - this.#base);
    return target?.service === service && target.instance === undefined ? target : undefined;
  }

  /** xorshift32 of the seed: where a roundrobin begins. */
  #random(): number {
    let x = this.#seed === 0 ? 0x9e3779b9 : this.#seed;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.#seed = x >>> 0;
    return this.#seed;
  }
}
