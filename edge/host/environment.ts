// The environment manager: the only hand that changes this host. Each method observes, plans (plan.ts), writes what
// it is about to change into the state file, and applies; all are idempotent and all-or-nothing, and run one at a
// time. It refuses to touch a link, namespace, rule or file that the state file does not name.
import { type Cidr, formatIpv4, type Ipv4, overlaps } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import type { Logger } from '../../src/log.ts';
import { DEFAULT_PLAN } from '../../src/plan.ts';
import type { Container, Files, Runner } from '../ports.ts';
import { apply, clear, type Host } from './apply.ts';
import { Observer } from './observe.ts';
import {
  type AttachState,
  chainOf,
  checkLinkName,
  iptablesClean,
  linkName,
  type Observed,
  type Plan,
  planAttach,
  planClean,
  planDetach,
  planNode,
  planTun,
  type ResolvState,
  resolvContent,
} from './plan.ts';
import { type Attachment, EMPTY_STATE, type HostState, loadState, saveState } from './state.ts';

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
  readonly services: Cidr;
  /** Default: the platform of the default plan. */
  readonly platform?: Cidr;
  /** Overlay MTU, bytes. */
  readonly mtu: number;
}

export type AttachTarget =
  | { readonly kind: 'netns'; readonly name: string }
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

const NETNS_DIR = '/run/netns';
const NETNS_ETC = '/etc/netns';

export class Environment {
  readonly #host: Host;
  readonly #observer: Observer;
  readonly #names: EnvironmentOptions['names'];
  readonly #table: string;
  readonly #statePath: string;
  #state: HostState | undefined;
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

  /** Bridge with the subnet's first address, forwarding, our nftables table, and room beside Docker's FORWARD policy. */
  setupNode(request: NodeRequest): Promise<void> {
    return this.#alone(async () => {
      const before = await this.#load();
      const platform = request.platform ?? DEFAULT_PLAN.platform;
      const node = { ...this.#names, table: this.#table, ...request, platform };
      const [observed, hadFilterTable] = await this.#observeNode(node);
      const touches = observed.forward !== '1' && !('net/ipv4/ip_forward' in before.sysctls);
      const madeTable = observed.iptables === 'absent' && !hadFilterTable;
      await this.#change(
        before,
        {
          ...before,
          node,
          sysctls: touches ? { ...before.sysctls, 'net/ipv4/ip_forward': observed.forward } : before.sysctls,
          filterTableIsOurs: before.filterTableIsOurs || madeTable,
        },
        planNode(node, observed),
        async () => {
          if (madeTable) await this.#dropEmptyFilterTable();
        },
      );
    });
  }

  /** Brings the packet loop's TUN device up and routes the service range to it. */
  attachTun(request: { readonly tun?: string; readonly services: Cidr }): Promise<void> {
    return this.#alone(async () => {
      const state = await this.#load();
      const node = this.#nodeOf(state);
      const tun = checkLinkName(request.tun ?? node.tun, 'TUN');
      const ipv6 = (await this.#observer.sysctl('net/ipv6/conf/all/disable_ipv6')) !== undefined;
      await this.#change(state, state, planTun(node, tun, request.services, ipv6));
    });
  }

  attach(request: AttachRequest): Promise<Attached> {
    return this.#alone(async () => {
      const state = await this.#load();
      const node = this.#nodeOf(state);
      const { path, identity } = await this.#netnsOf(request.target);
      const known = state.attachments[request.id];
      if (known !== undefined) {
        if (await this.#holds(known, request, identity, node.bridge)) return attached(known);
        await this.#detach(request.id);
      }
      const before = await this.#load();
      const links = await this.#observer.links(path);
      const resolv = await this.#resolvOf(request);
      const plan: AttachState = {
        id: request.id,
        netns: path,
        hostInterface: hostInterfaceOf(node.bridge, request.id),
        inner: freeName(links.map((link) => link.ifname)),
        namespaceIp: request.namespaceIp,
        subnet: request.subnet,
        platform: node.platform,
        bridge: node.bridge,
        mtu: request.mtu,
        hasDefault: await this.#observer.hasDefaultRoute(path),
        ipv6: (await this.#observer.sysctl('net/ipv6/conf/all/disable_ipv6')) !== undefined,
        ...(resolv === undefined ? {} : { resolv }),
      };
      const attachment: Attachment = {
        target: request.target.kind === 'pid' ? `pid ${request.target.pid}` : `netns ${request.target.name}`,
        netns: path,
        netnsId: identity,
        hostInterface: plan.hostInterface,
        inner: plan.inner,
        namespaceIp: request.namespaceIp,
        subnet: request.subnet,
        mtu: request.mtu,
        ...(resolv === undefined ? {} : { resolv: { ...resolv, made: [...resolv.made] } }),
      };
      await this.#change(
        before,
        { ...before, attachments: { ...before.attachments, [request.id]: attachment } },
        planAttach(plan),
      );
      return attached(attachment);
    });
  }

  /** Succeeds when the id, its link, namespace or process are gone. */
  detach(request: { readonly id: string }): Promise<void> {
    return this.#alone(() => this.#detach(request.id));
  }

  /** What is attached as far as the state file knows, also from before a crash. */
  attachments(): Promise<readonly (Attached & { readonly id: string; readonly namespaceIp: Ipv4 })[]> {
    return this.#alone(async () => {
      const state = await this.#load();
      return Object.entries(state.attachments).map(([id, one]) => ({
        id,
        namespaceIp: one.namespaceIp,
        ...attached(one),
      }));
    });
  }

  /** Removes everything of ours; works from the state file alone, and succeeds when things are gone. */
  cleanNode(): Promise<void> {
    return this.#alone(async () => {
      const state = await this.#load();
      for (const id of Object.keys(state.attachments)) await this.#detach(id);
      await clear(this.#host, planClean(state.node ?? { ...this.#names, table: this.#table }));
      await this.#restoreSysctls(state);
      if (state.filterTableIsOurs) await this.#dropEmptyFilterTable();
      await this.#save(EMPTY_STATE);
    });
  }

  /** The host's routes and addresses, our own devices left out: a node subnet must overlap none of them. */
  hostRoutes(): Promise<readonly Cidr[]> {
    return this.#alone(async () => this.#foreignPrefixes(await this.#load()));
  }

  // ---- inside the queue ----

  #alone<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#queue.then(work);
    this.#queue = turn.catch(() => {});
    return turn;
  }

  async #load(): Promise<HostState> {
    this.#state ??= await loadState(this.#host.files, this.#statePath);
    return this.#state;
  }

  async #save(state: HostState): Promise<void> {
    await saveState(this.#host.files, this.#statePath, state);
    this.#state = state;
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

  #nodeOf(state: HostState): NonNullable<HostState['node']> {
    if (state.node === undefined)
      throw new EdgewayError('not_registered', 'the node has no network yet: set it up first');
    return state.node;
  }

  async #foreignPrefixes(state: HostState): Promise<readonly Cidr[]> {
    const ours = new Set([this.#names.bridge, this.#names.tun]);
    for (const one of Object.values(state.attachments)) ours.add(one.hostInterface);
    return await this.#observer.prefixes((link) => ours.has(link));
  }

  async #observeNode(node: NonNullable<HostState['node']>): Promise<[Observed, boolean]> {
    const observer = this.#observer;
    const forward = await observer.sysctl('net/ipv4/ip_forward');
    if (forward === undefined)
      throw new EdgewayError('host_unsupported', 'this kernel has no net.ipv4.ip_forward');
    const addresses = await observer.addresses();
    const foreign = (await this.#foreignPrefixes(await this.#load())).filter(
      (cidr) => !overlaps(cidr, node.subnet) && !overlaps(cidr, node.services),
    );
    const hadFilterTable = await observer.succeeds(['nft', 'list', 'table', 'ip', 'filter']);
    return [
      {
        bridgeExists: (await observer.links()).some((link) => link.ifname === node.bridge),
        bridgeAddresses: addresses.get(node.bridge) ?? [],
        forward,
        ipv6: (await observer.sysctl('net/ipv6/conf/all/disable_ipv6')) !== undefined,
        tableExists: await observer.succeeds(['nft', 'list', 'table', 'inet', node.table]),
        iptables: await this.#observeIptables(node.bridge),
        foreign,
      },
      hadFilterTable,
    ];
  }

  async #observeIptables(bridge: string): Promise<Observed['iptables']> {
    const chain = chainOf(bridge);
    const found = await this.#host.runner.run(
      `iptables -w 10 -C FORWARD -m comment --comment edgeway -j ${chain}`.split(' '),
    );
    if (found.status === 0) return 'present';
    if (found.status === 127) return 'not-installed';
    // The chain without its jump: somebody flushed FORWARD.
    await clear(this.#host, iptablesClean(bridge));
    return 'absent';
  }

  async #netnsOf(target: AttachTarget): Promise<{ path: string; identity: string }> {
    if (target.kind === 'netns' && !/^[a-zA-Z0-9_.-]{1,255}$/.test(target.name))
      throw new EdgewayError('invalid_request', `"${target.name}" is not a network namespace's name`);
    if (target.kind === 'pid' && !(Number.isInteger(target.pid) && target.pid > 0))
      throw new EdgewayError('invalid_request', `${target.pid} is not a process id`);
    const path = target.kind === 'netns' ? `${NETNS_DIR}/${target.name}` : `/proc/${target.pid}/ns/net`;
    const identity = await this.#observer.identity(path);
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
    return { path, identity };
  }

  /** The attachment is as the request wants it, on the host too. */
  async #holds(
    known: Attachment,
    request: AttachRequest,
    identity: string,
    bridge: string,
  ): Promise<boolean> {
    if (known.netnsId !== identity || known.namespaceIp !== request.namespaceIp || known.mtu !== request.mtu)
      return false;
    if (known.subnet.base !== request.subnet.base || known.subnet.bits !== request.subnet.bits) return false;
    const links = await this.#observer.links();
    if (!links.some((link) => link.ifname === known.hostInterface && link.master === bridge)) return false;
    const inside = (await this.#observer.addresses(known.netns)).get(known.inner) ?? [];
    if (!inside.includes(`${formatIpv4(known.namespaceIp)}/${known.subnet.bits}`)) return false;
    if (request.resolvConf === undefined) return known.resolv === undefined;
    return known.resolv === undefined || (await this.#resolvIsOurs(request.id, known));
  }

  async #detach(id: string): Promise<void> {
    const state = await this.#load();
    const known = state.attachments[id];
    if (known === undefined) return;
    await clear(this.#host, planDetach(known, await this.#resolvIsOurs(id, known)));
    const { [id]: _gone, ...attachments } = state.attachments;
    await this.#save({ ...state, attachments });
  }

  async #resolvIsOurs(id: string, { resolv }: Attachment): Promise<boolean> {
    if (resolv === undefined) return false;
    return (await this.#host.files.read(resolv.path)) === resolvContent(id, resolv.nameserver);
  }

  /** Which file the instance reads, what it holds now. Undefined: none that is the instance's own. */
  async #resolvOf(request: AttachRequest): Promise<ResolvState | undefined> {
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
      if (path === 'net/ipv4/ip_forward' && (await this.#dockerForwards())) {
        this.#host.log.info({ name: path }, 'forwarding stays on: Docker relies on it');
        continue;
      }
      await clear(this.#host, [{ kind: 'sysctl', path, value }]);
    }
  }

  #dockerForwards(): Promise<boolean> {
    return this.#observer.succeeds(['iptables', '-w', '10', '-S', 'DOCKER-USER']);
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

function attached(one: Attachment): Attached {
  return {
    hostInterface: one.hostInterface,
    interface: one.inner,
    ...(one.resolv === undefined ? {} : { resolvConf: one.resolv.path }),
  };
}

/** `ew` and a hash of bridge and id: two environments on one host never meet. */
function hostInterfaceOf(bridge: string, id: string): string {
  return linkName('ew', `${bridge}/${id}`);
}

function freeName(taken: readonly string[]): string {
  for (let n = 0; ; n++) if (!taken.includes(`eth${n}`)) return `eth${n}`;
}
