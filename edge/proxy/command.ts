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
}

export type ProxyCommand =
  /** Replaces all that is known of a service. */
  | {
      readonly kind: 'service';
      readonly service: ServiceId;
      readonly addresses: Readonly<Partial<Record<Policy, Ipv4>>>;
      readonly instances: readonly InstanceRoute[];
    }
  | { readonly kind: 'serviceGone'; readonly service: ServiceId }
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
  /** Seed of the roundrobin start and of the source-port choice; randomness stays outside. */
  readonly seed: number;
}
