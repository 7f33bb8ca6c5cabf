// The server side of the DNS measurement: the agent's own unicast server on loopback with a table of services. One
// JSON command per line changes a service; the line that comes back says that the change holds.
//   bench_dns_server.ts PORT SERVICES
import process from 'node:process';
import { createInterface } from 'node:readline';
import { boundHeap } from '../coordinator/io/heap.ts';
import { startDnsServer } from '../edge/io/dns_server.ts';
import { RouteTable } from '../edge/routes/table.ts';
import { type Ipv4, ipv4, parseIpv4 } from '../src/addr.ts';
import { unwrap } from '../src/error.ts';
import { SILENT } from '../src/log.ts';
import { parseServiceId, type ServiceId, splitServiceId } from '../src/name.ts';

boundHeap();

const [port, services] = process.argv.slice(2).map(Number) as [number, number];
const table = new RouteTable();

function put(id: ServiceId, first: Ipv4): void {
  const { app, appNs, service, serviceNs } = splitServiceId(id);
  table.putService({
    id,
    descriptor: {
      appname: app,
      appnamespace: appNs,
      servicename: service,
      servicenamespace: serviceNs,
      exposed: false,
      ports: [80],
      statefull: false,
    },
    addresses: { roundrobin: first, closest: ipv4(first + 1), fastest: ipv4(first + 2) },
  });
}

for (let i = 0; i < services; i++) put(unwrap(parseServiceId(`app.ns.s${i}.v1`)), ipv4(0xac1e0001 + i * 4));
table.synced = true;
const dns = await startDnsServer({
  address: ipv4(0x7f000001),
  port,
  table,
  upstreams: () => [],
  onLookup: () => {},
  needsOf: () => undefined,
  log: SILENT,
  clock: { monotonicMs: () => performance.now(), wallMs: () => Date.now() },
});
process.stdout.write('ready\n');
for await (const line of createInterface({ input: process.stdin })) {
  const { service, first } = JSON.parse(line) as { service: string; first: string };
  put(unwrap(parseServiceId(service)), unwrap(parseIpv4(first)));
  process.stdout.write(`${JSON.stringify({ service, counters: dns.counters() })}\n`);
}
await dns.stop();
