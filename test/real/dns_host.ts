// The process under test: a table, the unicast server and the multicast server on the bridge of a namespace. It takes
// one JSON command per line and answers each with one line; it ends with its standard input.
import { createServer } from 'node:http';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { serveOutside } from '../../coordinator/io/outside_server.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { parseZone } from '../../coordinator/outside.ts';
import { startDnsServer } from '../../edge/io/dns_server.ts';
import { startMdns } from '../../edge/io/mdns_server.ts';
import { unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { SILENT } from '../../src/log.ts';
import type { ServiceId } from '../../src/name.ts';
import { CART, id, ip, service, world } from '../edge/resolver/world.ts';

interface Options {
  readonly upstreams?: readonly string[];
  readonly needs?: Readonly<Record<string, readonly string[]>>;
  readonly mdns?: boolean;
  /** Two-label name of cart on the bridge as if it were a LAN. */
  readonly alias?: string;
  /** The bridge's own prefix is all that the unicast server serves. */
  readonly linkOnly?: boolean;
  /** Service that the keyspace tells of only when it is asked for. */
  readonly late?: string;
  /** Port of an outside DNS for edge.example.org, which knows nothing. */
  readonly outside?: number;
  /** Address of a web page. */
  readonly page?: string;
}
const options = JSON.parse(process.argv[2] ?? '{}') as Options;
const say = (message: object): void => {
  process.stdout.write(`${JSON.stringify(message)}\n`);
};
const table = world();
if (options.alias !== undefined) {
  const cart = table.service(CART)!;
  const ports = [{ source: 8080, destination: 80, protocol: 'tcp' as const }];
  table.putService({ ...cart, descriptor: { ...cart.descriptor, exposed: true, ports } });
}
const asked = new Map<ServiceId, number>();
const clock = { monotonicMs: () => performance.now(), wallMs: () => Date.now() };
const subnet = { base: ip('172.16.0.64'), bits: 26 };
const common = {
  address: ip('172.16.0.65'),
  table,
  clock,
  log: SILENT,
  onLookup: (name: ServiceId): Promise<boolean> | undefined => {
    asked.set(name, (asked.get(name) ?? 0) + 1);
    if (name !== options.late || table.service(name) !== undefined) return undefined;
    return new Promise((resolve) => {
      setTimeout(() => {
        table.putService(service(name, '172.30.8.1'));
        resolve(true);
      }, 100);
    });
  },
  needsOf: (source: number): readonly ServiceId[] | undefined => {
    for (const [address, names] of Object.entries(options.needs ?? {}))
      if (ip(address) === source) return names.map((name) => id(name));
    return undefined;
  },
};

const aliases = options.alias === undefined ? {} : { aliases: [{ name: options.alias, service: CART }] };

try {
  const links = options.linkOnly === true ? { clients: [subnet] } : {};
  const dns = await startDnsServer({ ...common, ...links, upstreams: () => options.upstreams ?? [] });
  const outside =
    options.outside === undefined
      ? undefined
      : await serveOutside({
          kv: new MemoryStore(clock.monotonicMs).connect(),
          keys: new Keys(),
          zone: unwrap(parseZone('edge.example.org')),
          address: ip('172.16.0.65'),
          port: options.outside,
          log: SILENT,
        });
  const mdns =
    options.mdns === false ? undefined : await startMdns({ ...common, interface: 'br0', subnet, ...aliases });
  mdns?.changed([CART]);
  const page = createServer((_request, response) => response.end('the page of cart'));
  let connections = 0;
  page.on('connection', () => connections++);
  page.on('clientError', (_error, socket) => socket.destroy());
  if (options.page !== undefined)
    await new Promise<void>((resolve) => page.listen(80, options.page, () => resolve()));
  say({ ready: true });
  for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line) as { put?: string; first?: string; delete?: string; synced?: boolean };
    if (command.put !== undefined) {
      table.putService(service(command.put, command.first ?? '172.30.9.1'));
      mdns?.changed([id(command.put)]);
    }
    if (command.delete !== undefined) {
      table.deleteService(id(command.delete));
      mdns?.changed([id(command.delete)]);
    }
    if (command.synced !== undefined) table.synced = command.synced;
    say({
      counters: { ...dns.counters(), ...mdns?.counters() },
      asked: Object.fromEntries(asked),
      connections,
    });
  }
  page.closeAllConnections();
  page.close();
  await outside?.stop();
  await mdns?.stop();
  await dns.stop();
} catch (error) {
  say({ error: (error as Error).message, code: (error as { code?: string }).code });
}
