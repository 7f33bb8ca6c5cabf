// Why a service that can be read does not work as written: an address or a node port that it names is somebody else's
// or nobody's. For people who list services; it repairs nothing, that is the cluster role's.
import { formatIpv4 } from '../src/addr.ts';
import { EdgewayError } from '../src/error.ts';
import type { Keys } from '../src/keys.ts';
import { publishedPorts, type Service } from '../src/model.ts';
import { POLICIES } from '../src/policy.ts';
import { decodeAddress, decodePort } from '../src/records.ts';
import { describeOwner } from './claims.ts';
import type { Kv } from './kv.ts';

/** By the service's key; a service without fault has no entry. Two listings, however many services there are. */
export async function serviceFaults(
  kv: Kv,
  keys: Keys,
  services: Iterable<Service>,
): Promise<Map<string, EdgewayError>> {
  const values = new Map<string, string>();
  for (const subtree of ['addresses', 'ports'] as const)
    for (const { key, value } of (await kv.range(keys.prefix(subtree))).entries) values.set(key, value);
  const faults = new Map<string, EdgewayError>();
  for (const service of services) {
    const reasons = [...addressFaults(keys, service, values), ...portFaults(keys, service, values)];
    if (reasons.length > 0)
      faults.set(
        keys.build({ kind: 'service', service: service.id }),
        new EdgewayError('invalid_record', reasons.join('; ')),
      );
  }
  return faults;
}

function* addressFaults(keys: Keys, { id, addresses }: Service, values: ReadonlyMap<string, string>) {
  for (const policy of POLICIES) {
    const address = addresses[policy];
    if (address === undefined) {
      yield `has no address for ${policy} yet`;
      continue;
    }
    const value = values.get(keys.build({ kind: 'address', address }));
    const owner = value === undefined ? undefined : decodeAddress(value);
    const what = `address ${formatIpv4(address)} (${policy})`;
    if (owner === undefined) yield `${what} is not claimed`;
    else if (!owner.ok) yield `${what} has a claim that cannot be read`;
    else if (owner.value.kind !== 'service' || owner.value.service !== id || owner.value.policy !== policy)
      yield `${what} ${describeOwner(owner.value)}`;
  }
}

function* portFaults(keys: Keys, { id, descriptor }: Service, values: ReadonlyMap<string, string>) {
  for (const { protocol, source } of publishedPorts(descriptor)) {
    const value = values.get(keys.build({ kind: 'port', protocol, port: source }));
    const owner = value === undefined ? undefined : decodePort(value);
    const what = `${protocol} port ${source}`;
    if (owner === undefined) yield `${what} is not claimed`;
    else if (!owner.ok) yield `${what} has a claim that cannot be read`;
    else if (owner.value.service !== id) yield `${what} leads to service ${owner.value.service}`;
  }
}
