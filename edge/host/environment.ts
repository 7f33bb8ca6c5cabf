// The environment manager: the only hand that changes this host. Each method observes, plans (plan.ts), writes what
// it is about to change into the state file, and applies; all are idempotent and all-or-nothing, and run one at a
// time. It refuses to touch a link, namespace, rule or file that the state file does not name.
import { type Cidr, contains, formatCidr, formatIpv4, type Ipv4, overlaps } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import type { Logger } from '../../src/log.ts';
import type { PortMapping } from '../../src/model.ts';
import { layoutOf } from '../../src/plan.ts';
import type { Container, Files, Runner } from '../ports.ts';
import { apply, clear, type Host } from './apply.ts';
import { type Foreign, Observer } from './observe.ts';
import {
  chainOf,
  checkLinkName,
  linkName,
  type Observed,
  type Plan,
  planAdjust,
  planAttach,
  planClean,
  planDetach,
  planIptables,
  planNode,
  planPeers,
  planRules,
  planTun,
  resolvContent,
} from './plan.ts';
import { type Publication, publicationsOf, type Target } from './rules.ts';
import {
  type Attachment,
  EMPTY_STATE,
  type HostState,
  loadState,
  type NodeState,
  type Peer,
  saveState,
} from './state.ts';

export interface EnvironmentOptions {
  readonly runner: Runner;
  readonly files: Files;
  readonly log: Logger;
  readonly names: { readonly bridge: string; readonly tun: string };
  /** Directory of host.json; two environments on one host need two of them and names of their own. */
  readonly stateDir: string;
}

export interface NodeRequest {
  readonly subnet: Cidr;
  /** The bridge's address; default: the subnet's first. */
  readonly gateway?: Ipv4;
  /** Range that the ProxyTUN serves; absent where there is none. */
  readonly services?: Cidr;
  /** Addresses that never leave by another way than ours; default: none. */
  readonly platform?: Cidr;
  /** Overlay MTU, bytes. */
  readonly mtu: number;
  /** Default true: instances reach each other only through the ProxyTUN. */
  readonly isolated?: boolean;
  /** UDP port of the ProxyTUN's tunnel; no instance sends there. */
  readonly tunnelPort?: number;
  /** Where the node finds its coordination store; no instance does. */
  readonly stores?: readonly Target[];
  /** The kernel's own VXLAN-GPE device, where it shall carry packets between nodes. */
  readonly carrier?: NonNullable<NodeState['carrier']>;
  /** Nodes that the carrier reaches, beside those that it knows. */
  readonly peers?: Peers;
}

export type Peers = Readonly<Record<string, Peer>>;

export type AttachTarget =
  /** `create`: the namespace is made with the attachment and deleted with it. */
  | { readonly kind: 'netns'; readonly name: string; readonly create?: true }
  | { readonly kind: 'pid'; readonly pid: number };

export interface AttachRequest {
  /** Whoever attaches chooses it; the same id is the same attachment. */
  readonly id: string;
  readonly target: AttachTarget;
  readonly namespaceIp: Ipv4;
  readonly subnet: Cidr;
  readonly mtu: number;
  /** Exactly one nameserver; absent: resolv.conf is left alone. */
  readonly resolvConf?: { readonly nameserver: Ipv4 };
  /** Ports of this host that lead to the instance. */
  readonly ports?: readonly PortMapping[];
  /** Names of the link's two ends; default: a hash, and the first ethN that is free. */
  readonly names?: { readonly host: string; readonly inner: string };
  /** The container whose process `target` is: its engine keeps the resolv.conf. */
  readonly container?: Container;
}

export interface Attached {
  readonly hostInterface: string;
  /** Name inside the namespace: eth0, or the first ethN that was free. */
  readonly interface: string;
  /** File that now names our nameserver; undefined when there is none that we may write. */
  readonly resolvConf?: string;
}

/** What is attached, as the state file knows it. */
export interface Listed extends Attached {
  readonly id: string;
  readonly namespaceIp: Ipv4;
  readonly netns: string;
  readonly ports: readonly PortMapping[];
}

const NETNS_DIR = '/run/netns';
const NETNS_ETC = '/etc/netns';

export class Environment {
  readonly #host: Host;
  readonly #observer: Observer;
  readonly #names: EnvironmentOptions['names'];
  readonly #table: string;
  readonly #statePath: string;
  #queue: Promise<unknown> = Promise.resolve();

  constructor(options: EnvironmentOptions) {
    checkLinkName(options.names.bridge, 'bridge');
    checkLinkName(options.names.tun, 'TUN');
    this.#host = { runner: options.runner, files: options.files, log: options.log };
    this.#observer = new Observer(options.runner);
    this.#names = options.names;
    // The default bridge has the table that the documentation names; another bridge on the host needs its own.
    this.#table = options.names.bridge === 'edgeway0' ? 'edgeway' : `edgeway-${options.names.bridge}`;
    this.#statePath = `${options.stateDir}/host.json`;
  }

  /** Bridge, forwarding, our nftables table, and room beside Docker's FORWARD policy. */
  setupNode(request: NodeRequest): Promise<void> {
    return this.#alone(() => this.#setupNode(request));
  }

  /** Brings the packet loop's TUN device up and routes the service range to it. */
  attachTun(request: { readonly tun?: string; readonly services: Cidr }): Promise<void> {
    return this.#alone(async () => {
      const state = await this.#load();
      const node = this.#nodeOf(state);
      const tun = checkLinkName(request.tun ?? node.tun, 'TUN');
      const ipv6 = await this.#observer.hasIpv6();
      await this.#change(state, state, planTun(node, tun, request.services, ipv6));
    });
  }

  /** @throws namespace_unknown, address_taken, port_taken, invalid_request, not_registered, host_command_failed */
  attach(request: AttachRequest): Promise<Attached> {
    return this.#alone(() => this.#attach(request));
  }

  /** Succeeds when the id, its link, namespace or process are gone. */
  detach(request: { readonly id: string }): Promise<void> {
    return this.#alone(() => this.#detach(request.id));
  }

  /** What is attached as far as the state file knows, also from before a crash. */
  attachments(): Promise<readonly Listed[]> {
    return this.#alone(async () => {
      const state = await this.#load();
      return Object.entries(state.attachments).map(([id, one]) => ({
        id,
        namespaceIp: one.namespaceIp,
        netns: one.netns,
        ports: one.ports,
        ...attached(one),
      }));
    });
  }

  /** The node as it is set up, if it is. */
  node(): Promise<NodeState | undefined> {
    return this.#alone(async () => (await this.#load()).node);
  }

  /** Publishes exactly these ports beside those of attachments, and keeps instances from other nodes' tunnels. What
   *  somebody else on the host has already is left out and returned with the reason. */
  expose(
    publications: readonly Publication[],
    tunnelPorts: readonly number[] = [],
  ): Promise<readonly { readonly publication: Publication; readonly reason: string }[]> {
    return this.#alone(async () => {
      const before = await this.#load();
      const node = this.#nodeOf(before);
      const taken = new Map(publications.length === 0 ? [] : await this.#observer.holders(node.table));
      for (const [id, one] of Object.entries(before.attachments))
        for (const port of one.ports) taken.set(`${port.protocol}/${port.source}`, `instance ${id}`);
      const refused: { publication: Publication; reason: string }[] = [];
      const exposed: Publication[] = [];
      for (const publication of publications) {
        const port = `${publication.protocol}/${publication.source}`;
        const holder = taken.get(port);
        if (holder !== undefined) refused.push({ publication, reason: `${port} belongs to ${holder}` });
        else exposed.push(publication);
        taken.set(port, 'another service');
      }
      const after: HostState = {
        ...before,
        exposed: exposed.map(({ targets, kept, ...one }) => ({
          ...one,
          targets: [...targets],
          ...(kept === undefined ? {} : { kept: [...kept] }),
        })),
        tunnelPorts: [...tunnelPorts],
      };
      // Also when the journal says so already: a crash may have come before the rules.
      await this.#change(before, after, planRules(node, before, after));
      return refused;
    });
  }

  /** Adds or moves nodes that the carrier reaches. */
  addPeers(peers: Peers): Promise<void> {
    return this.#alone(async () => {
      const before = await this.#load();
      const node = this.#nodeOf(before);
      await this.#checkPeers(before, node, peers);
      await this.#changePeers(before, { ...before.peers, ...peers });
    });
  }

  /** Succeeds when there is no such peer. */
  removePeer(id: string): Promise<void> {
    return this.#alone(async () => {
      const before = await this.#load();
      const { [id]: _gone, ...peers } = before.peers;
      if (before.node?.carrier !== undefined) await this.#changePeers(before, peers);
    });
  }

  /** After a reboot: everything that the state file names is there again, with new namespaces where they were ours.
   *  `mtu`: the overlay's, where it may have changed. */
  restore(mtu?: number): Promise<void> {
    return this.#alone(async () => {
      const state = await this.#load();
      const node = this.#nodeOf(state);
      const { bridge: _bridge, tun: _tun, table: _table, foreign: _foreign, ...request } = node;
      await this.#setupNode(exact({ ...request, mtu: mtu ?? node.mtu }));
      for (const [id, one] of Object.entries(state.attachments)) {
        if (one.netnsId !== '' && (await this.#observer.identity(one.netns)) === one.netnsId) continue;
        if (!one.madeNetns) await this.#detach(id);
        else
          await this.#attach({
            id,
            target: { kind: 'netns', name: one.netns.slice(NETNS_DIR.length + 1), create: true },
            namespaceIp: one.namespaceIp,
            subnet: one.subnet,
            mtu: mtu ?? one.mtu,
            ports: one.ports,
            names: { host: one.hostInterface, inner: one.inner },
          });
      }
    });
  }

  /** Removes everything of ours; works from the state file alone, and succeeds when things are gone. */
  cleanNode(): Promise<void> {
    return this.#alone(async () => {
      const state = await this.#load();
      await clear(this.#host, planClean(state.node ?? { ...this.#names, table: this.#table }));
      for (const [id, one] of Object.entries(state.attachments))
        await clear(this.#host, planDetach(undefined, one, await this.#resolvIsOurs(id, one), EMPTY_STATE));
      await this.#restoreSysctls(state);
      if (state.filterTableIsOurs) await this.#dropEmptyFilterTable();
      await this.#save(EMPTY_STATE);
    });
  }

  /** The host's routes and addresses, our own devices left out: a node subnet must overlap none of them. */
  hostRoutes(): Promise<readonly Cidr[]> {
    return this.#alone(async () =>
      (await this.#foreignPrefixes(await this.#load())).map(({ prefix }) => prefix),
    );
  }

  // ---- inside the queue ----

  #alone<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#queue.then(work);
    this.#queue = turn.catch(() => {});
    return turn;
  }

  /** From disk each time: the library may run in several short-lived processes. */
  #load(): Promise<HostState> {
    return loadState(this.#host.files, this.#statePath);
  }

  #save(state: HostState): Promise<void> {
    return saveState(this.#host.files, this.#statePath, state);
  }

  async #setupNode(request: NodeRequest): Promise<void> {
    const before = await this.#load();
    const {
      gateway = layoutOf(request.subnet).bridge,
      isolated = true,
      peers = {},
      stores,
      ...rest
    } = request;
    if (!contains(request.subnet, gateway))
      throw new EdgewayError(
        'invalid_request',
        `${formatIpv4(gateway)} does not lie in ${formatCidr(request.subnet)}`,
      );
    const found = await this.#foreignPrefixes(before);
    // An agent claims a subnet that is free here; whoever brings a carrier chose without asking the host.
    if (request.carrier !== undefined) checkClear(request.subnet, 'the subnet', found);
    const foreign = found
      .map(({ prefix }) => prefix)
      .filter(
        (cidr) =>
          request.platform !== undefined &&
          overlaps(cidr, request.platform) &&
          !overlaps(cidr, request.subnet) &&
          !(request.services !== undefined && overlaps(cidr, request.services)),
      );
    const node: NodeState = {
      ...this.#names,
      table: this.#table,
      ...rest,
      gateway,
      isolated,
      foreign,
      ...(stores === undefined ? {} : { stores: [...stores] }),
    };
    await this.#checkPeers(before, node, peers);
    const observed = await this.#observeNode(node);
    const madeTable =
      observed.iptables === 'absent' &&
      !(await this.#observer.succeeds(['nft', 'list', 'table', 'ip', 'filter']));
    const known = 'net/ipv4/ip_forward' in before.sysctls;
    const former =
      !known && observed.forward === '1' && (await this.#observer.forwardingWasOff(this.#table))
        ? '0'
        : observed.forward;
    const touches = former !== '1' && !known;
    const after: HostState = {
      ...before,
      node,
      sysctls: touches ? { ...before.sysctls, 'net/ipv4/ip_forward': former } : before.sysctls,
      filterTableIsOurs: before.filterTableIsOurs || madeTable,
      peers: { ...before.peers, ...peers },
    };
    await this.#change(before, after, planNode(before, after, node, observed), async () => {
      if (madeTable) await this.#dropEmptyFilterTable();
    });
  }

  async #attach(request: AttachRequest): Promise<Attached> {
    const found = await this.#load();
    const node = this.#nodeOf(found);
    const target = await this.#netnsOf(request.target);
    const known = attachmentOf(found, request.id);
    await this.#checkFree(found, request, target.identity);
    if (known !== undefined) {
      if (await this.#holds(known, request, target.identity, node.bridge))
        return attached(await this.#adjust(found, node, known, request));
      // What is made anew in a namespace of our own making stays in the journal, which alone knows of it: a crash or a
      // refusal on the way is not the instance's end.
      if (known.madeNetns && target.create) await this.#remove(found, request.id, known);
      else await this.#detach(request.id);
    } else if (target.create && target.identity !== '')
      throw new EdgewayError(
        'conflict',
        `the network namespace ${target.path} is there already and not ours`,
      );
    const before = await this.#load();
    const fresh = target.create || target.identity === '';
    const links = fresh ? [] : await this.#observer.links(target.path);
    const resolv = await this.#resolvOf(request);
    const attachment: Attachment = {
      target: describe(request.target),
      netns: target.path,
      // A namespace of our own making is known by its name.
      netnsId: fresh ? '' : target.identity,
      hostInterface: checkLinkName(
        request.names?.host ?? linkName('ew', `${node.bridge}/${request.id}`),
        'interface',
      ),
      inner: checkLinkName(request.names?.inner ?? freeName(links.map((link) => link.ifname)), 'interface'),
      namespaceIp: request.namespaceIp,
      subnet: request.subnet,
      mtu: request.mtu,
      madeNetns: target.create,
      ports: [...(request.ports ?? [])],
      ...(resolv === undefined ? {} : { resolv }),
    };
    const after = { ...before, attachments: { ...before.attachments, [request.id]: attachment } };
    const seen = {
      hasDefault: !fresh && (await this.#observer.hasDefaultRoute(target.path)),
      ipv6: await this.#observer.hasIpv6(),
    };
    await this.#change(before, after, [
      ...(await this.#roomInForward(node)),
      ...planAttach(node, request.id, attachment, seen, before, after),
    ]);
    return attached(attachment);
  }

  /** What may change while an attachment holds: its ports and the MTU of its link. Done also when the journal says so
   *  already, since a crash may have come before it was. */
  async #adjust(
    before: HostState,
    node: NodeState,
    known: Attachment,
    request: AttachRequest,
  ): Promise<Attachment> {
    const changed = { ...known, mtu: request.mtu, ports: [...(request.ports ?? [])] };
    const after = { ...before, attachments: { ...before.attachments, [request.id]: changed } };
    await this.#change(before, after, [
      ...(await this.#roomInForward(node)),
      ...planAdjust(node, known, changed, before, after),
    ]);
    return changed;
  }

  /** Our chain of iptables, where somebody flushed it. */
  async #roomInForward(node: NodeState): Promise<Plan> {
    return (await this.#observeIptables(node.bridge)) === 'absent' ? planIptables(node) : [];
  }

  /** The address, the namespace and the ports belong to no other attachment, and the ports to nobody else on the host. */
  async #checkFree(state: HostState, request: AttachRequest, identity: string): Promise<void> {
    const others = Object.entries(state.attachments).filter(([id]) => id !== request.id);
    for (const [id, one] of others)
      if (identity !== '' && (await this.#observer.identity(one.netns)) === identity)
        throw new EdgewayError(
          'instance_exists',
          `instance ${id} lives in the network namespace of ${describe(request.target)}: one namespace, one instance`,
        );
    const holder = others.find(([, one]) => one.namespaceIp === request.namespaceIp);
    if (holder !== undefined)
      throw new EdgewayError(
        'address_taken',
        `${formatIpv4(request.namespaceIp)} belongs to instance ${holder[0]}`,
      );
    const wanted = request.ports ?? [];
    if (wanted.length === 0) return;
    const own = attachmentOf(state, request.id)?.ports ?? [];
    const rest = { attachments: Object.fromEntries(others), exposed: state.exposed };
    const published = publicationsOf(rest);
    const holders = await this.#observer.holders(this.#table);
    for (const [at, { protocol, source }] of wanted.entries()) {
      const same = (one: { readonly protocol: string; readonly source: number }): boolean =>
        one.protocol === protocol && one.source === source;
      const by = wanted.slice(0, at).some(same)
        ? 'wanted twice'
        : published.some(same)
          ? 'published for another instance'
          : undefined;
      const holder = own.some(same) ? undefined : holders.get(`${protocol}/${source}`);
      if (by !== undefined || holder !== undefined)
        throw new EdgewayError(
          'port_taken',
          `${protocol} port ${source} for instance ${request.id} is ${by ?? `held by ${holder}`}`,
        );
    }
  }

  /** Prefixes overlap neither each other, nor this node's subnet, nor what the host has; and the way to a node does not
   *  lead through the carrier itself. `peers`: those that come or move, beside the ones of `before`. */
  async #checkPeers(before: HostState, node: NodeState, peers: Peers): Promise<void> {
    const all = Object.entries({ ...before.peers, ...peers });
    const found = Object.keys(peers).length === 0 ? [] : await this.#foreignPrefixes(before);
    for (const [id, { prefix }] of all) {
      if (overlaps(prefix, node.subnet))
        throw new EdgewayError(
          'subnet_taken',
          `${formatCidr(prefix)} of node "${id}" overlaps ${formatCidr(node.subnet)} of this one`,
        );
      const other = all.find(([name, peer]) => name !== id && overlaps(peer.prefix, prefix));
      if (other !== undefined)
        throw new EdgewayError(
          'subnet_taken',
          `${formatCidr(prefix)} of node "${id}" overlaps ${formatCidr(other[1].prefix)} of node "${other[0]}"`,
        );
      const inside = all.find(([, peer]) => contains(prefix, peer.endpoint));
      if (inside !== undefined)
        throw new EdgewayError(
          'invalid_request',
          `${formatCidr(prefix)} of node "${id}" holds ${formatIpv4(inside[1].endpoint)}, where node "${inside[0]}" is reached: what carries packets cannot be carried itself`,
        );
      if (Object.hasOwn(peers, id)) checkClear(prefix, `node "${id}"`, found);
    }
  }

  async #changePeers(before: HostState, peers: Peers): Promise<void> {
    const node = this.#nodeOf(before);
    if (node.carrier === undefined)
      throw new EdgewayError('invalid_request', 'this node was set up without a carrier to other nodes');
    const after = { ...before, peers };
    const carried = await this.#observer.carried(node.carrier.device);
    await this.#change(before, after, planPeers(node, node.carrier, before, after, carried));
  }

  /** Journal first, then the host; when the plan fails and was undone, the journal goes back too. */
  async #change(
    before: HostState,
    after: HostState,
    plan: Plan,
    alsoUndo: () => Promise<void> = async () => {},
  ): Promise<void> {
    if (after !== before) await this.#save(after);
    const failure = await apply(this.#host, plan);
    if (failure === undefined) return;
    await alsoUndo();
    if (failure.undone && after !== before) await this.#save(before);
    throw failure.error;
  }

  #nodeOf(state: HostState): NodeState {
    if (state.node === undefined)
      throw new EdgewayError('not_registered', 'the node has no network yet: set it up first');
    return state.node;
  }

  async #foreignPrefixes(state: HostState): Promise<readonly Foreign[]> {
    const ours = new Set([this.#names.bridge, this.#names.tun, state.node?.carrier?.device]);
    for (const one of Object.values(state.attachments)) ours.add(one.hostInterface);
    return await this.#observer.prefixes((link) => ours.has(link));
  }

  async #observeNode(node: NodeState): Promise<Observed> {
    const observer = this.#observer;
    const [forward, links, carried, addresses, ipv6, tableExists, iptables] = await Promise.all([
      observer.sysctl('net/ipv4/ip_forward'),
      observer.links(),
      node.carrier === undefined ? [] : observer.carried(node.carrier.device),
      observer.addresses(),
      observer.hasIpv6(),
      observer.succeeds(['nft', 'list', 'table', 'inet', node.table]),
      this.#observeIptables(node.bridge),
    ]);
    if (forward === undefined)
      throw new EdgewayError('host_unsupported', 'this kernel has no net.ipv4.ip_forward');
    return {
      links: new Map(links.map((link) => [link.ifname, link.mtu])),
      carried,
      bridgeAddresses: addresses.get(node.bridge) ?? [],
      forward,
      ipv6,
      tableExists,
      iptables,
    };
  }

  async #observeIptables(bridge: string): Promise<Observed['iptables']> {
    const found = await this.#host.runner.run(
      `iptables -w 10 -C FORWARD -m comment --comment edgeway -j ${chainOf(bridge)}`.split(' '),
    );
    if (found.status === 0) return 'present';
    return found.status === 127 ? 'not-installed' : 'absent';
  }

  /** `identity` is empty for a namespace that is to be made. */
  async #netnsOf(
    target: AttachTarget,
  ): Promise<{ readonly path: string; readonly identity: string; readonly create: boolean }> {
    if (
      target.kind === 'netns' &&
      (!/^[a-zA-Z0-9_.-]{1,255}$/.test(target.name) || /^\.+$/.test(target.name))
    )
      throw new EdgewayError('invalid_request', `"${target.name}" is not a network namespace's name`);
    if (target.kind === 'pid' && !(Number.isInteger(target.pid) && target.pid > 0))
      throw new EdgewayError('invalid_request', `${target.pid} is not a process id`);
    const path = target.kind === 'netns' ? `${NETNS_DIR}/${target.name}` : `/proc/${target.pid}/ns/net`;
    const create = target.kind === 'netns' && target.create === true;
    const identity = await this.#observer.identity(path);
    if (identity === undefined && create) return { path, identity: '', create };
    if (identity === undefined)
      throw new EdgewayError(
        'namespace_unknown',
        target.kind === 'netns'
          ? `there is no network namespace "${target.name}" (${path})`
          : `there is no process ${target.pid}`,
      );
    if (identity === (await this.#observer.identity('/proc/self/ns/net')))
      throw new EdgewayError(
        'invalid_request',
        `${target.kind === 'pid' ? `process ${target.pid}` : `namespace "${target.name}"`} lives in the host's own network namespace: give it one of its own`,
      );
    return { path, identity, create };
  }

  /** The attachment is as the request wants it, on the host too, but for what can be changed in place. */
  async #holds(
    known: Attachment,
    request: AttachRequest,
    identity: string,
    bridge: string,
  ): Promise<boolean> {
    if (identity === '' || (!known.madeNetns && known.netnsId !== identity)) return false;
    if (known.namespaceIp !== request.namespaceIp) return false;
    if (formatCidr(known.subnet) !== formatCidr(request.subnet)) return false;
    const links = await this.#observer.links();
    if (!links.some((link) => link.ifname === known.hostInterface && link.master === bridge)) return false;
    const inside = (await this.#observer.addresses(known.netns)).get(known.inner) ?? [];
    if (!inside.includes(`${formatIpv4(known.namespaceIp)}/${known.subnet.bits}`)) return false;
    // Ours comes last, where there was none: without one, a crash came before it.
    if (!(await this.#observer.hasDefaultRoute(known.netns))) return false;
    if (request.resolvConf === undefined) return known.resolv === undefined;
    return known.resolv === undefined || (await this.#resolvIsOurs(request.id, known));
  }

  async #detach(id: string): Promise<void> {
    const state = await this.#load();
    const known = attachmentOf(state, id);
    if (known === undefined) return;
    await this.#save(await this.#remove(state, id, known));
  }

  /** Off the host, not out of the journal: answers what the journal is without it. */
  async #remove(state: HostState, id: string, known: Attachment): Promise<HostState> {
    const { [id]: _gone, ...attachments } = state.attachments;
    const after = { ...state, attachments };
    await clear(this.#host, planDetach(state.node, known, await this.#resolvIsOurs(id, known), after));
    return after;
  }

  async #resolvIsOurs(id: string, { resolv }: Attachment): Promise<boolean> {
    if (resolv === undefined) return false;
    return (await this.#host.files.read(resolv.path)) === resolvContent(id, resolv.nameserver);
  }

  /** Which file the instance reads, what it holds now. Undefined: none that is the instance's own. */
  async #resolvOf(request: AttachRequest): Promise<Attachment['resolv']> {
    if (request.resolvConf === undefined) return undefined;
    const { nameserver } = request.resolvConf;
    const { target } = request;
    let path: string;
    const made: string[] = [];
    if (request.container?.resolvConfPath !== undefined) path = request.container.resolvConfPath;
    else if (target.kind === 'netns') {
      for (const directory of [NETNS_ETC, `${NETNS_ETC}/${target.name}`])
        if ((await this.#observer.identity(directory)) === undefined) made.push(directory);
      path = `${NETNS_ETC}/${target.name}/resolv.conf`;
    } else {
      path = `/proc/${target.pid}/root/etc/resolv.conf`;
      const why = await this.#notItsOwn(target.pid, path);
      if (why !== undefined) {
        this.#host.log.warn({ file: path, reason: why }, 'resolv.conf of the process is left alone');
        return undefined;
      }
    }
    const current = await this.#host.files.read(path);
    // What an earlier environment of ours left behind is not worth restoring.
    const before = current?.startsWith('# edgeway: ') ? '' : current;
    return { path, nameserver, made, ...(before === undefined ? {} : { before }) };
  }

  /** A symbolic link would be followed from our root, not from the process's; the host's own file is not ours. */
  async #notItsOwn(pid: number, path: string): Promise<string | undefined> {
    if ((await this.#observer.kind(`/proc/${pid}/root/etc`)) !== 'directory')
      return 'it has no /etc directory';
    const kind = await this.#observer.kind(path);
    if (kind === 'symbolic link') return 'it is a symbolic link';
    const own = await this.#observer.identity(`/proc/${pid}/root/etc`);
    const file = await this.#observer.identity(path);
    if (file === undefined)
      return own === (await this.#observer.identity('/etc')) ? "it would be the host's own" : undefined;
    return file === (await this.#observer.identity('/etc/resolv.conf')) ? "it is the host's own" : undefined;
  }

  /** Only what still has the value that we gave it, and forwarding only while nobody else's rules rely on it. */
  async #restoreSysctls(state: HostState): Promise<void> {
    for (const [path, value] of Object.entries(state.sysctls)) {
      if ((await this.#observer.sysctl(path)) !== '1') continue;
      const reliant = path === 'net/ipv4/ip_forward' ? await this.#forwardsToo() : undefined;
      if (reliant !== undefined) {
        this.#host.log.info({ name: path, reason: reliant }, 'forwarding stays on');
        continue;
      }
      await clear(this.#host, [{ kind: 'sysctl', path, value }]);
    }
  }

  /** Who else has rules on this host that rely on forwarding. Our own are gone by now. */
  async #forwardsToo(): Promise<string | undefined> {
    if (await this.#observer.succeeds(['iptables', '-w', '10', '-S', 'DOCKER-USER']))
      return 'Docker relies on it';
    return (await this.#observer.tables()).some((table) => table !== this.#table)
      ? 'another Edgeway network of this host relies on it'
      : undefined;
  }

  /** iptables makes its base chains on first use; they go when no rule of anybody is in them. */
  async #dropEmptyFilterTable(): Promise<void> {
    const listed = await this.#host.runner.run(['nft', '-j', 'list', 'table', 'ip', 'filter']);
    if (listed.status !== 0 || listed.stdout.includes('"rule"') || /"policy":\s*"drop"/.test(listed.stdout))
      return;
    const chains = [...listed.stdout.matchAll(/"chain":\s*\{[^}]*"name":\s*"([^"]+)"/g)].map((one) => one[1]);
    if (chains.some((name) => name !== 'INPUT' && name !== 'FORWARD' && name !== 'OUTPUT')) return;
    await this.#host.runner.run(['nft', 'delete', 'table', 'ip', 'filter']);
  }
}

/** Own properties only: an id may be called like one that every object has. */
function attachmentOf(state: HostState, id: string): Attachment | undefined {
  return Object.hasOwn(state.attachments, id) ? state.attachments[id] : undefined;
}

function describe(target: AttachTarget): string {
  return target.kind === 'pid' ? `pid ${target.pid}` : `netns ${target.name}`;
}

/** Neither may the prefix reach into a network that the host is connected to, nor take the place of a route. A wider
 *  route, such as a VPN's, may stand beside it: the longer prefix wins. */
function checkClear(prefix: Cidr, whose: string, found: readonly Foreign[]): void {
  const other = found.find(
    (one) => overlaps(one.prefix, prefix) && (one.connected || one.prefix.bits >= prefix.bits),
  );
  if (other !== undefined)
    throw new EdgewayError(
      'subnet_taken',
      `${formatCidr(prefix)} of ${whose} overlaps ${formatCidr(other.prefix)}, which this host has on ${other.link}`,
    );
}

function attached(one: Attachment): Attached {
  return {
    hostInterface: one.hostInterface,
    interface: one.inner,
    ...(one.resolv === undefined ? {} : { resolvConf: one.resolv.path }),
  };
}

/** Without the keys whose value is undefined. */
function exact<T extends object>(value: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(value).filter(([, one]) => one !== undefined)) as {
    [K in keyof T]: Exclude<T[K], undefined>;
  };
}

function freeName(taken: readonly string[]): string {
  for (let n = 0; ; n++) if (!taken.includes(`eth${n}`)) return `eth${n}`;
}
