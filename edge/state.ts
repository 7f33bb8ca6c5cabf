// What the agent must remember across a restart: the subnet it claimed and the instances it hosts. One JSON file in
// the data directory, replaced atomically. A file that cannot be read is reported and treated as absent: the
// keyspace and the host are the truth, this is only what to ask them for again.
import * as v from 'valibot';
import { type Cidr, formatCidr, formatIpv4, type Ipv4 } from '../src/addr.ts';
import { fail, ok, type Result } from '../src/error.ts';
import type { ServiceId } from '../src/name.ts';
import {
  cidrSchema,
  describeIssues,
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
  readonly namespaceIp: Ipv4;
  readonly instanceIp: Ipv4;
}

export interface SavedState {
  readonly subnet: Cidr;
  readonly hosted: readonly Hosted[];
}

const savedSchema = v.object({
  v: v.literal(1),
  subnet: cidrSchema,
  hosted: v.array(
    v.object({
      service: serviceIdSchema,
      instance: instanceNumberSchema,
      target: v.variant('kind', [
        v.object({ kind: v.literal('container'), container: v.string() }),
        v.object({ kind: v.literal('netns'), name: v.string() }),
        v.object({ kind: v.literal('pid'), pid: v.number() }),
      ]),
      namespaceIp: ipv4Schema,
      instanceIp: ipv4Schema,
    }),
  ),
});

export function encodeState(state: SavedState): string {
  const hosted = state.hosted.map((one) => ({
    ...one,
    namespaceIp: formatIpv4(one.namespaceIp),
    instanceIp: formatIpv4(one.instanceIp),
  }));
  return `${JSON.stringify({ v: 1, subnet: formatCidr(state.subnet), hosted }, undefined, 2)}\n`;
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
  return ok({ subnet: result.output.subnet, hosted: result.output.hosted });
}
