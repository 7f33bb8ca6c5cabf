// What the proxy's decision about one packet costs, without a kernel: nanoseconds per leaving packet with few and many
// services, and with 100,000 flows that all take turns. Prints one JSON line.
import process from 'node:process';
import { ProxyTun } from '../edge/proxy/proxy.ts';
import { VERDICT } from '../edge/proxy/verdict.ts';
import { ipv4 } from '../src/addr.ts';
import { VNI_DEFAULT } from '../src/limits.ts';
import type { ServiceId } from '../src/name.ts';
import { newBytes } from '../src/wire/bytes.ts';
import { IPV4, PROTOCOL, writeIpv4 } from '../src/wire/ipv4.ts';
import { finishUdp, UDP, writeUdp } from '../src/wire/udp.ts';

const SERVICES = 0xac1e0000;
const CLIENT = 0xac100042;
const AT = 16;
/** Traffic goes to as many services whatever the table holds: what is asked is what the others cost. */
const SERVICES_USED = 10;
/** More than an agent tracks (FLOWS_MAX), so that its worst is inside. */
const FLOWS = 100_000;

/** A proxy with that much in its tables; the result times packets, each of the next flow. */
function prepare(services: number, flows: number, used = SERVICES_USED): (count: number) => number {
  const proxy = new ProxyTun({
    tun: 'none',
    mtu: 1464,
    vni: VNI_DEFAULT,
    nodeIp: ipv4(0x0a000001),
    ewp: 4790,
    servicesBase: ipv4(SERVICES),
    servicesBits: 16,
    subnetBase: ipv4(0xac100040),
    subnetBits: 26,
    flowsMax: FLOWS,
    seed: 1,
  });
  const own = 's.s.client.v1' as ServiceId;
  proxy.apply({ kind: 'local', namespaceIp: ipv4(CLIENT), instanceIp: ipv4(SERVICES + 1), service: own }, 0);
  for (let i = 0; i < services; i++)
    proxy.apply(
      {
        kind: 'service',
        service: `s.s.s${i}.v1` as ServiceId,
        addresses: { roundrobin: ipv4(SERVICES + 16 + i * 3), closest: ipv4(SERVICES + 17 + i * 3) },
        instances: [
          {
            instance: 1,
            instanceIp: ipv4(SERVICES + 18 + i * 3),
            namespaceIp: ipv4(0xac110000 + (i % 1000) * 64 + 2),
            nodeIp: ipv4(0x0a000002 + (i % 1000)),
            ewp: 4790,
            local: false,
          },
        ],
      },
      0,
    );
  // One packet per flow, prepared, so that only the proxy is timed; copied in as a read would.
  const total = IPV4.size + UDP.size + 64;
  const packets = Array.from({ length: flows }, (_, i) => {
    const bytes = newBytes(total);
    const target = SERVICES + 16 + (i % used) * 3;
    writeIpv4(bytes, 0, { source: CLIENT, target, protocol: PROTOCOL.udp, total });
    writeUdp(bytes, IPV4.size, 1_024 + (i % 60_000), 80 + Math.floor(i / 60_000), total - IPV4.size);
    finishUdp(bytes, IPV4.size, total - IPV4.size, CLIENT, target);
    return bytes.u8;
  });
  const bytes = newBytes(256);
  let next = 0;
  return (count: number): number => {
    const begin = performance.now();
    for (let i = 0; i < count; i++) {
      bytes.u8.set(packets[next]!, AT);
      next = next + 1 === packets.length ? 0 : next + 1;
      if (proxy.leaving(bytes, AT, total, false, 0, 0) !== VERDICT.tunnel)
        throw new Error('a packet was dropped');
    }
    return ((performance.now() - begin) * 1e6) / count;
  };
}

// The cases take turns, and the least of each counts: what else runs on the machine only ever adds.
const cases = [prepare(10, 1_000), prepare(10_000, 1_000), prepare(10_000, FLOWS, 10_000)];
const least = cases.map(() => Number.POSITIVE_INFINITY);
for (let turn = 0; turn < 15; turn++)
  for (const [i, once] of cases.entries()) least[i] = Math.min(least[i]!, once(200_000));
const [few, many, flows] = least.map((ns) => Math.round(ns * 10) / 10) as [number, number, number];
process.stdout.write(
  `${JSON.stringify({
    services_10_ns: few,
    services_10000_ns: many,
    flows_100000_ns: flows,
    services_10000_vs_10: Math.round((many / few) * 100) / 100,
  })}\n`,
);
