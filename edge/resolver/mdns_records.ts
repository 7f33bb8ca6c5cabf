// Records of ours as multicast DNS sends and hears them: by whole sets, since the cache-flush bit speaks for every
// record of a name and type (RFC 6762 §10.2) and a receiver drops what such a set lacks. Pure.
import type { Answer } from 'dns-packet';
import { formatIpv4 } from '../../src/addr.ts';
import { DNS_TTL_S } from '../../src/limits.ts';
import type { LocalRecord } from './resolver.ts';

export const TTL_S = DNS_TTL_S; // §10: 120 s for records tied to an address

/** All records of one name and type. */
export interface RecordSet {
  /** The name in lower case, and the type. */
  readonly key: string;
  readonly name: string;
  readonly type: string;
  readonly records: readonly Answer[];
  /** What each record says, to be compared. */
  readonly facts: readonly string[];
}

/** What somebody's records say, by key. */
export type Facts = ReadonlyMap<string, ReadonlySet<string>>;

const keyOf = (name: string, type: string): string => `${name.toLowerCase()} ${type}`;

export function setsOf(records: readonly LocalRecord[]): RecordSet[] {
  const sets = new Map<string, LocalRecord[]>();
  for (const record of records) {
    const key = keyOf(record.name, record.type);
    const same = sets.get(key);
    if (same === undefined) sets.set(key, [record]);
    else same.push(record);
  }
  return [...sets].map(([key, all]) => {
    const { name, type } = all[0]!;
    const answers = all.map(toAnswer);
    return { key, name, type, records: answers, facts: answers.map((record) => factOf(record) ?? '') };
  });
}

/** §6.1: the next name is the name itself, the bitmap holds what exists. */
export function nsecSet(name: string, types: readonly string[]): RecordSet {
  const record = {
    type: 'NSEC',
    name,
    ttl: TTL_S,
    flush: true,
    data: { nextDomain: name, rrtypes: [...types] },
  } as unknown as Answer;
  return { key: keyOf(name, 'NSEC'), name, type: 'NSEC', records: [record], facts: [types.join(' ')] };
}

/** §10.1: the same records with TTL 0. Without cache-flush: what somebody else says under that name by now stays. */
export function goodbyeOf(set: RecordSet): RecordSet {
  return { ...set, records: set.records.map((record) => ({ ...record, ttl: 0, flush: false }) as Answer) };
}

export function isSame(a: RecordSet, b: RecordSet): boolean {
  return a.key === b.key && a.facts.join('\n') === b.facts.join('\n');
}

/** What records say that live at least so long; 256 of them are looked at. */
export function factsOf(records: readonly Answer[] | undefined, leastTtlS: number): Facts {
  const facts = new Map<string, Set<string>>();
  for (const record of (records ?? []).slice(0, 256)) {
    const fact = factOf(record);
    if (fact === undefined || ((record as { ttl?: number }).ttl ?? 0) < leastTtlS) continue;
    const key = keyOf(record.name, record.type);
    const known = facts.get(key);
    if (known === undefined) facts.set(key, new Set([fact]));
    else known.add(fact);
  }
  return facts;
}

/** True when the facts hold all that the set says. */
export function covers(facts: Facts, set: RecordSet): boolean {
  const known = facts.get(set.key);
  return known !== undefined && set.facts.every((fact) => known.has(fact));
}

/** Undefined for types that we never send. */
function factOf(record: Answer): string | undefined {
  if (record.type === 'A' || record.type === 'PTR') return String(record.data);
  if (record.type === 'SRV') return `${record.data.port} ${record.data.target.toLowerCase()}`;
  if (record.type === 'NSEC')
    return (record.data as unknown as { rrtypes: readonly string[] }).rrtypes.join(' ');
  return undefined;
}

function toAnswer(record: LocalRecord): Answer {
  const common = { name: record.name, ttl: TTL_S, flush: true } as const;
  switch (record.type) {
    case 'A':
      return { type: 'A', ...common, data: formatIpv4(record.address) };
    case 'PTR':
      return { type: 'PTR', ...common, data: record.target };
    case 'SRV':
      return {
        type: 'SRV',
        ...common,
        data: { priority: 0, weight: 0, port: record.port, target: record.target },
      };
  }
}

/** At most: a name, 10 octets, and data of at most 8 octets with the name once more (SRV, NSEC). */
function octetsOf(record: Answer): number {
  const name = record.name.length + 2;
  return 10 + name + (record.type === 'A' ? 4 : 8 + name);
}

export interface Section {
  readonly answers: Answer[];
  readonly additionals: Answer[];
}

/** Cuts answers into parts of so many octets, one message each, and puts additionals where there is room left. */
export function packed(
  answers: readonly RecordSet[],
  additionals: readonly RecordSet[],
  octetsMax: number,
): readonly Section[] {
  const parts: Section[] = [];
  const left: number[] = [];
  for (const record of answers.flatMap(({ records }) => records)) {
    const octets = octetsOf(record);
    if (parts.length === 0 || octets > left.at(-1)!) {
      parts.push({ answers: [], additionals: [] });
      left.push(octetsMax);
    }
    parts.at(-1)!.answers.push(record);
    left[left.length - 1]! -= octets;
  }
  for (const { records } of additionals) {
    const octets = records.reduce((sum, record) => sum + octetsOf(record), 0);
    const at = left.findIndex((room) => octets <= room);
    if (at < 0) continue;
    parts[at]!.additionals.push(...records);
    left[at]! -= octets;
  }
  return parts;
}
