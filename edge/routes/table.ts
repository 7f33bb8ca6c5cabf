// The routing table: what this node knows about services, instances and nodes, with an index for each question that
// the resolver, the proxy and the API ask. It has one author, the keyspace (follow.ts); everyone else reads.
import type { Ipv4 } from '../../src/addr.ts';
import { UNOWNED_ADDRESSES_MAX } from '../../src/limits.ts';
import type { Instance, Node, Service } from '../../src/model.ts';
import type { Name, ServiceId } from '../../src/name.ts';
import { POLICIES } from '../../src/policy.ts';

/** What the resolver needs to know; a true subset of the table so that tests can build one in a line. */
export interface NameTable {
  /** False until the first snapshot is complete: "I do not know yet" is another answer than "there is none". */
  readonly synced: boolean;
  service(id: ServiceId): Service | undefined;
  instance(id: ServiceId, number: number): Instance | undefined;
  /** The name that an address of ours (ServiceIP, InstanceIP or namespace IP) answers to. */
  nameOf(address: Ipv4): Name | undefined;
  /** Whether a node holds the subnet with this base; undefined: the table cannot tell. */
  isNodeSubnet(base: Ipv4): boolean | undefined;
}

/** Services whose routes changed, for those who hold a projection of the table. */
export interface RouteDelta {
  readonly services: ReadonlySet<ServiceId>;
  readonly nodes: ReadonlySet<string>;
}

/**
 * An address answers to whoever listed it first. A record that lists somebody else's (written by hand, or told before
 * the news that the other one let it go) waits for it: it takes nothing, and nothing is lost when it is mended.
 */
export class RouteTable implements NameTable {
  synced = false;
  /** Revision of the keyspace that the table reflects. */
  revision = 0;
  readonly #services = new Map<ServiceId, Service>();
  readonly #instances = new Map<ServiceId, Map<number, Instance>>();
  readonly #nodes = new Map<string, Node>();
  /** Instances on each node that has some. */
  readonly #loads = new Map<string, number>();
  readonly #hidden = new Set<string>();
  /** Grows whenever `hidden` changes. */
  hiddenChanges = 0;
  readonly #names = new Map<Ipv4, Name>();
  /** Who lists an address that answers to another, in the order they came. */
  readonly #waiting = new Map<Ipv4, Name[]>();
  /** How many nodes of the table have the subnet with that base. */
  readonly #subnets = new Map<Ipv4, number>();
  /** Subnets of nodes that are not in the table, or of none, by `tellSubnet`; the oldest first. */
  readonly #toldSubnets = new Map<Ipv4, boolean>();
  /** Services that an address fell to, for `takeHeirs`. */
  #heirs = new Set<ServiceId>();

  service(id: ServiceId): Service | undefined {
    return this.#services.get(id);
  }
  services(): IterableIterator<Service> {
    return this.#services.values();
  }
  instance(id: ServiceId, number: number): Instance | undefined {
    return this.#instances.get(id)?.get(number);
  }
  instancesOf(id: ServiceId): readonly Instance[] {
    return [...(this.#instances.get(id)?.values() ?? [])].sort((a, b) => a.instance - b.instance);
  }
  *instances(): IterableIterator<Instance> {
    for (const byNumber of this.#instances.values()) yield* byNumber.values();
  }
  node(id: string): Node | undefined {
    return this.#nodes.get(id);
  }
  nodes(): IterableIterator<Node> {
    return this.#nodes.values();
  }
  /** Nodes that a NAT hides and that have instances. */
  get hidden(): ReadonlySet<string> {
    return this.#hidden;
  }
  nameOf(address: Ipv4): Name | undefined {
    return this.#names.get(address);
  }

  putService(service: Service): void {
    const old = this.#services.get(service.id);
    this.#services.set(service.id, service);
    // What it keeps it does not let go for a moment: somebody may be waiting for it.
    for (const policy of POLICIES)
      this.#move(old?.addresses[policy], service.addresses[policy], { service: service.id, policy });
  }
  deleteService(id: ServiceId): void {
    const old = this.#services.get(id);
    if (old === undefined) return;
    this.#services.delete(id);
    for (const policy of POLICIES) this.#move(old.addresses[policy], undefined, { service: id, policy });
  }

  putInstance(instance: Instance): void {
    const { service, instance: number } = instance;
    let byNumber = this.#instances.get(service);
    if (byNumber === undefined) {
      byNumber = new Map();
      this.#instances.set(service, byNumber);
    }
    const old = byNumber.get(number);
    byNumber.set(number, instance);
    if (old?.node !== instance.node) {
      this.#load(instance.node, 1);
      if (old !== undefined) this.#load(old.node, -1);
    }
    const name: Name = { service, instance: number };
    this.#move(old?.instanceIp, instance.instanceIp, name);
    this.#move(old?.namespaceIp, instance.namespaceIp, name);
  }
  deleteInstance(id: ServiceId, number: number): void {
    const byNumber = this.#instances.get(id);
    const old = byNumber?.get(number);
    if (byNumber === undefined || old === undefined) return;
    byNumber.delete(number);
    this.#load(old.node, -1);
    if (byNumber.size === 0) this.#instances.delete(id);
    const name: Name = { service: id, instance: number };
    this.#move(old.instanceIp, undefined, name);
    this.#move(old.namespaceIp, undefined, name);
  }

  putNode(node: Node): void {
    const old = this.#nodes.get(node.node);
    this.#nodes.set(node.node, node);
    this.#judge(node.node);
    if (old !== undefined) this.#countSubnet(old.subnet.base, -1);
    this.#countSubnet(node.subnet.base, 1);
  }
  deleteNode(id: string): void {
    const old = this.#nodes.get(id);
    if (old === undefined) return;
    this.#nodes.delete(id);
    this.#judge(id);
    this.#countSubnet(old.subnet.base, -1);
  }
  #countSubnet(base: Ipv4, more: number): void {
    const nodes = (this.#subnets.get(base) ?? 0) + more;
    if (nodes > 0) this.#subnets.set(base, nodes);
    else this.#subnets.delete(base);
  }

  isNodeSubnet(base: Ipv4): boolean | undefined {
    return this.#subnets.has(base) || this.#toldSubnets.get(base);
  }
  /** What the store says of a subnet, kept until `forgetSubnets`. */
  tellSubnet(base: Ipv4, taken: boolean): void {
    this.#toldSubnets.set(base, taken);
    if (this.#toldSubnets.size > UNOWNED_ADDRESSES_MAX)
      this.#toldSubnets.delete(this.#toldSubnets.keys().next().value!);
  }
  forgetSubnets(): void {
    this.#toldSubnets.clear();
  }

  /** Services that got an address since the last call because another one let it go: their routes changed, too. */
  takeHeirs(): ReadonlySet<ServiceId> {
    const heirs = this.#heirs;
    if (heirs.size > 0) this.#heirs = new Set();
    return heirs;
  }

  #load(node: string, by: 1 | -1): void {
    const load = (this.#loads.get(node) ?? 0) + by;
    if (load > 0) this.#loads.set(node, load);
    else this.#loads.delete(node);
    this.#judge(node);
  }

  #judge(node: string): void {
    const hidden = this.#nodes.get(node)?.nat === true && this.#loads.has(node);
    if (hidden === this.#hidden.has(node)) return;
    if (hidden) this.#hidden.add(node);
    else this.#hidden.delete(node);
    this.hiddenChanges++;
  }

  #move(from: Ipv4 | undefined, to: Ipv4 | undefined, name: Name): void {
    if (from === to) return;
    if (from !== undefined) this.#forget(from, name);
    if (to !== undefined) this.#enter(to, name);
  }

  #enter(address: Ipv4, name: Name): void {
    const holder = this.#names.get(address);
    if (holder === undefined) this.#names.set(address, name);
    else if (!sameName(holder, name))
      this.#waiting.set(address, [...(this.#waiting.get(address) ?? []), name]);
  }

  #forget(address: Ipv4, name: Name): void {
    const holder = this.#names.get(address);
    if (holder === undefined) return;
    const waiting = this.#waiting.get(address)?.filter((other) => !sameName(other, name)) ?? [];
    if (sameName(holder, name)) {
      const heir = waiting.shift();
      if (heir === undefined) this.#names.delete(address);
      else {
        this.#names.set(address, heir);
        this.#heirs.add(heir.service);
      }
    }
    if (waiting.length > 0) this.#waiting.set(address, waiting);
    else this.#waiting.delete(address);
  }
}

function sameName(a: Name, b: Name): boolean {
  return (
    a.service === b.service &&
    ('policy' in a ? a.policy : undefined) === ('policy' in b ? b.policy : undefined) &&
    ('instance' in a ? a.instance : undefined) === ('instance' in b ? b.instance : undefined)
  );
}
