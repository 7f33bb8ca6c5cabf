// Kudo's network library on our environment manager: nine functions with the records of its documents, in camelCase.
// It needs no agent and no etcd: what it knows is in one state file, and the kernel carries packets between nodes by
// the wire of our own tunnel (VXLAN-GPE). Every function is idempotent and all-or-nothing; `clean…` and `delete…`
// succeed when things are gone already. It refuses what would take an address or a port from another instance.
import {
  type Cidr,
  contains,
  formatCidr,
  formatIpv4,
  type Ipv4,
  networkOf,
  parseIpv4,
  sizeOf,
} from '../../src/addr.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import { EWP_DEFAULT, MTU_MIN, PORT_MAX, TUNNEL_OVERHEAD, VNI_DEFAULT } from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import type { PortMapping } from '../../src/model.ts';
import { Environment } from '../host/environment.ts';
import { linkName } from '../host/plan.ts';
import { findUnderlay } from '../host/underlay.ts';
import type { Files, Lock, Runner } from '../ports.ts';

/** Where another node is: its instances' prefix (`10.0.1.1/24`), and the address at which its host is reached. */
export interface NodeIp {
  readonly clusterIpCidr: string;
  readonly externalIpAddr: string;
}

export interface NodeRequest {
  readonly nodeId: string;
  readonly nodeIp: NodeIp;
}

export interface SetupNodeRequest {
  readonly nodeId: string;
  /** The bridge's address with the prefix length of its instances: `10.0.0.1/24`. */
  readonly nodeIpCidr: string;
  /** The other nodes that are known already. */
  readonly nodesIps: readonly NodeRequest[];
}

export interface SetupNodeResponse {
  /** The bridge. */
  readonly interfaceName: string;
}

export interface Port {
  /** Port of the node. */
  readonly source: number;
  /** Port in the instance. */
  readonly destination: number;
  /** Ours: one of the two. Absent, as in Kudo's record: both. */
  readonly protocol?: 'tcp' | 'udp';
}

export interface SetupInstanceRequest {
  readonly nodeId: string;
  /** The node's address: the instance's gateway. */
  readonly nodeIpAddr: string;
  readonly instanceId: string;
  /** `10.0.0.2/24` */
  readonly instanceIpCidr: string;
  readonly ports: readonly Port[];
}

export interface SetupInstanceResponse {
  /** The host's end of the instance's link. */
  readonly interfaceName: string;
  readonly namespaceName: string;
}

export interface CleanInstanceRequest {
  readonly instanceId: string;
  /** Kudo's callers had to remember these two; ours need not, and they are not looked at. */
  readonly ports?: readonly Port[];
  readonly instanceIpCidr?: string;
}

/** An instance as this host has it. */
export interface InstanceDescription extends SetupInstanceResponse {
  readonly instanceId: string;
  readonly ipAddr: string;
}

export interface KudoOptions {
  readonly runner: Runner;
  readonly files: Files;
  readonly log: Logger;
  /** Directory of the state file; one node per directory and per host. */
  readonly stateDir: string;
  /** Keeps other processes from the directory during a call; without it there is one process at a time. */
  readonly lock?: Lock;
  /** UDP port between nodes; default 4790. All nodes of a cluster use the same. */
  readonly port?: number;
}

export interface Kudo {
  /** @throws conflict when this host is set up as another node */
  setupNode(request: SetupNodeRequest): Promise<SetupNodeResponse>;
  /** After a reboot, or whenever somebody flushed the host's rules: everything is there again, instances with new and
   *  empty namespaces. One call does all. */
  setupIptables(request: { readonly nodeId: string }): Promise<void>;
  addOtherNodes(nodes: readonly NodeRequest[]): Promise<void>;
  newNodeInCluster(request: NodeRequest): Promise<void>;
  deleteNodeInCluster(request: NodeRequest): Promise<void>;
  /** @throws address_taken, port_taken, address_not_in_plan, conflict, not_registered */
  setupInstance(request: SetupInstanceRequest): Promise<SetupInstanceResponse>;
  getNamespaceName(instanceId: string): string;
  cleanInstance(request: CleanInstanceRequest): Promise<void>;
  cleanNode(request: { readonly nodeId: string }): Promise<void>;
  /** Ours: what is set up on this host. Undefined when it is no node. */
  describeNode(): Promise<
    | {
        readonly nodeId: string;
        readonly interfaceName: string;
        /** `10.0.0.1/24` */
        readonly nodeIpCidr: string;
        readonly instances: readonly InstanceDescription[];
      }
    | undefined
  >;
}

/** Prefixes of Kudo's names; with twelve more characters they fill a link's name. */
const NAMES = { bridge: 'kbr', carrier: 'kvx', netns: 'kns', host: 'kvo', inner: 'kvi' } as const;

/** The name of an instance's network namespace: `kns` and the id, or a hash where the id is longer than twelve
 *  characters or not `[a-z0-9-]`. */
export function getNamespaceName(instanceId: string): string {
  return linkName(NAMES.netns, checkId(instanceId, 'instanceId'));
}

export function createKudo(options: KudoOptions): Kudo {
  const { runner, files, log, stateDir, port = EWP_DEFAULT } = options;
  const lock: Lock = options.lock ?? ((_directory, work) => work());
  const turns = inTurns();

  function inTurn<Args extends unknown[], Answer>(
    act: (...args: Args) => Promise<Answer>,
  ): (...args: Args) => Promise<Answer> {
    return turns((...args: Args) => lock(stateDir, () => act(...args)));
  }

  /** The node on this host, whoever set it up. */
  async function existing(): Promise<
    { readonly environment: Environment; readonly nodeId: string } | undefined
  > {
    const text = await files.read(nodeFile(stateDir));
    if (text === undefined) return undefined;
    const nodeId = text.replace(/\n$/, '');
    return { environment: environmentOf(nodeId), nodeId };
  }

  function environmentOf(nodeId: string): Environment {
    const bridge = linkName(NAMES.bridge, nodeId);
    return new Environment({ runner, files, log, names: { bridge, tun: 'kudo-no-tun' }, stateDir });
  }

  async function overlayMtu(): Promise<number> {
    const underlay = await findUnderlay(runner, undefined);
    return Math.max(underlay.mtu - TUNNEL_OVERHEAD, MTU_MIN);
  }

  async function here(nodeId?: string): Promise<Environment> {
    const found = await existing();
    if (found === undefined)
      throw new EdgewayError('not_registered', 'this host is no node yet: call setupNode first');
    if (nodeId !== undefined && nodeId !== found.nodeId)
      throw new EdgewayError('not_found', `this host is node "${found.nodeId}", not "${nodeId}"`);
    return found.environment;
  }

  const kudo: Kudo = {
    async setupNode({ nodeId, nodeIpCidr, nodesIps }) {
      checkId(nodeId, 'nodeId');
      const { address, subnet } = parseInterface(nodeIpCidr, 'nodeIpCidr');
      const peers = peersOf(nodesIps);
      const found = await existing();
      if (found !== undefined && found.nodeId !== nodeId)
        throw new EdgewayError(
          'conflict',
          `this host is set up as node "${found.nodeId}": clean that before it becomes "${nodeId}"`,
        );
      const environment = found?.environment ?? environmentOf(nodeId);
      for (const { id, namespaceIp } of await environment.attachments())
        if (!contains(subnet, namespaceIp) || namespaceIp === address)
          throw new EdgewayError(
            'conflict',
            `instance "${id}" has ${formatIpv4(namespaceIp)}, which does not go with ${nodeIpCidr}: clean it first`,
          );
      await files.write(nodeFile(stateDir), `${nodeId}\n`);
      try {
        await environment.setupNode({
          subnet,
          gateway: address,
          mtu: await overlayMtu(),
          isolated: false,
          carrier: { device: linkName(NAMES.carrier, nodeId), vni: VNI_DEFAULT, port },
          peers,
        });
      } catch (error) {
        if (found === undefined) await files.remove(nodeFile(stateDir));
        throw error;
      }
      return { interfaceName: linkName(NAMES.bridge, nodeId) };
    },

    async setupIptables({ nodeId }) {
      await (await here(nodeId)).restore(await overlayMtu());
    },

    async addOtherNodes(nodes) {
      await (await here()).addPeers(peersOf(nodes));
    },

    async newNodeInCluster(request) {
      await (await here()).addPeers(peersOf([request]));
    },

    async deleteNodeInCluster({ nodeId }) {
      const found = await existing();
      await found?.environment.removePeer(checkId(nodeId, 'nodeId'));
    },

    async setupInstance({ nodeId, nodeIpAddr, instanceId, instanceIpCidr, ports }) {
      checkId(instanceId, 'instanceId');
      const environment = await here(nodeId);
      const node = await environment.node();
      if (node === undefined)
        throw new EdgewayError('not_registered', `node "${nodeId}" is not set up: call setupNode first`);
      const gateway = parseAddress(nodeIpAddr, 'nodeIpAddr');
      if (gateway !== node.gateway)
        throw new EdgewayError(
          'invalid_request',
          `nodeIpAddr ${nodeIpAddr} is not the address of node "${nodeId}", ${formatIpv4(node.gateway)}`,
        );
      const { address, subnet } = parseInterface(instanceIpCidr, 'instanceIpCidr');
      if (formatCidr(subnet) !== formatCidr(node.subnet) || address === gateway)
        throw new EdgewayError(
          'address_not_in_plan',
          `instanceIpCidr ${instanceIpCidr} is no instance address of node "${nodeId}": those lie in ${formatCidr(node.subnet)}, ${formatIpv4(gateway)} excepted`,
        );
      const held = (await environment.attachments()).find(({ id }) => id === instanceId);
      if (held !== undefined && held.namespaceIp !== address)
        throw new EdgewayError(
          'conflict',
          `instance "${instanceId}" has ${formatIpv4(held.namespaceIp)}: clean it before it gets ${formatIpv4(address)}`,
        );
      const namespaceName = getNamespaceName(instanceId);
      const attached = await environment.attach({
        id: instanceId,
        target: { kind: 'netns', name: namespaceName, create: true },
        namespaceIp: address,
        subnet: node.subnet,
        mtu: node.mtu,
        ports: ports.flatMap(mappingsOf),
        names: { host: linkName(NAMES.host, instanceId), inner: linkName(NAMES.inner, instanceId) },
      });
      return { interfaceName: attached.hostInterface, namespaceName };
    },

    getNamespaceName,

    async cleanInstance({ instanceId }) {
      const found = await existing();
      await found?.environment.detach({ id: checkId(instanceId, 'instanceId') });
    },

    async cleanNode({ nodeId }) {
      checkId(nodeId, 'nodeId');
      const found = await existing();
      // Also without a node file: a crash may have come between.
      if (found === undefined || found.nodeId === nodeId) {
        await (found?.environment ?? environmentOf(nodeId)).cleanNode();
        await files.remove(nodeFile(stateDir));
      }
    },

    async describeNode() {
      const found = await existing();
      const node = await found?.environment.node();
      if (found === undefined || node === undefined) return undefined;
      return {
        nodeId: found.nodeId,
        interfaceName: node.bridge,
        nodeIpCidr: `${formatIpv4(node.gateway)}/${node.subnet.bits}`,
        instances: (await found.environment.attachments()).map(({ id, hostInterface, namespaceIp }) => ({
          instanceId: id,
          interfaceName: hostInterface,
          namespaceName: getNamespaceName(id),
          ipAddr: formatIpv4(namespaceIp),
        })),
      };
    },
  };
  return {
    setupNode: inTurn(kudo.setupNode),
    setupIptables: inTurn(kudo.setupIptables),
    addOtherNodes: inTurn(kudo.addOtherNodes),
    newNodeInCluster: inTurn(kudo.newNodeInCluster),
    deleteNodeInCluster: inTurn(kudo.deleteNodeInCluster),
    setupInstance: inTurn(kudo.setupInstance),
    getNamespaceName,
    cleanInstance: inTurn(kudo.cleanInstance),
    cleanNode: inTurn(kudo.cleanNode),
    describeNode: inTurn(kudo.describeNode),
  };
}

/** Calls of what it wraps run one at a time, in the order in which they came. */
export function inTurns(): <Args extends unknown[], Answer>(
  act: (...args: Args) => Promise<Answer>,
) => (...args: Args) => Promise<Answer> {
  let queue: Promise<unknown> = Promise.resolve();
  return (act) =>
    (...args) => {
      const turn = queue.then(() => act(...args));
      queue = turn.catch(() => {});
      return turn;
    };
}

function nodeFile(stateDir: string): string {
  return `${stateDir}/node`;
}

function peersOf(nodes: readonly NodeRequest[]): Readonly<Record<string, { prefix: Cidr; endpoint: Ipv4 }>> {
  return Object.fromEntries(
    nodes.map(({ nodeId, nodeIp }) => [
      checkId(nodeId, 'nodeId'),
      {
        prefix: parseInterface(nodeIp.clusterIpCidr, 'clusterIpCidr').subnet,
        endpoint: parseAddress(nodeIp.externalIpAddr, 'externalIpAddr'),
      },
    ]),
  );
}

/** Kudo's port has no protocol and means both. */
function mappingsOf(port: Port): readonly PortMapping[] {
  for (const [name, value] of [
    ['source', port.source],
    ['destination', port.destination],
  ] as const)
    if (!Number.isInteger(value) || value < 1 || value > PORT_MAX)
      throw new EdgewayError(
        'invalid_request',
        `port ${name} ${value} must be an integer from 1 to ${PORT_MAX}`,
      );
  const { source, destination, protocol } = port;
  if (protocol !== undefined && protocol !== 'tcp' && protocol !== 'udp')
    throw new EdgewayError('invalid_request', `port protocol "${protocol}" must be tcp or udp`);
  return (protocol === undefined ? (['tcp', 'udp'] as const) : [protocol]).map((one) => ({
    protocol: one,
    source,
    destination,
  }));
}

/** `10.0.0.2/24`: an address and the prefix that it lies in. */
function parseInterface(text: string, field: string): { readonly address: Ipv4; readonly subnet: Cidr } {
  const [address = '', length = '', ...rest] = text.split('/');
  const parsed = parseIpv4(address);
  const bits = Number(length);
  if (!parsed.ok || rest.length > 0 || !/^\d{1,2}$/.test(length) || bits < 1 || bits > 30)
    throw new EdgewayError(
      'invalid_request',
      `${field} "${text}" is not an address with a prefix length from 1 to 30, such as 10.0.0.1/24`,
    );
  const subnet: Cidr = { base: networkOf(parsed.value, bits), bits };
  if (parsed.value === subnet.base || parsed.value === subnet.base + sizeOf(subnet) - 1)
    throw new EdgewayError(
      'invalid_request',
      `${field} "${text}" is the network or the broadcast address of ${formatCidr(subnet)}`,
    );
  return { address: parsed.value, subnet };
}

function parseAddress(text: string, field: string): Ipv4 {
  const parsed = parseIpv4(text);
  if (!parsed.ok) throw new EdgewayError('invalid_request', `${field}: ${parsed.error.message}`);
  return unwrap(parsed);
}

/** Names under which no record can hold anything of its own. */
const NO_IDS: ReadonlySet<string> = new Set(['__proto__', 'prototype', 'constructor']);

function checkId(id: string, field: string): string {
  if (NO_IDS.has(id))
    throw new EdgewayError('invalid_request', `${field} "${id}" is a reserved word: choose another`);
  // 253: as long as a DNS name; a line of its own in the state directory.
  if (typeof id !== 'string' || id === '' || id.length > 253 || /[\p{Cc}]/u.test(id))
    throw new EdgewayError(
      'invalid_request',
      `${field} ${JSON.stringify(id)} must be 1 to 253 characters without control characters`,
    );
  return id;
}
