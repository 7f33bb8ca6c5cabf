// The routing table: what this node knows about services, instances and nodes, with an index for each question that
// the resolver, the proxy and the API ask. It has one author, the keyspace (follow.ts); everyone else reads.
import type { Ipv4 } from '../../src/addr.ts';
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
}

/** Services whose routes changed, for those who hold a projection of the table. */
export interface RouteDelta {
  readonly services: ReadonlySet<ServiceId>;
  readonly nodes: ReadonlySet<string>;
}

export class RouteTable implements NameTable {
  synced = false;
  /** Revision of the keyspace that the table reflects. */
  revision = 0;
  readonly #services = new Map<ServiceId, Service>();
  readonly #instances = new Map<ServiceId, Map<number, Instance>>();
  readonly #nodes = new Map<string, Node>();
  readonly #names = new Map<Ipv4, Name>();

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
  nameOf(address: Ipv4): Name | undefined {
    return this.#names.get(address);
  }

  putService(service: Service): void {
    this.deleteService(service.id);
    this.#services.set(service.id, service);
    for (const policy of POLICIES) {
      const address = service.addresses[policy];
      if (address !== undefined) this.#names.set(address, { service: service.id, policy });
    }
  }
  deleteService(id: ServiceId): void {
    const old = this.#services.get(id);
    if (old === undefined) return;
    this.#services.delete(id);
    for (const address of Object.values(old.addresses)) this.#forget(address, id);
  }

  putInstance(instance: Instance): void {
    this.deleteInstance(instance.service, instance.instance);
    let byNumber = this.#instances.get(instance.service);
    if (byNumber === undefined) {
      byNumber = new Map();
      this.#instances.set(instance.service, byNumber);
    }
    byNumber.set(instance.instance, instance);
    const name: Name = { service: instance.service, instance: instance.instance };
    this.#names.set(instance.instanceIp, name);
    this.#names.set(instance.namespaceIp, name);
  }
  deleteInstance(id: ServiceId, number: number): void {
    const byNumber = this.#instances.get(id);
    const old = byNumber?.get(number);
    if (byNumber === undefined || old === undefined) return;
    byNumber.delete(number);
    if (byNumber.size === 0) this.#instances.delete(id);
    this.#forget(old.instanceIp, id);
    this.#forget(old.namespaceIp, id);
  }

  putNode(node: Node): void {
    this.#nodes.set(node.node, node);
  }
  deleteNode(id: string): void {
    this.#nodes.delete(id);
  }

  /** An address may have passed to another owner in the meantime; only its own entry goes. */
  #forget(address: Ipv4, id: ServiceId): void {
    if (this.#names.get(address)?.service === id) this.#names.delete(address);
  }
}
