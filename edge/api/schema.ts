// Shapes of requests and answers, and their parsers. The seed documents' spelling (containerId, appName, IpType …)
// ends here; inside there is one spelling.
import * as v from 'valibot';
import { type Cidr, type Ipv4, ipv4, parseCidr, parseIpv4 } from '../../src/addr.ts';
import { fail, ok, type Result } from '../../src/error.ts';
import type { ServiceId } from '../../src/name.ts';
import { IP_TYPES, POLICIES, type Policy, policyOfIpType } from '../../src/policy.ts';
import { descriptorSchema, instanceNumberSchema, ipv4Schema, serviceIdSchema } from '../../src/records.ts';

/** What a caller asks to attach. */
export type Target =
  | { readonly kind: 'container'; readonly container: string }
  | { readonly kind: 'netns'; readonly name: string }
  | { readonly kind: 'pid'; readonly pid: number };

export interface DeployRequest {
  readonly service: ServiceId;
  readonly instance: number;
  readonly target: Target;
  /** ServiceIPs that the caller wants for the service. */
  readonly addresses: Readonly<Partial<Record<Policy, Ipv4>>>;
  /** InstanceIP that the caller wants. */
  readonly instanceIp?: Ipv4;
}

const textSchema = v.pipe(v.string(), v.minLength(1), v.maxLength(255));
/** `ip netns` names are file names below /run/netns. */
const netnsSchema = v.pipe(
  v.string(),
  v.regex(/^[A-Za-z0-9_.-]{1,128}$/, 'must be a name of `ip netns`'),
  v.notValue('.'),
  v.notValue('..'),
);
const pidSchema = v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(4_194_304)); // PID_MAX_LIMIT of Linux

/** `POST /register`. `subnetwork` may carry its prefix length or leave it to the plan. */
export const registerSchema = v.strictObject({ subnetwork: v.optional(v.string()) });

/** `POST /docker/deploy`, field for field as the seed documents it. */
export const dockerDeploySchema = v.strictObject({
  containerId: textSchema,
  appName: serviceIdSchema,
  instanceNumber: instanceNumberSchema,
  nodeIp: v.optional(v.string()),
  nodePort: v.optional(v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(65_535))),
  serviceIp: v.optional(v.array(v.strictObject({ IpType: v.picklist(IP_TYPES), Address: ipv4Schema })), []),
});

/** `POST /docker/undeploy`. Without a number every instance of the service on this node goes. */
export const dockerUndeploySchema = v.strictObject({
  serviceName: serviceIdSchema,
  instanceNumber: v.optional(instanceNumberSchema),
});

/** `POST /api/v1/services`. Stricter than a record of the keyspace: a mistyped "needs" would open a service to all. */
export const applySchema = v.strictObject(descriptorSchema.entries);

/** `POST /api/v1/instances`: exactly one of `netns`, `pid`, `container`. */
export const attachSchema = v.pipe(
  v.strictObject({
    service: serviceIdSchema,
    instance: instanceNumberSchema,
    netns: v.optional(netnsSchema),
    pid: v.optional(pidSchema),
    container: v.optional(textSchema),
  }),
  v.check(
    (body) => [body.netns, body.pid, body.container].filter((x) => x !== undefined).length === 1,
    'give exactly one of netns, pid, container',
  ),
);

export function fromDockerDeploy(body: v.InferOutput<typeof dockerDeploySchema>): Result<DeployRequest> {
  const addresses: Partial<Record<Policy, Ipv4>> = {};
  let instanceIp: Ipv4 | undefined;
  for (const { IpType, Address } of body.serviceIp) {
    const policy = policyOfIpType(IpType);
    if (policy === undefined ? instanceIp !== undefined : addresses[policy] !== undefined)
      return fail('invalid_request', `serviceIp: ${IpType} is given twice`);
    if (policy === undefined) instanceIp = Address;
    else addresses[policy] = Address;
  }
  return ok({
    service: body.appName,
    instance: body.instanceNumber,
    target: { kind: 'container', container: body.containerId },
    addresses,
    ...(instanceIp === undefined ? {} : { instanceIp }),
  });
}

export function fromAttach(body: v.InferOutput<typeof attachSchema>): DeployRequest {
  const target: Target =
    body.netns !== undefined
      ? { kind: 'netns', name: body.netns }
      : body.pid !== undefined
        ? { kind: 'pid', pid: body.pid }
        : { kind: 'container', container: body.container! };
  return { service: body.service, instance: body.instance, target, addresses: {} };
}

/** `172.16.5.0/26`, or `172.16.5.0` with the plan's prefix length. */
export function parseSubnetwork(text: string, nodeBits: number): Result<Cidr> {
  if (text.includes('/')) return parseCidr(text);
  const base = parseIpv4(text);
  if (!base.ok) return base;
  return ok({ base: ipv4(base.value), bits: nodeBits });
}

// Answers. All addresses are dotted text.
export const errorAnswer = v.object({ code: v.string(), message: v.string() });
export const registerAnswer = v.object({ subnetwork: v.string() });
export const dockerDeployAnswer = v.object({ serviceName: v.string(), nsAddress: v.string() });
export const emptyAnswer = v.object({});
export const instanceAnswer = v.object({
  service: v.string(),
  instance: v.number(),
  node: v.string(),
  nodeIp: v.string(),
  ewp: v.number(),
  namespaceIp: v.string(),
  instanceIp: v.string(),
});
export const serviceAnswer = v.object({
  service: v.string(),
  needs: v.optional(v.array(v.string())),
  ports: v.array(
    v.union([
      v.number(),
      v.object({ source: v.number(), destination: v.number(), protocol: v.picklist(['tcp', 'udp']) }),
    ]),
  ),
  exposed: v.boolean(),
  statefull: v.boolean(),
  policy: v.optional(v.picklist(POLICIES)),
  addresses: v.record(v.string(), v.string()),
  instances: v.number(),
});
export const nodeAnswer = v.object({
  node: v.string(),
  cluster: v.string(),
  nodeIp: v.string(),
  ewp: v.number(),
  nsp: v.number(),
  /** Others reach it by the address of a NAT. */
  nat: v.boolean(),
  subnet: v.string(),
  epoch: v.number(),
});
/** A key that could not be read, and why. */
export const problemAnswer = v.object({ key: v.string(), code: v.string(), reason: v.string() });
export const resolveAnswer = v.object({
  name: v.string(),
  address: v.string(),
  instances: v.array(instanceAnswer),
});
/** Which instance a name or address would reach now, and why. */
export const explainAnswer = v.object({
  name: v.string(),
  address: v.nullable(v.string()),
  policy: v.string(),
  why: v.string(),
  candidates: v.array(
    v.object({
      instance: v.number(),
      instanceIp: v.nullable(v.string()),
      node: v.string(),
      local: v.boolean(),
      health: v.string(),
      reason: v.string(),
      rttMs: v.nullable(v.number()),
      /** measured by probes, estimated by coordinates, or not known */
      rttBy: v.nullable(v.picklist(['probe', 'coordinate'])),
      load: v.nullable(v.number()),
      costMs: v.nullable(v.number()),
      share: v.number(),
    }),
  ),
  choices: v.array(
    v.object({
      at: v.string(),
      policy: v.string(),
      instance: v.number(),
      client: v.string(),
      why: v.string(),
    }),
  ),
});
export const statusAnswer = v.object({
  node: v.string(),
  cluster: v.string(),
  nodeIp: v.string(),
  ewp: v.number(),
  subnet: v.nullable(v.string()),
  etcd: v.picklist(['live', 'away']),
  revision: v.number(),
  instances: v.number(),
  flows: v.number(),
  runtime: v.string(),
  version: v.string(),
});
