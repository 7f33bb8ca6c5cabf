// What the control plane tells the packet loop, and what the loop tells back. Plain data that structured clone
// carries to the worker; addresses are unsigned 32-bit integers.
import type { Ipv4 } from '../../src/addr.ts';
import type { ServiceId } from '../../src/name.ts';
import type { Policy } from '../../src/policy.ts';

/** An instance as the packet path sees it. */
export interface InstanceRoute {
  readonly instance: number;
  readonly instanceIp: Ipv4;
  readonly namespaceIp: Ipv4;
  /** Tunnel endpoint of its node. */
  readonly nodeIp: Ipv4;
  readonly ewp: number;
  /** True when it lives on this node. */
  readonly local: boolean;
  /** False: passed over for new flows while another instance is healthy. Absent: healthy. */
  readonly healthy?: boolean;
  /** Cost of choosing it by `closest` and by `fastest`, milliseconds, lower is better. Absent: not known. */
  readonly closestMs?: number;
  readonly fastestMs?: number;
}

/** What changes about an instance without its route changing. */
export type InstanceRank = Pick<InstanceRoute, 'instance' | 'healthy' | 'closestMs' | 'fastestMs'>;

export type ProxyCommand =
  /** Replaces all that is known of a service. */
  | {
      readonly kind: 'service';
      readonly service: ServiceId;
      readonly addresses: Readonly<Partial<Record<Policy, Ipv4>>>;
      readonly instances: readonly InstanceRoute[];
    }
  | { readonly kind: 'serviceGone'; readonly service: ServiceId }
  /** Health and cost of instances that an earlier `service` named; flows that exist are not touched. */
  | { readonly kind: 'ranks'; readonly service: ServiceId; readonly ranks: readonly InstanceRank[] }
  /** Sends one probe frame through the tunnel's own socket; `probed` follows if the node's loop answers. */
  | { readonly kind: 'probe'; readonly token: number; readonly nodeIp: Ipv4; readonly ewp: number }
  /** An instance on this node may send: its namespace IP, the InstanceIP that stands for it on the wire, and the
   *  services it may talk to (undefined: any). */
  | {
      readonly kind: 'local';
      readonly namespaceIp: Ipv4;
      readonly instanceIp: Ipv4;
      readonly service: ServiceId;
      readonly needs?: readonly ServiceId[];
    }
  | { readonly kind: 'localGone'; readonly namespaceIp: Ipv4 }
  | { readonly kind: 'stop' };

export type ProxyReport =
  | { readonly kind: 'ready' }
  /** The loop has ended; `error` when it did so by itself. */
  | { readonly kind: 'stopped'; readonly error?: string }
  /** A packet named an address that no route knows: the control plane may start to follow it. Rate-limited. */
  | { readonly kind: 'miss'; readonly address: Ipv4 };

export interface ProxyConfig {
  /** Name of the TUN device to create. */
  readonly tun: string;
  /** Overlay MTU, bytes. */
  readonly mtu: number;
  readonly vni: number;
  /** Where the tunnel's UDP socket binds. */
  readonly nodeIp: Ipv4;
  readonly ewp: number;
  /** Service range: ServiceIPs and InstanceIPs. */
  readonly servicesBase: Ipv4;
  readonly servicesBits: number;
  /** This node's subnet. */
  readonly subnetBase: Ipv4;
  readonly subnetBits: number;
  readonly flowsMax: number;
  /** Shared by all nodes of the network; proves control frames, and so a peer's address behind NAT. Absent: frames
   *  are only as trustworthy as the underlay. */
  readonly secret?: Uint8Array;
  /** After a packet the loop asks again for this long before it sleeps (0: sleeps at once). Default: limits.ts. */
  readonly spinUs?: number;
  /** File that outlives a killed agent and brings its flows back; absent: flows live in memory only. */
  readonly flowsFile?: string;
  /** Seed of the roundrobin start and of the source-port choice; randomness stays outside. */
  readonly seed: number;
}
