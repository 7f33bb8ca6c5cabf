// The address plan: which addresses belong to nodes and which to services. One pure function each way between a
// subnet's index and its prefix, with a hole where the service range lies.
//
//   172.16.0.0/12  ┌ 172.16 … 172.29 ┐ node subnets, /26 each: 14 × 1,024
//                  │ 172.30          │ ServiceIPs and InstanceIPs
//                  └ 172.31          ┘ node subnets: 1,024
import { type Cidr, contains, formatCidr, type Ipv4, ipv4, networkOf, overlaps, sizeOf } from './addr.ts';
import { assert } from './assert.ts';
import { fail, ok, type Result } from './error.ts';
import { SUBNETS_MAX } from './limits.ts';

export interface Plan {
  /** The whole platform. */
  readonly platform: Cidr;
  /** ServiceIPs and InstanceIPs; inside `platform`, aligned to node subnets. */
  readonly services: Cidr;
  /** Prefix length of a node's subnet. */
  readonly nodeBits: number;
}

/** 172.16.0.0/12 in /26 subnets, services in 172.30.0.0/16: 15 × 1,024 = 15,360 nodes of 61 instances. */
export const DEFAULT_PLAN: Plan = {
  platform: { base: ipv4(0xac100000), bits: 12 },
  services: { base: ipv4(0xac1e0000), bits: 16 },
  nodeBits: 26,
};

/** Checks the relations that every other function here relies on. */
export function checkPlan(plan: Plan): Result<Plan> {
  const { platform, services, nodeBits } = plan;
  if (services.bits < platform.bits || !contains(platform, services.base))
    return fail(
      'invalid_request',
      `plan: services ${formatCidr(services)} must lie inside platform ${formatCidr(platform)}`,
    );
  if (services.bits === platform.bits)
    return fail('invalid_request', `plan: services ${formatCidr(services)} leave no room for node subnets`);
  if (!Number.isInteger(nodeBits) || nodeBits < services.bits || nodeBits > 30)
    return fail(
      'invalid_request',
      `plan: nodeBits ${nodeBits} must be an integer from ${services.bits} to 30`,
    );
  if (subnetCount(plan) > SUBNETS_MAX)
    return fail(
      'invalid_request',
      `plan: ${formatCidr(platform)} in /${nodeBits} makes ${subnetCount(plan)} node subnets; at most ${SUBNETS_MAX} are possible`,
    );
  return ok(plan);
}

/** How many node subnets the plan holds. */
export function subnetCount(plan: Plan): number {
  const per = 2 ** (32 - plan.nodeBits);
  return (sizeOf(plan.platform) - sizeOf(plan.services)) / per;
}

/** The subnet with that index, 0 … subnetCount-1. */
export function subnetAt(plan: Plan, index: number): Cidr {
  assert(
    Number.isInteger(index) && index >= 0 && index < subnetCount(plan),
    'a subnet index lies inside the plan',
  );
  const per = 2 ** (32 - plan.nodeBits);
  const plain = plan.platform.base + index * per;
  const base = plain >= plan.services.base ? plain + sizeOf(plan.services) : plain;
  return { base: ipv4(base), bits: plan.nodeBits };
}

/** Inverse of subnetAt; the error says which rule the prefix breaks. */
export function subnetIndex(plan: Plan, subnet: Cidr): Result<number> {
  const text = formatCidr(subnet);
  if (subnet.bits !== plan.nodeBits)
    return fail(
      'address_not_in_plan',
      `subnet ${text} must be a /${plan.nodeBits}: that is the plan's node prefix`,
    );
  if (!contains(plan.platform, subnet.base))
    return fail(
      'address_not_in_plan',
      `subnet ${text} lies outside the platform ${formatCidr(plan.platform)}`,
    );
  if (overlaps(plan.services, subnet))
    return fail(
      'address_not_in_plan',
      `subnet ${text} lies in ${formatCidr(plan.services)}, which belongs to services`,
    );
  const per = 2 ** (32 - plan.nodeBits);
  const past = subnet.base > plan.services.base ? sizeOf(plan.services) : 0;
  return ok((subnet.base - past - plan.platform.base) / per);
}

/** A block of node subnets lies inside the platform and is no narrower than one of them. */
export function checkBlock(plan: Plan, block: Cidr): Result<Cidr> {
  const { platform, nodeBits } = plan;
  if (block.bits >= platform.bits && block.bits <= nodeBits && contains(platform, block.base))
    return ok(block);
  return fail(
    'address_not_in_plan',
    `block ${formatCidr(block)} must lie inside the platform ${formatCidr(platform)} and hold whole /${nodeBits} subnets`,
  );
}

/** The node subnet that an address falls into, if it is a node address at all. */
export function subnetOf(plan: Plan, address: Ipv4): Cidr | undefined {
  if (!contains(plan.platform, address) || contains(plan.services, address)) return undefined;
  return { base: networkOf(address, plan.nodeBits), bits: plan.nodeBits };
}

/** Addresses of one node subnet, by role. */
export interface SubnetLayout {
  /** Gateway and nameserver of the instances: the first address after the network's. */
  readonly bridge: Ipv4;
  readonly firstInstance: Ipv4;
  /** Inclusive; the broadcast address follows it. */
  readonly lastInstance: Ipv4;
  readonly broadcast: Ipv4;
  /** /26: 64 − network − bridge − broadcast = 61. */
  readonly instancesMax: number;
}

export function layoutOf(subnet: Cidr): SubnetLayout {
  const size = sizeOf(subnet);
  return {
    bridge: ipv4(subnet.base + 1),
    firstInstance: ipv4(subnet.base + 2),
    lastInstance: ipv4(subnet.base + size - 2),
    broadcast: ipv4(subnet.base + size - 1),
    instancesMax: size - 3,
  };
}

/** Usable service addresses: all but the first and the last of the range, which look like network and broadcast. */
export function serviceAddressCount(plan: Plan): number {
  return sizeOf(plan.services) - 2;
}

/** The service address with that index, 0 … serviceAddressCount-1. */
export function serviceAddressAt(plan: Plan, index: number): Ipv4 {
  assert(index >= 0 && index < serviceAddressCount(plan), 'a service address index lies inside the plan');
  return ipv4(plan.services.base + 1 + index);
}

/** True for an address that may be claimed as a ServiceIP or an InstanceIP. */
export function isServiceAddress(plan: Plan, address: Ipv4): boolean {
  if (!contains(plan.services, address)) return false;
  const offset = address - plan.services.base;
  return offset > 0 && offset < sizeOf(plan.services) - 1;
}
