// The journal of what we changed on this host, on disk before it is done, so that a crash leaves nothing that cannot
// be cleaned up. It refuses to guess: a file that cannot be read is an error that names it.
import * as v from 'valibot';
import { type Cidr, formatCidr, formatIpv4, ipv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import { cidrSchema, describeIssues, ipv4Schema, portSchema } from '../../src/records.ts';
import type { Files } from '../ports.ts';

const resolvSchema = v.object({
  path: v.string(),
  nameserver: ipv4Schema,
  before: v.optional(v.string()),
  made: v.array(v.string()),
});

const protocolSchema = v.picklist(['tcp', 'udp']);
const mappingSchema = v.object({ source: portSchema, destination: portSchema, protocol: protocolSchema });

const targetSchema = v.object({ address: ipv4Schema, port: portSchema });

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
  /** The namespace is ours: made with the attachment, deleted with it. */
  madeNetns: v.boolean(),
  /** Ports of this host that lead to the instance. */
  ports: v.array(mappingSchema),
  resolv: v.optional(resolvSchema),
});

const nodeSchema = v.object({
  bridge: v.string(),
  tun: v.string(),
  /** Name of our nftables table. */
  table: v.string(),
  subnet: cidrSchema,
  /** The bridge's address: gateway, and nameserver where there is one. */
  gateway: ipv4Schema,
  /** Range that the TUN serves; absent where there is no ProxyTUN. */
  services: v.optional(cidrSchema),
  /** Addresses that never leave by another way than ours. */
  platform: v.optional(cidrSchema),
  mtu: v.number(),
  /** Instances reach each other only through the ProxyTUN. */
  isolated: v.boolean(),
  /** The kernel's own VXLAN-GPE device, where it carries packets between nodes. */
  carrier: v.optional(v.object({ device: v.string(), vni: v.number(), port: portSchema })),
  /** UDP port of the ProxyTUN's tunnel, where there is one. */
  tunnelPort: v.optional(portSchema),
  /** Where the node finds its coordination store: nothing for instances. */
  stores: v.optional(v.array(targetSchema)),
  /** Prefixes of the host that lie inside the platform and are not ours: instances may go there. */
  foreign: v.array(cidrSchema),
});

const peerSchema = v.object({ prefix: cidrSchema, endpoint: ipv4Schema });

const exposedSchema = v.object({
  protocol: protocolSchema,
  source: portSchema,
  targets: v.array(targetSchema),
  hairpin: v.optional(targetSchema),
  kept: v.optional(v.array(targetSchema)),
});

const stateSchema = v.object({
  v: v.literal(1),
  node: v.optional(nodeSchema),
  /** Switches that we turned, with the value they had. */
  sysctls: v.record(v.string(), v.string()),
  /** iptables had no filter table before us. */
  filterTableIsOurs: v.boolean(),
  attachments: v.record(v.string(), attachmentSchema),
  /** Ports of this host that lead to services. */
  exposed: v.optional(v.array(exposedSchema), []),
  /** UDP ports of other nodes' tunnels. */
  tunnelPorts: v.optional(v.array(portSchema), []),
  /** Other nodes, by id, whose prefixes the carrier reaches. */
  peers: v.optional(v.record(v.string(), peerSchema), {}),
});

export type NodeState = v.InferOutput<typeof nodeSchema>;
export type Peer = v.InferOutput<typeof peerSchema>;
export type Attachment = v.InferOutput<typeof attachmentSchema>;
export type HostState = v.InferOutput<typeof stateSchema>;

export const EMPTY_STATE: HostState = {
  v: 1,
  sysctls: {},
  filterTableIsOurs: false,
  attachments: {},
  exposed: [],
  tunnelPorts: [],
  peers: {},
};

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

const ADDRESSES = new Set(['namespaceIp', 'nameserver', 'gateway', 'endpoint', 'address']);

/** Addresses and prefixes are text on disk. */
function replacer(key: string, value: unknown): unknown {
  if (typeof value === 'number') return ADDRESSES.has(key) ? formatIpv4(ipv4(value)) : value;
  if (typeof value === 'object' && value !== null && 'base' in value && 'bits' in value)
    return formatCidr(value as Cidr);
  return value;
}

function unreadable(path: string, why: string, cause?: unknown): EdgewayError {
  return new EdgewayError(
    'invalid_record',
    `${path} cannot be read (${why}): it lists what Edgeway changed on this host; clean up by hand as edge/host/README.md says, then remove it`,
    { cause },
  );
}
