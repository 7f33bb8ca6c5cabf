// Keyspace values: JSON that a person can read with `etcdctl get`, versioned, one codec per key. Decoding is total:
// a value or an error that names the key, the field and the rule. Unknown fields are kept out, not refused, so that
// a newer minor writer does no harm; another `v` is refused.
import * as v from 'valibot';
import { formatCidr, formatIpv4, parseCidr, parseIpv4 } from './addr.ts';
import { type Coordinate, checkCoordinate } from './coordinate.ts';
import { EdgewayError, fail, ok, type Result } from './error.ts';
import { ID_PATTERN, type Key } from './keys.ts';
import * as limits from './limits.ts';
import type {
  AddressOwner,
  BlockOwner,
  Call,
  Cluster,
  Descriptor,
  HealthCheck,
  HealthProbe,
  Host,
  Instance,
  Leader,
  NetworkConfig,
  Node,
  PortOwner,
  Service,
  SubnetOwner,
} from './model.ts';
import { INSTANCE_NUMBER_MAX, parseName, parseServiceId, type ServiceId, serviceIdOf } from './name.ts';
import { checkPlan, DEFAULT_PLAN } from './plan.ts';
import { POLICIES } from './policy.ts';

/** Turns one of our Result parsers into a valibot step that keeps its message. */
function parsed<Out>(parse: (text: string) => Result<Out>) {
  return v.pipe(
    v.string(),
    v.rawTransform(({ dataset, addIssue, NEVER }): Out => {
      const result = parse(dataset.value);
      if (result.ok) return result.value;
      addIssue({ message: result.error.message });
      return NEVER;
    }),
  );
}

export const ipv4Schema = parsed(parseIpv4);
export const cidrSchema = parsed(parseCidr);
export const serviceIdSchema = parsed(parseServiceId);
export const portSchema = v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(65_535));
/** A port in the descriptor: a number, or a mapping from the node's port; tcp unless it says udp. */
const descriptorPortSchema = v.union(
  [
    portSchema,
    v.object({
      source: portSchema,
      destination: portSchema,
      protocol: v.optional(v.picklist(['tcp', 'udp']), 'tcp'),
    }),
  ],
  'a port is a number from 1 to 65535, or {source, destination, protocol: tcp or udp}',
);
const descriptorPortsSchema = v.pipe(
  v.array(descriptorPortSchema),
  v.check((ports) => {
    const sources = ports.flatMap((port) =>
      typeof port === 'number' ? [] : [`${port.protocol}/${port.source}`],
    );
    return new Set(sources).size === sources.length;
  }, 'two mappings have the same source and protocol'),
);
const portOrNoneSchema = v.pipe(v.number(), v.integer(), v.minValue(0), v.maxValue(65_535));
export const instanceNumberSchema = v.pipe(
  v.number(),
  v.integer(),
  v.minValue(1),
  v.maxValue(INSTANCE_NUMBER_MAX),
);
const epochSchema = v.pipe(v.number(), v.integer(), v.minValue(0));
const idSchema = v.pipe(
  v.string(),
  v.regex(ID_PATTERN, 'must be 1…63 of a-z 0-9 . _ -, beginning with a letter or digit'),
);
const secondsSchema = v.pipe(v.number(), v.integer(), v.minValue(1));
const versionEntry = { v: v.literal(1) };

/** `needs` takes a service id or any name of the service. */
function parseNeed(text: string): Result<ServiceId> {
  if (text.split('.').length !== 7) return parseServiceId(text);
  const name = parseName(text);
  return name.ok ? ok(name.value.service) : name;
}

const milliseconds = (min: number, max: number, otherwise: number) =>
  v.optional(v.pipe(v.number(), v.integer(), v.minValue(min), v.maxValue(max)), otherwise);

const healthTiming = {
  intervalMs: milliseconds(100, 3_600_000, 1_000),
  timeoutMs: milliseconds(10, 60_000, 1_000),
  fall: milliseconds(1, 100, 2),
  rise: milliseconds(1, 100, 2),
};

/** `health` of a descriptor; the timing fields are optional. */
const healthSchema = v.union(
  [
    v.object({ tcp: v.object({ port: portSchema }), ...healthTiming }),
    v.object({
      http: v.object({
        port: portSchema,
        // A request line ends a path at a space (RFC 9112 §3.2).
        path: v.optional(v.pipe(v.string(), v.regex(/^\/[!-~]*$/), v.maxLength(1_024)), '/'),
      }),
      ...healthTiming,
    }),
    v.object({
      command: v.pipe(v.array(v.pipe(v.string(), v.minLength(1))), v.minLength(1), v.maxLength(64)),
      ...healthTiming,
    }),
  ],
  'health: exactly one of tcp {port}, http {port, path: "/" and visible ASCII, no space}, command [program, …], and optionally intervalMs, timeoutMs, fall, rise',
);

function checkOf(health: v.InferOutput<typeof healthSchema>): HealthCheck {
  const { intervalMs, timeoutMs, fall, rise } = health;
  const probe: HealthProbe =
    'tcp' in health
      ? { kind: 'tcp', ...health.tcp }
      : 'http' in health
        ? { kind: 'http', ...health.http }
        : { kind: 'command', command: health.command };
  return { probe, intervalMs, timeoutMs, fall, rise };
}

/** Inverse of checkOf: the descriptor's spelling. */
function healthOf(check: HealthCheck): object {
  const { probe, ...timing } = check;
  const { kind, ...rest } = probe;
  return { [kind]: kind === 'command' ? probe.command : rest, ...timing };
}

/** Service descriptor as the seed documents spell it; `POST /api/v1/services` and `edgeway apply` take the same. */
export const descriptorSchema = v.object({
  appname: v.string(),
  appnamespace: v.string(),
  servicename: v.string(),
  servicenamespace: v.string(),
  exposed: v.optional(v.boolean(), false),
  needs: v.optional(v.array(parsed(parseNeed))),
  ports: v.optional(descriptorPortsSchema, []),
  statefull: v.optional(v.boolean(), false),
  policy: v.optional(v.picklist(POLICIES)),
  health: v.optional(v.pipe(healthSchema, v.transform(checkOf))),
});

const configSchema = v.object({
  ...versionEntry,
  platform: cidrSchema,
  services: cidrSchema,
  nodePrefix: v.pipe(v.number(), v.integer()),
  vni: v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(0xffffff)),
  mtu: v.pipe(v.number(), v.integer(), v.minValue(limits.MTU_MIN), v.maxValue(limits.MTU_MAX)),
  presenceTtlS: secondsSchema,
  tenureTtlS: secondsSchema,
  quarantineS: v.pipe(v.number(), v.integer(), v.minValue(0)),
  secret: v.optional(
    v.pipe(
      v.string(),
      v.regex(/^([0-9a-f]{2}){16,64}$/, 'must be 16 to 64 octets in lower-case hexadecimal'),
    ),
  ),
});

/** Milliseconds, see coordinate.ts. */
export const coordinateSchema = v.pipe(
  v.object({
    vec: v.array(v.number()),
    height: v.number(),
    adjustment: v.number(),
    error: v.number(),
  }),
  v.rawCheck(({ dataset, addIssue }) => {
    const result = dataset.typed ? checkCoordinate(dataset.value) : undefined;
    if (result !== undefined && !result.ok) addIssue({ message: result.error.message });
  }),
);

/** A coordinate in a file of its own: where this node was when it last ran. */
export function encodeCoordinate(coordinate: Coordinate): string {
  return `${print({ ...printCoordinate(coordinate) })}\n`;
}
export function decodeCoordinate(text: string): Result<Coordinate> {
  return strip(decode(v.intersect([v.object(versionEntry), coordinateSchema]), text));
}

/** Microseconds are enough, and keep the record readable. */
const round3 = (x: number): number => Math.round(x * 1_000) / 1_000;

export function printCoordinate(c: Coordinate): Coordinate {
  return {
    vec: c.vec.map(round3),
    height: round3(c.height),
    adjustment: round3(c.adjustment),
    error: round3(c.error),
  };
}

const nodeSchema = v.object({
  ...versionEntry,
  node: idSchema,
  cluster: idSchema,
  nodeIp: ipv4Schema,
  ewp: portSchema,
  nsp: portOrNoneSchema,
  subnet: cidrSchema,
  epoch: epochSchema,
  nat: v.exactOptional(v.boolean()),
  coordinate: v.optional(coordinateSchema),
  load: v.optional(v.pipe(v.number(), v.minValue(0), v.maxValue(1_000_000))),
});

const serviceSchema = v.object({
  ...versionEntry,
  ...descriptorSchema.entries,
  addresses: v.optional(
    v.object({
      roundrobin: v.optional(ipv4Schema),
      closest: v.optional(ipv4Schema),
      fastest: v.optional(ipv4Schema),
    }),
    {},
  ),
});

const instanceSchema = v.object({
  ...versionEntry,
  service: serviceIdSchema,
  instance: instanceNumberSchema,
  node: idSchema,
  cluster: idSchema,
  nodeIp: ipv4Schema,
  ewp: portSchema,
  nsp: portOrNoneSchema,
  namespaceIp: ipv4Schema,
  instanceIp: ipv4Schema,
  ports: v.optional(v.array(portSchema), []),
  epoch: epochSchema,
});

const addressSchema = v.variant('kind', [
  v.object({
    ...versionEntry,
    kind: v.literal('service'),
    service: serviceIdSchema,
    policy: v.picklist(POLICIES),
    resting: v.exactOptional(v.boolean()),
  }),
  v.object({
    ...versionEntry,
    kind: v.literal('instance'),
    service: serviceIdSchema,
    instance: instanceNumberSchema,
    node: idSchema,
    resting: v.exactOptional(v.boolean()),
  }),
]);

const portOwnerSchema = v.object({ ...versionEntry, service: serviceIdSchema });

const subnetSchema = v.object({
  ...versionEntry,
  node: idSchema,
  cluster: idSchema,
  resting: v.exactOptional(v.boolean()),
});
const hostSchema = v.object({ ...versionEntry, cluster: idSchema, nodeIp: v.optional(ipv4Schema) });
const callSchema = v.object({ ...versionEntry, cluster: idSchema });
const leaderSchema = v.object({ ...versionEntry, holder: idSchema });
const blockSchema = v.object({ ...versionEntry, cluster: idSchema });
const clusterSchema = v.object({
  ...versionEntry,
  cluster: idSchema,
  admitted: v.optional(v.boolean(), false),
});

/** One line for a person: the field's path, what it should be, what it is. */
export function describeIssues(issues: readonly v.BaseIssue<unknown>[]): string {
  return issues
    .map((issue) => {
      const path = v.getDotPath(issue);
      return path === null ? issue.message : `${path}: ${issue.message}`;
    })
    .join('; ');
}

function decode<Schema extends v.GenericSchema>(schema: Schema, text: string): Result<v.InferOutput<Schema>> {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    return fail('invalid_record', `is not JSON: ${(cause as Error).message}`);
  }
  if (typeof json === 'object' && json !== null && 'v' in json && json.v !== 1)
    return fail('invalid_record', `has version ${JSON.stringify(json.v)}, this agent reads version 1`);
  const result = v.safeParse(schema, json);
  return result.success ? ok(result.output) : fail('invalid_record', describeIssues(result.issues));
}

const print = (value: object): string => JSON.stringify({ v: 1, ...value });

export const DEFAULT_NETWORK_CONFIG: NetworkConfig = {
  plan: DEFAULT_PLAN,
  vni: limits.VNI_DEFAULT,
  mtu: limits.MTU_DEFAULT,
  presenceTtlS: limits.PRESENCE_TTL_S,
  tenureTtlS: limits.TENURE_TTL_S,
  quarantineS: limits.QUARANTINE_S,
};

export function encodeConfig(config: NetworkConfig): string {
  const { plan, ...rest } = config;
  return print({
    platform: formatCidr(plan.platform),
    services: formatCidr(plan.services),
    nodePrefix: plan.nodeBits,
    ...rest,
  });
}
export function decodeConfig(text: string): Result<NetworkConfig> {
  const record = decode(configSchema, text);
  if (!record.ok) return record;
  const { platform, services, nodePrefix, v: _, ...rest } = record.value;
  const plan = checkPlan({ platform, services, nodeBits: nodePrefix });
  if (!plan.ok) return fail('invalid_record', plan.error.message);
  return ok({ plan: plan.value, ...compact(rest) });
}

export function encodeNode(node: Node): string {
  const { coordinate, load } = node;
  return print({
    ...node,
    nodeIp: formatIpv4(node.nodeIp),
    subnet: formatCidr(node.subnet),
    ...(coordinate === undefined ? {} : { coordinate: printCoordinate(coordinate) }),
    ...(load === undefined ? {} : { load: round3(load) }),
  });
}
export function decodeNode(text: string): Result<Node> {
  const record = strip(decode(nodeSchema, text));
  return record.ok ? ok(compact(record.value)) : record;
}

/** `stands`: the record that this one replaces; fields of it that are none of a service's are kept. */
export function encodeService(service: Service, stands?: string): string {
  const addresses = Object.fromEntries(
    Object.entries(service.addresses).map(([policy, address]) => [policy, formatIpv4(address)]),
  );
  const { health, ...descriptor } = service.descriptor;
  return print({
    ...descriptor,
    ...(health === undefined ? {} : { health: healthOf(health) }),
    addresses,
    ...(stands === undefined ? {} : foreignFields(serviceSchema, stands)),
  });
}

function foreignFields(schema: { readonly entries: object }, text: string): object {
  const fields = Object.entries(JSON.parse(text) as object);
  return Object.fromEntries(fields.filter(([name]) => !Object.hasOwn(schema.entries, name)));
}

/** True when both records say the same, however they are spelled. */
export function sameService(a: Service, b: Service): boolean {
  const canonical = (service: Service): string => {
    const read = decodeService(encodeService(service), service.id);
    return encodeService(read.ok ? read.value : service);
  };
  return canonical(a) === canonical(b);
}

/** The key says which service it is; a value that names another one is refused. */
export function decodeService(text: string, key: ServiceId): Result<Service> {
  const record = decode(serviceSchema, text);
  if (!record.ok) return record;
  const { v: _, addresses, ...fields } = record.value;
  const named = descriptorId(fields);
  if (!named.ok) return fail('invalid_record', named.error.message);
  if (named.value !== key)
    return fail('invalid_record', `describes service ${named.value} under the key of ${key}`);
  return ok({ id: key, descriptor: compact(fields), addresses: compact(addresses) });
}

export function descriptorId(
  d: Pick<Descriptor, 'appname' | 'appnamespace' | 'servicename' | 'servicenamespace'>,
): Result<ServiceId> {
  return serviceIdOf({
    app: d.appname,
    appNs: d.appnamespace,
    service: d.servicename,
    serviceNs: d.servicenamespace,
  });
}

export interface ParsedDescriptor {
  readonly id: ServiceId;
  readonly descriptor: Descriptor;
}

/** Parses an API or CLI descriptor; never trusts `addresses` in it. */
export function parseDescriptor(json: unknown): Result<ParsedDescriptor> {
  const result = v.safeParse(descriptorSchema, json);
  if (!result.success) return fail('invalid_request', describeIssues(result.issues));
  const id = descriptorId(result.output);
  if (!id.ok) return id;
  return ok({ id: id.value, descriptor: compact(result.output) });
}

export function encodeInstance(instance: Instance): string {
  return print({
    ...instance,
    nodeIp: formatIpv4(instance.nodeIp),
    namespaceIp: formatIpv4(instance.namespaceIp),
    instanceIp: formatIpv4(instance.instanceIp),
  });
}
export function decodeInstance(
  text: string,
  key: { service: ServiceId; instance: number },
): Result<Instance> {
  const record = strip(decode(instanceSchema, text));
  if (!record.ok) return record;
  const { service, instance } = record.value;
  if (service !== key.service || instance !== key.instance)
    return fail(
      'invalid_record',
      `describes ${service} instance ${instance} under the key of ${key.service} instance ${key.instance}`,
    );
  return record;
}

export function encodeAddress(owner: AddressOwner): string {
  return print(owner);
}
export function decodeAddress(text: string): Result<AddressOwner> {
  return strip(decode(addressSchema, text));
}

export function encodePort(owner: PortOwner): string {
  return print(owner);
}
export function decodePort(text: string): Result<PortOwner> {
  return strip(decode(portOwnerSchema, text));
}

export function encodeSubnet(owner: SubnetOwner): string {
  return print(owner);
}
export function decodeSubnet(text: string): Result<SubnetOwner> {
  return strip(decode(subnetSchema, text));
}

export function encodeHost({ cluster, nodeIp }: Host): string {
  return print({ cluster, ...(nodeIp === undefined ? {} : { nodeIp: formatIpv4(nodeIp) }) });
}
export function decodeHost(text: string): Result<Host> {
  const record = strip(decode(hostSchema, text));
  return record.ok ? ok(compact(record.value)) : record;
}

export function encodeCall(call: Call): string {
  return print(call);
}
export function decodeCall(text: string): Result<Call> {
  return strip(decode(callSchema, text));
}

export function encodeLeader(leader: Leader): string {
  return print(leader);
}
export function decodeLeader(text: string): Result<Leader> {
  return strip(decode(leaderSchema, text));
}

export function encodeBlock(owner: BlockOwner): string {
  return print(owner);
}
export function decodeBlock(text: string): Result<BlockOwner> {
  return strip(decode(blockSchema, text));
}

export function encodeCluster(cluster: Cluster): string {
  return print(cluster);
}
export function decodeCluster(text: string): Result<Cluster> {
  return strip(decode(clusterSchema, text));
}

/** The key says it all. */
export function encodeExposed(): string {
  return print({});
}
export function decodeExposed(text: string): Result<Record<string, never>> {
  const read = decode(v.object(versionEntry), text);
  return read.ok ? ok({}) : read;
}

/** What the value under each kind of key says. */
export interface RecordValues {
  readonly config: NetworkConfig;
  readonly rootLeader: Leader;
  readonly block: BlockOwner;
  readonly cluster: Cluster;
  readonly clusterLeader: Leader;
  readonly subnet: SubnetOwner;
  readonly node: Node;
  readonly host: Host;
  readonly call: Call;
  readonly service: Service;
  readonly exposed: Record<string, never>;
  readonly address: AddressOwner;
  readonly instance: Instance;
  readonly port: PortOwner;
}

/** A key with its value, understood. */
export type KeyRecord = {
  [Kind in Key['kind']]: {
    readonly kind: Kind;
    readonly key: Extract<Key, { kind: Kind }>;
    readonly value: RecordValues[Kind];
  };
}[Key['kind']];

/** Total: a record or an error of code `invalid_record`, without the key in its message (see `recordError`). */
export function decodeRecord(key: Key, text: string): Result<KeyRecord> {
  switch (key.kind) {
    case 'config':
      return record({ kind: key.kind, key }, decodeConfig(text));
    case 'rootLeader':
      return record({ kind: key.kind, key }, decodeLeader(text));
    case 'block':
      return record({ kind: key.kind, key }, decodeBlock(text));
    case 'cluster':
      return record(
        { kind: key.kind, key },
        matching(decodeCluster(text), (c) => c.cluster === key.cluster, `cluster ${key.cluster}`),
      );
    case 'clusterLeader':
      return record({ kind: key.kind, key }, decodeLeader(text));
    case 'subnet':
      return record({ kind: key.kind, key }, decodeSubnet(text));
    case 'node':
      return record(
        { kind: key.kind, key },
        matching(
          decodeNode(text),
          (node) => node.node === key.node && node.cluster === key.cluster,
          `node ${key.node} of cluster ${key.cluster}`,
        ),
      );
    case 'host':
      return record({ kind: key.kind, key }, decodeHost(text));
    case 'call':
      return record({ kind: key.kind, key }, decodeCall(text));
    case 'service':
      return record({ kind: key.kind, key }, decodeService(text, key.service));
    case 'exposed':
      return record({ kind: key.kind, key }, decodeExposed(text));
    case 'address':
      return record({ kind: key.kind, key }, decodeAddress(text));
    case 'instance':
      return record({ kind: key.kind, key }, decodeInstance(text, key));
    case 'port':
      return record({ kind: key.kind, key }, decodePort(text));
  }
}

function record<Kind extends Key['kind']>(
  head: { readonly kind: Kind; readonly key: Extract<Key, { kind: Kind }> },
  value: Result<RecordValues[Kind]>,
): Result<KeyRecord> {
  return value.ok ? ok({ ...head, value: value.value } as unknown as KeyRecord) : value;
}

/** A value that names another thing than its key is not believed. */
function matching<T>(result: Result<T>, holds: (value: T) => boolean, what: string): Result<T> {
  if (!result.ok || holds(result.value)) return result;
  return fail('invalid_record', `describes something else than its key, which is that of ${what}`);
}

/** Omit that keeps a union's members apart. */
type WithoutVersion<T> = T extends unknown ? Omit<T, 'v'> : never;

function strip<T extends { v: 1 }>(result: Result<T>): Result<WithoutVersion<T>> {
  if (!result.ok) return result;
  const { v: _, ...rest } = result.value;
  return ok(rest as WithoutVersion<T>);
}

/** Drops keys whose value is undefined, so that "absent" has one spelling. */
function compact<T extends object>(value: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(value).filter(([, x]) => x !== undefined)) as never;
}

/** The error of a record, with its key in front. */
export function recordError(key: string, error: EdgewayError): EdgewayError {
  return new EdgewayError('invalid_record', `${key}: ${error.message}`);
}
