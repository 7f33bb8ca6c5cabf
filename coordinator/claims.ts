// Claims: how a node gets its subnet, a service its ServiceIPs, an instance its InstanceIP and its place in the
// keyspace. Every claim is a create-if-absent transaction with an owner in the value; the key's create revision is
// its epoch. No lock protects anything here, and nothing that somebody else holds is ever overwritten.
//
// What a claim prefers is found without an index: the candidates of a claimant are an order of the range that depends
// only on who asks (and, for subnets, on the blocks of its cluster), so whoever asks again meets its own earlier claim
// first. That also settles a write whose outcome is unknown (a connection that broke after the request left): the
// next try recognises it. A node remembers its subnet on disk too; one that lost its disk after its cluster was
// granted more blocks may claim another, and the old one goes with its tenure.
//
// A node id belongs to one host of one cluster: every claim of a subnet writes or compares `hosts/<node>` in the same
// transaction, and so does whatever is published, so that hosts which were given one id cannot share what it holds.
//
// A released address rests (rest.ts): its value says so and a lease takes it away after the quarantine, so nobody else
// is given it while a peer may still hold a flow to its last owner; the last holder itself may take it up again at once.
// What tenure frees needs no rest: nobody has published it since presence ended, which is longer ago than the quarantine.
import {
  type Cidr,
  contains,
  formatCidr,
  formatIpv4,
  type Ipv4,
  ipv4,
  overlaps,
  sizeOf,
} from '../src/addr.ts';
import { EdgewayError, type Result, unwrap } from '../src/error.ts';
import { hash32 } from '../src/hash.ts';
import type { Keys } from '../src/keys.ts';
import { CLAIM_PROBES, CLAIM_TRIES_MAX, PORT_MAPPINGS_MAX } from '../src/limits.ts';
import {
  type AddressOwner,
  type Descriptor,
  type Host,
  type Instance,
  type NetworkConfig,
  type Node,
  type PortMapping,
  publishedPorts,
  type Service,
  type SubnetOwner,
} from '../src/model.ts';
import type { ServiceId } from '../src/name.ts';
import {
  checkBlock,
  isServiceAddress,
  type Plan,
  serviceAddressAt,
  serviceAddressCount,
  subnetAt,
  subnetCount,
  subnetIndex,
} from '../src/plan.ts';
import { POLICIES, type Policy } from '../src/policy.ts';
import {
  decodeAddress,
  decodeBlock,
  decodeConfig,
  decodeHost,
  decodeInstance,
  decodeNode,
  decodePort,
  decodeService,
  decodeSubnet,
  descriptorId,
  encodeAddress,
  encodeConfig,
  encodeExposed,
  encodeHost,
  encodeInstance,
  encodeNode,
  encodePort,
  encodeService,
  encodeSubnet,
  recordError,
  sameService,
} from '../src/records.ts';
import type { Compare, Kv, KvEntry, LeaseId, Operation } from './kv.ts';
import { RESTING_LEASE, txnWithRest } from './rest.ts';

/** What there is, or `wanted` when there is nothing yet. Rejects `invalid_record` when what is there cannot be read. */
export async function ensureConfig(kv: Kv, keys: Keys, wanted: NetworkConfig): Promise<NetworkConfig> {
  const key = keys.build({ kind: 'config' });
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const entry = await kv.get(key);
    if (entry !== undefined) {
      const config = decodeConfig(entry.value);
      if (!config.ok) throw recordError(key, config.error);
      return config.value;
    }
    await kv.txn([{ key, createRevision: 0 }], [{ kind: 'put', key, value: encodeConfig(wanted) }]);
  }
  throw conflict(key);
}

export interface SubnetWish {
  /** Held before, if the node remembers; tried first. */
  readonly preferred?: Cidr;
  /** This one or none. */
  readonly exact?: Cidr;
  /** Routes of the host: a subnet that overlaps one is not claimed. */
  readonly avoid?: readonly Cidr[];
  /** Salt of the order in which candidates are tried; the node id is part of it anyway. */
  readonly seed?: number;
  /** The node's tenure lease when it has one; otherwise one is granted, and ended again when the claim is refused. */
  readonly lease?: LeaseId;
}

/** Who claims. `nodeIp`: where the node is reached; without it, hosts of one cluster and id cannot be told apart. */
export interface Claimant {
  readonly node: string;
  readonly cluster: string;
  readonly nodeIp?: Ipv4;
}

export interface SubnetClaim {
  readonly subnet: Cidr;
  /** Create revision of the claim: a later owner of the subnet has a greater one. */
  readonly epoch: number;
  /** Tenure: keep it alive. */
  readonly lease: LeaseId;
}

/**
 * Claims a node subnet, or confirms the one that the node holds. Rejects `subnet_taken` naming the holder (only with
 * `exact`), `address_not_in_plan`, `subnets_exhausted`, `conflict` (node id in use elsewhere, or every candidate of
 * a bounded number was snatched away), and whatever the store rejects with.
 *
 * Of two hosts with one id that join together, the later one gets the claim and the earlier one meets `conflict` when
 * it publishes itself: until then nothing says that it lives.
 */
export async function claimSubnet(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  owner: Claimant,
  wish: SubnetWish = {},
): Promise<SubnetClaim> {
  if (wish.lease !== undefined) return findSubnet(kv, keys, config, owner, wish, wish.lease);
  const lease = await kv.grant(config.tenureTtlS);
  try {
    return await findSubnet(kv, keys, config, owner, wish, lease);
  } catch (error) {
    // With the outcome unknown the claim may hang on it, and with it what this node runs.
    if (error instanceof EdgewayError && error.code !== 'coordination_unavailable')
      await kv.revoke(lease).catch(() => {});
    throw error;
  }
}

async function findSubnet(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  owner: Claimant,
  wish: SubnetWish,
  lease: LeaseId,
): Promise<SubnetClaim> {
  const { plan } = config;
  const avoided = (subnet: Cidr): Cidr | undefined => wish.avoid?.find((route) => overlaps(route, subnet));
  if (wish.exact !== undefined) {
    unwrap(subnetIndex(plan, wish.exact));
    const route = avoided(wish.exact);
    if (route !== undefined)
      throw new EdgewayError(
        'subnet_taken',
        `subnet ${formatCidr(wish.exact)} collides with this host's route ${formatCidr(route)}`,
      );
  }
  const host = await hostTerms(kv, keys, owner, lease);
  const attempt = async (subnet: Cidr): Promise<number | SubnetOwner> =>
    tryClaimSubnet(kv, keys, subnet, owner, lease, host);

  if (wish.exact !== undefined) {
    const result = await attempt(wish.exact);
    if (typeof result === 'number') return { subnet: wish.exact, epoch: result, lease };
    throw new EdgewayError(
      'subnet_taken',
      result.resting === true
        ? `subnet ${formatCidr(wish.exact)} was given back by node ${result.node} a moment ago and rests`
        : `subnet ${formatCidr(wish.exact)} is held by node ${result.node} of cluster ${result.cluster}`,
    );
  }

  const tried = new Set<number>();
  const tryIndex = async (index: number): Promise<SubnetClaim | undefined> => {
    const subnet = subnetAt(plan, index);
    tried.add(index);
    if (avoided(subnet) !== undefined) return undefined;
    const result = await attempt(subnet);
    return typeof result === 'number' ? { subnet, epoch: result, lease } : undefined;
  };
  if (wish.preferred !== undefined) {
    const index = subnetIndex(plan, wish.preferred);
    const claim = index.ok ? await tryIndex(index.value) : undefined;
    if (claim !== undefined) return claim;
  }
  const candidates = await findCandidates(kv, keys, config, owner, wish.seed ?? 0);
  let probes = 0;
  for (const index of candidates.inOrder()) {
    if (probes++ === CLAIM_PROBES) break;
    if (tried.has(index)) continue;
    const claim = await tryIndex(index);
    if (claim !== undefined) return claim;
  }
  for (let round = 0; round < CLAIM_TRIES_MAX; round++) {
    const free = await findFree(kv, keys, plan, candidates, owner, round, avoided);
    if (free.length === 0)
      throw new EdgewayError(
        'subnets_exhausted',
        `no free node subnet: all ${candidates.count} of ${subnetCount(plan)} in ${formatCidr(plan.platform)} that this node may claim are claimed` +
          ((wish.avoid?.length ?? 0) > 0 ? ', or collide with routes of this host' : ''),
      );
    for (const index of free) {
      const claim = await tryIndex(index);
      if (claim !== undefined) return claim;
    }
  }
  throw new EdgewayError(
    'conflict',
    `node ${owner.node} lost every race for a subnet in ${CLAIM_TRIES_MAX} rounds; try again`,
  );
}

/** The epoch when the subnet is ours now; otherwise who has it. */
async function tryClaimSubnet(
  kv: Kv,
  keys: Keys,
  subnet: Cidr,
  owner: Claimant,
  lease: LeaseId,
  known: Terms,
): Promise<number | SubnetOwner> {
  const key = keys.build({ kind: 'subnet', subnet });
  const put: Operation = { kind: 'put', key, value: encodeSubnet(plainOwner(owner)), lease };
  let host = known;
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const claimed = await kv.txn([{ key, createRevision: 0 }, ...host.compares], [put, ...host.operations]);
    if (claimed.succeeded) return claimed.revision;
    const [entry] = claimed.seen;
    if (entry !== undefined) {
      const holder = decodeSubnet(entry.value);
      // A value that nobody can read is still somebody's claim: the key is what counts.
      if (!holder.ok) return { node: '(unreadable claim)', cluster: '?' };
      if (!sameNode(holder.value, owner)) return holder.value;
      // One that rests is taken up in place: deleted first, it would be anybody's for a moment.
      const stands = entry.lease === lease && holder.value.resting !== true;
      if (stands && host.operations.length === 0) return entry.createRevision;
      const unchanged: Compare = { key, modRevision: entry.modRevision };
      const kept = await kv.txn([unchanged, ...host.compares], [put, ...host.operations]);
      if (kept.succeeded) return entry.createRevision;
    }
    host = await hostTerms(kv, keys, owner, lease);
  }
  throw conflict(key);
}

/** Part of a transaction. */
interface Terms {
  readonly compares: readonly Compare[];
  readonly operations: readonly Operation[];
}

/**
 * What makes the node id this host's: its entry among the hosts, under the tenure lease. Rejects `conflict` when it is
 * another's. A host of the same cluster that is not published is taken for a predecessor that had another address.
 */
async function hostTerms(kv: Kv, keys: Keys, owner: Claimant, lease: LeaseId): Promise<Terms> {
  const { node, cluster, nodeIp } = owner;
  const key = keys.build({ kind: 'host', node });
  const entry = await kv.get(key);
  const put: Operation = {
    kind: 'put',
    key,
    value: encodeHost({ cluster, ...(nodeIp === undefined ? {} : { nodeIp }) }),
    lease,
  };
  const compares: Compare[] = [
    entry === undefined ? { key, createRevision: 0 } : { key, modRevision: entry.modRevision },
  ];
  const held = entry === undefined ? undefined : unwrap(readHost(entry));
  const sameHost = held?.nodeIp !== undefined && held.nodeIp === nodeIp;
  if (held !== undefined && held.cluster !== cluster && !sameHost)
    throw new EdgewayError(
      'conflict',
      `node id ${node} belongs to ${describeHost(held)}: ids are unique in the platform, not in a cluster`,
    );
  if (nodeIp !== undefined && !sameHost) {
    const nodeKey = keys.build({ kind: 'node', cluster, node });
    const published = await kv.get(nodeKey);
    const live = published === undefined ? undefined : decodeNode(published.value);
    if (live?.ok && live.value.nodeIp !== nodeIp)
      throw new EdgewayError(
        'conflict',
        `node id ${node} is in use by a live node at ${formatIpv4(live.value.nodeIp)}; this host is ${formatIpv4(nodeIp)}`,
      );
    compares.push(
      published === undefined
        ? { key: nodeKey, createRevision: 0 }
        : { key: nodeKey, modRevision: published.modRevision },
    );
  }
  const stands =
    entry !== undefined && entry.lease === lease && held?.cluster === cluster && held.nodeIp === nodeIp;
  return { compares, operations: stands ? [] : [put] };
}

/** What must hold while a node publishes something: its subnet is its own with that epoch, and its id this host's. */
async function publishing(
  kv: Kv,
  keys: Keys,
  subnet: Cidr,
  { node, cluster, nodeIp, epoch }: Pick<Node, 'node' | 'cluster' | 'nodeIp' | 'epoch'>,
): Promise<Compare[]> {
  const subnetKey = keys.build({ kind: 'subnet', subnet });
  const hostKey = keys.build({ kind: 'host', node });
  const [claim, host] = await Promise.all([kv.get(subnetKey), kv.get(hostKey)]);
  const holder = claim === undefined ? undefined : decodeSubnet(claim.value);
  if (
    claim?.createRevision !== epoch ||
    (holder?.ok && (holder.value.resting === true || !sameNode(holder.value, { node, cluster })))
  )
    throw new EdgewayError(
      'lease_lost',
      `this node no longer holds subnet ${formatCidr(subnet)}; register again`,
    );
  const held = host === undefined ? undefined : unwrap(readHost(host));
  if (held !== undefined && (held.cluster !== cluster || (held.nodeIp ?? nodeIp) !== nodeIp))
    throw new EdgewayError(
      'conflict',
      `node id ${node} has passed to ${describeHost(held)}; this host is ${formatIpv4(nodeIp)}`,
    );
  return [
    { key: subnetKey, modRevision: claim.modRevision },
    { key: hostKey, modRevision: host?.modRevision ?? 0 },
  ];
}

/** Rejects `lease_lost` when the subnet with that epoch, and `conflict` when the node id, is no longer this host's. */
export async function checkClaim(
  kv: Kv,
  keys: Keys,
  node: Pick<Node, 'node' | 'cluster' | 'nodeIp' | 'subnet' | 'epoch'>,
): Promise<void> {
  await publishing(kv, keys, node.subnet, node);
}

function readHost({ key, value }: KvEntry): Result<Host> {
  const host = decodeHost(value);
  return host.ok ? host : { ok: false, error: recordError(key, host.error) };
}

function describeHost({ cluster, nodeIp }: Host): string {
  return `a host of cluster ${cluster}${nodeIp === undefined ? '' : ` at ${formatIpv4(nodeIp)}`}`;
}

const sameNode = (a: Pick<Node, 'node' | 'cluster'>, b: Pick<Node, 'node' | 'cluster'>): boolean =>
  a.node === b.node && a.cluster === b.cluster;

/** Keys per look: what is taken near full comes to a few looks instead of one list of the whole plan. */
const LOOK = 1_000;
/** Subnet keys of a plan in key order, with their indexes: 15,360 strings, made once. */
const keysOfPlan = new WeakMap<Plan, readonly { readonly key: string; readonly index: number }[]>();

/** Some subnets that are free now, looked for from another place by each node and round; none: there is none. */
async function findFree(
  kv: Kv,
  keys: Keys,
  plan: Plan,
  candidates: Candidates,
  owner: Claimant,
  round: number,
  avoided: (subnet: Cidr) => Cidr | undefined,
): Promise<number[]> {
  let sorted = keysOfPlan.get(plan);
  if (sorted === undefined || sorted[0]?.key.startsWith(keys.prefix('subnets')) !== true) {
    sorted = Array.from({ length: subnetCount(plan) }, (_, index) => ({
      key: keys.build({ kind: 'subnet', subnet: subnetAt(plan, index) }),
      index,
    })).sort((a, b) => (a.key < b.key ? -1 : 1));
    keysOfPlan.set(plan, sorted);
  }
  const free: number[] = [];
  let at = hash32(`${owner.cluster}/${owner.node}`, round) % sorted.length;
  for (let seen = 0; seen < sorted.length && free.length === 0; ) {
    const taken = await kv.keys(keys.prefix('subnets'), { from: sorted[at]!.key, limit: LOOK });
    const held = new Set(taken);
    const last = taken.length < LOOK ? undefined : taken.at(-1);
    for (; at < sorted.length && seen < sorted.length && free.length < CLAIM_PROBES; at++, seen++) {
      const { key, index } = sorted[at]!;
      if (last !== undefined && key > last) break;
      if (!held.has(key) && candidates.may(index) && avoided(subnetAt(plan, index)) === undefined)
        free.push(index);
    }
    if (at === sorted.length) at = 0;
  }
  return free;
}

interface Candidates {
  /** How many there are. */
  readonly count: number;
  may(index: number): boolean;
  /** Their indexes, the blocks of the node's cluster first, in an order that depends on the node alone. */
  inOrder(): IterableIterator<number>;
}

/** The subnets that a node may claim: those in its cluster's blocks and those in nobody's. */
async function findCandidates(
  kv: Kv,
  keys: Keys,
  { plan }: NetworkConfig,
  owner: Claimant,
  seed: number,
): Promise<Candidates> {
  const mine: Cidr[] = [];
  const others: Cidr[] = [];
  for (const entry of (await kv.range(keys.prefix('root'))).entries) {
    const key = keys.parse(entry.key);
    if (!key.ok || key.value.kind !== 'block') continue;
    if (!checkBlock(plan, key.value.block).ok) continue; // role root reports it
    const block = decodeBlock(entry.value);
    // A block whose owner cannot be read is nobody's to claim from.
    (block.ok && block.value.cluster === owner.cluster ? mine : others).push(key.value.block);
  }
  const all = subnetCount(plan);
  const first: number[] = [];
  let foreign = 0;
  if (mine.length + others.length > 0)
    for (let index = 0; index < all; index++) {
      const subnet = subnetAt(plan, index);
      if (mine.some((block) => overlaps(block, subnet))) first.push(index);
      else if (others.some((block) => overlaps(block, subnet))) foreign++;
    }
  const blocked = (index: number): boolean => {
    const subnet = subnetAt(plan, index);
    return mine.concat(others).some((block) => overlaps(block, subnet));
  };
  return {
    count: all - foreign,
    may: (index) => {
      const subnet = subnetAt(plan, index);
      return (
        !others.some((block) => overlaps(block, subnet)) || mine.some((block) => overlaps(block, subnet))
      );
    },
    *inOrder() {
      for (const at of strides(first.length, owner, seed)) yield first[at]!;
      const free = mine.length + others.length === 0;
      for (const index of strides(all, owner, seed)) if (free || !blocked(index)) yield index;
    },
  };
}

/**
 * 0 … count-1, each once, in an order of the node's own: another start and another stride for each, as in double
 * hashing, so that nodes which join together do not race along the same run of taken subnets.
 */
function* strides(count: number, owner: Claimant, seed: number): IterableIterator<number> {
  const text = `${owner.cluster}/${owner.node}`;
  let stride = count < 3 ? 1 : 1 + (hash32(text, seed ^ 0x5bd1e995) % (count - 1));
  while (gcd(stride, count) > 1) stride = 1 + (stride % (count - 1));
  let at = count === 0 ? 0 : hash32(text, seed) % count;
  for (let i = 0; i < count; i++) {
    yield at;
    at = (at + stride) % count;
  }
}

function gcd(a: number, b: number): number {
  return b === 0 ? a : gcd(b, a % b);
}

/** Gives a subnet back, and the node id; it rests before somebody else gets it. Succeeds when it is not the owner's
 *  (any more). */
export async function releaseSubnet(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  owner: Claimant,
  subnet: Cidr,
): Promise<void> {
  const key = keys.build({ kind: 'subnet', subnet });
  const hostKey = keys.build({ kind: 'host', node: owner.node });
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const [entry, host] = await Promise.all([kv.get(key), kv.get(hostKey)]);
    const holder = entry === undefined ? undefined : decodeSubnet(entry.value);
    if (entry === undefined || !holder?.ok || holder.value.resting === true) return;
    if (!sameNode(holder.value, owner)) return;
    const held = host === undefined ? undefined : decodeHost(host.value);
    if (held !== undefined) {
      if (!held.ok || held.value.cluster !== owner.cluster) return;
      if ((held.value.nodeIp ?? owner.nodeIp) !== (owner.nodeIp ?? held.value.nodeIp)) return;
    }
    const operation = rest(key, encodeSubnet({ ...plainOwner(owner), resting: true }));
    const { succeeded } = await txnWithRest(
      kv,
      config.quarantineS,
      [
        { key, modRevision: entry.modRevision },
        { key: hostKey, modRevision: host?.modRevision ?? 0 },
      ],
      [operation, { kind: 'delete', key: hostKey }],
    );
    if (succeeded) return;
  }
  throw conflict(key);
}

/** A service as it stands in the keyspace, and the revision that a reader must reach to see it. */
export interface AppliedService {
  readonly service: Service;
  readonly revision: number;
}

/**
 * Creates or changes a service and claims the ServiceIPs that it lacks, in one transaction. Addresses that it has
 * stay unless `wanted` says otherwise, even one whose claim cannot be read; the replaced one rests. Applying the same
 * again changes nothing, and what a record holds beside a service's own fields is kept. Rejects `address_taken` naming the holder, `address_not_in_plan`, `addresses_exhausted`, `conflict`.
 */
export async function applyService(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  descriptor: Descriptor,
  wanted: Partial<Record<Policy, Ipv4>> = {},
  seed = 0,
): Promise<AppliedService> {
  const id = unwrap(descriptorId(descriptor));
  return writeService(kv, keys, config, id, () => descriptor, wanted, seed);
}

/** `describe` chooses the descriptor for what stands there, from the read that the transaction compares. */
async function writeService(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  id: ServiceId,
  describe: (stands: Result<Service> | undefined) => Descriptor,
  wanted: Partial<Record<Policy, Ipv4>>,
  seed = 0,
): Promise<AppliedService> {
  for (const policy of POLICIES) checkWanted(config, wanted[policy]);
  const distinct = new Set(Object.values(wanted));
  if (distinct.size < Object.values(wanted).length)
    throw new EdgewayError('invalid_request', `service ${id}: one address cannot stand for two policies`);
  const key = keys.build({ kind: 'service', service: id });
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const entry = await kv.get(key);
    const known = entry === undefined ? undefined : decodeService(entry.value, id);
    const before = known?.ok ? known.value : undefined;
    const descriptor = describe(known);
    const addresses: Partial<Record<Policy, Ipv4>> = {};
    const compares: Compare[] = [
      entry === undefined ? { key, createRevision: 0 } : { key, modRevision: entry.modRevision },
    ];
    const operations: Operation[] = [];
    for (const policy of POLICIES) {
      const had = before?.addresses[policy];
      const owner: AddressOwner = { kind: 'service', service: id, policy };
      const slot = await findAddress(kv, keys, config, owner, {
        wanted: wanted[policy],
        had,
        faithful: true,
        seed,
        except: new Set([...Object.values(addresses), ...distinct]),
      });
      addresses[policy] = slot.address;
      compares.push(slot.compare);
      if (slot.write)
        operations.push({ kind: 'put', key: addressKey(keys, slot.address), value: encodeAddress(owner) });
      if (had !== undefined && had !== slot.address) {
        const old = await kv.get(addressKey(keys, had));
        if (old === undefined || !sameOwner(decodeAddress(old.value), owner)) continue;
        compares.push({ key: old.key, modRevision: old.modRevision });
        operations.push(rest(old.key, encodeAddress({ ...owner, resting: true })));
      }
    }
    const ports = await findPorts(kv, keys, id, descriptor, before?.descriptor);
    compares.push(...ports.compares);
    operations.push(...ports.operations);
    const service: Service = { id, descriptor, addresses };
    const exposed = await exposure(kv, keys, id, descriptor.exposed);
    if (exposed !== undefined) operations.push(exposed);
    if (entry !== undefined && operations.length === 0 && before && sameService(before, service))
      return { service, revision: entry.modRevision };
    operations.push({ kind: 'put', key, value: encodeService(service, before && entry?.value) });
    const result = await txnWithRest(kv, config.quarantineS, compares, operations);
    if (result.succeeded) return { service, revision: result.revision };
  }
  throw conflict(key);
}

/** What brings the service's entry among the exposed ones up to date; undefined when it is. */
async function exposure(
  kv: Kv,
  keys: Keys,
  service: ServiceId,
  wanted: boolean,
): Promise<Operation | undefined> {
  const key = keys.build({ kind: 'exposed', service });
  if (((await kv.get(key)) !== undefined) === wanted) return undefined;
  return wanted ? { kind: 'put', key, value: encodeExposed() } : { kind: 'delete', key };
}

/**
 * Makes sure that a service exists and has all its ServiceIPs, keeping the descriptor that it has: for a record that
 * a person wrote, and for a deploy of a service that this node does not follow. `otherwise` is written when there is
 * none; without it a missing service is `not_found`.
 */
export async function ensureService(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  id: ServiceId,
  otherwise?: Descriptor,
  wanted: Partial<Record<Policy, Ipv4>> = {},
): Promise<AppliedService> {
  const describe = (stands: Result<Service> | undefined): Descriptor => {
    if (stands?.ok === false) throw recordError(keys.build({ kind: 'service', service: id }), stands.error);
    const descriptor = stands?.value.descriptor ?? otherwise;
    if (descriptor === undefined) throw new EdgewayError('not_found', `there is no service ${id}`);
    return descriptor;
  };
  return writeService(kv, keys, config, id, describe, wanted);
}

/**
 * Deletes a service; its ServiceIPs rest. Rejects `not_found`, and `instance_exists` naming a node while instances
 * live, unless forced. Returns the revision of the deletion.
 */
export async function deleteService(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  id: ServiceId,
  options: { readonly force?: boolean } = {},
): Promise<number> {
  const key = keys.build({ kind: 'service', service: id });
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const entry = await kv.get(key);
    if (entry === undefined) throw new EdgewayError('not_found', `there is no service ${id}`);
    if (options.force !== true) {
      const [alive] = (await kv.range(keys.instancesOf(id))).entries;
      if (alive !== undefined)
        throw new EdgewayError(
          'instance_exists',
          `service ${id} still has instances (${alive.key}); undeploy them first`,
        );
    }
    const compares: Compare[] = [{ key, modRevision: entry.modRevision }];
    const operations: Operation[] = [{ kind: 'delete', key }];
    const exposed = await exposure(kv, keys, id, false);
    if (exposed !== undefined) operations.push(exposed);
    const known = decodeService(entry.value, id);
    for (const policy of POLICIES) {
      const address = known.ok ? known.value.addresses[policy] : undefined;
      const held = address === undefined ? undefined : await kv.get(addressKey(keys, address));
      const owner: AddressOwner = { kind: 'service', service: id, policy };
      if (held === undefined || !sameOwner(decodeAddress(held.value), owner)) continue;
      compares.push({ key: held.key, modRevision: held.modRevision });
      operations.push(rest(held.key, encodeAddress({ ...owner, resting: true })));
    }
    const ports = await findPorts(kv, keys, id, undefined, known.ok ? known.value.descriptor : undefined);
    compares.push(...ports.compares);
    operations.push(...ports.operations);
    const result = await txnWithRest(kv, config.quarantineS, compares, operations);
    if (result.succeeded) return result.revision;
  }
  throw conflict(key);
}

export interface InstanceWish {
  readonly service: ServiceId;
  readonly instance: number;
  readonly node: string;
  /** The node's tenure lease. */
  readonly lease: LeaseId;
  /** An InstanceIP that the caller insists on. */
  readonly wanted?: Ipv4;
  /** What this instance held before, if the node remembers. */
  readonly preferred?: Ipv4;
  /** The part of the service range that this node's rights allow; the whole of it otherwise. */
  readonly within?: Cidr;
  readonly seed?: number;
}

/**
 * Claims the InstanceIP of an instance. Rejects `instance_exists` when a live node publishes that number,
 * `address_taken`, `address_not_in_plan`, `addresses_exhausted`, `conflict`.
 */
export async function claimInstance(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  wish: InstanceWish,
): Promise<{ readonly instanceIp: Ipv4; readonly revision: number }> {
  const { service, instance, node } = wish;
  checkWanted(config, wish.wanted);
  refuseOtherNode(keys, await kv.get(keys.build({ kind: 'instance', service, instance })), node);
  const owner: AddressOwner = { kind: 'instance', service, instance, node };
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const slot = await findAddress(kv, keys, config, owner, {
      wanted: wish.wanted,
      had: wish.preferred,
      seed: wish.seed ?? 0,
      except: new Set(),
      ...(wish.within === undefined ? {} : { within: wish.within }),
    });
    const key = addressKey(keys, slot.address);
    // A claim that hangs on an earlier tenure lease moves to the present one.
    if (!slot.write && slot.lease === wish.lease)
      return { instanceIp: slot.address, revision: slot.revision };
    const put: Operation = { kind: 'put', key, value: encodeAddress(owner), lease: wish.lease };
    const result = await kv.txn([slot.compare], [put]);
    if (result.succeeded) return { instanceIp: slot.address, revision: result.revision };
  }
  throw conflict(`instance ${instance} of ${service}`);
}

/**
 * Makes an instance visible, under the node's presence lease, provided that the node still holds its subnet with the
 * instance's epoch. Publishing again moves it to the given lease. Returns the revision. Rejects `instance_exists`
 * naming the node that has the number, `lease_lost` when the subnet is no longer the node's.
 */
export async function publishInstance(
  kv: Kv,
  keys: Keys,
  subnet: Cidr,
  instance: Instance,
  lease: LeaseId,
): Promise<number> {
  const key = keys.build({ kind: 'instance', service: instance.service, instance: instance.instance });
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const fence = await publishing(kv, keys, subnet, instance);
    const entry = await kv.get(key);
    refuseOtherNode(keys, entry, instance.node);
    const unchanged: Compare =
      entry === undefined ? { key, createRevision: 0 } : { key, modRevision: entry.modRevision };
    const put: Operation = { kind: 'put', key, value: encodeInstance(instance), lease };
    const result = await kv.txn([...fence, unchanged], [put]);
    if (result.succeeded) return result.revision;
  }
  throw conflict(key);
}

/**
 * Takes an instance away and lets its InstanceIP rest; either may be gone already. Returns the revision that a
 * reader must reach not to see it; 0 when there was nothing to see. What another node holds under the number stays.
 */
export async function releaseInstance(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  held: {
    readonly service: ServiceId;
    readonly instance: number;
    readonly node: string;
    readonly instanceIp?: Ipv4;
  },
): Promise<number> {
  const { service, instance, node } = held;
  const key = keys.build({ kind: 'instance', service, instance });
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const compares: Compare[] = [];
    const operations: Operation[] = [];
    const entry = await kv.get(key);
    const published = entry === undefined ? undefined : decodeInstance(entry.value, { service, instance });
    if (entry !== undefined && published?.ok && published.value.node === node) {
      compares.push({ key, modRevision: entry.modRevision });
      operations.push({ kind: 'delete', key });
    }
    const address = held.instanceIp ?? (published?.ok ? published.value.instanceIp : undefined);
    const claim = address === undefined ? undefined : await kv.get(addressKey(keys, address));
    const owner: AddressOwner = { kind: 'instance', service, instance, node };
    if (claim !== undefined && sameOwner(decodeAddress(claim.value), owner)) {
      compares.push({ key: claim.key, modRevision: claim.modRevision });
      operations.push(rest(claim.key, encodeAddress({ ...owner, resting: true })));
    }
    if (operations.length === 0) return 0;
    const shown = operations.some((operation) => operation.kind === 'delete' && operation.key === key);
    const result = await txnWithRest(kv, config.quarantineS, compares, operations);
    if (result.succeeded) return shown ? result.revision : 0;
  }
  throw conflict(key);
}

/**
 * Makes the node visible under its presence lease, provided that its subnet is still its own. Returns the revision.
 * Rejects `lease_lost` when it is not, and `conflict` naming the host that has the node id by now.
 */
export async function publishNode(kv: Kv, keys: Keys, node: Node, lease: LeaseId): Promise<number> {
  const key = keys.build({ kind: 'node', cluster: node.cluster, node: node.node });
  for (let tries = 0; tries < CLAIM_TRIES_MAX; tries++) {
    const fence = await publishing(kv, keys, node.subnet, node);
    const result = await kv.txn(fence, [{ kind: 'put', key, value: encodeNode(node), lease }]);
    if (result.succeeded) return result.revision;
  }
  throw conflict(key);
}

/** Who holds a ServiceIP or InstanceIP; undefined when nobody does, or the claim rests or cannot be read. */
export async function ownerOf(kv: Kv, keys: Keys, address: Ipv4): Promise<AddressOwner | undefined> {
  const entry = await kv.get(addressKey(keys, address));
  const owner = entry === undefined ? undefined : decodeAddress(entry.value);
  return owner?.ok && owner.value.resting !== true ? owner.value : undefined;
}

interface Slot {
  readonly address: Ipv4;
  /** What must still hold when the address is used. */
  readonly compare: Compare;
  /** False when it is ours already. */
  readonly write: boolean;
  readonly lease?: LeaseId;
  readonly revision: number;
}

/** An address that the owner has or may have: the wanted one, the one it had, or the next of its own order. */
async function findAddress(
  kv: Kv,
  keys: Keys,
  config: NetworkConfig,
  owner: AddressOwner,
  wish: {
    readonly wanted: Ipv4 | undefined;
    readonly had: Ipv4 | undefined;
    /** What the owner had stays even if its claim cannot be read: a service that runs does not move for a typo. */
    readonly faithful?: boolean;
    readonly seed: number;
    /** Spoken for in the same transaction. */
    readonly except: ReadonlySet<Ipv4>;
    readonly within?: Cidr;
  },
): Promise<Slot> {
  const look = async (address: Ipv4, faithful = false): Promise<Slot | AddressOwner | undefined> => {
    const key = addressKey(keys, address);
    const entry = await kv.get(key);
    if (entry === undefined)
      return { address, compare: { key, createRevision: 0 }, write: true, revision: 0 };
    const holder = decodeAddress(entry.value);
    const compare: Compare = { key, modRevision: entry.modRevision };
    const revision = entry.modRevision;
    if (!holder.ok) return faithful ? { address, compare, write: false, revision } : undefined;
    const lease = entry.lease === undefined ? {} : { lease: entry.lease };
    if (holder.value.resting === true)
      return mayWake(holder.value, owner)
        ? { address, compare, write: true, revision, ...lease }
        : holder.value;
    return sameOwner(holder, owner) ? { address, compare, write: false, revision, ...lease } : holder.value;
  };
  if (wish.wanted !== undefined) {
    const found = await look(wish.wanted);
    if (found !== undefined && 'compare' in found) return found;
    throw new EdgewayError(
      'address_taken',
      `address ${formatIpv4(wish.wanted)} ${found === undefined ? 'has a claim that cannot be read' : describeOwner(found)}`,
    );
  }
  const { within } = wish;
  const usable = (address: Ipv4): boolean =>
    !wish.except.has(address) &&
    isServiceAddress(config.plan, address) &&
    (within === undefined || contains(within, address));
  if (wish.had !== undefined && usable(wish.had)) {
    const found = await look(wish.had, wish.faithful);
    if (found !== undefined && 'compare' in found) return found;
  }
  const count = within === undefined ? serviceAddressCount(config.plan) : sizeOf(within);
  const at = (index: number): Ipv4 =>
    within === undefined ? serviceAddressAt(config.plan, index) : ipv4(within.base + index);
  const start = hash32(ownerText(owner), wish.seed) % count;
  for (let i = 0; i < CLAIM_PROBES; i++) {
    const address = at((start + i) % count);
    const found = usable(address) ? await look(address) : undefined;
    if (found !== undefined && 'compare' in found) return found;
  }
  const taken = new Set(await kv.keys(keys.prefix('addresses')));
  for (let i = 0; i < count; i++) {
    const address = at((start + i) % count);
    if (!usable(address) || taken.has(addressKey(keys, address))) continue;
    const found = await look(address);
    if (found !== undefined && 'compare' in found) return found;
  }
  throw new EdgewayError(
    'addresses_exhausted',
    `no free address in ${formatCidr(within ?? config.plan.services)}: ${taken.size} addresses of the network are claimed`,
  );
}

/** Turns a claim into a resting one. */
function rest(key: string, value: string): Operation {
  return { kind: 'put', key, value, lease: RESTING_LEASE };
}

function refuseOtherNode(keys: Keys, entry: KvEntry | undefined, node: string): void {
  if (entry === undefined) return;
  const key = keys.parse(entry.key);
  if (!key.ok || key.value.kind !== 'instance') return;
  const held = decodeInstance(entry.value, key.value);
  if (!held.ok) throw recordError(entry.key, held.error);
  if (held.value.node !== node)
    throw new EdgewayError(
      'instance_exists',
      `instance ${key.value.instance} of ${key.value.service} lives on node ${held.value.node}`,
    );
}

function checkWanted(config: NetworkConfig, address: Ipv4 | undefined): void {
  if (address === undefined || isServiceAddress(config.plan, address)) return;
  throw new EdgewayError(
    'address_not_in_plan',
    `address ${formatIpv4(address)} cannot be claimed: service addresses lie inside ${formatCidr(config.plan.services)}`,
  );
}

function addressKey(keys: Keys, address: Ipv4): string {
  return keys.build({ kind: 'address', address });
}

function plainOwner(owner: Claimant): SubnetOwner {
  return { node: owner.node, cluster: owner.cluster };
}

function ownerText(owner: AddressOwner): string {
  return owner.kind === 'service' ? `${owner.service}/${owner.policy}` : `${owner.service}/${owner.instance}`;
}

function sameOwner(holder: ReturnType<typeof decodeAddress>, owner: AddressOwner): boolean {
  return (
    holder.ok &&
    holder.value.resting !== true &&
    holder.value.kind === owner.kind &&
    ownerText(holder.value) === ownerText(owner) &&
    (holder.value.kind !== 'instance' || owner.kind !== 'instance' || holder.value.node === owner.node)
  );
}

/** A resting address goes back to the same policy or instance number only; for an instance, on any node. */
function mayWake(holder: AddressOwner, owner: AddressOwner): boolean {
  return holder.kind === owner.kind && ownerText(holder) === ownerText(owner);
}

/** What follows after naming the address. */
export function describeOwner(owner: AddressOwner): string {
  const what =
    owner.kind === 'service'
      ? `policy ${owner.policy} of ${owner.service}`
      : `instance ${owner.instance} of ${owner.service} on node ${owner.node}`;
  return owner.resting === true ? `was given back by ${what} a moment ago and rests` : `is held by ${what}`;
}

/** Claims the node ports that the descriptor publishes, and gives back those that it no longer does. A port whose
 *  owner's record is gone, or no longer publishes it, is free. */
async function findPorts(
  kv: Kv,
  keys: Keys,
  id: ServiceId,
  descriptor: Descriptor | undefined,
  before: Descriptor | undefined,
): Promise<{ readonly compares: readonly Compare[]; readonly operations: readonly Operation[] }> {
  const compares: Compare[] = [];
  const operations: Operation[] = [];
  const keyOf = ({ protocol, source }: PortMapping): string =>
    keys.build({ kind: 'port', protocol, port: source });
  const wanted = descriptor === undefined ? [] : publishedPorts(descriptor);
  if (wanted.length > PORT_MAPPINGS_MAX)
    throw new EdgewayError(
      'invalid_request',
      `service ${id} publishes ${wanted.length} ports: at most ${PORT_MAPPINGS_MAX} are possible`,
    );
  for (const mapping of wanted) {
    const key = keyOf(mapping);
    const entry = await kv.get(key);
    if (entry === undefined) compares.push({ key, createRevision: 0 });
    else {
      const owner = decodePort(entry.value);
      if (owner.ok && owner.value.service === id) continue;
      if (!owner.ok) throw recordError(key, owner.error);
      const other = await kv.get(keys.build({ kind: 'service', service: owner.value.service }));
      const held = other === undefined ? undefined : decodeService(other.value, owner.value.service);
      if (
        held !== undefined &&
        (!held.ok || publishedPorts(held.value.descriptor).some((one) => keyOf(one) === key))
      )
        throw new EdgewayError(
          'port_taken',
          `${mapping.protocol} port ${mapping.source} leads to service ${owner.value.service} already`,
        );
      compares.push({ key, modRevision: entry.modRevision });
      if (other !== undefined) compares.push({ key: other.key, modRevision: other.modRevision });
    }
    operations.push({ kind: 'put', key, value: encodePort({ service: id }) });
  }
  const kept = new Set(wanted.map(keyOf));
  for (const mapping of before === undefined ? [] : publishedPorts(before)) {
    const key = keyOf(mapping);
    const entry = kept.has(key) ? undefined : await kv.get(key);
    const owner = entry === undefined ? undefined : decodePort(entry.value);
    if (entry === undefined || !owner?.ok || owner.value.service !== id) continue;
    compares.push({ key, modRevision: entry.modRevision });
    operations.push({ kind: 'delete', key });
  }
  return { compares, operations };
}

function conflict(key: string): EdgewayError {
  return new EdgewayError('conflict', `${key} kept changing under ${CLAIM_TRIES_MAX} tries; try again`);
}
