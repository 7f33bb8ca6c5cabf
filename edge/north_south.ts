// The way in from outside: which ports this node publishes and where each leads, decided from the routing table, and
// the shell that keeps the host's rules equal to that. It refuses to touch packets: the kernel redirects, and what
// leaves for another node goes through the ProxyTUN like any flow.
import { EdgewayError, toEdgewayError, unwrap } from '../src/error.ts';
import { EXPOSE_RETRY_MS, PORT_REFUSED_RETRY_MS } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import { type Instance, publishedPolicy, publishedPorts } from '../src/model.ts';
import { parseServiceId, type ServiceId } from '../src/name.ts';
import type { Environment } from './host/environment.ts';
import type { Publication } from './host/rules.ts';
import type { Timers } from './ports.ts';
import type { RouteTable } from './routes/table.ts';

/** On whose behalf a node's own packets enter the network: one instance per node, at its bridge's address. */
export const INGRESS: ServiceId = unwrap(parseServiceId('edgeway.system.ingress.v1'));

/** A publication and whose it is. */
export interface ServicePublication extends Publication {
  readonly service: ServiceId;
}

/**
 * What a node publishes. Where only instances of this node are to be had (all are here, or the policy is `closest` and
 * one here is healthy: to it a local instance is always closest), the port leads to the healthy ones in turn, and they
 * see the client's address. Else it leads to the ServiceIP of the service's policy, the proxy chooses per flow, and the
 * instance sees this node. None that is healthy: nothing is published, and a client is refused at once. Who talks to an
 * instance of this node already, or through any ServiceIP of the service, goes on. Ports of other services that claim the
 * same (records edited by hand) are left out, the first service by name wins.
 */
export function publicationsFor(
  table: RouteTable,
  node: string,
  isUp: (instance: Instance) => boolean,
): readonly ServicePublication[] {
  const publications = new Map<string, ServicePublication>();
  const services = [...table.services()].sort((a, b) => (a.id < b.id ? -1 : 1));
  for (const service of services) {
    const mappings = publishedPorts(service.descriptor);
    const instances = mappings.length === 0 ? [] : table.instancesOf(service.id);
    if (instances.length === 0) continue;
    const policy = publishedPolicy(service.descriptor);
    const address = service.addresses[policy];
    const local = instances.filter((instance) => instance.node === node);
    const up = local.filter(isUp);
    const here = local.length === instances.length || (policy === 'closest' && up.length > 0);
    if (!here && address === undefined) continue;
    const names = Object.values(service.addresses);
    for (const { protocol, source, destination: port } of mappings) {
      const key = `${protocol}/${source}`;
      if (publications.has(key)) continue;
      const byName = address === undefined ? undefined : { address, port };
      const target = ({ namespaceIp }: Instance) => ({ address: namespaceIp, port });
      const targets = here || byName === undefined ? up.map(target) : [byName];
      publications.set(key, {
        service: service.id,
        protocol,
        source,
        targets,
        kept: [...local.map(target), ...names.map((name) => ({ address: name, port }))],
        ...(byName === undefined ? {} : { hairpin: byName }),
      });
    }
  }
  return [...publications.values()];
}

/** UDP ports at which other nodes take frames of the tunnel: nodes of the table, and nodes that only instances name. */
export function tunnelPortsOf(table: RouteTable): readonly number[] {
  const ports = new Set<number>();
  for (const { ewp } of table.nodes()) ports.add(ewp);
  for (const { ewp } of table.instances()) ports.add(ewp);
  return [...ports].sort((a, b) => a - b);
}

export interface NorthSouthOptions {
  readonly table: RouteTable;
  readonly node: string;
  readonly environment: Pick<Environment, 'expose'>;
  /** False for an instance of this node that is dead or fails its health check. */
  readonly isUp: (instance: Instance) => boolean;
  /** Gives the node's own packets an InstanceIP; called until it succeeds, before the first port is published. */
  readonly openIngress: () => Promise<void>;
  readonly timers: Timers;
  readonly log: Logger;
}

export class NorthSouth {
  readonly #options: NorthSouthOptions;
  /** What was last handed to the host, as text; undefined before the first time. */
  #published: string | undefined;
  /** Ports that somebody else on this host has, by `tcp/80`. */
  #refused: ReadonlyMap<string, { readonly service: ServiceId; readonly reason: string }> = new Map();
  #retry: (() => void) | undefined;
  #open = false;
  #running: Promise<void> | undefined;
  #again = false;
  #stopped = false;

  constructor(options: NorthSouthOptions) {
    this.#options = options;
  }

  /** The table changed, or an instance's health. What changes while the host is being told is told in one piece after
   *  it. */
  update(): void {
    const { table, node, isUp, log } = this.#options;
    // What an incomplete table does not know yet is not gone.
    if (this.#stopped || !table.synced) return;
    if (this.#running !== undefined) {
      this.#again = true;
      return;
    }
    const publications = publicationsFor(table, node, isUp);
    const tunnelPorts = tunnelPortsOf(table);
    const text = JSON.stringify([publications, tunnelPorts]);
    if (text === this.#published) return;
    this.#running = this.#apply(publications, tunnelPorts)
      .then(
        () => {
          this.#published = text;
          // Whoever has a port may give it up, and nobody will say so.
          if (this.#refused.size > 0) this.#later(PORT_REFUSED_RETRY_MS);
        },
        (thrown: unknown) => {
          const { code, message } = toEdgewayError(thrown);
          log.warn({ code, error: message }, 'ports are not published yet');
          this.#later(EXPOSE_RETRY_MS);
        },
      )
      .finally(() => {
        this.#running = undefined;
        if (!this.#again) return;
        this.#again = false;
        this.update();
      });
  }

  /** Ports that this node does not publish although it should, by the service whose they are. */
  refused(): ReadonlyMap<ServiceId, EdgewayError> {
    const reasons = new Map<ServiceId, string[]>();
    for (const { service, reason } of this.#refused.values())
      reasons.set(service, [...(reasons.get(service) ?? []), reason]);
    return new Map(
      [...reasons].map(([service, all]) => [
        service,
        new EdgewayError('port_taken', `node ${this.#options.node} does not publish it: ${all.join('; ')}`),
      ]),
    );
  }

  /** Waits for what is under way; nothing begins after it. */
  async stop(): Promise<void> {
    this.#stopped = true;
    this.#retry?.();
    await this.#running;
  }

  #later(ms: number): void {
    this.#retry?.();
    this.#retry = this.#options.timers.after(ms, () => {
      this.#published = undefined;
      this.update();
    });
  }

  async #apply(publications: readonly ServicePublication[], tunnelPorts: readonly number[]): Promise<void> {
    const { openIngress, environment, log } = this.#options;
    if (publications.length > 0 && !this.#open) {
      await openIngress();
      this.#open = true;
    }
    const owners = new Map<string, ServiceId>();
    const plain = publications.map(({ service, ...publication }) => {
      owners.set(`${publication.protocol}/${publication.source}`, service);
      return publication;
    });
    const refused = new Map<string, { service: ServiceId; reason: string }>();
    for (const { publication, reason } of await environment.expose(plain, tunnelPorts)) {
      const port = `${publication.protocol}/${publication.source}`;
      const service = owners.get(port);
      if (service === undefined) continue;
      refused.set(port, { service, reason });
      if (this.#refused.get(port)?.reason !== reason)
        log.warn({ port: publication.source, service, reason }, 'port is not published on this node');
    }
    this.#refused = refused;
  }
}
