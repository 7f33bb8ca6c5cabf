// The grammar of service names, and nothing else that spells them.
//
//   appname.appns.servicename.servicens . instance . policy . local
//   └────────── service id ───────────┘   any        roundrobin | closest | fastest
//                                         1…n        fixed
//
// Labels follow RFC 1035 §2.3.1 relaxed by RFC 1123 §2.1 (a digit may lead), at most 63 octets (§2.3.4). Names
// compare case-blind and are lower case here. `format` and `parse` are inverses.
import { EdgewayError, fail, ok, type Result } from './error.ts';
import { isPolicy, POLICIES, type Policy } from './policy.ts';

/** The four parts that identify a service. */
export interface ServiceName {
  readonly app: string;
  readonly appNs: string;
  readonly service: string;
  readonly serviceNs: string;
}

/** `app.appns.service.servicens`: the service's identity in keys, in the API and in logs. */
export type ServiceId = string & { readonly __brand: 'ServiceId' };

/** What a name asks for: an instance by policy, or exactly one. Other pairs cannot be spelled. */
export type Name =
  | { readonly service: ServiceId; readonly policy: Policy }
  | { readonly service: ServiceId; readonly instance: number };

export const LABEL_LENGTH_MAX = 63; // RFC 1035 §2.3.4
export const TOP_LABEL = 'local';
export const FIXED_LABEL = 'fixed';
const ANY = 'any';
const PART_NAMES = ['appname', 'appns', 'servicename', 'servicens'] as const;
/** Instance numbers are printed without leading zeros and stay far below any platform's size (15,360 × 61). */
export const INSTANCE_NUMBER_MAX = 999_999;

function checkLabel(label: string, part: string, whole: string): EdgewayError | undefined {
  const why =
    label.length === 0
      ? 'is empty'
      : label.length > LABEL_LENGTH_MAX
        ? `is ${label.length} octets long, the limit is ${LABEL_LENGTH_MAX}`
        : !/^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/.test(label)
          ? 'must be letters, digits and inner hyphens'
          : undefined;
  return why === undefined
    ? undefined
    : new EdgewayError('invalid_name', `"${whole}": ${part} "${label}" ${why}`);
}

/** Four labels, `app.appns.service.servicens`. */
export function parseServiceId(text: string): Result<ServiceId> {
  const lower = text.toLowerCase();
  const labels = lower.split('.');
  if (labels.length !== 4)
    return fail(
      'invalid_name',
      `"${text}" has ${labels.length} part(s), a service has four: appname.appns.servicename.servicens`,
    );
  for (const [i, label] of labels.entries()) {
    const error = checkLabel(label, PART_NAMES[i]!, text);
    if (error) return { ok: false, error };
  }
  // 4 × 63 + the longest ".instance.policy.local" would pass the 253 octets that a name may have (RFC 1035 §2.3.4).
  const longest = `${lower}.${INSTANCE_NUMBER_MAX}.${FIXED_LABEL}.${TOP_LABEL}`.length;
  const worst = Math.max(longest, `${lower}.${ANY}.roundrobin.${TOP_LABEL}`.length);
  if (worst > 253)
    return fail(
      'invalid_name',
      `"${text}" is too long: its names would have ${worst} octets, the limit is 253`,
    );
  return ok(lower as ServiceId);
}

export function serviceIdOf(name: ServiceName): Result<ServiceId> {
  return parseServiceId(`${name.app}.${name.appNs}.${name.service}.${name.serviceNs}`);
}

export function splitServiceId(id: ServiceId): ServiceName {
  const [app, appNs, service, serviceNs] = id.split('.') as [string, string, string, string];
  return { app, appNs, service, serviceNs };
}

/** A positive decimal without leading zeros. */
export function parseInstanceNumber(text: string): number | undefined {
  if (!/^[1-9][0-9]{0,5}$/.test(text)) return undefined;
  return Number(text);
}

/** Parses a full name; a trailing dot is allowed. The error names the label that is wrong and what would be right. */
export function parseName(text: string): Result<Name> {
  const lower = text.toLowerCase().replace(/\.$/, '');
  const labels = lower.split('.');
  if (labels.length !== 7)
    return fail(
      'invalid_name',
      `"${text}" has ${labels.length} label(s), a name has seven: appname.appns.servicename.servicens.instance.policy.${TOP_LABEL}`,
    );
  const [, , , , instance, policy, top] = labels as [string, string, string, string, string, string, string];
  if (top !== TOP_LABEL)
    return fail('invalid_name', `"${text}" ends in "${top}", a name ends in "${TOP_LABEL}"`);
  const service = parseServiceId(labels.slice(0, 4).join('.'));
  if (!service.ok) return service;
  if (policy === FIXED_LABEL) {
    const number = parseInstanceNumber(instance);
    if (number === undefined)
      return fail(
        'invalid_name',
        `"${text}": instance "${instance}" must be 1…${INSTANCE_NUMBER_MAX} with policy "${FIXED_LABEL}"`,
      );
    return ok({ service: service.value, instance: number });
  }
  if (!isPolicy(policy))
    return fail(
      'invalid_name',
      `"${text}": policy "${policy}" must be one of ${POLICIES.join(', ')}, ${FIXED_LABEL}`,
    );
  if (instance !== ANY)
    return fail(
      'invalid_name',
      `"${text}": instance "${instance}" must be "${ANY}" with policy "${policy}"; a number goes with "${FIXED_LABEL}"`,
    );
  return ok({ service: service.value, policy });
}

export function formatName(name: Name): string {
  return 'policy' in name
    ? `${name.service}.${ANY}.${name.policy}.${TOP_LABEL}`
    : `${name.service}.${name.instance}.${FIXED_LABEL}.${TOP_LABEL}`;
}

/** True when the last two labels make the name ours to answer (`….closest.local`), whether or not the rest parses. */
export function isOurSuffix(text: string): boolean {
  const labels = text.toLowerCase().replace(/\.$/, '').split('.');
  const policy = labels.at(-2);
  return labels.at(-1) === TOP_LABEL && policy !== undefined && (isPolicy(policy) || policy === FIXED_LABEL);
}
