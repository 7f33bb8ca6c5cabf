// What the proxy's decision about one packet costs, without a kernel: nanoseconds per leaving packet with few and many
// services, with few and many flows. Prints one JSON line.
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

function measure(services: number, flows: number): number {
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
    flowsMax: 131_072,
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
  const packets = Array.from({ length: Math.min(flows, 4_096) }, (_, i) => {
    const bytes = newBytes(total);
    const target = SERVICES + 16 + (i % services) * 3;
    writeIpv4(bytes, 0, { source: CLIENT, target, protocol: PROTOCOL.udp, total });
    writeUdp(bytes, IPV4.size, 1_024 + (i % 60_000), 80, total - IPV4.size);
    finishUdp(bytes, IPV4.size, total - IPV4.size, CLIENT, target);
    return bytes.u8;
  });
  const bytes = newBytes(256);
  // Flows beyond the prepared ones only fill the table.
  for (let i = packets.length; i < flows; i++) {
    bytes.u8.set(packets[i % packets.length]!, AT);
    bytes.view.setUint16(AT + IPV4.size, 1_024 + Math.floor(i / packets.length));
    bytes.view.setUint16(AT + IPV4.size + 2, 81 + (i % 4_096));
    proxy.leaving(bytes, AT, total, false, 0, 0);
  }
  const once = (count: number): number => {
    const begin = performance.now();
    for (let i = 0; i < count; i++) {
      bytes.u8.set(packets[i % packets.length]!, AT);
      if (proxy.leaving(bytes, AT, total, false, 0, 0) !== VERDICT.tunnel)
        throw new Error('a packet was dropped');
    }
    return ((performance.now() - begin) * 1e6) / count;
  };
  once(200_000);
  const times = [once(500_000), once(500_000), once(500_000), once(500_000), once(500_000)].sort(
    (a, b) => a - b,
  );
  return Math.round(times[2]! * 10) / 10;
}

// The first measurement warms the compiler and is thrown away.
measure(10, 1_000);
const services10 = measure(10, 1_000);
const services10000 = measure(10_000, 1_000);
const flows100000 = measure(10, 100_000);
process.stdout.write(
  `${JSON.stringify({
    services_10_ns: services10,
    services_10000_ns: services10000,
    flows_100000_ns: flows100000,
    services_10000_vs_10: Math.round((services10000 / services10) * 100) / 100,
  })}\n`,
);
