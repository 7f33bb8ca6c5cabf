// Why a text is not a name of ours, or which name was meant: for people at a prompt (`edgeway resolve`). Pure; it
// refuses to decide anything, the grammar in name.ts does.
import {
  FIXED_LABEL,
  formatName,
  parseInstanceNumber,
  parseName,
  parseServiceId,
  type ServiceId,
  TOP_LABEL,
} from './name.ts';
import { isPolicy, POLICIES } from './policy.ts';

/** The label at fault: its place from the left (0 …), its text and the rule that it breaks. */
export interface Fault {
  readonly index: number;
  readonly label: string;
  readonly rule: string;
}

export interface Explanation {
  readonly valid: boolean;
  /** One sentence per thing that is wrong; empty when the name is valid and known. */
  readonly faults: readonly Fault[];
  readonly problem?: string;
  /** Valid names that may have been meant, best first, at most five. */
  readonly suggestions: readonly string[];
}

const SUGGESTIONS_MAX = 5;
const ROLES = ['appname', 'appns', 'servicename', 'servicens', 'instance', 'policy', 'top'] as const;
const LABEL = /^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/;

/** `known` are the services that this node follows; they only serve suggestions. */
export function explainName(text: string, known: Iterable<ServiceId> = []): Explanation {
  const lower = text.trim().toLowerCase().replace(/\.$/, '');
  const parsed = parseName(lower);
  const services = [...known];
  if (parsed.ok) {
    const { service } = parsed.value;
    if (services.includes(service) || services.length === 0)
      return { valid: true, faults: [], suggestions: [] };
    const near = nearest(service, services);
    return {
      valid: true,
      faults: [],
      problem: `the name is well-formed, but this node knows no service ${service}`,
      suggestions: near.map((id) => formatName({ ...parsed.value, service: id })),
    };
  }
  const labels = lower.split('.');
  const faults = faultsOf(labels);
  return { valid: false, faults, problem: parsed.error.message, suggestions: suggest(labels, services) };
}

/** The same in one paragraph; undefined when there is nothing to say. */
export function explainInWords(text: string, known: Iterable<ServiceId> = []): string | undefined {
  const { valid, faults, problem, suggestions } = explainName(text, known);
  if (problem === undefined) return undefined;
  const meant = suggestions.length === 0 ? '' : `; perhaps ${suggestions.slice(0, 2).join(' or ')} was meant`;
  if (valid || faults.length === 0) return problem + meant;
  const said = faults.map(({ label, rule }) => (label === '' ? rule : `label "${label}": ${rule}`));
  return `"${text}" is not a name: ${said.join('; ')}${meant}`;
}

/** Every label that is wrong where it stands, reading from the right, where the fixed parts are. */
function faultsOf(labels: readonly string[]): readonly Fault[] {
  const faults: Fault[] = [];
  const shift = ROLES.length - labels.length;
  for (const [index, label] of labels.entries()) {
    const role = ROLES[index + shift];
    const rule =
      role === undefined ? 'there is no eighth label: a name has seven' : ruleOf(role, label, labels);
    if (rule !== undefined) faults.push({ index, label, rule });
  }
  if (shift > 0)
    faults.push({
      index: labels.length,
      label: '',
      rule: `${shift} label(s) are missing: ${ROLES.join('.').replace(/top$/, TOP_LABEL)}`,
    });
  return faults;
}

function ruleOf(role: (typeof ROLES)[number], label: string, labels: readonly string[]): string | undefined {
  const policy = labels.at(-2);
  switch (role) {
    case 'top':
      return label === TOP_LABEL ? undefined : `a name ends in "${TOP_LABEL}"`;
    case 'policy':
      return isPolicy(label) || label === FIXED_LABEL
        ? undefined
        : `the policy is one of ${[...POLICIES, FIXED_LABEL].join(', ')}`;
    case 'instance':
      if (policy === FIXED_LABEL)
        return parseInstanceNumber(label) === undefined
          ? `with "${FIXED_LABEL}" stands a number from 1`
          : undefined;
      return label === 'any' ? undefined : `with a policy other than "${FIXED_LABEL}" stands "any"`;
    default:
      if (label.length > 63) return `${role} has ${label.length} octets, the limit is 63`;
      return LABEL.test(label) ? undefined : `${role} is letters, digits and inner hyphens`;
  }
}

function suggest(labels: readonly string[], services: readonly ServiceId[]): readonly string[] {
  const candidates: string[] = [];
  const policy = nearestOf(labels.at(-2) ?? '', [...POLICIES, FIXED_LABEL]);
  const number = labels.map(parseInstanceNumber).find((each) => each !== undefined);
  // Four labels, with or without ".local", are a service without its ending.
  const head = labels
    .filter((label) => label !== TOP_LABEL)
    .slice(0, 4)
    .join('.');
  const service = parseServiceId(head);
  const ids: ServiceId[] = service.ok ? [service.value] : [];
  for (const id of nearest(head, services)) if (!ids.includes(id)) ids.push(id);
  for (const id of ids) {
    if (number !== undefined && labels.length > 4)
      candidates.push(formatName({ service: id, instance: number }));
    if (policy !== undefined && isPolicy(policy)) candidates.push(formatName({ service: id, policy }));
    candidates.push(formatName({ service: id, policy: 'closest' }));
  }
  return [...new Set(candidates)].slice(0, SUGGESTIONS_MAX);
}

/** Known services within a third of the letters, nearest first. */
function nearest(text: string, services: readonly ServiceId[]): readonly ServiceId[] {
  return services
    .map((id) => ({ id, far: distance(text, id) }))
    .filter(({ far }) => far > 0 && far <= Math.max(2, Math.floor(text.length / 3)))
    .sort((a, b) => a.far - b.far || (a.id < b.id ? -1 : 1))
    .slice(0, SUGGESTIONS_MAX)
    .map(({ id }) => id);
}

function nearestOf(text: string, words: readonly string[]): string | undefined {
  let best: string | undefined;
  let least = Math.max(3, Math.floor(text.length / 2)) + 1;
  for (const word of words) {
    const far = distance(text, word);
    if (far < least) {
      least = far;
      best = word;
    }
  }
  return best;
}

/** Levenshtein's distance, cut to 253 characters each way. */
export function distance(a: string, b: string): number {
  const left = a.slice(0, 253);
  const right = b.slice(0, 253);
  let row = Array.from({ length: right.length + 1 }, (_, i) => i);
  for (let i = 1; i <= left.length; i++) {
    const next = [i];
    for (let j = 1; j <= right.length; j++)
      next[j] = Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (left[i - 1] === right[j - 1] ? 0 : 1));
    row = next;
  }
  return row[right.length]!;
}
