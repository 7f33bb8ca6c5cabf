// The gRPC service `Network` of Kudo's documents as functions from request to response: no server here. What its
// messages leave open is decided so: a port p means p → p over tcp and udp; an instance is known by its address; the
// names of link and namespace follow from that (`kvo…`, `kns…` with the same ending).
import { formatIpv4, maskOf, parseCidr, parseIpv4 } from '../../src/addr.ts';
import { EdgewayError, type ErrorCode } from '../../src/error.ts';
import { inTurns, type Kudo } from './kudo.ts';

export interface CreateInterfaceRequest {
  readonly ip_address: string;
  readonly ports: readonly number[];
}
export interface DeleteInterfaceRequest {
  readonly interface_name: string;
}
export interface CreateContainerNetworkInterfaceRequest {
  readonly ip_address: string;
  /** `10.0.0.0/24`, `/24`, `24` or `255.255.255.0`. */
  readonly sub_network: string;
}
export interface InterfaceResponse {
  readonly interface_name: string;
}

export interface NetworkService {
  CreateInterface(request: CreateInterfaceRequest): Promise<InterfaceResponse>;
  DeleteInterface(request: DeleteInterfaceRequest): Promise<Record<string, never>>;
  CreateContainerNetworkInterface(
    request: CreateContainerNetworkInterfaceRequest,
  ): Promise<InterfaceResponse>;
}

/** gRPC status codes (grpc.io, "Status codes and their use in gRPC"). */
const GRPC = {
  INVALID_ARGUMENT: 3,
  DEADLINE_EXCEEDED: 4,
  NOT_FOUND: 5,
  ALREADY_EXISTS: 6,
  FAILED_PRECONDITION: 9,
  UNIMPLEMENTED: 12,
  INTERNAL: 13,
} as const;

const STATUS: Partial<Record<ErrorCode, number>> = {
  invalid_request: GRPC.INVALID_ARGUMENT,
  address_not_in_plan: GRPC.INVALID_ARGUMENT,
  not_found: GRPC.NOT_FOUND,
  namespace_unknown: GRPC.NOT_FOUND,
  address_taken: GRPC.ALREADY_EXISTS,
  port_taken: GRPC.ALREADY_EXISTS,
  subnet_taken: GRPC.ALREADY_EXISTS,
  conflict: GRPC.ALREADY_EXISTS,
  not_registered: GRPC.FAILED_PRECONDITION,
  host_unsupported: GRPC.UNIMPLEMENTED,
  timeout: GRPC.DEADLINE_EXCEEDED,
};

export function grpcStatus(code: ErrorCode): number {
  return STATUS[code] ?? GRPC.INTERNAL;
}

/** One call at a time: each looks at the node before it changes it. */
export function networkService(kudo: Kudo): NetworkService {
  const inTurn = inTurns();
  const service: NetworkService = {
    async CreateContainerNetworkInterface({ ip_address, sub_network }) {
      const address = addressOf(ip_address);
      const nodeIpCidr = `${address}/${bitsOf(sub_network, address)}`;
      const node = await kudo.describeNode();
      if (node !== undefined && node.nodeIpCidr !== nodeIpCidr)
        throw new EdgewayError(
          'conflict',
          `the container network interface ${node.interfaceName} has ${node.nodeIpCidr} already`,
        );
      const nodeId = node?.nodeId ?? idOf(address);
      const { interfaceName } = await kudo.setupNode({ nodeId, nodeIpCidr, nodesIps: [] });
      return { interface_name: interfaceName };
    },

    async CreateInterface({ ip_address, ports }) {
      const address = addressOf(ip_address);
      if (new Set(ports).size !== ports.length)
        throw new EdgewayError('invalid_request', `ports ${ports.join(', ')}: one stands there twice`);
      const node = await kudo.describeNode();
      if (node === undefined)
        throw new EdgewayError('not_registered', 'call CreateContainerNetworkInterface first');
      const [nodeIpAddr = '', bits = ''] = node.nodeIpCidr.split('/');
      const held = node.instances.find(({ ipAddr }) => ipAddr === address);
      const { interfaceName } = await kudo.setupInstance({
        nodeId: node.nodeId,
        nodeIpAddr,
        instanceId: held?.instanceId ?? idOf(address),
        instanceIpCidr: `${address}/${bits}`,
        ports: ports.map((port) => ({ source: port, destination: port })),
      });
      return { interface_name: interfaceName };
    },

    async DeleteInterface({ interface_name }) {
      const node = await kudo.describeNode();
      const held = node?.instances.find(({ interfaceName }) => interfaceName === interface_name);
      if (held !== undefined) await kudo.cleanInstance({ instanceId: held.instanceId });
      else if (!/^kvo[a-z0-9-]{1,12}$/.test(interface_name))
        throw new EdgewayError('not_found', `"${interface_name}" is no interface of an instance`);
      return {};
    },
  };
  return {
    CreateContainerNetworkInterface: inTurn(service.CreateContainerNetworkInterface),
    CreateInterface: inTurn(service.CreateInterface),
    DeleteInterface: inTurn(service.DeleteInterface),
  };
}

/** Eight hexadecimal digits: short and plain enough to stand in a link's name as it is. */
function idOf(address: string): string {
  const parsed = parseIpv4(address);
  return parsed.ok ? parsed.value.toString(16).padStart(8, '0') : address;
}

function addressOf(text: string): string {
  const parsed = parseIpv4(text);
  if (!parsed.ok) throw new EdgewayError('invalid_request', `ip_address: ${parsed.error.message}`);
  return formatIpv4(parsed.value);
}

function bitsOf(text: string, address: string): number {
  const plain = /^\/?(\d{1,2})$/.exec(text)?.[1];
  if (plain !== undefined && Number(plain) <= 32) return Number(plain);
  const mask = text.includes('/') ? undefined : parseIpv4(text);
  for (let bits = 0; mask?.ok && bits <= 32; bits++) if (maskOf(bits) === mask.value) return bits;
  const cidr = parseCidr(text);
  const own = parseIpv4(address);
  if (cidr.ok && own.ok && (own.value & maskOf(cidr.value.bits)) >>> 0 === cidr.value.base)
    return cidr.value.bits;
  throw new EdgewayError(
    'invalid_request',
    `sub_network "${text}" is no prefix that holds ${address}: write 10.0.0.0/24, /24 or 255.255.255.0`,
  );
}
