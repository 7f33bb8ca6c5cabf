// The table's nouns as the API shows them: addresses as text, nothing derived that an operator could not check.
import { formatCidr, formatIpv4 } from '../src/addr.ts';
import type { EdgewayError } from '../src/error.ts';
import type { Instance, Node, Service } from '../src/model.ts';
import type { InstanceView, NodeView, Problem, ServiceView } from './api/app.ts';

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
  const { needs, ports, exposed, statefull } = service.descriptor;
  return {
    service: service.id,
    ...(needs === undefined ? {} : { needs: [...needs] }),
    ports: [...ports],
    exposed,
    statefull,
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
