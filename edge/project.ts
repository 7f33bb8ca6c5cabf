// The packet loop's projection of the routing table: which commands bring the loop up to date. Pure.
import type { Ipv4 } from '../src/addr.ts';
import type { Instance } from '../src/model.ts';
import type { ServiceId } from '../src/name.ts';
import type { InstanceRoute, ProxyCommand } from './proxy/command.ts';
import type { RouteTable } from './routes/table.ts';

function routeOf(instance: Instance, thisNode: string): InstanceRoute {
  return {
    instance: instance.instance,
    instanceIp: instance.instanceIp,
    namespaceIp: instance.namespaceIp,
    nodeIp: instance.nodeIp,
    ewp: instance.ewp,
    local: instance.node === thisNode,
  };
}

/** What the loop must be told about one service: only addresses that answer to it, so that a record which lists another
 *  one's takes no packets. An instance may be there before its service's record. `isHere` is asked of this node's own
 *  instances only. */
export function projectService(
  table: RouteTable,
  id: ServiceId,
  thisNode: string,
  isHere: (instance: Instance) => boolean = () => true,
): ProxyCommand {
  const service = table.service(id);
  const instances = table.instancesOf(id).filter((one) => one.node !== thisNode || isHere(one));
  const isOf = (address: Ipv4): boolean => table.nameOf(address)?.service === id;
  if (service === undefined && instances.length === 0) return { kind: 'serviceGone', service: id };
  return {
    kind: 'service',
    service: id,
    addresses: Object.fromEntries(
      Object.entries(service?.addresses ?? {}).filter(([, address]) => isOf(address)),
    ),
    instances: instances
      .filter(({ instanceIp }) => isOf(instanceIp))
      .map((instance) => routeOf(instance, thisNode)),
  };
}

/** What the loop must be told about an instance of this node; `needs` come from its service's descriptor. */
export function projectLocal(
  table: RouteTable,
  local: Pick<Instance, 'service' | 'namespaceIp' | 'instanceIp'>,
): ProxyCommand {
  const needs = table.service(local.service)?.descriptor.needs;
  return {
    kind: 'local',
    namespaceIp: local.namespaceIp,
    instanceIp: local.instanceIp,
    service: local.service,
    ...(needs === undefined ? {} : { needs }),
  };
}
