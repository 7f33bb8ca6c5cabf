// What the root role does: write the plan, admit clusters, grant them blocks of node subnets, take empty ones back.
// A pure decision: what is known in, transactions out; the shell fences and commits them. It never touches a claim
// of a node, and nothing that runs depends on it: without any root, nodes claim from the blocks that are granted
// and from whatever nobody's block covers.
import { type Cidr, contains, formatCidr, ipv4, overlaps } from '../src/addr.ts';
import type { Keys } from '../src/keys.ts';
import { BLOCK_LOW_SUBNETS, BLOCK_SUBNET_BITS } from '../src/limits.ts';
import type { NetworkConfig } from '../src/model.ts';
import { checkBlock, type Plan, subnetIndex } from '../src/plan.ts';
import { encodeBlock, encodeCluster, encodeConfig } from '../src/records.ts';
import type { Compare, Operation } from './kv.ts';
import type { View } from './view.ts';

/** One transaction that a role wants, with the reason for people. */
export interface Action {
  readonly why: string;
  readonly compares: readonly Compare[];
  readonly operations: readonly Operation[];
}

/** `unreadable`: keys that exist but cannot be read; nothing is decided about what they may stand for. */
export function decideRoot(
  view: View,
  keys: Keys,
  wanted: NetworkConfig,
  unreadable: ReadonlySet<string>,
): Action[] {
  const configKey = keys.build({ kind: 'config' });
  const config = view.get('config', configKey)?.value;
  if (config === undefined) {
    if (unreadable.has(configKey)) return [];
    const put: Operation = { kind: 'put', key: configKey, value: encodeConfig(wanted) };
    return [{ why: 'write the plan', compares: [{ key: configKey, createRevision: 0 }], operations: [put] }];
  }
  const actions: Action[] = [];
  const admitted = new Set<string>();
  for (const [key, { value, modRevision }] of view.all('cluster')) {
    admitted.add(value.cluster);
    if (value.admitted) continue;
    actions.push({
      why: `admit cluster ${value.cluster}`,
      compares: [{ key, modRevision }],
      operations: [{ kind: 'put', key, value: encodeCluster({ ...value, admitted: true }) }],
    });
  }
  const books = bookBlocks(view, config.plan);
  for (const cluster of [...admitted].sort()) {
    const own = books.filter((book) => book.cluster === cluster);
    const free = own.reduce((sum, { size, used }) => sum + size - used, 0);
    if (free < BLOCK_LOW_SUBNETS) {
      const block = nextBlock(config.plan, view, books, cluster, unreadable, keys);
      if (block !== undefined) {
        const key = keys.build({ kind: 'block', block });
        actions.push({
          why: `grant ${formatCidr(block)} to cluster ${cluster}`,
          compares: [{ key, createRevision: 0 }],
          operations: [{ kind: 'put', key, value: encodeBlock({ cluster }) }],
        });
        books.push({ block, cluster, key, modRevision: 0, size: sizeInSubnets(config.plan, block), used: 0 });
      }
      continue;
    }
    // Twice the low mark must stay free, so that a block is not granted and taken back in turns.
    for (const { key, modRevision, size, used, block } of own) {
      if (used > 0 || modRevision === 0 || free - size < 2 * BLOCK_LOW_SUBNETS) continue;
      actions.push({
        why: `take back empty ${formatCidr(block)} from cluster ${cluster}`,
        compares: [{ key, modRevision }],
        operations: [{ kind: 'delete', key }],
      });
      break;
    }
  }
  for (const { cluster, key, modRevision, used, block } of books)
    if (!admitted.has(cluster) && used === 0 && modRevision > 0)
      actions.push({
        why: `take back ${formatCidr(block)}: cluster ${cluster} is gone`,
        compares: [
          { key, modRevision },
          { key: keys.build({ kind: 'cluster', cluster }), createRevision: 0 },
        ],
        operations: [{ kind: 'delete', key }],
      });
  return actions;
}

/** Why blocks that a person wrote are left out of account, by key. */
export function blockFaults(view: View, keys: Keys): ReadonlyMap<string, string> {
  const faults = new Map<string, string>();
  const plan = view.get('config', keys.build({ kind: 'config' }))?.value.plan;
  if (plan === undefined) return faults;
  for (const [key, held] of view.all('block')) {
    const checked = checkBlock(plan, held.key.block);
    if (!checked.ok) faults.set(key, checked.error.message);
  }
  return faults;
}

interface BookedBlock {
  readonly block: Cidr;
  readonly cluster: string;
  readonly key: string;
  readonly modRevision: number;
  /** In subnets. */
  readonly size: number;
  used: number;
}

function bookBlocks(view: View, plan: Plan): BookedBlock[] {
  const books: BookedBlock[] = [];
  for (const [key, held] of view.all('block')) {
    if (!checkBlock(plan, held.key.block).ok) continue;
    books.push({
      block: held.key.block,
      cluster: held.value.cluster,
      key,
      modRevision: held.modRevision,
      size: sizeInSubnets(plan, held.key.block),
      used: 0,
    });
  }
  for (const { key } of view.all('subnet').values())
    for (const book of books) if (contains(book.block, key.subnet.base)) book.used++;
  return books;
}

const sizeInSubnets = (plan: Plan, block: Cidr): number => 2 ** Math.max(0, plan.nodeBits - block.bits);

/** The first block that overlaps nobody's and holds no other cluster's subnet. */
function nextBlock(
  plan: Plan,
  view: View,
  books: readonly BookedBlock[],
  cluster: string,
  unreadable: ReadonlySet<string>,
  keys: Keys,
): Cidr | undefined {
  const bits = Math.max(plan.platform.bits, plan.nodeBits - BLOCK_SUBNET_BITS);
  const step = 2 ** (32 - bits);
  const foreign = new Set<number>();
  const blockOf = (base: number): number => Math.floor((base - plan.platform.base) / step);
  for (const { key, value } of view.all('subnet').values())
    if (value.cluster !== cluster) foreign.add(blockOf(key.subnet.base));
  const count = 2 ** (bits - plan.platform.bits);
  for (let i = 0; i < count; i++) {
    const block: Cidr = { base: ipv4(plan.platform.base + i * step), bits };
    if (overlaps(block, plan.services) || foreign.has(i)) continue;
    if (books.some((book) => overlaps(book.block, block))) continue;
    if (unreadable.has(keys.build({ kind: 'block', block }))) continue;
    if (!subnetIndex(plan, { base: block.base, bits: plan.nodeBits }).ok) continue;
    return block;
  }
  return undefined;
}
