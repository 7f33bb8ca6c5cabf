// The journal of what we changed on this host, on disk before it is done, so that a crash leaves nothing that cannot
// be cleaned up. It refuses to guess: a file that cannot be read is an error that names it.
import * as v from 'valibot';
import { formatCidr, formatIpv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import { cidrSchema, describeIssues, ipv4Schema } from '../../src/records.ts';
import type { Files } from '../ports.ts';

const resolvSchema = v.object({
  path: v.string(),
  nameserver: ipv4Schema,
  before: v.optional(v.string()),
  made: v.array(v.string()),
});

const attachmentSchema = v.object({
  /** For people: `netns NAME` or `pid N`. */
  target: v.string(),
  netns: v.string(),
  /** `device:inode` of the namespace: a pid may come again as another process. */
  netnsId: v.string(),
  hostInterface: v.string(),
  inner: v.string(),
  namespaceIp: ipv4Schema,
  subnet: cidrSchema,
  mtu: v.number(),
  resolv: v.optional(resolvSchema),
});

const nodeSchema = v.object({
  bridge: v.string(),
  tun: v.string(),
  table: v.string(),
  subnet: cidrSchema,
  services: cidrSchema,
  platform: cidrSchema,
  mtu: v.number(),
});

const stateSchema = v.object({
  v: v.literal(1),
  node: v.optional(nodeSchema),
  /** Switches that we turned, with the value they had. */
  sysctls: v.record(v.string(), v.string()),
  /** iptables had no filter table before us. */
  filterTableIsOurs: v.boolean(),
  attachments: v.record(v.string(), attachmentSchema),
});

export type Attachment = v.InferOutput<typeof attachmentSchema>;
export type HostState = v.InferOutput<typeof stateSchema>;

export const EMPTY_STATE: HostState = { v: 1, sysctls: {}, filterTableIsOurs: false, attachments: {} };

/** What is on disk, or the empty state. */
export async function loadState(files: Files, path: string): Promise<HostState> {
  const text = await files.read(path);
  if (text === undefined) return EMPTY_STATE;
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw unreadable(path, (cause as Error).message, cause);
  }
  const parsed = v.safeParse(stateSchema, json);
  if (!parsed.success) throw unreadable(path, describeIssues(parsed.issues));
  return parsed.output;
}

export async function saveState(files: Files, path: string, state: HostState): Promise<void> {
  if (
    state.node === undefined &&
    Object.keys(state.attachments).length + Object.keys(state.sysctls).length === 0
  )
    return await files.remove(path);
  const text = JSON.stringify(state, replacer, 2);
  await files.write(path, `${text}\n`);
}

/** Addresses are text on disk. */
function replacer(key: string, value: unknown): unknown {
  if ((key === 'namespaceIp' || key === 'nameserver') && typeof value === 'number')
    return formatIpv4(value as Parameters<typeof formatIpv4>[0]);
  if ((key === 'subnet' || key === 'services' || key === 'platform') && typeof value === 'object')
    return formatCidr(value as Parameters<typeof formatCidr>[0]);
  return value;
}

function unreadable(path: string, why: string, cause?: unknown): EdgewayError {
  return new EdgewayError(
    'invalid_record',
    `${path} cannot be read (${why}): it lists what Edgeway changed on this host; clean up by hand as edge/host/README.md says, then remove it`,
    { cause },
  );
}
