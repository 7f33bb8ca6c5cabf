// The way in from outside: which ports this node publishes and where each leads, decided from the routing table, and
// the shell that keeps the host's rules equal to that. It refuses to touch packets: the kernel redirects, and what
// leaves for another node goes through the ProxyTUN like any flow.
import { toEdgewayError, unwrap } from '../src/error.ts';
import { EXPOSE_RETRY_MS } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import { publishedPorts } from '../src/model.ts';
import { parseServiceId, type ServiceId } from '../src/name.ts';
import type { Environment } from './host/environment.ts';
import type { Publication } from './host/rules.ts';
import type { Timers } from './ports.ts';
import type { RouteTable } from './routes/table.ts';

/** On whose behalf a node's own packets enter the network: one instance per node, at its bridge's address. */
export const INGRESS: ServiceId = unwrap(parseServiceId('edgeway.system.ingress.v1'));

/**
 * What a node publishes. All instances here: the port leads to them in turn, and they see the client's address. One or
 * more elsewhere: it leads to the service's roundrobin ServiceIP, the proxy chooses per flow, and the instance sees
 * this node. No instance: nothing is published, and a client is refused at once. Ports of other services that claim
 * the same (records edited by hand) are left out, the first service by name wins.
 */
export function publicationsFor(table: RouteTable, node: string): readonly Publication[] {
  const publications = new Map<string, Publication>();
  const services = [...table.services()].sort((a, b) => (a.id < b.id ? -1 : 1));
  for (const service of services) {
    const mappings = publishedPorts(service.descriptor);
    const instances = mappings.length === 0 ? [] : table.instancesOf(service.id);
    if (instances.length === 0) continue;
    const address = service.addresses.roundrobin;
    const here = instances.every((instance) => instance.node === node);
    if (!here && address === undefined) continue;
    for (const { protocol, source, destination: port } of mappings) {
      const key = `${protocol}/${source}`;
      if (publications.has(key)) continue;
      const byName = address === undefined ? undefined : { address, port };
      const direct = instances.map(({ namespaceIp }) => ({ address: namespaceIp, port }));
      publications.set(key, {
        protocol,
        source,
        targets: here || byName === undefined ? direct : [byName],
        ...(byName === undefined ? {} : { hairpin: byName }),
      });
    }
  }
  return [...publications.values()];
}

export interface NorthSouthOptions {
  readonly table: RouteTable;
  readonly node: string;
  readonly environment: Pick<Environment, 'expose'>;
  /** Gives the node's own packets an InstanceIP; called until it succeeds, before the first port is published. */
  readonly openIngress: () => Promise<void>;
  readonly timers: Timers;
  readonly log: Logger;
}

export class NorthSouth {
  readonly #options: NorthSouthOptions;
  /** What was last handed to the host, as text; undefined before the first time. */
  #published: string | undefined;
  #open = false;
  #running: Promise<void> | undefined;
  #again = false;
  #stopped = false;

  constructor(options: NorthSouthOptions) {
    this.#options = options;
  }

  /** The table changed. What changes while the host is being told is told in one piece after it. */
  update(): void {
    const { table, node, timers, log } = this.#options;
    // What an incomplete table does not know yet is not gone.
    if (this.#stopped || !table.synced) return;
    if (this.#running !== undefined) {
      this.#again = true;
      return;
    }
    const publications = publicationsFor(table, node);
    const text = JSON.stringify(publications);
    if (text === this.#published) return;
    this.#running = this.#apply(publications)
      .then(
        () => {
          this.#published = text;
        },
        (thrown: unknown) => {
          const { code, message } = toEdgewayError(thrown);
          log.warn({ code, error: message }, 'ports are not published yet');
          timers.after(EXPOSE_RETRY_MS, () => this.update());
        },
      )
      .finally(() => {
        this.#running = undefined;
        if (!this.#again) return;
        this.#again = false;
        this.update();
      });
  }

  /** Waits for what is under way; nothing begins after it. */
  async stop(): Promise<void> {
    this.#stopped = true;
    await this.#running;
  }

  async #apply(publications: readonly Publication[]): Promise<void> {
    const { openIngress, environment, log } = this.#options;
    if (publications.length > 0 && !this.#open) {
      await openIngress();
      this.#open = true;
    }
    for (const { publication, reason } of await environment.expose(publications))
      log.warn({ port: publication.source, reason }, 'port is not published on this node');
  }
}
