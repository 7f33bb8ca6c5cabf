// Desired host state in, ordered actions with their undo out. Pure: it runs nothing and reads nothing, so that a plan
// is reviewed and tested as plain text (`formatPlan`). It refuses to name anything that is not ours: every link,
// table and chain below carries our own name, and what belongs to others is put back as it was.
import { createHash } from 'node:crypto';
import { type Cidr, formatCidr, formatIpv4, type Ipv4, overlaps } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import { INTERFACE_NAME_MAX } from '../../src/limits.ts';
import { layoutOf } from '../../src/plan.ts';

/** A program run on the host. `netns` is a path such as /run/netns/NAME or /proc/PID/ns/net. */
export type CommandAction =
  | { readonly kind: 'ip'; readonly netns?: string; readonly args: string }
  | { readonly kind: 'sysctl'; readonly netns?: string; readonly path: string; readonly value: string }
  | { readonly kind: 'nft'; readonly ruleset: string }
  | { readonly kind: 'iptables'; readonly args: string }
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
}

export type Plan = readonly Step[];

/** What is there, as far as a plan depends on it. */
export interface Observed {
  readonly bridgeExists: boolean;
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
  /** Prefixes of the host that lie inside the platform and are not ours: instances may go there. */
  readonly foreign: readonly Cidr[];
}

export interface NodeState {
  readonly bridge: string;
  readonly tun: string;
  /** Name of our nftables table. */
  readonly table: string;
  readonly subnet: Cidr;
  readonly services: Cidr;
  readonly platform: Cidr;
  readonly mtu: number;
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

/** Bridge, forwarding, rules. Without the TUN: the packet loop makes that (see planTun). */
export function planNode(state: NodeState, observed: Observed): Plan {
  const { bridge, subnet, mtu } = state;
  const address = `${formatIpv4(layoutOf(subnet).bridge)}/${subnet.bits}`;
  const steps: Step[] = [];
  if (!observed.bridgeExists)
    steps.push(
      step(
        ip(`link add ${bridge} address ${macOf(layoutOf(subnet).bridge)} type bridge`),
        ip(`link del ${bridge}`),
      ),
    );
  if (observed.ipv6) steps.push(step(sysctl(`net/ipv6/conf/${bridge}/disable_ipv6`, '1')));
  // Strict (RFC 3704 §2.2): from the bridge only the subnet's own addresses, whatever conf.all says.
  steps.push(step(sysctl(`net/ipv4/conf/${bridge}/rp_filter`, '1')));
  steps.push(step(sysctl(`net/ipv4/conf/${bridge}/route_localnet`, '0')));
  steps.push(step(sysctl(`net/ipv4/conf/${bridge}/send_redirects`, '0')));
  steps.push(step(ip(`link set ${bridge} mtu ${mtu}`)));
  for (const old of observed.bridgeAddresses)
    if (old !== address)
      steps.push(step(ip(`addr del ${old} dev ${bridge}`), ip(`addr replace ${old} dev ${bridge}`)));
  if (!observed.bridgeAddresses.includes(address))
    steps.push(step(ip(`addr replace ${address} dev ${bridge}`), ip(`addr del ${address} dev ${bridge}`)));
  steps.push(step(ip(`link set ${bridge} up`)));
  if (observed.forward !== '1')
    steps.push(step(sysctl('net/ipv4/ip_forward', '1'), sysctl('net/ipv4/ip_forward', observed.forward)));
  steps.push(
    step(
      { kind: 'nft', ruleset: nodeRules(state, observed.foreign) },
      ...(observed.tableExists ? [] : [nftDelete(state.table)]),
    ),
  );
  if (observed.iptables === 'absent') steps.push(...planIptables(state));
  return steps;
}

/** A locally administered address of the bridge's own: without one a bridge takes the lowest of its ports' and changes
 *  it as they come and go, and instances would lose their gateway until they ask for it again. */
function macOf(address: Ipv4): string {
  const octets = [24, 16, 8, 0].map((shift) => ((address >>> shift) & 255).toString(16).padStart(2, '0'));
  return `02:45:${octets.join(':')}`;
}

/** Takes away what planNode and planTun made; each action may find nothing. The sysctl goes last: see Environment. */
export function planClean(state: {
  readonly bridge: string;
  readonly tun: string;
  readonly table: string;
}): readonly Action[] {
  return [
    ip(`link del ${state.tun}`),
    ip(`link del ${state.bridge}`),
    nftDelete(state.table),
    ...iptablesClean(state.bridge),
  ];
}

/** After the packet loop has made the TUN device. It needs no address: the bridge's is the source of the host's own
 *  packets to services. */
export function planTun(state: NodeState, tun: string, services: Cidr, forwardedIpv6: boolean): Plan {
  const source = formatIpv4(layoutOf(state.subnet).bridge);
  return [
    ...(forwardedIpv6 ? [step(sysctl(`net/ipv6/conf/${tun}/disable_ipv6`, '1'))] : []),
    step(sysctl(`net/ipv4/conf/${tun}/rp_filter`, '1')),
    step(sysctl(`net/ipv4/conf/${tun}/route_localnet`, '0')),
    step(ip(`link set ${tun} mtu ${state.mtu} up`), ip(`link set ${tun} down`)),
    step(
      ip(`route replace ${formatCidr(services)} dev ${tun} src ${source}`),
      ip(`route del ${formatCidr(services)} dev ${tun}`),
    ),
  ];
}

function planIptables(state: NodeState): Plan {
  const chain = chainOf(state.bridge);
  const undo = iptablesClean(state.bridge);
  const accept = (match: string): Step =>
    step({ kind: 'iptables', args: `-A ${chain} ${match} -m comment --comment edgeway -j ACCEPT` });
  return [
    step({ kind: 'iptables', args: `-N ${chain}` }, ...undo),
    accept(`-i ${state.bridge}`),
    accept(`-o ${state.bridge}`),
    accept(`-i ${state.tun}`),
    accept(`-o ${state.tun}`),
    step({ kind: 'iptables', args: `-I FORWARD -m comment --comment edgeway -j ${chain}` }),
  ];
}

export function iptablesClean(bridge: string): readonly Action[] {
  const chain = chainOf(bridge);
  return [
    { kind: 'iptables', args: `-D FORWARD -m comment --comment edgeway -j ${chain}` },
    { kind: 'iptables', args: `-F ${chain}` },
    { kind: 'iptables', args: `-X ${chain}` },
  ];
}

/** `add` before `delete` makes the deletion succeed whether or not the table is there. */
function nftDelete(table: string): Action {
  return { kind: 'nft', ruleset: `table inet ${table}\ndelete table inet ${table}\n` };
}

/** The whole table, replaced in one transaction. */
export function nodeRules(state: NodeState, foreign: readonly Cidr[]): string {
  const { bridge, tun, table } = state;
  const layout = layoutOf(state.subnet);
  const gateway = formatIpv4(layout.bridge);
  const subnet = formatCidr(state.subnet);
  const services = formatCidr(state.services);
  const inside = widest(foreign.filter((cidr) => overlaps(cidr, state.platform))).map(formatCidr);
  const exempt = inside.length === 0 ? '' : `ip daddr != { ${inside.join(', ')} } `;
  return `table inet ${table}
delete table inet ${table}
table inet ${table} {
  # DNS on the bridge and overlay packets need no connection tracking: the proxy keeps the flows.
  chain untracked {
    type filter hook prerouting priority raw; policy accept;
    iifname "${bridge}" ip daddr ${gateway} udp dport { 53, 5353 } notrack
    iifname "${bridge}" ip daddr ${gateway} tcp dport 53 notrack
    iifname "${bridge}" ip saddr ${subnet} ip daddr ${services} notrack
    iifname "${tun}" ip daddr ${subnet} ip daddr != ${gateway} notrack
  }
  chain untracked_out {
    type filter hook output priority raw; policy accept;
    oifname "${bridge}" ip saddr ${gateway} udp sport { 53, 5353 } notrack
    oifname "${bridge}" ip saddr ${gateway} tcp sport 53 notrack
  }
  # An instance reaches of this host its nameserver and nothing else.
  chain input {
    type filter hook input priority filter; policy accept;
    iifname != "${bridge}" accept
    ip daddr { ${gateway}, 224.0.0.251 } udp dport { 53, 5353 } accept
    ip daddr ${gateway} tcp dport 53 accept
    ip daddr ${gateway} icmp type echo-request accept
    ct state established,related accept
    ip protocol igmp accept
    reject with icmpx type admin-prohibited
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname "${bridge}" oifname "${tun}" accept
    iifname "${tun}" oifname "${bridge}" accept
    # Instances meet only through the ProxyTUN.
    iifname "${bridge}" oifname "${bridge}" drop
    # The platform's addresses never leave by another way than the TUN.
    iifname "${bridge}" ip daddr ${formatCidr(state.platform)} ${exempt}reject with icmpx type admin-prohibited
    oifname "${bridge}" ct state established,related accept
    oifname "${bridge}" drop
  }
  chain outside {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr ${subnet} oifname != { "${bridge}", "${tun}" } masquerade
  }
}
`;
}

/** Prefixes that lie in no other of them: nft refuses intervals that overlap. */
function widest(prefixes: readonly Cidr[]): readonly Cidr[] {
  const kept: Cidr[] = [];
  for (const prefix of prefixes.toSorted((a, b) => a.bits - b.bits))
    if (!kept.some((wider) => overlaps(wider, prefix))) kept.push(prefix);
  return kept;
}

export interface AttachState {
  readonly id: string;
  /** Path of the network namespace. */
  readonly netns: string;
  readonly hostInterface: string;
  /** Name inside the namespace. */
  readonly inner: string;
  readonly namespaceIp: Ipv4;
  readonly subnet: Cidr;
  readonly platform: Cidr;
  readonly bridge: string;
  readonly mtu: number;
  /** A default route is there already: only the platform goes through us. */
  readonly hasDefault: boolean;
  readonly ipv6: boolean;
  readonly resolv?: ResolvState;
}

export interface ResolvState {
  readonly path: string;
  readonly nameserver: Ipv4;
  /** Content before us; undefined when there was no such file. */
  readonly before?: string | undefined;
  /** Directories that hold the file and exist only for it, outermost first. */
  readonly made: readonly string[];
}

/** What an instance's resolv.conf holds: exactly one nameserver (design §4). The first line tells ours from others'. */
export function resolvContent(id: string, nameserver: Ipv4): string {
  return `# edgeway: instance ${id}\nnameserver ${formatIpv4(nameserver)}\noptions ndots:1\n`;
}

export function planAttach(state: AttachState): Plan {
  const { hostInterface, inner, netns, bridge, mtu, subnet } = state;
  const gateway = formatIpv4(layoutOf(subnet).bridge);
  const address = `${formatIpv4(state.namespaceIp)}/${subnet.bits}`;
  const inside = (args: string): Step => step(ip(args, netns));
  const steps: Step[] = [
    step(
      ip(`link add ${hostInterface} mtu ${mtu} type veth peer name ${inner} mtu ${mtu} netns ${netns}`),
      ip(`link del ${hostInterface}`),
    ),
    step(ip(`link set ${hostInterface} addrgenmode none`)),
    step(ip(`link set ${hostInterface} master ${bridge}`)),
    step(ip(`link set ${hostInterface} type bridge_slave isolated on`)),
    step(ip(`link set ${hostInterface} up`)),
  ];
  if (state.ipv6) steps.push(step(sysctl(`net/ipv6/conf/${inner}/disable_ipv6`, '1', netns)));
  steps.push(
    inside('link set lo up'),
    inside(`addr add ${address} dev ${inner}`),
    inside(`link set ${inner} up`),
  );
  if (state.hasDefault)
    steps.push(inside(`route replace ${formatCidr(state.platform)} via ${gateway} dev ${inner}`));
  else steps.push(inside(`route add default via ${gateway} dev ${inner}`));
  if (state.resolv !== undefined) steps.push(...planResolv(state.id, state.resolv));
  return steps;
}

function planResolv(id: string, resolv: ResolvState): Plan {
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

function resolvRestore(resolv: ResolvState): readonly Action[] {
  return resolv.before === undefined
    ? [{ kind: 'remove', path: resolv.path }]
    : [{ kind: 'writeInPlace', path: resolv.path, content: resolv.before }];
}

/** `resolvIsOurs`: the file still holds what we wrote; anything else belongs to somebody else by now. */
export function planDetach(
  state: { readonly hostInterface: string; readonly resolv?: ResolvState | undefined },
  resolvIsOurs: boolean,
): readonly Action[] {
  const actions: Action[] = [ip(`link del ${state.hostInterface}`)];
  if (state.resolv === undefined) return actions;
  if (resolvIsOurs) actions.push(...resolvRestore(state.resolv));
  for (const directory of state.resolv.made.toReversed())
    actions.push({ kind: 'run', argv: ['rmdir', directory] });
  return actions;
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
