// One question against the table: what the name service says, and why. Both faces ask here, unicast DNS and multicast
// DNS. Pure: no message, no socket, no time. It refuses to guess: what the table cannot know yet is SERVFAIL, what
// may exist below the name is NODATA, and only what surely is not there is NXDOMAIN.
//
//   ours: NAME.{roundrobin,closest,fastest,fixed}.local   A, SRV · reverse of the address plan   PTR · else: forward
import { contains, formatIpv4, type Ipv4, ipv4, networkOf } from '../../src/addr.ts';
import { DNS_INSTANCE_TTL_S, DNS_NEGATIVE_TTL_S, DNS_TTL_S } from '../../src/limits.ts';
import { type Instance, portNumbers, type Service } from '../../src/model.ts';
import {
  FIXED_LABEL,
  formatName,
  isOurSuffix,
  type Name,
  parseInstanceNumber,
  parseName,
  type ServiceId,
} from '../../src/name.ts';
import { DEFAULT_PLAN, type Plan } from '../../src/plan.ts';
import type { NameTable } from '../routes/table.ts';

/** `name` as it was asked, without the trailing dot; `type` in the IANA mnemonic (`A`, `AAAA`, `PTR`, …). */
export interface Question {
  readonly name: string;
  readonly type: string;
}

/** A record of ours. The owner repeats the question's spelling; `ttl` is in seconds. */
export type LocalRecord =
  | { readonly type: 'A'; readonly name: string; readonly ttl: number; readonly address: Ipv4 }
  | { readonly type: 'PTR'; readonly name: string; readonly ttl: number; readonly target: string }
  | {
      readonly type: 'SRV';
      readonly name: string;
      readonly ttl: number;
      readonly port: number;
      readonly target: string;
    };

/**
 * What to say. `service` is set when the question was a valid name of ours, `address` when it was about one that the
 * table knows nothing of; `zone` owns the SOA of a negative answer
 * and `ttl` bounds its caching, seconds (RFC 2308 §3). `why` is one sentence for people.
 */
export type Decision =
  | {
      readonly kind: 'answer';
      readonly service?: ServiceId;
      readonly records: readonly LocalRecord[];
      readonly additionals: readonly LocalRecord[];
    }
  | {
      readonly kind: 'nodata';
      readonly service?: ServiceId;
      readonly zone: string;
      readonly ttl: number;
      /** Types that do exist at the name, for NSEC (RFC 6762 §6.1). */
      readonly types: readonly string[];
    }
  | {
      readonly kind: 'nxdomain';
      readonly service?: ServiceId;
      readonly address?: Ipv4;
      readonly zone: string;
      readonly ttl: number;
      readonly why: string;
    }
  | { readonly kind: 'soa'; readonly zone: string; readonly ttl: number }
  | {
      readonly kind: 'servfail';
      readonly service?: ServiceId;
      readonly address?: Ipv4;
      readonly why: string;
    }
  | { readonly kind: 'refused'; readonly service?: ServiceId; readonly why: string }
  | { readonly kind: 'forward' };

export interface ResolverOptions {
  /** Services that the asker may use; undefined = any. */
  readonly needs?: readonly ServiceId[] | undefined;
  readonly plan?: Plan;
}

const NO_RECORDS: readonly LocalRecord[] = [];
const REVERSE_SUFFIX = '.in-addr.arpa';

/** Decides one question of class IN. */
export function answer(question: Question, table: NameTable, options: ResolverOptions = {}): Decision {
  const lower = question.name.toLowerCase();
  if (isOurSuffix(lower)) return answerName(question, lower, table, options);
  if (lower.endsWith(REVERSE_SUFFIX))
    return answerReverse(question, lower, table, options.plan ?? DEFAULT_PLAN);
  return { kind: 'forward' };
}

function answerName(question: Question, lower: string, table: NameTable, options: ResolverOptions): Decision {
  const zone = lower.slice(lower.lastIndexOf('.', lower.lastIndexOf('.') - 1) + 1);
  const parsed = parseName(lower);
  if (!parsed.ok) {
    if (lower === zone && question.type === 'SOA') return { kind: 'soa', zone, ttl: DNS_TTL_S };
    // RFC 8020 §2: NXDOMAIN would also deny every name below; what a valid name may stand under has no data instead.
    if (mayHaveNamesBelow(lower.split('.')))
      return { kind: 'nodata', zone, ttl: DNS_NEGATIVE_TTL_S, types: lower === zone ? ['SOA'] : [] };
    return { kind: 'nxdomain', zone, ttl: DNS_NEGATIVE_TTL_S, why: parsed.error.message };
  }
  const name = parsed.value;
  const { service } = name;
  if (options.needs !== undefined && !options.needs.includes(service))
    return { kind: 'refused', service, why: `${service} is not among the asker's needs` };
  const found = lookUp(name, table);
  if (found === undefined) {
    if (!table.synced) return { kind: 'servfail', service, why: 'the routing table is not complete yet' };
    if ('policy' in name && table.service(service) !== undefined)
      return { kind: 'nodata', service, zone, ttl: DNS_NEGATIVE_TTL_S, types: [] };
    return { kind: 'nxdomain', service, zone, ttl: DNS_NEGATIVE_TTL_S, why: whyMissing(name, table) };
  }
  const { address, ports, ttl } = found;
  const a: LocalRecord = { type: 'A', name: question.name, ttl, address };
  if (question.type === 'A') return { kind: 'answer', service, records: [a], additionals: NO_RECORDS };
  const srv = ports.map(
    (port): LocalRecord => ({ type: 'SRV', name: question.name, ttl, port, target: question.name }),
  );
  if (question.type === 'SRV' && srv.length > 0)
    return { kind: 'answer', service, records: srv, additionals: [a] };
  // RFC 8482 §4.1: ANY may be answered with a part of what there is.
  if (question.type === 'ANY')
    return { kind: 'answer', service, records: [a, ...srv], additionals: NO_RECORDS };
  return { kind: 'nodata', service, zone, ttl, types: srv.length > 0 ? ['A', 'SRV'] : ['A'] };
}

interface Found {
  readonly address: Ipv4;
  readonly ports: readonly number[];
  readonly ttl: number;
}

function lookUp(name: Name, table: NameTable): Found | undefined {
  const service = table.service(name.service);
  if ('policy' in name) {
    const address = service?.addresses[name.policy];
    if (service === undefined || address === undefined) return undefined;
    return { address, ports: portNumbers(service.descriptor.ports), ttl: DNS_TTL_S };
  }
  const instance = table.instance(name.service, name.instance);
  if (instance === undefined) return undefined;
  const ports = instance.ports.length > 0 ? instance.ports : portNumbers(service?.descriptor.ports ?? []);
  return { address: instance.instanceIp, ports, ttl: DNS_INSTANCE_TTL_S };
}

/** The record that an answer about `name` was made of: while it is the same object, the answer still holds. */
export function sourceOf(
  name: Name,
  table: NameTable,
): { readonly service: Service | undefined; readonly instance: Instance | undefined } {
  return {
    service: table.service(name.service),
    instance: 'policy' in name ? undefined : table.instance(name.service, name.instance),
  };
}

function whyMissing(name: Name, table: NameTable): string {
  if ('instance' in name && table.service(name.service) !== undefined)
    return `service ${name.service} has no instance ${name.instance}`;
  return `there is no service ${name.service}`;
}

/** True for a proper ending of names that the grammar allows: `closest.local`, `any.closest.local`, `2.fixed.local`, … */
function mayHaveNamesBelow(labels: readonly string[]): boolean {
  if (labels.length >= 7) return false;
  const policy = labels.at(-2);
  const instance = labels.at(-3);
  if (instance !== undefined) {
    const fits = policy === FIXED_LABEL ? parseInstanceNumber(instance) !== undefined : instance === 'any';
    if (!fits) return false;
  }
  return labels.slice(0, -3).every((label) => /^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/.test(label));
}

/**
 * Names of addresses that have one. ServiceIPs and InstanceIPs without one surely have none. In a node's subnet there
 * may be an instance that this node does not follow, and nothing tells its name by its address: no data. A subnet of
 * the plan that no node holds may be another network of the operator's.
 */
function answerReverse(question: Question, lower: string, table: NameTable, plan: Plan): Decision {
  const address = parseReverse(lower);
  if (address === undefined) return { kind: 'forward' };
  const name = table.nameOf(address);
  const isService = contains(plan.services, address);
  const zone = reverseZone(plan);
  if (name !== undefined) {
    if (question.type === 'PTR' || question.type === 'ANY') {
      const ttl = 'policy' in name ? DNS_TTL_S : DNS_INSTANCE_TTL_S;
      const target = formatName(name);
      return {
        kind: 'answer',
        records: [{ type: 'PTR', name: question.name, ttl, target }],
        additionals: NO_RECORDS,
      };
    }
    return {
      kind: 'nodata',
      zone: isService ? zone : lower,
      ttl: DNS_INSTANCE_TTL_S,
      types: ['PTR'],
    };
  }
  if (!isService) {
    if (!contains(plan.platform, address)) return { kind: 'forward' };
    const taken = table.isNodeSubnet(networkOf(address, plan.nodeBits));
    if (taken === false) return { kind: 'forward' };
    if (taken) return { kind: 'nodata', zone: lower, ttl: DNS_NEGATIVE_TTL_S, types: [] };
    return { kind: 'servfail', address, why: `whether a node holds ${formatIpv4(address)} is not known yet` };
  }
  if (!table.synced) return { kind: 'servfail', address, why: 'the routing table is not complete yet' };
  const why = `${formatIpv4(address)} belongs to nobody`;
  return { kind: 'nxdomain', address, zone, ttl: DNS_NEGATIVE_TTL_S, why };
}

/** `5.0.30.172.in-addr.arpa` → 172.30.0.5 (RFC 1035 §3.5); undefined for anything but four plain octets. */
export function parseReverse(lower: string): Ipv4 | undefined {
  const octets = lower.slice(0, -REVERSE_SUFFIX.length).split('.');
  if (octets.length !== 4) return undefined;
  let value = 0;
  for (const octet of octets.reverse()) {
    if (!/^(0|[1-9][0-9]{0,2})$/.test(octet) || Number(octet) > 255) return undefined;
    value = value * 256 + Number(octet);
  }
  return ipv4(value);
}

/** Inverse of parseReverse. */
export function formatReverse(address: Ipv4): string {
  return formatIpv4(address).split('.').reverse().join('.') + REVERSE_SUFFIX;
}

/** The service range as a reverse zone, cut to whole octets: 172.30.0.0/16 → `30.172.in-addr.arpa`. */
function reverseZone(plan: Plan): string {
  const octets = formatIpv4(plan.services.base)
    .split('.')
    .slice(0, Math.floor(plan.services.bits / 8));
  return octets.reverse().join('.') + REVERSE_SUFFIX;
}
