// Wires the name service of a node: unicast DNS and multicast DNS on the bridge, aliases on a LAN and the host's own
// resolver where the operator asks for them. All of it or nothing: a part that cannot start takes the others down.
import { type Cidr, type Ipv4, networkOf, parseIpv4 } from '../src/addr.ts';
import { EdgewayError, unwrap } from '../src/error.ts';
import { HOST_RESOLVER_CHECK_MS } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import type { NetworkConfig } from '../src/model.ts';
import type { ServiceId } from '../src/name.ts';
import { layoutOf } from '../src/plan.ts';
import type { NameServer, NeedsOf } from './agent.ts';
import type { AgentConfig } from './config.ts';
import { Observer } from './host/observe.ts';
import { restoreHostResolver, setUpHostResolver } from './host/resolv.ts';
import { systemClock, systemTimers } from './io/clock.ts';
import { followResolvConf } from './io/dns_resolvconf.ts';
import { startDnsServer } from './io/dns_server.ts';
import { hostRunner } from './io/exec.ts';
import { hostFiles } from './io/files.ts';
import { startMdns } from './io/mdns_server.ts';
import type { NameTable } from './routes/table.ts';
import { Undo } from './undo.ts';

/** Where the host's original resolv.conf is kept while the agent's stands. */
function resolverStatePath(dataDir: string): string {
  return `${dataDir}/resolv.conf.json`;
}

/** Puts back what an agent that was killed left in the host's resolver set-up; true when there was something. */
export function restoreResolver(dataDir: string, log: Logger): Promise<boolean> {
  return restoreHostResolver({
    runner: hostRunner,
    files: hostFiles,
    statePath: resolverStatePath(dataDir),
    log,
  });
}

export interface NamesOptions {
  readonly config: AgentConfig;
  readonly table: NameTable;
  readonly log: Logger;
  readonly subnet: Cidr;
  readonly needsOf: NeedsOf;
  readonly network: Pick<NetworkConfig, 'plan' | 'mtu'>;
  /** See DnsServerOptions. Without a source when the node itself asks. */
  readonly onLookup?: (service: ServiceId, source?: Ipv4) => undefined | Promise<unknown>;
  readonly onAddress?: (address: Ipv4, source: Ipv4) => undefined | Promise<unknown>;
}

export async function startNames(options: NamesOptions): Promise<NameServer> {
  const { config, table, log, subnet, needsOf, onLookup, onAddress } = options;
  const { plan, mtu } = options.network;
  const clock = systemClock;
  const address = layoutOf(subnet).bridge;
  const lookup = onLookup === undefined ? {} : { onLookup };
  const addresses = onAddress === undefined ? {} : { onAddress };
  const shared = { address, table, needsOf, plan, ...lookup, log, clock };
  // Instances and the host itself; nobody who merely has a route to the bridge.
  const clients = [subnet];
  const statePath = resolverStatePath(config.dataDir);
  const upstreams =
    config.upstreams.length > 0
      ? () => config.upstreams
      : followResolvConf({ own: address, statePath, clock, log });
  const counters: (() => Readonly<Record<string, number>>)[] = [];
  const listeners: ((services: ReadonlySet<ServiceId>) => void)[] = [];
  return Undo.guard(log, async (undo) => {
    const dns = await startDnsServer({ ...shared, ...addresses, clients, upstreams });
    undo.push('dns', () => dns.stop());
    counters.push(() => dns.counters());
    if (config.mdns) {
      const mdns = await startMdns({ ...shared, interface: config.bridge, subnet, mtu });
      undo.push('mdns', () => mdns.stop());
      counters.push(() => mdns.counters());
      listeners.push((services) => mdns.changed(services));
    }
    if (config.lan !== undefined) {
      const lan = await faceOn(config.lan.interface);
      const { aliases } = config.lan;
      const mdns = await startMdns({ ...lan, table, log, clock, interface: config.lan.interface, aliases });
      undo.push('lan', () => mdns.stop());
      counters.push(() => onLan(mdns.counters()));
      listeners.push((services) => mdns.changed(services));
      // Nobody asks for the service by its own name there; it must be known all the same.
      for (const { service } of aliases) void onLookup?.(service)?.catch(() => {});
    }
    if (config.hostDns) {
      const host = await setUpHostResolver({
        runner: hostRunner,
        files: hostFiles,
        bridge: config.bridge,
        address,
        statePath,
        log,
      });
      undo.push('host resolver', () => host.restore());
      undo.push('host resolver check', async () => cancel());
      let cancel = systemTimers.after(HOST_RESOLVER_CHECK_MS, check);
      function check(): void {
        host.check().catch((error: Error) => log.warn({ error: error.message }, "the host's resolv.conf"));
        cancel = systemTimers.after(HOST_RESOLVER_CHECK_MS, check);
      }
    }
    return {
      changed: (delta) => {
        for (const listener of listeners) listener(delta.services);
      },
      counters: () => Object.assign({}, ...counters.map((read) => read())) as Record<string, number>,
      stop: () => undo.run(log),
    };
  });
}

/** A LAN's counters apart from the bridge's. */
function onLan(counters: Readonly<Record<string, number>>): Record<string, number> {
  return Object.fromEntries(
    Object.entries(counters).map(([name, value]) => [name.replace(/^mdns_/, 'mdns_lan_'), value]),
  );
}

/** The first address of a link, its prefix and how much a frame of it holds. */
async function faceOn(
  link: string,
): Promise<{ readonly address: Ipv4; readonly subnet: Cidr; readonly mtu?: number }> {
  const observer = new Observer(hostRunner);
  const [first] = (await observer.addresses()).get(link) ?? [];
  if (first === undefined)
    throw new EdgewayError('host_unsupported', `--mdns-lan ${link}: the interface has no IPv4 address`);
  const mtu = (await observer.links()).find(({ ifname }) => ifname === link)?.mtu;
  const [text, bits] = first.split('/') as [string, string];
  const address = unwrap(parseIpv4(text));
  const subnet = { base: networkOf(address, Number(bits)), bits: Number(bits) };
  return { address, subnet, ...(mtu === undefined ? {} : { mtu }) };
}
