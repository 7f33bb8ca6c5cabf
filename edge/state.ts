// What the agent must remember across a restart: the subnet it claimed and the instances it hosts. One JSON file in
// the data directory, replaced atomically. A file that cannot be read is reported and treated as absent: the
// keyspace and the host are the truth, this is only what to ask them for again.
import * as v from 'valibot';
import type { LeaseId } from '../coordinator/kv.ts';
import { type Cidr, formatCidr, formatIpv4, type Ipv4 } from '../src/addr.ts';
import { fail, ok, type Result } from '../src/error.ts';
import type { NetworkConfig } from '../src/model.ts';
import type { ServiceId } from '../src/name.ts';
import {
  cidrSchema,
  decodeConfig,
  describeIssues,
  encodeConfig,
  instanceNumberSchema,
  ipv4Schema,
  serviceIdSchema,
} from '../src/records.ts';
import type { Target } from './api/schema.ts';

/** An instance that this node hosts. */
export interface Hosted {
  readonly service: ServiceId;
  readonly instance: number;
  readonly target: Target;
  /** Of a process: what tells it from a later one with the same id (Vitals in ports.ts). */
  readonly identity?: string;
  readonly namespaceIp: Ipv4;
  readonly instanceIp: Ipv4;
}

/** An instance that is no longer hosted and not yet gone everywhere. */
export interface Leaving {
  readonly service: ServiceId;
  readonly instance: number;
  readonly instanceIp?: Ipv4;
}

export interface SavedState {
  readonly subnet: Cidr;
  /** What is needed to go on while etcd is away: the claim as it was, and the network's settings. */
  readonly claim?: { readonly epoch: number; readonly lease: LeaseId };
  /** When etcd last confirmed the claim, milliseconds since 1970. */
  readonly tenureMs?: number;
  readonly network?: NetworkConfig;
  /** Where the next namespace address is looked for: those before it were given lately. */
  readonly nextAddress?: Ipv4;
  readonly hosted: readonly Hosted[];
  readonly leaving?: readonly Leaving[];
}

const savedSchema = v.object({
  v: v.literal(1),
  subnet: cidrSchema,
  claim: v.exactOptional(v.object({ epoch: v.number(), lease: v.string() })),
  tenureMs: v.exactOptional(v.number()),
  network: v.exactOptional(v.unknown()),
  nextAddress: v.exactOptional(ipv4Schema),
  hosted: v.array(
    v.object({
      service: serviceIdSchema,
      instance: instanceNumberSchema,
      target: v.variant('kind', [
        v.object({ kind: v.literal('container'), container: v.string() }),
        v.object({ kind: v.literal('netns'), name: v.string() }),
        v.object({ kind: v.literal('pid'), pid: v.number() }),
      ]),
      identity: v.exactOptional(v.string()),
      namespaceIp: ipv4Schema,
      instanceIp: ipv4Schema,
    }),
  ),
  leaving: v.exactOptional(
    v.array(
      v.object({
        service: serviceIdSchema,
        instance: instanceNumberSchema,
        instanceIp: v.exactOptional(ipv4Schema),
      }),
    ),
  ),
});

export function encodeState(state: SavedState): string {
  const hosted = state.hosted.map((one) => ({
    ...one,
    namespaceIp: formatIpv4(one.namespaceIp),
    instanceIp: formatIpv4(one.instanceIp),
  }));
  const leaving = state.leaving?.map(({ service, instance, instanceIp }) => ({
    service,
    instance,
    ...(instanceIp === undefined ? {} : { instanceIp: formatIpv4(instanceIp) }),
  }));
  const { subnet, claim, tenureMs, network, nextAddress } = state;
  // JSON leaves out what is undefined.
  const json = {
    v: 1,
    subnet: formatCidr(subnet),
    claim,
    tenureMs,
    network: network === undefined ? undefined : JSON.parse(encodeConfig(network)),
    nextAddress: nextAddress === undefined ? undefined : formatIpv4(nextAddress),
    hosted,
    leaving,
  };
  return `${JSON.stringify(json, undefined, 2)}\n`;
}

export function decodeState(text: string): Result<SavedState> {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    return fail('invalid_record', `is not JSON: ${(cause as Error).message}`);
  }
  const result = v.safeParse(savedSchema, json);
  if (!result.success) return fail('invalid_record', describeIssues(result.issues));
  const { v: _version, claim, network: savedNetwork, ...rest } = result.output;
  const network = decodeConfig(JSON.stringify(savedNetwork ?? null));
  return ok({
    ...rest,
    ...(claim === undefined ? {} : { claim: { epoch: claim.epoch, lease: claim.lease as LeaseId } }),
    ...(network.ok ? { network: network.value } : {}),
  });
}
