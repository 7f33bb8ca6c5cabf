// The table's nouns as the API shows them: addresses as text, nothing derived that an operator could not check.
import { formatCidr, formatIpv4, type Ipv4 } from '../src/addr.ts';
import type { EdgewayError } from '../src/error.ts';
import type { Instance, Node, Service } from '../src/model.ts';
import { formatName, type Name } from '../src/name.ts';
import type { ExplainView, InstanceView, NodeView, Problem, ServiceView } from './api/app.ts';
import type { Explanation } from './balance.ts';
import type { RecordedChoice } from './steering.ts';

export function viewInstance(i: Instance): InstanceView {
  return {
    service: i.service,
    instance: i.instance,
    node: i.node,
    nodeIp: formatIpv4(i.nodeIp),
    ewp: i.ewp,
    namespaceIp: formatIpv4(i.namespaceIp),
    instanceIp: formatIpv4(i.instanceIp),
  };
}

export function viewService(service: Service, instances: number): ServiceView {
  const { needs, ports, exposed, statefull, policy } = service.descriptor;
  return {
    service: service.id,
    ...(needs === undefined ? {} : { needs: [...needs] }),
    ports: [...ports],
    exposed,
    statefull,
    ...(policy === undefined ? {} : { policy }),
    addresses: Object.fromEntries(
      Object.entries(service.addresses).map(([policy, address]) => [policy, formatIpv4(address)]),
    ),
    instances,
  };
}

export function viewNode(node: Node): NodeView {
  const { cluster, ewp, nsp, epoch } = node;
  return {
    node: node.node,
    cluster,
    nodeIp: formatIpv4(node.nodeIp),
    ewp,
    nsp,
    nat: node.nat === true,
    subnet: formatCidr(node.subnet),
    epoch,
  };
}

/** Problems of one subtree. */
export function viewProblems(problems: ReadonlyMap<string, EdgewayError>, prefix: string): Problem[] {
  return [...problems]
    .filter(([key]) => key.startsWith(prefix))
    .map(([key, error]) => ({ key, code: error.code, reason: error.message }));
}

const round = (value: number | undefined, digits: number): number | null =>
  value === undefined ? null : Number(value.toFixed(digits));

/** For an InstanceIP only its own instance is a candidate, with all the flows. */
export function viewExplanation(
  name: Name,
  service: Service | undefined,
  explanation: Explanation,
  more: {
    /** What health checks say of an instance of this node. */
    readonly healthOf: (instance: number) => string | undefined;
    readonly addressOf: (instance: number) => Ipv4 | undefined;
    readonly choices: readonly RecordedChoice[];
  },
): ExplainView {
  const fixed = 'instance' in name ? name.instance : undefined;
  const address = 'policy' in name ? service?.addresses[name.policy] : more.addressOf(name.instance);
  const candidates = explanation.candidates
    .filter(({ instance }) => fixed === undefined || instance === fixed)
    .map(({ instance, node, local, health, reason, rttMs, confirmed, load, costMs, share }) => {
      const instanceIp = more.addressOf(instance);
      return {
        instance,
        instanceIp: instanceIp === undefined ? null : formatIpv4(instanceIp),
        node,
        local,
        health,
        reason: (local ? more.healthOf(instance) : undefined) ?? reason,
        rttMs: round(rttMs, 3),
        rttBy: rttMs === undefined ? null : confirmed ? ('probe' as const) : ('coordinate' as const),
        load: round(load, 3),
        costMs: round(costMs, 3),
        share: fixed === undefined ? Number(share.toFixed(4)) : 1,
      };
    });
  return {
    name: formatName(name),
    address: address === undefined ? null : formatIpv4(address),
    policy: 'policy' in name ? name.policy : 'fixed',
    why: fixed === undefined ? explanation.why : 'an InstanceIP means this instance and no other',
    candidates,
    choices: more.choices.map(({ wallMs, policy, instance, client, why }) => ({
      at: new Date(wallMs).toISOString(),
      policy,
      instance,
      client: formatIpv4(client),
      why,
    })),
  };
}
