// What can happen to a packet: a closed vocabulary. Every drop has a name and a counter; the names are what the
// operator reads in /metrics and in edge/proxy/README.md.

/** Where a packet goes next; `held`: nowhere yet, a copy of it waits. */
export const VERDICT = { drop: 0, tunnel: 1, tun: 2, held: 3 } as const;
export type Verdict = (typeof VERDICT)[keyof typeof VERDICT];

/** Reasons to drop, each with the sentence that the documentation prints. */
export const DROP_REASONS = {
  malformed_ipv4: 'not a whole IPv4 packet, or its header checksum is wrong',
  malformed_transport: 'the TCP, UDP or ICMP header is cut short or its length is wrong',
  unknown_transport: 'neither TCP, UDP nor ICMP, or an ICMP type that has no meaning between instances',
  spoofed_source: 'from the bridge, but not from the namespace IP of an instance on this node',
  not_service_address: 'from the bridge to an address outside the service range',
  unknown_destination: 'a ServiceIP or InstanceIP that no route knows (reported as a miss)',
  no_instance: 'a ServiceIP whose service has no instance',
  not_needed: 'a service outside the needs that the sender declared',
  no_flow: 'a TCP packet that opens nothing and belongs to no flow',
  flow_reset: 'a packet, in either direction, of a flow that was ended because its instance went away',
  ports_exhausted: 'no free source port on the wire for a flow that would look like another',
  ttl_exceeded: 'its time to live ended here',
  too_big: 'larger than the path to its node and marked not to be fragmented',
  bad_quote: 'an ICMP error about a packet that no flow and no route knows',
  fragment_orphan: 'a fragment whose first fragment never came',
  fragments_full: 'too many fragments waiting for their first',
  short_frame: 'from the tunnel, too short for its header',
  bad_flags: 'from the tunnel, not the flags of VXLAN-GPE',
  wrong_vni: 'from the tunnel, of another virtual network',
  unknown_protocol: 'from the tunnel, a next-protocol value that is not ours',
  bad_control: 'a control frame of wrong length, kind or proof',
  misdirected_control:
    'a control frame that was meant for another node: somebody repeats what was said elsewhere',
  old_control:
    "a control frame older than its sender's last: repeated, overtaken, or of a clock that was set back",
  excess_control: 'a greeting or probe of a node that asks more often than any prober; it is not answered',
  unknown_receiver: 'from the tunnel to an address that is no instance on this node',
  unknown_sender: 'from the tunnel, its source is no InstanceIP that a route knows (reported as a miss)',
  spoofed_sender:
    'from the tunnel, its source is an InstanceIP whose node has not proved that it sends from there',
  send_unreachable: 'the host has no route to the node',
  send_full: 'the socket buffer stayed full',
  send_failed: 'the host refused to send for another reason',
  tun_full: 'the TUN device did not take it',
  unread: 'the host had it and could not give it',
} as const;
export type DropReason = keyof typeof DROP_REASONS;

/** Everything that is counted; drops as `drop_<reason>`. */
export const COUNTERS = [
  'from_tun_packets',
  'from_tun_bytes',
  'to_tun_packets',
  'to_tun_bytes',
  'from_tunnel_packets',
  'from_tunnel_bytes',
  'to_tunnel_packets',
  'to_tunnel_bytes',
  'same_node_packets',
  'segmented_packets',
  'joined_packets',
  'tun_reads',
  'tun_writes',
  'tunnel_reads',
  'tunnel_sends',
  'flows_made',
  'flows_expired',
  'flows_evicted',
  'flows_reset',
  'flows_restored',
  'wire_ports_changed',
  'fragments_held',
  'packets_held',
  'packets_resumed',
  'packets_given_up',
  'icmp_made',
  'resets_made',
  'misses_reported',
  'peers_learned',
  'control_received',
  'control_sent',
  'flows',
  'polls',
] as const;
export type Counter = (typeof COUNTERS)[number];

const names: readonly string[] = [
  ...COUNTERS,
  ...Object.keys(DROP_REASONS).map((reason) => `drop_${reason}`),
];
export const COUNTER_NAMES = names;
export const COUNTER_COUNT = names.length;

/** Index of a counter in the shared array. */
export const COUNT = Object.fromEntries(COUNTERS.map((name, i) => [name, i])) as Record<Counter, number>;
/** Index of a drop's counter. */
export const DROP = Object.fromEntries(
  Object.keys(DROP_REASONS).map((reason, i) => [reason, COUNTERS.length + i]),
) as Record<DropReason, number>;
