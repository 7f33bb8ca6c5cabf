// The packet path's own projection of the routing table, built from ProxyCommands: addresses to services and
// instances, instances to peers, local instances to their rights. It refuses to see packets and flows.
import { type Ipv4, ipv4 } from '../../src/addr.ts';
import { Turns } from '../../src/choose.ts';
import { PEER_KEPT_MS, PEERS_SPARE_MAX } from '../../src/limits.ts';
import type { ServiceId } from '../../src/name.ts';
import { POLICIES, type Policy } from '../../src/policy.ts';
import { Rng } from '../../src/rng.ts';
import type { InstanceRoute, InstanceWeights, NodePlace, ProxyCommand, ProxyConfig } from './command.ts';
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
  /** False once no route names it. */
  live: boolean;
  /** Flows that chose it, and how many of them dialled its InstanceIP: where there are none nobody looks for them. */
  flows: number;
  dialled: number;
}

export interface ServiceEntry {
  readonly id: ServiceId;
  instances: InstanceEntry[];
  /** As last told; an instance that it does not name counts 1 as long as no instance has a weight. */
  told: InstanceWeights | undefined;
  /** Per policy, in the order of `instances`. */
  weights: Readonly<Record<Policy, Float64Array>>;
  readonly turns: Readonly<Record<Policy, Turns>>;
  addresses: Readonly<Partial<Record<Policy, Ipv4>>>;
  /** When the sweep last found a flow to it that has not ended. */
  flowMs: number;
}

/** What an address of the service range means. */
export interface Target {
  readonly address: number;
  readonly service: ServiceEntry;
  /** Of a ServiceIP; undefined for an InstanceIP. */
  readonly policy: Policy | undefined;
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
  /** By subnet: those that a route names or that call, and spare ones. */
  readonly peers = new Map<number, Peer>();
  #callers = new Set<Peer>();
  #spare = 0;
  readonly #seed: number;
  #streams = 0;

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
  /**
   * The node that proved itself: one that a route names, or a spare one that a route may name soon (it greets us
   * because it has a route to us). Undefined when there are too many of those.
   */
  meet(subnet: number, now: number): Peer | undefined {
    let peer = this.peers.get(subnet);
    if (peer !== undefined || this.#spare >= PEERS_SPARE_MAX) return peer;
    peer = new Peer(subnet, 0, 0, this.#mtu);
    peer.spareMs = now;
    this.peers.set(subnet, peer);
    this.#spare++;
    return peer;
  }

  /** Lets go of spare peers that were silent for long. */
  prunePeers(now: number): void {
    if (this.#spare === 0) return;
    for (const peer of this.peers.values()) {
      if (peer.routes > 0) continue;
      if (peer.spareMs === Number.NEGATIVE_INFINITY) peer.spareMs = now;
      if (now - Math.max(peer.spareMs, peer.heardMs) < PEER_KEPT_MS) continue;
      this.peers.delete(peer.subnet);
      this.#spare--;
    }
  }

  /** Takes the nodes that call, as they now are. */
  putCallers(nodes: readonly NodePlace[]): void {
    const before = this.#callers;
    this.#callers = new Set();
    for (const { subnet, nodeIp, ewp } of nodes) {
      if (subnet === this.#subnetBase) continue;
      const peer = this.#peer(subnet, nodeIp, ewp);
      if (!this.#callers.has(peer) && !before.delete(peer)) this.#hold(peer);
      this.#callers.add(peer);
    }
    for (const peer of before) this.#letGo(peer);
  }

  /** Takes a service as it now is; returns instances that are gone. */
  putService(command: Extract<ProxyCommand, { kind: 'service' }>): InstanceEntry[] {
    const service = this.#services.get(command.service) ?? this.#newService(command.service);
    const before = service.instances;
    for (const address of Object.values(service.addresses))
      if (this.#isServiceIp(address, service)) this.#targets.delete(address - this.#base);
    service.addresses = command.addresses;
    for (const policy of POLICIES) {
      const address = command.addresses[policy];
      if (address === undefined || !this.inServices(address)) continue;
      this.#targets.set(address - this.#base, { address, service, policy, instance: undefined });
    }
    service.instances = command.instances
      .filter((route) => this.inServices(route.instanceIp))
      .map((route) => {
        const same = before.find(
          (old) =>
            old.instance === route.instance &&
            old.instanceIp === route.instanceIp &&
            old.namespaceIp === route.namespaceIp,
        );
        return this.#putInstance(service, route, same);
      });
    const gone = before.filter((old) => !service.instances.includes(old));
    for (const entry of gone) this.#forget(entry);
    const numbers = service.instances.map((entry) => entry.instance);
    for (const policy of POLICIES) service.turns[policy].replace(numbers);
    this.#weigh(service);
    return gone;
  }

  /** The instance that a new flow to this ServiceIP gets, by its policy's turns. */
  choose(target: Target): InstanceEntry | undefined {
    const { service, policy } = target;
    if (policy === undefined) return target.instance;
    const index = service.turns[policy].pick(service.weights[policy]);
    return index < 0 ? undefined : service.instances[index];
  }

  /** Services and other nodes, by the first address of their subnet, to which the sweep found flows since then. */
  used(sinceMs: number): { readonly services: ServiceId[]; readonly subnets: Ipv4[] } {
    const services: ServiceId[] = [];
    for (const { id, flowMs } of this.#services.values()) if (flowMs > sinceMs) services.push(id);
    const subnets: Ipv4[] = [];
    for (const { subnet, flowMs } of this.peers.values()) if (flowMs > sinceMs) subnets.push(ipv4(subnet));
    return { services, subnets };
  }

  deleteService(id: ServiceId): InstanceEntry[] {
    const service = this.#services.get(id);
    if (service === undefined) return [];
    const gone = this.putService({ kind: 'service', service: id, addresses: {}, instances: [] });
    this.#services.delete(id);
    return gone;
  }

  weigh(id: ServiceId, told: InstanceWeights): void {
    const service = this.#services.get(id);
    if (service === undefined) return;
    service.told = told;
    this.#weigh(service);
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
      live: true,
      flows: 0,
      dialled: 0,
    };
    const peer = route.local ? undefined : this.#peer(this.#subnetOf(route), route.nodeIp, route.ewp);
    if (entry.peer !== peer) {
      this.#release(entry);
      if (peer !== undefined) this.#hold(peer);
    }
    entry.local = route.local;
    entry.peer = peer;
    this.#targets.set(route.instanceIp - this.#base, {
      address: route.instanceIp,
      service,
      policy: undefined,
      instance: entry,
    });
    this.#byNamespaceIp.set(route.namespaceIp, entry);
    return entry;
  }

  #subnetOf(route: InstanceRoute): number {
    return (route.namespaceIp & this.#subnetMask) >>> 0;
  }

  #peer(subnet: number, nodeIp: Ipv4, ewp: number): Peer {
    let peer = this.peers.get(subnet);
    if (peer === undefined) {
      peer = new Peer(subnet, nodeIp, ewp, this.#mtu);
      this.peers.set(subnet, peer);
      this.#spare++;
    }
    peer.place(nodeIp, ewp);
    return peer;
  }

  #hold(peer: Peer): void {
    if (peer.routes++ > 0) return;
    this.#spare--;
    peer.spareMs = Number.NEGATIVE_INFINITY;
  }

  #release(entry: InstanceEntry): void {
    const peer = entry.peer;
    if (peer === undefined) return;
    entry.peer = undefined;
    this.#letGo(peer);
  }

  #letGo(peer: Peer): void {
    if (--peer.routes === 0) this.#spare++;
  }

  #forget(entry: InstanceEntry): void {
    entry.live = false;
    this.#release(entry);
    if (this.#targets.get(entry.instanceIp - this.#base)?.instance === entry)
      this.#targets.delete(entry.instanceIp - this.#base);
    if (this.#byNamespaceIp.get(entry.namespaceIp) === entry) this.#byNamespaceIp.delete(entry.namespaceIp);
  }

  #isServiceIp(address: number, service: ServiceEntry): boolean {
    const target = this.#targets.get(address - this.#base);
    return target?.service === service && target.instance === undefined;
  }

  #newService(id: ServiceId): ServiceEntry {
    const turns = (): Turns => new Turns(new Rng(this.#seed, this.#streams++));
    const none = new Float64Array(0);
    const service: ServiceEntry = {
      id,
      instances: [],
      addresses: {},
      flowMs: Number.NEGATIVE_INFINITY,
      told: undefined,
      weights: { roundrobin: none, closest: none, fastest: none },
      turns: { roundrobin: turns(), closest: turns(), fastest: turns() },
    };
    this.#services.set(id, service);
    return service;
  }

  #weigh(service: ServiceEntry): void {
    const { told } = service;
    const of = (policy: Policy): Float64Array => {
      const weights = service.instances.map((entry) => {
        const index = told?.instances.indexOf(entry.instance) ?? -1;
        return index < 0 ? undefined : told?.weights[policy][index];
      });
      const unnamed = weights.some((weight) => weight !== undefined && weight > 0) ? 0 : 1;
      return Float64Array.from(weights, (weight) => weight ?? unnamed);
    };
    service.weights = { roundrobin: of('roundrobin'), closest: of('closest'), fastest: of('fastest') };
  }
}
