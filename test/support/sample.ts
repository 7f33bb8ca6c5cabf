// Small true values for tests, and generators of arbitrary ones.
import fc from 'fast-check';
import { type Cidr, type Ipv4, ipv4, networkOf, parseIpv4 } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import type { Key } from '../../src/keys.ts';
import type { Descriptor, Instance, Node } from '../../src/model.ts';
import { INSTANCE_NUMBER_MAX, parseServiceId, type ServiceId } from '../../src/name.ts';
import { DEFAULT_PLAN, layoutOf, subnetAt } from '../../src/plan.ts';

export const ip = (text: string): Ipv4 => unwrap(parseIpv4(text));
export const sid = (text: string): ServiceId => unwrap(parseServiceId(text));
export const CART = sid('shop.prod.cart.v1');

export function descriptor(id: ServiceId = CART, more: Partial<Descriptor> = {}): Descriptor {
  const [appname, appnamespace, servicename, servicenamespace] = id.split('.') as [
    string,
    string,
    string,
    string,
  ];
  return {
    appname,
    appnamespace,
    servicename,
    servicenamespace,
    exposed: false,
    ports: [80],
    statefull: false,
    ...more,
  };
}

export function node(id: string, index: number, more: Partial<Node> = {}): Node {
  return {
    node: id,
    cluster: 'lab',
    nodeIp: ipv4(ip('10.0.0.1') + index),
    ewp: 4790,
    nsp: 0,
    subnet: subnetAt(DEFAULT_PLAN, index),
    epoch: 1,
    ...more,
  };
}

export function instance(
  of: Node,
  service: ServiceId,
  number: number,
  more: Partial<Instance> = {},
): Instance {
  return {
    service,
    instance: number,
    node: of.node,
    cluster: of.cluster,
    nodeIp: of.nodeIp,
    ewp: of.ewp,
    nsp: of.nsp,
    namespaceIp: ipv4(layoutOf(of.subnet).firstInstance + number),
    instanceIp: ipv4(ip('172.30.1.0') + number),
    ports: [80],
    epoch: of.epoch,
    ...more,
  };
}

const LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789';
export const anyLabel = fc
  .array(fc.constantFrom(...LETTERS, '-'), { minLength: 1, maxLength: 12 })
  .map((chars) => chars.join(''))
  .filter((label) => !label.startsWith('-') && !label.endsWith('-'));
export const anyServiceId: fc.Arbitrary<ServiceId> = fc
  .tuple(anyLabel, anyLabel, anyLabel, anyLabel)
  .map((labels) => sid(labels.join('.')));
export const anyIpv4: fc.Arbitrary<Ipv4> = fc.nat(0xffffffff).map(ipv4);
export const anyCidr: fc.Arbitrary<Cidr> = fc
  .tuple(anyIpv4, fc.integer({ min: 0, max: 32 }))
  .map(([address, bits]) => ({ base: networkOf(address, bits), bits }));
export const anyId = fc
  .tuple(
    fc.constantFrom(...LETTERS),
    fc.array(fc.constantFrom(...LETTERS, '.', '_', '-'), { maxLength: 20 }).map((chars) => chars.join('')),
  )
  .map(([first, rest]) => first + rest);
export const anyInstanceNumber = fc.integer({ min: 1, max: INSTANCE_NUMBER_MAX });
export const anyPort = fc.integer({ min: 1, max: 65_535 });

export const anyKey: fc.Arbitrary<Key> = fc.oneof(
  fc.constant({ kind: 'config' } as const),
  fc.constant({ kind: 'rootLeader' } as const),
  anyCidr.map((block) => ({ kind: 'block', block }) as const),
  anyId.map((cluster) => ({ kind: 'cluster', cluster }) as const),
  anyId.map((cluster) => ({ kind: 'clusterLeader', cluster }) as const),
  anyCidr.map((subnet) => ({ kind: 'subnet', subnet }) as const),
  fc.tuple(anyId, anyId).map(([cluster, node]) => ({ kind: 'node', cluster, node }) as const),
  anyId.map((node) => ({ kind: 'host', node }) as const),
  fc.tuple(anyId, anyId).map(([node, caller]) => ({ kind: 'call', node, caller }) as const),
  anyServiceId.map((service) => ({ kind: 'service', service }) as const),
  anyServiceId.map((service) => ({ kind: 'exposed', service }) as const),
  anyIpv4.map((address) => ({ kind: 'address', address }) as const),
  fc
    .tuple(anyServiceId, anyInstanceNumber)
    .map(([service, instance]) => ({ kind: 'instance', service, instance }) as const),
  fc
    .tuple(fc.constantFrom('tcp', 'udp'), fc.integer({ min: 1, max: 65_535 }))
    .map(([protocol, port]) => ({ kind: 'port', protocol, port }) as const),
);
