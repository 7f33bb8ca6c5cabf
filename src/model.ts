// The nouns of the platform, as every other file uses them. Addresses are integers; text lives in records.ts.
import type { Cidr, Ipv4 } from './addr.ts';
import type { Coordinate } from './coordinate.ts';
import { type ServiceId, splitServiceId } from './name.ts';
import type { Plan } from './plan.ts';
import type { Policy } from './policy.ts';

/** What an operator may change for the whole network; written once by whoever comes first. */
export interface NetworkConfig {
  readonly plan: Plan;
  /** VXLAN network identifier, 1 … 2^24-1. */
  readonly vni: number;
  /** Overlay MTU in bytes: underlay MTU − 36. */
  readonly mtu: number;
  readonly presenceTtlS: number;
  readonly tenureTtlS: number;
  readonly quarantineS: number;
  /** Proves the tunnel's control frames to nodes of this network, hexadecimal, 16 … 64 octets. Absent: such frames are
   *  only as trustworthy as the underlay. */
  readonly secret?: string;
}

/** A host running an agent. */
export interface Node {
  readonly node: string;
  readonly cluster: string;
  /** Where its tunnel is reached: node IP + EWP. */
  readonly nodeIp: Ipv4;
  readonly ewp: number;
  /** North-south port, 0 when it has none. */
  readonly nsp: number;
  readonly subnet: Cidr;
  readonly epoch: number;
  /** Its address is a NAT's: what it has not spoken to first may not reach it. */
  readonly nat?: boolean;
  /** Where it is in the network and how loaded (choose.ts), as it last published: rarely, so that records stay cold. */
  readonly coordinate?: Coordinate;
  readonly load?: number;
}

/** How the hosting agent finds out whether an instance can work. */
export type HealthProbe =
  /** A connection to the port is accepted. */
  | { readonly kind: 'tcp'; readonly port: number }
  /** GET of the path answers 200…399. */
  | { readonly kind: 'http'; readonly port: number; readonly path: string }
  /** The program, run inside the instance's namespaces, exits 0. Only where the agent allows it. */
  | { readonly kind: 'command'; readonly command: readonly string[] };

export interface HealthCheck {
  readonly probe: HealthProbe;
  readonly intervalMs: number;
  readonly timeoutMs: number;
  /** Failures in a row that make it unhealthy, successes in a row that make it healthy again. */
  readonly fall: number;
  readonly rise: number;
}

export type Protocol = 'tcp' | 'udp';

/** A way in from outside: the node's port and the instance's that it reaches. */
export interface PortMapping {
  /** Port on every node. */
  readonly source: number;
  /** Port in the instance. */
  readonly destination: number;
  readonly protocol: Protocol;
}

/** Service descriptor of the seed documents, with their spelling. */
export interface Descriptor {
  readonly appname: string;
  readonly appnamespace: string;
  readonly servicename: string;
  readonly servicenamespace: string;
  readonly exposed: boolean;
  /** Services that instances of this one may talk to; undefined = not declared. */
  readonly needs?: readonly ServiceId[];
  /** A number is a port that the service listens on; a mapping is published on the nodes too if it is `exposed`. */
  readonly ports: readonly (number | PortMapping)[];
  readonly statefull: boolean;
  /** Which of its addresses a published port leads to; absent: roundrobin. */
  readonly policy?: Policy;
  /** Absent: an instance is healthy while its process or namespace exists. */
  readonly health?: HealthCheck;
}

/** The descriptor of a service that nobody described: it may talk to anybody and publishes nothing. */
export function bareDescriptor(id: ServiceId): Descriptor {
  const { app, appNs, service, serviceNs } = splitServiceId(id);
  return {
    appname: app,
    appnamespace: appNs,
    servicename: service,
    servicenamespace: serviceNs,
    exposed: false,
    ports: [],
    statefull: false,
  };
}

/** The ports that the service itself listens on, each once. */
export function portNumbers(ports: Descriptor['ports']): readonly number[] {
  return [...new Set(ports.map((port) => (typeof port === 'number' ? port : port.destination)))];
}

/** What the nodes publish for it: nothing unless the descriptor says `exposed`. */
export function publishedPorts(descriptor: Descriptor): readonly PortMapping[] {
  return descriptor.exposed ? descriptor.ports.filter((port) => typeof port !== 'number') : [];
}

/** Whom a published port chooses among the service's instances. */
export function publishedPolicy(descriptor: Descriptor): Policy {
  return descriptor.policy ?? 'roundrobin';
}

export interface Service {
  readonly id: ServiceId;
  readonly descriptor: Descriptor;
  /** ServiceIP per policy; a record written by hand may lack some until a role or an agent claims them. */
  readonly addresses: Readonly<Partial<Record<Policy, Ipv4>>>;
}

/** One running copy of a service. */
export interface Instance {
  readonly service: ServiceId;
  readonly instance: number;
  readonly node: string;
  readonly cluster: string;
  readonly nodeIp: Ipv4;
  readonly ewp: number;
  readonly nsp: number;
  /** Address inside its node's subnet. */
  readonly namespaceIp: Ipv4;
  /** Virtual address of exactly this instance. */
  readonly instanceIp: Ipv4;
  readonly ports: readonly number[];
  /** Create revision of its node's subnet claim: a later owner has a greater one. */
  readonly epoch: number;
}

/**
 * Who holds a service address. `resting`: given back a moment ago and not to be given to anybody else until its
 * (quarantine) lease ends; the last holder may take it up again.
 */
export type AddressOwner =
  | {
      readonly kind: 'service';
      readonly service: ServiceId;
      readonly policy: Policy;
      readonly resting?: boolean;
    }
  | {
      readonly kind: 'instance';
      readonly service: ServiceId;
      readonly instance: number;
      readonly node: string;
      readonly resting?: boolean;
    };

/** Which service a port of every node leads to. */
export interface PortOwner {
  readonly service: ServiceId;
}

/** Who holds a node subnet; `resting` as with addresses. */
export interface SubnetOwner {
  readonly node: string;
  readonly cluster: string;
  readonly resting?: boolean;
}

/** The host that has a node id, for as long as its tenure lasts. */
export interface Host {
  readonly cluster: string;
  /** What tells two hosts with one id apart; absent when the node did not say. */
  readonly nodeIp?: Ipv4;
}

/** What a caller says to a node that a NAT hides; where the caller is, its own record says. */
export interface Call {
  /** Of the caller. */
  readonly cluster: string;
}

/** Who acts in a role. The key's create revision is the role's fence. */
export interface Leader {
  /** Id of the process that holds the role: its node id, or what a standalone coordinator was given. */
  readonly holder: string;
}

/** A block of node subnets that root has granted. */
export interface BlockOwner {
  readonly cluster: string;
}

/** A cluster as its role keeps it. The record is also the request for admission. */
export interface Cluster {
  readonly cluster: string;
  /** Set by root: only an admitted cluster is granted blocks. */
  readonly admitted: boolean;
}
