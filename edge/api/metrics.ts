// `/metrics` in the Prometheus text format, by prom-client, from the same status and counters that the API shows.
// A registry of its own, filled when it is asked for: nothing is measured twice.
import { Counter, Gauge, Registry } from 'prom-client';
import type { NodeControl } from './app.ts';

/** Counter families that carry what differs as a label, by the prefix of the counter's name. */
const FAMILIES = [
  {
    prefix: 'drop_',
    name: 'edgeway_dropped_packets_total',
    help: 'packets dropped by the ProxyTUN',
    label: 'reason',
  },
  {
    prefix: 'chosen_',
    name: 'edgeway_choices_total',
    help: 'new flows by service/instance and policy',
    label: 'choice',
  },
  { prefix: 'mdns_', name: 'edgeway_mdns_total', help: 'multicast DNS events', label: 'event' },
  { prefix: 'dns_', name: 'edgeway_dns_total', help: 'unicast DNS events', label: 'event' },
] as const;

export async function metricsText(
  node: Pick<NodeControl, 'status' | 'counters'>,
): Promise<{ type: string; text: string }> {
  const registry = new Registry();
  const registers = [registry];
  const status = node.status();
  new Gauge({
    name: 'edgeway_build_info',
    help: 'always 1',
    labelNames: ['version', 'runtime', 'node', 'cluster'],
    registers,
  })
    .labels({ version: status.version, runtime: status.runtime, node: status.node, cluster: status.cluster })
    .set(1);
  const gauge = (name: string, help: string, value: number): void => {
    new Gauge({ name, help, registers }).set(value);
  };
  gauge('edgeway_registered', '1 when this node holds a subnet', status.subnet === null ? 0 : 1);
  gauge(
    'edgeway_etcd_live',
    '1 while every followed path of the keyspace is watched',
    status.etcd === 'live' ? 1 : 0,
  );
  gauge('edgeway_revision', 'revision of the keyspace that the routing table reflects', status.revision);
  gauge('edgeway_instances', 'instances on this node', status.instances);
  gauge('edgeway_flows', 'flows that the ProxyTUN tracks', status.flows);

  const families = new Map(
    FAMILIES.map(({ prefix, name, help, label }) => [
      prefix,
      new Counter({ name, help, labelNames: [label], registers }),
    ]),
  );
  for (const [key, value] of Object.entries(node.counters())) {
    const family = FAMILIES.find(({ prefix }) => key.startsWith(prefix));
    if (family !== undefined)
      families
        .get(family.prefix)!
        .labels({ [family.label]: key.slice(family.prefix.length) })
        .inc(value);
    else if (key !== 'flows')
      new Counter({
        name: `edgeway_${key}_total`,
        help: `${key.replaceAll('_', ' ')} since the agent started`,
        registers,
      }).inc(value);
  }
  return { type: registry.contentType, text: await registry.metrics() };
}
