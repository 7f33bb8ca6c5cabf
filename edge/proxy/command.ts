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

/** A node and its tunnel endpoint in the keyspace. */
export interface NodePlace {
  /** First address of its subnet. */
  readonly subnet: Ipv4;
  readonly nodeIp: Ipv4;
  readonly ewp: number;
}

/** One turn-taking weight per instance and policy, 0 = not for new flows; `weights[policy][i]` belongs to
 *  `instances[i]`. The loop picks with Turns (src/choose.ts), one Turns per service and policy. An instance without a
 *  weight counts 1 as long as no instance has one, so that a service is reachable before anything is known of it, and
 *  a new instance is not taken for the best. */
export interface InstanceWeights {
  readonly instances: readonly number[];
  readonly weights: Readonly<Record<Policy, readonly number[]>>;
}

/** A choice that the loop made for a new flow. */
export interface Choice {
  readonly service: ServiceId;
  /** `fixed`: an InstanceIP was dialled. */
  readonly policy: Policy | 'fixed';
  readonly instance: number;
  /** Namespace IP of the client. */
  readonly client: Ipv4;
}

/** Choices that one report did not list, by what they have in common. */
export interface ChoiceCount extends Omit<Choice, 'client'> {
  readonly count: number;
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
  /** The answer to a `miss` when nobody has the address: packets to it that wait are refused. */
  | { readonly kind: 'unowned'; readonly address: Ipv4 }
  /** Weights of instances that an earlier `service` named; flows that exist are not touched, a later `service` of the
   *  same instance numbers keeps them. */
  | ({ readonly kind: 'weights'; readonly service: ServiceId } & InstanceWeights)
  /** Lets go of the flows to instances on that node that nobody has answered yet: their next packet is chosen anew. */
  | { readonly kind: 'nodeSuspect'; readonly nodeIp: Ipv4; readonly ewp: number }
  /** Resets the TCP flows that this node has to instances on that one, and lets go of the others: it is dead. */
  | { readonly kind: 'nodeDead'; readonly nodeIp: Ipv4; readonly ewp: number }
  /** The same for one instance whose node lives. */
  | { readonly kind: 'instanceDead'; readonly service: ServiceId; readonly instance: number }
  /** Replaces the nodes that are greeted although no route may name them: they ask for it because a NAT keeps out whom
   *  this node has not spoken to. */
  | { readonly kind: 'callers'; readonly nodes: readonly NodePlace[] }
  /** Sends one probe frame through the tunnel's own socket; `probed` follows if the node's loop answers. The token is an
   *  unpredictable unsigned 32-bit integer; the frame carries it and the answer repeats it. */
  | { readonly kind: 'probe'; readonly token: number; readonly nodeIp: Ipv4; readonly ewp: number }
  /** What the loop puts into its answers to probes until told otherwise (src/wire/probe.ts); the loop does not look
   *  into it. It answers without the control plane. At most PROBE_STATUS_BYTES. */
  | { readonly kind: 'probeStatus'; readonly status: Uint8Array }
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
  /** A packet named an address that no route knows: the control plane may start to follow it,
   *  or answers `unowned`. Rate-limited. */
  | { readonly kind: 'miss'; readonly address: Ipv4 }
  /** The answer to a `probe` of ours: it carried the probe's token and, authentic, came from `nodeIp`. `rttNs` is taken in the
   *  loop from send to receive; `status` is the answering node's probeStatus. */
  | {
      readonly kind: 'probed';
      readonly token: number;
      readonly nodeIp: Ipv4;
      readonly rttNs: number;
      readonly status: Uint8Array;
    }
  /** Choices since the last report, at most four reports a second; those that did not fit are only counted. */
  | {
      readonly kind: 'chosen';
      readonly choices: readonly Choice[];
      readonly unlisted: readonly ChoiceCount[];
    }
  /** Where flows lead that have not ended, every FLOWS_MS as long as there are any: services, and other nodes by the
   *  first address of their subnet. */
  | { readonly kind: 'flows'; readonly services: readonly ServiceId[]; readonly subnets: readonly Ipv4[] }
  /** Something an operator should know once: an offload that this kernel refuses, a setting that did not take. */
  | { readonly kind: 'notice'; readonly text: string };

/** Super-packets of TCP and UDP on the TUN; joined sends and receives on the tunnel's socket. */
export type Offload = 'tso' | 'uso' | 'gso' | 'gro';

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
  /** Kernel offloads to do without: on a host whose kernel or device promises one and breaks it. */
  readonly without?: readonly Offload[] | undefined;
  /** After a packet the loop asks again for this long before it sleeps (0: sleeps at once). Default: limits.ts. */
  readonly spinUs?: number;
  /** File that outlives a killed agent and brings its flows back; absent: flows live in memory only. */
  readonly flowsFile?: string;
  /** Seed of the roundrobin start and of the source-port choice; randomness stays outside. */
  readonly seed: number;
}
