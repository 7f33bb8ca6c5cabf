// What the cluster role does: keep its cluster's record, give addresses to services that a person wrote without any
// (or with somebody else's), and sweep what nothing owns any more. Decisions are pure; each becomes one fenced
// transaction. It never takes an address from a living owner: what hangs on a node's tenure lease is left to it.
import { formatIpv4, type Ipv4 } from '../src/addr.ts';
import type { Keys } from '../src/keys.ts';
import type { ServiceId } from '../src/name.ts';
import { isServiceAddress } from '../src/plan.ts';
import { POLICIES } from '../src/policy.ts';
import { encodeAddress, encodeCluster } from '../src/records.ts';
import type { Operation } from './kv.ts';
import { RESTING_LEASE } from './rest.ts';
import type { Action } from './root.ts';
import type { View } from './view.ts';

export interface ClusterDecision {
  /** Services whose addresses are incomplete or not their own: they need claims. */
  readonly complete: readonly { readonly service: ServiceId; readonly revision: number }[];
  readonly actions: readonly Action[];
}

/** `unreadable`: keys whose value cannot be read; what may belong to them is left alone. */
export function decideCluster(
  view: View,
  keys: Keys,
  cluster: string,
  unreadable: ReadonlySet<string>,
): ClusterDecision {
  const actions: Action[] = [];
  const ownKey = keys.build({ kind: 'cluster', cluster });
  if (view.get('cluster', ownKey) === undefined && !unreadable.has(ownKey))
    actions.push({
      why: `ask for admission of cluster ${cluster}`,
      compares: [{ key: ownKey, createRevision: 0 }],
      operations: [{ kind: 'put', key: ownKey, value: encodeCluster({ cluster, admitted: false }) }],
    });

  const plan = view.get('config', keys.build({ kind: 'config' }))?.value.plan;
  const complete: { service: ServiceId; revision: number }[] = [];
  const addressKey = (address: Ipv4): string => keys.build({ kind: 'address', address });
  for (const { value: service, modRevision } of view.all('service').values()) {
    const sound = POLICIES.every((policy) => {
      const address = service.addresses[policy];
      if (address === undefined) return false;
      if (plan !== undefined && !isServiceAddress(plan, address)) return false;
      // Claiming anew would move a service that runs; the fault is reported, and mended by a person.
      if (unreadable.has(addressKey(address))) return true;
      const owner = view.get('address', addressKey(address))?.value;
      return (
        owner?.kind === 'service' &&
        owner.service === service.id &&
        owner.policy === policy &&
        owner.resting !== true
      );
    });
    const exposed = view.get('exposed', keys.build({ kind: 'exposed', service: service.id })) !== undefined;
    if (!sound || exposed !== service.descriptor.exposed)
      complete.push({ service: service.id, revision: modRevision });
  }
  for (const [key, { key: parsed, modRevision }] of view.all('exposed')) {
    const recordKey = keys.build({ kind: 'service', service: parsed.service });
    if (view.get('service', recordKey) !== undefined || unreadable.has(recordKey)) continue;
    actions.push({
      why: `forget that ${parsed.service}, which is gone, was exposed`,
      compares: [
        { key, modRevision },
        { key: recordKey, createRevision: 0 },
      ],
      operations: [{ kind: 'delete', key }],
    });
  }

  for (const [key, { value: owner, modRevision, lease, key: parsed }] of view.all('address')) {
    if (owner.resting === true) {
      // Resting without a lease would rest for ever.
      if (lease === undefined)
        actions.push({
          why: `end the rest of ${formatIpv4(parsed.address)}, which no lease would end`,
          compares: [{ key, modRevision }],
          operations: [{ kind: 'delete', key }],
        });
      continue;
    }
    const orphan =
      owner.kind === 'service'
        ? orphanOfService(view, keys, owner.service, parsed.address, unreadable)
        : // An instance's claim hangs on its node's tenure; only one without a lease can be left behind.
          lease === undefined &&
          ![...view.all('node').values()].some(({ value }) => value.node === owner.node);
    if (!orphan) continue;
    const put: Operation = {
      kind: 'put',
      key,
      value: encodeAddress({ ...owner, resting: true }),
      lease: RESTING_LEASE,
    };
    const guard = owner.kind === 'service' ? serviceGuard(view, keys, owner.service) : [];
    actions.push({
      why: `free ${formatIpv4(parsed.address)}, whose owner ${owner.service} is gone`,
      compares: [{ key, modRevision }, ...guard],
      operations: [put],
    });
  }

  for (const [key, { value: instance, modRevision }] of view.all('instance')) {
    const nodeKey = keys.build({ kind: 'node', cluster: instance.cluster, node: instance.node });
    if (view.get('node', nodeKey) !== undefined || unreadable.has(nodeKey)) continue;
    actions.push({
      why: `remove instance ${instance.instance} of ${instance.service}: node ${instance.node} is gone`,
      compares: [
        { key, modRevision },
        { key: nodeKey, createRevision: 0 },
      ],
      operations: [{ kind: 'delete', key }],
    });
  }
  return { complete, actions };
}

function orphanOfService(
  view: View,
  keys: Keys,
  service: ServiceId,
  address: Ipv4,
  unreadable: ReadonlySet<string>,
): boolean {
  const key = keys.build({ kind: 'service', service });
  if (unreadable.has(key)) return false;
  const record = view.get('service', key)?.value;
  return record === undefined || !Object.values(record.addresses).includes(address);
}

/** The service must still be as it was when the address was found to be nobody's. */
function serviceGuard(view: View, keys: Keys, service: ServiceId) {
  const key = keys.build({ kind: 'service', service });
  const held = view.get('service', key);
  return [held === undefined ? { key, createRevision: 0 } : { key, modRevision: held.modRevision }];
}
