// Desired host state in, ordered actions with their undo out. Pure: it runs nothing and reads nothing, so that a plan
// is reviewed and tested as plain text (`formatPlan`). It refuses to name anything that is not ours: every link,
// table and chain below carries our own name, and what belongs to others is put back as it was.
import { createHash } from 'node:crypto';
import { type Cidr, formatCidr, formatIpv4, type Ipv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import { INTERFACE_NAME_MAX, sendSegments } from '../../src/limits.ts';
import { dropRules, macOf, ownLinks, rulesOf } from './rules.ts';
import type { Attachment, HostState, NodeState, Peer } from './state.ts';

/** A program run on the host. `netns` is a path such as /run/netns/NAME or /proc/PID/ns/net. */
export type CommandAction =
  | { readonly kind: 'ip'; readonly netns?: string; readonly args: string }
  | { readonly kind: 'sysctl'; readonly netns?: string; readonly path: string; readonly value: string }
  | { readonly kind: 'nft'; readonly ruleset: string }
  | { readonly kind: 'iptables'; readonly args: string }
  /** Lines for the table `filter`, in one transaction. */
  | { readonly kind: 'iptablesRestore'; readonly lines: readonly string[] }
  | { readonly kind: 'run'; readonly argv: readonly string[] };

export type FileAction =
  | { readonly kind: 'writeInPlace'; readonly path: string; readonly content: string }
  | { readonly kind: 'remove'; readonly path: string };

/** One thing done to the host. */
export type Action = CommandAction | FileAction;

/** `undo` takes back what `act` did; each of its actions may find that there is nothing left to take back. */
export interface Step {
  readonly act: Action;
  readonly undo: readonly Action[];
  /** `act` takes something away, and finding nothing is a success. */
  readonly lenient?: true;
}

export type Plan = readonly Step[];

/** What is there, as far as a plan depends on it. */
export interface Observed {
  /** IPv4 addresses of the bridge, `a.b.c.d/len`. */
  readonly bridgeAddresses: readonly string[];
  /** Value of net/ipv4/ip_forward. */
  readonly forward: string;
  /** False where the kernel runs without IPv6. */
  readonly ipv6: boolean;
  /** Our nftables table is there: replacing it is not ours to undo. */
  readonly tableExists: boolean;
  /** Our chain in iptables: absent, present, or the program is not installed. */
  readonly iptables: 'absent' | 'present' | 'not-installed';
  /** MTU of each link that is there. */
  readonly links: ReadonlyMap<string, number>;
  /** Prefixes that the carrier has a route to. */
  readonly carried: readonly string[];
}

/** iptables chain for hosts whose FORWARD policy is DROP (Docker's); our own restrictions are in nftables. */
export function chainOf(bridge: string): string {
  return `EW-${bridge}`;
}

/** A link name of our own for any id: the id itself where it is short and plain, else a hash of it. */
export function linkName(prefix: string, id: string, max: number = INTERFACE_NAME_MAX): string {
  const room = max - prefix.length;
  if (id.length <= room && /^[a-z0-9-]+$/.test(id)) return `${prefix}${id}`;
  return `${prefix}${createHash('sha256').update(id).digest('hex').slice(0, room)}`;
}

/** @throws invalid_request for a name that the kernel or our own commands cannot carry. */
export function checkLinkName(name: string, what: string): string {
  if (name.length > INTERFACE_NAME_MAX || !/^[a-zA-Z0-9][a-zA-Z0-9_-]*$/.test(name))
    throw new EdgewayError(
      'invalid_request',
      `${what} "${name}" is not a link name: 1 to ${INTERFACE_NAME_MAX} letters, digits, - or _`,
    );
  return name;
}

const ip = (args: string, netns?: string): Action => ({
  kind: 'ip',
  args,
  ...(netns === undefined ? {} : { netns }),
});
const sysctl = (path: string, value: string, netns?: string): Action => ({
  kind: 'sysctl',
  path,
  value,
  ...(netns === undefined ? {} : { netns }),
});
const step = (act: Action, ...undo: readonly Action[]): Step => ({ act, undo });

/** Bridge, forwarding, rules, carrier. Without the TUN: the packet loop makes that (see planTun). */
export function planNode(before: HostState, after: HostState, node: NodeState, observed: Observed): Plan {
  const { bridge, mtu, carrier } = node;
  const address = `${formatIpv4(node.gateway)}/${node.subnet.bits}`;
  const steps: Step[] = [];
  // Without an address of its own a bridge takes the lowest of its ports' and changes it as they come and go, and
  // instances would lose their gateway until they ask for it again.
  if (!observed.links.has(bridge))
    steps.push(
      step(ip(`link add ${bridge} address ${macOf(node.gateway)} type bridge`), ip(`link del ${bridge}`)),
    );
  if (observed.ipv6) steps.push(step(sysctl(`net/ipv6/conf/${bridge}/disable_ipv6`, '1')));
  // Strict (RFC 3704 §2.2): from the bridge only the subnet's own addresses, whatever conf.all says.
  steps.push(step(sysctl(`net/ipv4/conf/${bridge}/rp_filter`, '1')));
  steps.push(step(sysctl(`net/ipv4/conf/${bridge}/route_localnet`, '0')));
  steps.push(step(sysctl(`net/ipv4/conf/${bridge}/send_redirects`, '0')));
  steps.push(linkMtu(bridge, mtu, observed.links.get(bridge)));
  // With an address the kernel takes the routes away that have it as their source.
  const former = before.node;
  const formerCarrier = former?.carrier;
  const formerRoutes =
    former === undefined || formerCarrier === undefined
      ? []
      : Object.values(before.peers).map((peer) => peerRoute(former, formerCarrier, peer));
  for (const old of observed.bridgeAddresses)
    if (old !== address)
      steps.push(
        step(ip(`addr del ${old} dev ${bridge}`), ip(`addr replace ${old} dev ${bridge}`), ...formerRoutes),
      );
  if (!observed.bridgeAddresses.includes(address))
    steps.push(step(ip(`addr replace ${address} dev ${bridge}`), ip(`addr del ${address} dev ${bridge}`)));
  steps.push(step(ip(`link set ${bridge} up`)));
  if (observed.forward !== '1')
    steps.push(step(sysctl('net/ipv4/ip_forward', '1'), sysctl('net/ipv4/ip_forward', observed.forward)));
  steps.push(
    step(
      { kind: 'nft', ruleset: rulesOf(node, after) },
      ...(!observed.tableExists
        ? [nftDrop(node.table)]
        : former === undefined
          ? []
          : [{ kind: 'nft', ruleset: rulesOf(former, before) } as const]),
    ),
  );
  if (carrier !== undefined) {
    if (!observed.links.has(carrier.device))
      steps.push(
        step(
          ip(`link add ${carrier.device} mtu ${mtu} type vxlan dstport ${carrier.port} external gpe`),
          ip(`link del ${carrier.device}`),
        ),
      );
    if (observed.ipv6) steps.push(step(sysctl(`net/ipv6/conf/${carrier.device}/disable_ipv6`, '1')));
    steps.push(step(sysctl(`net/ipv4/conf/${carrier.device}/rp_filter`, '1')));
    steps.push(linkMtu(carrier.device, mtu, observed.links.get(carrier.device)));
    steps.push(step(ip(`link set ${carrier.device} up`)));
    const { gone, made } = peerRoutes(node, carrier, before, after, observed.carried);
    steps.push(...gone, ...made);
  }
  if (observed.iptables === 'absent') steps.push(...planIptables(node));
  return steps;
}

type Carrier = NonNullable<NodeState['carrier']>;

/** `is`: what it is now, if it is there already. */
function linkMtu(link: string, mtu: number, is: number | undefined): Step {
  const undo = is === undefined || is === mtu ? [] : [ip(`link set ${link} mtu ${is}`)];
  return step(ip(`link set ${link} mtu ${mtu}`), ...undo);
}

/** The route says which node: one device carries to all of them (ip-route(8), `encap ip`). */
function peerRoute(node: NodeState, carrier: Carrier, peer: Peer): Action {
  return ip(
    `route replace ${formatCidr(peer.prefix)} encap ip id ${carrier.vni} dst ${formatIpv4(peer.endpoint)} dev ${carrier.device} src ${formatIpv4(node.gateway)}`,
  );
}

/**
 * Routes that no peer has, gone; routes of all peers, made. Told by what is there and not by the journal: that may know
 * of changes which a crash prevented. Taking back gives a prefix the route that it had, unless the bridge's address
 * changes too: such a route comes back with the address.
 */
function peerRoutes(
  node: NodeState,
  carrier: Carrier,
  before: HostState,
  after: HostState,
  carried: readonly string[],
): { readonly gone: Plan; readonly made: Plan } {
  const moves = before.node?.gateway !== node.gateway;
  const former = new Map(
    Object.values(before.peers).map((peer) => [
      formatCidr(peer.prefix),
      moves ? [] : [peerRoute(node, carrier, peer)],
    ]),
  );
  const named = new Set(Object.values(after.peers).map((peer) => formatCidr(peer.prefix)));
  const drop = (prefix: string): Action => ip(`route del ${prefix} dev ${carrier.device}`);
  return {
    gone: carried
      .filter((prefix) => !named.has(prefix))
      // Deleting is repeatable: a route that is gone already is what we want.
      .map((prefix) => ({ act: drop(prefix), undo: former.get(prefix) ?? [], lenient: true })),
    made: Object.values(after.peers).map((peer) => {
      const prefix = formatCidr(peer.prefix);
      return step(peerRoute(node, carrier, peer), ...(former.get(prefix) ?? [drop(prefix)]));
    }),
  };
}

/** New rules for a state that changed; the old ones come back if it does not hold. */
export function planRules(node: NodeState, before: HostState, after: HostState): Plan {
  return [
    step({ kind: 'nft', ruleset: rulesOf(node, after) }, { kind: 'nft', ruleset: rulesOf(node, before) }),
  ];
}

/** Peers that came, went or moved, with the rules that let them in. */
export function planPeers(
  node: NodeState,
  carrier: Carrier,
  before: HostState,
  after: HostState,
  carried: readonly string[],
): Plan {
  const { gone, made } = peerRoutes(node, carrier, before, after, carried);
  return [...gone, ...planRules(node, before, after), ...made];
}

/** Takes away what planNode and planTun made; each action may find nothing. */
export function planClean(
  node: Pick<NodeState, 'bridge' | 'tun' | 'table'> & { readonly carrier?: Carrier | undefined },
): readonly Action[] {
  return [
    ...(node.carrier === undefined ? [] : [ip(`link del ${node.carrier.device}`)]),
    ip(`link del ${node.tun}`),
    ip(`link del ${node.bridge}`),
    nftDrop(node.table),
    ...iptablesClean(node.bridge),
  ];
}

/** After the packet loop has made the TUN device. It needs no address: the bridge's is the source of the host's own
 *  packets to services. */
export function planTun(node: NodeState, tun: string, services: Cidr, forwardedIpv6: boolean): Plan {
  const source = formatIpv4(node.gateway);
  return [
    ...(forwardedIpv6 ? [step(sysctl(`net/ipv6/conf/${tun}/disable_ipv6`, '1'))] : []),
    step(sysctl(`net/ipv4/conf/${tun}/rp_filter`, '1')),
    step(sysctl(`net/ipv4/conf/${tun}/route_localnet`, '0')),
    step(ip(`link set ${tun} mtu ${node.mtu} up`), ip(`link set ${tun} down`)),
    step(
      ip(`route replace ${formatCidr(services)} dev ${tun} src ${source}`),
      ip(`route del ${formatCidr(services)} dev ${tun}`),
    ),
  ];
}

/** Where Docker puts its containers: whom it lets in there is for its own rules to say. */
const DOCKER_LINKS = ['docker+', 'br-+'];

/** Room for us in `FORWARD`. */
export function planIptables(node: NodeState): Plan {
  const chain = chainOf(node.bridge);
  const rule = (match: string, verdict: 'ACCEPT' | 'RETURN'): string =>
    `-A ${chain} ${match} -m comment --comment edgeway -j ${verdict}`;
  const own = ownLinks(node);
  const lines = [
    // Made, or emptied where it outlived its jump because somebody flushed FORWARD.
    `:${chain} - [0:0]`,
    ...own.map((link) => rule(`-o ${link}`, 'ACCEPT')),
    ...DOCKER_LINKS.map((link) => rule(`-i ${node.bridge} -o ${link}`, 'RETURN')),
    ...own.map((link) => rule(`-i ${link}`, 'ACCEPT')),
    `-I FORWARD -m comment --comment edgeway -j ${chain}`,
  ];
  return [step({ kind: 'iptablesRestore', lines }, ...iptablesClean(node.bridge))];
}

export function iptablesClean(bridge: string): readonly Action[] {
  const chain = chainOf(bridge);
  return [
    { kind: 'iptables', args: `-D FORWARD -m comment --comment edgeway -j ${chain}` },
    { kind: 'iptables', args: `-F ${chain}` },
    { kind: 'iptables', args: `-X ${chain}` },
  ];
}

function nftDrop(table: string): Action {
  return { kind: 'nft', ruleset: dropRules(table) };
}

/** What an instance's resolv.conf holds: exactly one nameserver (design §4). The first line tells ours from others'. */
export function resolvContent(id: string, nameserver: Ipv4): string {
  return `# edgeway: instance ${id}\nnameserver ${formatIpv4(nameserver)}\noptions ndots:1\n`;
}

/** What the plan must know of the namespace and the kernel beside the attachment itself. */
export interface AttachSeen {
  /** A default route is there already: only the platform goes through us. */
  readonly hasDefault: boolean;
  readonly ipv6: boolean;
}

export function planAttach(
  node: NodeState,
  id: string,
  one: Attachment,
  seen: AttachSeen,
  before: HostState,
  after: HostState,
): Plan {
  const { hostInterface, inner, netns, mtu } = one;
  const gateway = formatIpv4(node.gateway);
  const inside = (args: string): Step => step(ip(args, netns));
  // Before the link, so that no frame of the instance goes unseen.
  const steps: Step[] = [...planRules(node, before, after)];
  // Not in an `ip -batch`: making a namespace moves the program that makes it.
  if (one.madeNetns)
    steps.push(
      step(
        { kind: 'run', argv: ['ip', 'netns', 'add', basename(netns)] },
        { kind: 'run', argv: ['ip', 'netns', 'del', basename(netns)] },
      ),
    );
  steps.push(
    step(
      ip(
        `link add ${hostInterface} mtu ${mtu} type veth peer name ${inner} address ${macOf(one.namespaceIp)} mtu ${mtu} netns ${netns}`,
      ),
      ip(`link del ${hostInterface}`),
    ),
    step(ip(`link set ${hostInterface} addrgenmode none`)),
    step(ip(`link set ${hostInterface} master ${node.bridge}`)),
  );
  // Hairpin: where br_netfilter is loaded (Docker does), a packet that was redirected back to its own port is bridged,
  // not routed, and a bridge sends nothing back where it came from.
  const port = node.isolated ? 'isolated on' : 'hairpin on';
  steps.push(step(ip(`link set ${hostInterface} type bridge_slave ${port}`)));
  steps.push(step(ip(`link set ${hostInterface} up`)));
  if (seen.ipv6) steps.push(step(sysctl(`net/ipv6/conf/${inner}/disable_ipv6`, '1', netns)));
  steps.push(
    inside('link set lo up'),
    inside(`addr add ${formatIpv4(one.namespaceIp)}/${one.subnet.bits} dev ${inner}`),
    inside(`link set ${inner} up`),
  );
  // Two segments more than one send takes would cost a send, a receive and a wake-up of their own.
  if (node.services !== undefined) steps.push(inside(`link set ${inner} gso_max_segs ${sendSegments(mtu)}`));
  if (!seen.hasDefault) steps.push(inside(`route add default via ${gateway} dev ${inner}`));
  else if (node.platform !== undefined)
    steps.push(inside(`route replace ${formatCidr(node.platform)} via ${gateway} dev ${inner}`));
  if (one.resolv !== undefined) steps.push(...planResolv(id, one.resolv));
  return steps;
}

/** Other ports or another MTU for an attachment that otherwise holds. */
export function planAdjust(
  node: NodeState,
  former: Attachment,
  one: Attachment,
  before: HostState,
  after: HostState,
): Plan {
  return [
    ...planRules(node, before, after),
    ...(former.mtu === one.mtu
      ? []
      : [
          step(
            ip(`link set ${one.hostInterface} mtu ${one.mtu}`),
            ip(`link set ${one.hostInterface} mtu ${former.mtu}`),
          ),
          step(
            ip(`link set ${one.inner} mtu ${one.mtu}`, one.netns),
            ip(`link set ${one.inner} mtu ${former.mtu}`, one.netns),
          ),
        ]),
  ];
}

function planResolv(id: string, resolv: NonNullable<Attachment['resolv']>): Plan {
  const steps: Step[] = resolv.made.map((directory) =>
    step({ kind: 'run', argv: ['mkdir', '-p', directory] }, { kind: 'run', argv: ['rmdir', directory] }),
  );
  steps.push(
    step(
      { kind: 'writeInPlace', path: resolv.path, content: resolvContent(id, resolv.nameserver) },
      ...resolvRestore(resolv),
    ),
  );
  return steps;
}

function resolvRestore(resolv: NonNullable<Attachment['resolv']>): readonly Action[] {
  return resolv.before === undefined
    ? [{ kind: 'remove', path: resolv.path }]
    : [{ kind: 'writeInPlace', path: resolv.path, content: resolv.before }];
}

/** `resolvIsOurs`: the file still holds what we wrote; anything else belongs to somebody else by now. */
export function planDetach(
  node: NodeState | undefined,
  one: Attachment,
  resolvIsOurs: boolean,
  after: HostState,
): readonly Action[] {
  const actions: Action[] = [ip(`link del ${one.hostInterface}`)];
  if (one.madeNetns) actions.push({ kind: 'run', argv: ['ip', 'netns', 'del', basename(one.netns)] });
  if (node !== undefined) actions.push({ kind: 'nft', ruleset: rulesOf(node, after) });
  if (one.resolv === undefined) return actions;
  if (resolvIsOurs) actions.push(...resolvRestore(one.resolv));
  for (const directory of one.resolv.made.toReversed())
    actions.push({ kind: 'run', argv: ['rmdir', directory] });
  return actions;
}

function basename(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}

/** One line per action, as an operator would type it; the lines of a file or a ruleset are indented below it. */
export function formatAction(action: Action): string {
  const within = 'netns' in action && action.netns !== undefined ? `[${action.netns}] ` : '';
  const body = (text: string): string => text.trimEnd().replace(/^/gm, '    ');
  switch (action.kind) {
    case 'ip':
      return `${within}ip ${action.args}`;
    case 'sysctl':
      return `${within}sysctl ${action.path}=${action.value}`;
    case 'nft':
      return `nft\n${body(action.ruleset)}`;
    case 'iptables':
      return `iptables ${action.args}`;
    case 'iptablesRestore':
      return `iptables-restore\n${body(action.lines.join('\n'))}`;
    case 'run':
      return action.argv.join(' ');
    case 'writeInPlace':
      return `write ${action.path}\n${body(action.content)}`;
    case 'remove':
      return `remove ${action.path}`;
  }
}

/** The plan, then what would take it back, in the order in which that happens. */
export function formatPlan(plan: Plan): string {
  const undo = plan.toReversed().flatMap((one) => one.undo);
  return `${plan.map((one) => formatAction(one.act)).join('\n')}\n-- undo\n${undo.map(formatAction).join('\n')}\n`;
}
