// Our nftables rules as text, a pure function of the state file: whoever changes the state replaces them all in one
// transaction. (One table; what is said about frames stands in a table of the bridge family beside it.) Rules match
// on our own links and on "this host's addresses", never on the name of somebody else's interface, so that a default
// route may move.
import { type Cidr, formatCidr, formatIpv4, type Ipv4, overlaps } from '../../src/addr.ts';
import { EWP_DEFAULT } from '../../src/limits.ts';
import type { Protocol } from '../../src/model.ts';
import type { HostState, NodeState } from './state.ts';

/** A node port and what it leads to. */
export interface Publication {
  readonly protocol: Protocol;
  /** Port on any address of this host. */
  readonly source: number;
  /** Instances on this node take turns and see the client's address; a ServiceIP stands alone, and the proxy chooses. */
  readonly targets: readonly Target[];
  /** Where it leads the node's own instances, if not there too: a ServiceIP, since isolated instances meet only through
   *  the ProxyTUN. */
  readonly hairpin?: Target | undefined;
  /** Where conversations that began under other circumstances may go on, and no new one begins. */
  readonly kept?: readonly Target[] | undefined;
}

export interface Target {
  readonly address: Ipv4;
  readonly port: number;
}

/** `add` before `delete` makes the deletion succeed whether or not the table is there. */
export function dropRules(table: string): string {
  return ['inet', 'bridge']
    .map((family) => `table ${family} ${table}\ndelete table ${family} ${table}\n`)
    .join('');
}

export function rulesOf(
  node: NodeState,
  state: Pick<HostState, 'attachments' | 'exposed' | 'peers' | 'sysctls' | 'tunnelPorts'>,
): string {
  const publications = publicationsOf(state);
  return `${dropRules(node.table)}table inet ${node.table} {
${[
  turnedForwarding(state),
  untracked(node),
  untrackedOut(node),
  input(node, Object.values(state.peers)),
  published(publications),
  conversations(node),
  forward(node, state.tunnelPorts),
  ports('ports', publications),
  ports('hairpin', publications.map(ofInstances)),
  prerouting(node),
  output(),
  postrouting(node),
]
  .flat()
  .map((line) => `  ${line}`)
  .join('\n')}
}
table bridge ${node.table} {
${spoofed(Object.values(state.attachments))
  .map((line) => `  ${line}`)
  .join('\n')}
}
`;
}

/** A locally administered hardware address that belongs to the IPv4 address. An instance that is attached again, or
 *  its address's next owner, answers to it at once: the host's neighbour entry for the old one would hold for half a
 *  minute. */
export function macOf(address: Ipv4): string {
  const octets = [24, 16, 8, 0].map((shift) => ((address >>> shift) & 255).toString(16).padStart(2, '0'));
  return `02:45:${octets.join(':')}`;
}

/** A frame from an instance's port has the instance's own addresses, or goes no further: not even into the bridge's
 *  memory of who is where. */
function spoofed(
  attachments: readonly { readonly hostInterface: string; readonly namespaceIp: Ipv4 }[],
): Lines {
  return [
    ...set(
      'ports',
      'ifname',
      attachments.map((one) => `"${one.hostInterface}"`),
    ),
    ...set(
      'owners',
      'ifname . ether_addr . ipv4_addr',
      attachments.map(
        ({ hostInterface, namespaceIp }) =>
          `"${hostInterface}" . ${macOf(namespaceIp)} . ${formatIpv4(namespaceIp)}`,
      ),
    ),
    ...chain('spoofed', 'type filter hook prerouting priority -300', [
      'iifname != @ports accept',
      'ether type ip iifname . ether saddr . ip saddr @owners accept',
      'ether type arp iifname . ether saddr . arp saddr ip @owners iifname . arp saddr ether . arp saddr ip @owners accept',
      'drop',
    ]),
  ];
}

/** Everything that the node publishes, for its instances and for services. */
export function publicationsOf(state: Pick<HostState, 'attachments' | 'exposed'>): readonly Publication[] {
  const own = Object.values(state.attachments).flatMap(({ ports: mappings, namespaceIp }) =>
    mappings.map(({ protocol, source, destination }) => ({
      protocol,
      source,
      targets: [{ address: namespaceIp, port: destination }],
    })),
  );
  return [...own, ...state.exposed];
}

type Lines = readonly string[];

/**
 * An empty chain says that forwarding was off before the first of our networks on this host. One that comes while it is
 * on takes the note over, so that the last to leave turns it off, whoever that is; like the switch, the note does not
 * outlive a boot.
 */
export const FORWARDING_WAS_OFF = 'forwarding_was_off';

function turnedForwarding({ sysctls }: Pick<HostState, 'sysctls'>): Lines {
  return sysctls['net/ipv4/ip_forward'] === '0' ? [`chain ${FORWARDING_WAS_OFF} {`, '}'] : [];
}

/** DNS on the bridge and overlay packets need no connection tracking: the proxy keeps the flows. Nameserver and
 *  ProxyTUN come together: a node without services has neither. */
function untracked(node: NodeState): Lines {
  if (node.services === undefined) return [];
  const gateway = formatIpv4(node.gateway);
  const subnet = formatCidr(node.subnet);
  return chain('untracked', 'type filter hook prerouting priority raw', [
    `iifname "${node.bridge}" ip daddr ${gateway} udp dport { 53, 5353 } notrack`,
    `iifname "${node.bridge}" ip daddr ${gateway} tcp dport 53 notrack`,
    `iifname "${node.bridge}" ip saddr ${subnet} ip daddr ${formatCidr(node.services)} notrack`,
    `iifname "${node.tun}" ip daddr ${subnet} ip daddr != ${gateway} notrack`,
  ]);
}

function untrackedOut(node: NodeState): Lines {
  if (node.services === undefined) return [];
  const gateway = formatIpv4(node.gateway);
  return chain('untracked_out', 'type filter hook output priority raw', [
    `oifname "${node.bridge}" ip saddr ${gateway} udp sport { 53, 5353 } notrack`,
    `oifname "${node.bridge}" ip saddr ${gateway} tcp sport 53 notrack`,
  ]);
}

/** An instance reaches of this host its nameserver and nothing else; only peers reach the carrier's port. */
function input(node: NodeState, peers: readonly { readonly endpoint: Ipv4 }[]): Lines {
  const gateway = formatIpv4(node.gateway);
  const endpoints = [...new Set(peers.map((peer) => formatIpv4(peer.endpoint)))];
  // The device listens on [::] too, and no peer has an IPv6 address.
  const carrier =
    node.carrier === undefined
      ? []
      : endpoints.length === 0
        ? [`udp dport ${node.carrier.port} drop`]
        : [
            `meta nfproto ipv6 udp dport ${node.carrier.port} drop`,
            `udp dport ${node.carrier.port} ip saddr != { ${endpoints.join(', ')} } drop`,
          ];
  return chain('input', 'type filter hook input priority filter', [
    ...carrier,
    `iifname != ${setOf(ownLinks(node))} accept`,
    ...(node.services === undefined
      ? []
      : [
          `iifname "${node.bridge}" ip daddr { ${gateway}, 224.0.0.251 } udp dport { 53, 5353 } accept`,
          `iifname "${node.bridge}" ip daddr ${gateway} tcp dport 53 accept`,
        ]),
    `ip daddr ${gateway} icmp type echo-request accept`,
    'ct state established,related accept',
    'ip protocol igmp accept',
    'reject with icmpx type admin-prohibited',
  ]);
}

const PROTOCOLS: readonly Protocol[] = ['tcp', 'udp'];

/** The set of what a conversation through a published port may be: node port, target. */
export function publishedSet(protocol: Protocol): string {
  return `published_${protocol}`;
}

function published(publications: readonly Publication[]): Lines {
  return PROTOCOLS.flatMap((protocol) => {
    const elements = publications
      .filter((publication) => publication.protocol === protocol)
      .flatMap(({ source, targets, hairpin, kept = [] }) =>
        [...targets, ...(hairpin === undefined ? [] : [hairpin]), ...kept].map(
          ({ address, port }) => `${source} . ${formatIpv4(address)} . ${port}`,
        ),
      );
    return set(publishedSet(protocol), 'inet_service . ipv4_addr . inet_service', [...new Set(elements)]);
  });
}

/** The kernel remembers where a conversation was redirected to for as long as it goes on. It ends, and is told so, when
 *  the port leads elsewhere or nowhere by now, or when the target is gone. */
function conversations(node: NodeState): Lines {
  const live = PROTOCOLS.flatMap((protocol) =>
    [
      ['original', 'daddr', 'dport'],
      ['reply', 'saddr', 'sport'],
    ].map(
      ([direction, address, port]) =>
        `  meta l4proto ${protocol} ct direction ${direction} ct original proto-dst . ip ${address} . ${protocol} ${port} @${publishedSet(protocol)} accept`,
    ),
  );
  const inside = [node.subnet, ...(node.services === undefined ? [] : [node.services])].map(formatCidr);
  return [
    'chain conversations {',
    '  ct state related accept',
    ...live,
    '  meta l4proto tcp reject with tcp reset',
    '  reject with icmpx port-unreachable',
    '}',
    // By address: a packet that was redirected here still seems to leave by the link that it had before.
    ...chain('conversations_out', 'type filter hook output priority filter', [
      `ct status dnat ct direction original ip daddr { ${inside.join(', ')} } goto conversations`,
    ]),
  ];
}

function forward(node: NodeState, tunnelPorts: readonly number[]): Lines {
  const bridge = `"${node.bridge}"`;
  const others = ownLinks(node).slice(1);
  const targets = setOf([node.bridge, ...(node.services === undefined ? [] : [node.tun])]);
  return chain('forward', 'type filter hook forward priority filter', [
    ...platformsOwn(node, tunnelPorts),
    '# Published ports, in either direction.',
    `ct status dnat ct direction original oifname ${targets} goto conversations`,
    `ct status dnat ct direction reply iifname ${targets} goto conversations`,
    ...others.flatMap((other) => [
      `iifname ${bridge} oifname "${other}" accept`,
      `iifname "${other}" oifname ${bridge} accept`,
    ]),
    // A packet of another node goes to an instance here or is an answer to a published port's client; never further.
    ...(node.carrier === undefined
      ? []
      : [`iifname "${node.carrier.device}" ct state != established,related drop`]),
    // What others redirect, such as a port that Docker publishes.
    'ct status dnat accept',
    ...(node.isolated
      ? ['# Instances meet only through the ProxyTUN.', `iifname ${bridge} oifname ${bridge} drop`]
      : [`iifname ${bridge} oifname ${bridge} accept`]),
    ...(node.platform === undefined ? [] : platformStays(node, node.platform)),
    `oifname ${bridge} ct state established,related accept`,
    `oifname ${setOf(ownLinks(node))} drop`,
  ]);
}

/**
 * Other nodes take a frame by the address of the host that it comes from, and what an instance sends leaves under that
 * address: no instance sends to a port of a tunnel. By port alone, since a host has more addresses than its nodes tell,
 * and not by what the frame holds, since segments of one large packet are cut apart behind this rule. Nor does an
 * instance reach the node's coordination store.
 */
function platformsOwn(node: NodeState, tunnelPorts: readonly number[]): Lines {
  const out = `iifname "${node.bridge}" oifname != ${setOf(ownLinks(node))}`;
  const own = [node.tunnelPort, node.carrier?.port].filter((port) => port !== undefined);
  const ports = [...new Set([EWP_DEFAULT, ...own, ...tunnelPorts])].toSorted((a, b) => a - b);
  const stores = (node.stores ?? []).map(({ address, port }) => `${formatIpv4(address)} . ${port}`);
  return [
    `${out} udp dport { ${ports.join(', ')} } reject with icmpx admin-prohibited`,
    ...(stores.length === 0
      ? []
      : [
          `iifname "${node.bridge}" ip daddr . tcp dport { ${[...new Set(stores)].join(', ')} } reject with icmpx admin-prohibited`,
        ]),
  ];
}

/** The bridge first, then the ways to other nodes. */
export function ownLinks(node: NodeState): readonly string[] {
  return [
    node.bridge,
    ...(node.services === undefined ? [] : [node.tun]),
    ...(node.carrier === undefined ? [] : [node.carrier.device]),
  ];
}

function setOf(names: readonly string[]): string {
  return names.length === 1 ? `"${names[0]}"` : `{ ${names.map((name) => `"${name}"`).join(', ')} }`;
}

/** The platform's addresses never leave by another way than the TUN, unless the host itself has a route there. */
function platformStays(node: NodeState, platform: Cidr): Lines {
  const inside = widest(node.foreign.filter((cidr) => overlaps(cidr, platform))).map(formatCidr);
  const exempt = inside.length === 0 ? '' : `ip daddr != { ${inside.join(', ')} } `;
  return [
    `iifname "${node.bridge}" ip daddr ${formatCidr(platform)} ${exempt}reject with icmpx type admin-prohibited`,
  ];
}

/** One lookup per packet, however many ports there are; only a port with several targets has a rule of its own. */
function ports(name: string, publications: readonly Publication[]): Lines {
  const rules: string[] = [];
  for (const protocol of PROTOCOLS) {
    const simple: string[] = [];
    for (const publication of publications) {
      if (publication.protocol !== protocol) continue;
      const targets = publication.targets.map(({ address, port }) => `${formatIpv4(address)} . ${port}`);
      if (targets.length === 1) simple.push(`${publication.source} : ${targets[0]}`);
      else if (targets.length > 1)
        rules.push(
          `${protocol} dport ${publication.source} dnat ip to numgen inc mod ${targets.length} map { ${targets.map((target, at) => `${at} : ${target}`).join(', ')} }`,
        );
    }
    if (simple.length > 0) rules.push(`dnat ip to ${protocol} dport map { ${simple.join(', ')} }`);
  }
  return [`chain ${name} {`, ...rules.map((rule) => `  ${rule}`), '}'];
}

/** The publication as the node's own instances see it. */
function ofInstances(publication: Publication): Publication {
  return publication.hairpin === undefined ? publication : { ...publication, targets: [publication.hairpin] };
}

function prerouting(node: NodeState): Lines {
  return chain('published', 'type nat hook prerouting priority dstnat', [
    `iifname "${node.bridge}" fib daddr type local goto hairpin`,
    'fib daddr type local jump ports',
  ]);
}

/** The host's own clients. Not 127.0.0.0/8: that would need route_localnet, which opens loopback services to the bridge. */
function output(): Lines {
  return chain('published_out', 'type nat hook output priority -100', [
    'ip daddr != 127.0.0.0/8 fib daddr type local jump ports',
  ]);
}

function postrouting(node: NodeState): Lines {
  const gateway = formatIpv4(node.gateway);
  const subnet = formatCidr(node.subnet);
  return chain('outside', 'type nat hook postrouting priority srcnat', [
    ...(node.services === undefined
      ? []
      : [
          '# The proxy takes packets of this node only: the client of a service elsewhere becomes the bridge.',
          `oifname "${node.tun}" ct status dnat snat ip to ${gateway}`,
        ]),
    '# Hairpin: an instance that dials a published port of its own node.',
    `oifname "${node.bridge}" ip saddr ${subnet} ct status dnat snat ip to ${gateway}`,
    // Not on loopback: the host asking its own bridge would seem to come from another of its addresses.
    `ip saddr ${subnet} oifname != ${setOf([...ownLinks(node), 'lo'])} masquerade`,
  ]);
}

function set(name: string, type: string, elements: readonly string[]): Lines {
  return [
    `set ${name} {`,
    `  type ${type}`,
    ...(elements.length === 0 ? [] : [`  elements = { ${elements.join(', ')} }`]),
    '}',
  ];
}

function chain(name: string, hook: string, rules: Lines): Lines {
  return [`chain ${name} {`, `  ${hook}; policy accept;`, ...rules.map((rule) => `  ${rule}`), '}'];
}

/** Prefixes that lie in no other of them: nft refuses intervals that overlap. */
function widest(prefixes: readonly Cidr[]): readonly Cidr[] {
  const kept: Cidr[] = [];
  for (const prefix of prefixes.toSorted((a, b) => a.bits - b.bits))
    if (!kept.some((wider) => overlaps(wider, prefix))) kept.push(prefix);
  return kept;
}
