// The agent's shell: turns requests of the API into claims, host changes and keys, in that order, and takes back what
// was done when a later step fails. It decides no policy and no packet. Requests run one at a time; whatever they
// write comes back through the watch, and an answer waits until this node's own table has it.
import { Buffer } from 'node:buffer';
import {
  applyService,
  checkClaim,
  claimInstance,
  claimSubnet,
  deleteService,
  ensureConfig,
  ensureService,
  publishInstance,
  publishNode,
  releaseInstance,
  releaseSubnet,
  type SubnetClaim,
} from '../coordinator/claims.ts';
import { serviceFaults } from '../coordinator/faults.ts';
import type { Kv, LeaseId } from '../coordinator/kv.ts';
import { keepLease, type LeaseKeeper } from '../coordinator/lease.ts';
import { type Cidr, formatCidr, formatIpv4, type Ipv4, parseIpv4 } from '../src/addr.ts';
import { EdgewayError, type ErrorCode, toEdgewayError, unwrap } from '../src/error.ts';
import { explainInWords } from '../src/explain.ts';
import type { Keys } from '../src/keys.ts';
import * as limits from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import { bareDescriptor, type Instance, type NetworkConfig, portNumbers } from '../src/model.ts';
import { parseName, type ServiceId } from '../src/name.ts';
import { layoutOf, subnetIndex } from '../src/plan.ts';
import { decodeCoordinate, encodeCoordinate, type ParsedDescriptor } from '../src/records.ts';
import type {
  Change,
  ExplainView,
  InstanceView,
  Listing,
  NodeControl,
  NodeView,
  ServiceView,
} from './api/app.ts';
import { type DeployRequest, parseSubnetwork, type Target } from './api/schema.ts';
import { Calls } from './calls.ts';
import type { AgentConfig } from './config.ts';
import type { Environment, NodeRequest } from './host/environment.ts';
import { NamespaceAddresses } from './ipam.ts';
import { LoopKeeper } from './loop_keeper.ts';
import { INGRESS, NorthSouth } from './north_south.ts';
import type { Clock, Container, ContainerEngine, Files, StartPacketLoop, Timers, Vitals } from './ports.ts';
import { projectLocal, projectService } from './project.ts';
import type { ProxyConfig, ProxyReport } from './proxy/command.ts';
import type { RouteFollower, RouteSubtree } from './routes/follow.ts';
import { encodeSnapshot } from './routes/snapshot.ts';
import type { RouteDelta, RouteTable } from './routes/table.ts';
import { decodeState, encodeState, type Hosted, type Leaving, type SavedState } from './state.ts';
import { type Position, Steering } from './steering.ts';
import { Undo } from './undo.ts';
import { viewExplanation, viewInstance, viewNode, viewProblems, viewService } from './view.ts';

/** A name server of this node, running. */
export interface NameServer {
  /** Tells those who listen that services changed. */
  changed(delta: RouteDelta): void;
  counters(): Readonly<Record<string, number>>;
  stop(): Promise<void>;
}

export type NeedsOf = (source: Ipv4) => readonly ServiceId[] | undefined;

/** Everything that touches the world, handed in by compose.ts. */
export interface AgentParts {
  readonly config: AgentConfig;
  readonly nodeIp: Ipv4;
  /** That address is a NAT's. */
  readonly nat: boolean;
  /** Wanted for a network that does not exist yet. */
  readonly network: NetworkConfig;
  readonly kv: Kv;
  readonly keys: Keys;
  readonly table: RouteTable;
  readonly routes: RouteFollower;
  /** Follows everything, for those who list or watch more than this node is interested in; to be closed after use. */
  readonly openAll: (subtrees?: readonly RouteSubtree[]) => RouteFollower;
  readonly environment: Pick<
    Environment,
    'hostRoutes' | 'setupNode' | 'attachTun' | 'attach' | 'detach' | 'expose' | 'cleanNode'
  >;
  /** Where etcd is: nothing for instances. */
  readonly stores: NonNullable<NodeRequest['stores']>;
  readonly engine: ContainerEngine;
  readonly files: Files;
  readonly clock: Clock;
  readonly timers: Timers;
  readonly log: Logger;
  /** 0…1, uniform. */
  readonly random: () => number;
  /** Unpredictable unsigned 32-bit integers. */
  readonly nonce: () => number;
  readonly vitals: Vitals;
  readonly startLoop: StartPacketLoop;
  /** Starts DNS and mDNS on the bridge of that subnet. `needsOf`: services that an asker may know; undefined = any. */
  readonly startNames: (
    subnet: Cidr,
    needsOf: NeedsOf,
    network: Pick<NetworkConfig, 'plan' | 'mtu'>,
  ) => Promise<NameServer>;
  readonly runtime: string;
  readonly version: string;
}

/** What a registered node holds. */
interface Registered {
  readonly network: NetworkConfig;
  readonly claim: SubnetClaim;
  readonly addresses: NamespaceAddresses;
  readonly loop: LoopKeeper;
  readonly names: NameServer;
  readonly presence: LeaseKeeper;
  readonly tenure: LeaseKeeper;
  readonly steering: Steering;
  readonly calls: Calls;
  readonly northSouth: NorthSouth;
}

/** Pause before what could not be taken away is tried again. */
const LEAVE_RETRY_MS = 5_000;
/** Choices that `explain` shows. */
const CHOICES_SHOWN = 20;

/** Reasons why a hosted instance cannot be attached now and may be later. */
const MAY_STILL_COME: ReadonlySet<ErrorCode> = new Set([
  'docker_unavailable',
  'container_not_running',
  'coordination_unavailable',
  'timeout',
]);
const RESUME_RETRY_MS = 5_000;

/** What comes back by itself when etcd does. */
const MAY_PASS: ReadonlySet<ErrorCode> = new Set(['coordination_unavailable', 'timeout', 'conflict']);

/** How the keyspace says that what this node held may be another's. */
const CLAIM_LOST: ReadonlySet<ErrorCode> = new Set(['lease_lost', 'conflict']);

const hostedKey = (service: ServiceId, instance: number): string => `${service}/${instance}`;

export class Agent implements NodeControl {
  readonly #parts: AgentParts;
  readonly #log: Logger;
  readonly #statePath: string;
  readonly #hosted = new Map<string, Hosted>();
  /** No longer hosted, and not yet gone from the keyspace and the host; outlives a restart. */
  readonly #leaving = new Map<string, Leaving>();
  #leaveArmed = false;
  #registered: Registered | undefined;
  #queue: Promise<unknown> = Promise.resolve();
  #stopping = false;
  /** Hosted by the last run and not yet attached again. */
  #resuming: Hosted[] = [];
  /** True from a start without etcd until presence is held again. */
  #alonePhase = false;
  #rejoining = false;
  #routesDirty = false;
  /** What stands for this node's own packets on the wire, once it publishes ports. */
  #ingress: Instance | undefined;
  /** As last published; goes into the node's record whenever that is written. */
  #position: Position | undefined;
  /** Wall time at which etcd last confirmed the tenure; what age the saved claim has after a restart. */
  #tenureMs: number | undefined;

  constructor(parts: AgentParts) {
    this.#parts = parts;
    this.#log = parts.log;
    this.#statePath = `${parts.config.dataDir}/agent.json`;
    parts.routes.onDelta((delta) => {
      this.#routesChanged(delta);
      this.#saveRoutes();
    });
  }

  /** Keeps what is followed on disk, not more often than every few seconds. */
  #saveRoutes(): void {
    if (this.#routesDirty) return;
    this.#routesDirty = true;
    this.#parts.timers.after(limits.SNAPSHOT_INTERVAL_MS, () => {
      this.#routesDirty = false;
      if (!this.#stopping) void this.#writeRoutes();
    });
  }

  async #writeRoutes(): Promise<void> {
    const { files, table, keys, config } = this.#parts;
    if (!table.synced) return;
    await files
      .write(`${config.dataDir}/routes.json`, encodeSnapshot(table, keys))
      .catch((thrown: unknown) => this.#warn('the routes are not saved', thrown));
  }

  // ---- life ----

  /** Goes on where the last run ended: the same subnet, and the instances that are still there. */
  async restore(): Promise<void> {
    const saved = await this.#readState();
    const { register } = this.#parts.config;
    if (saved === undefined) {
      // What a killed agent left behind on the host, without a state file to go on from.
      await this.#parts.environment.cleanNode();
      if (register.kind === 'wait') return;
      await this.register(register.kind === 'exact' ? formatCidr(register.subnet) : undefined);
      return;
    }
    const kept = formatCidr(saved.subnet);
    this.#log.info({ subnet: kept, count: saved.hosted.length }, 'resuming');
    if (register.kind === 'exact' && formatCidr(register.subnet) !== kept)
      this.#log.warn(
        { subnet: kept },
        `a node keeps its subnet: --register ${formatCidr(register.subnet)} counts for a new data directory`,
      );
    this.#resuming = [...saved.hosted];
    for (const left of saved.leaving ?? []) this.#leaving.set(hostedKey(left.service, left.instance), left);
    await this.#registerAnew(kept, saved);
    await this.#resume();
  }

  /** The subnet that this node had, or another when somebody else has it by now. */
  async #registerAnew(kept: string, saved?: SavedState): Promise<void> {
    try {
      await this.#register(kept, saved);
    } catch (thrown) {
      const { register } = this.#parts.config;
      // New namespace addresses come with a new subnet.
      if (toEdgewayError(thrown).code !== 'subnet_taken' || register.kind === 'exact') throw thrown;
      this.#warn(`${kept} is not this node's any more`, thrown);
      await this.#register(undefined);
    }
  }

  /** Attaches again what the last run hosted; what may still come (an engine that starts later) is tried again. */
  async #resume(): Promise<void> {
    const waiting: Hosted[] = [];
    for (const hosted of this.#resuming) {
      try {
        await this.#deployAlone(hosted, hosted);
      } catch (thrown) {
        const { code, message } = toEdgewayError(thrown);
        const { service, instance } = hosted;
        if (MAY_STILL_COME.has(code)) waiting.push(hosted);
        else this.#leaving.set(hostedKey(service, instance), hosted);
        this.#log.warn({ service, instance, code, error: message }, 'instance is not resumed');
      }
    }
    // An undeploy may have come in between: it is not brought back.
    this.#resuming = waiting.filter((hosted) => this.#resuming.includes(hosted));
    this.#registered?.steering.resumed();
    await this.#alone(() => this.#writeState());
    this.#leaveSoon(0);
    if (this.#resuming.length > 0 && !this.#stopping)
      this.#parts.timers.after(RESUME_RETRY_MS, () => void this.#resume());
  }

  /** Leaves the host as it was found. Addresses stay claimed until tenure ends, so that a restart finds them. */
  stop(): Promise<void> {
    this.#stopping = true;
    return this.#alone(async () => {
      const node = this.#registered;
      this.#registered = undefined;
      await this.#writeRoutes();
      if (node !== undefined) await this.#close(node);
    });
  }

  // ---- NodeControl ----

  async register(subnetwork: string | undefined): Promise<{ subnetwork: string }> {
    const answer = await this.#register(subnetwork);
    // A registration by hand, after the one at the start had failed.
    if (this.#resuming.length > 0) void this.#resume();
    return answer;
  }

  #register(subnetwork: string | undefined, saved?: SavedState): Promise<{ subnetwork: string }> {
    return this.#alone(async () => {
      const held = this.#registered;
      if (held === undefined) {
        const { claim } = await this.#join(subnetwork, saved);
        await this.#writeState();
        return { subnetwork: formatCidr(claim.subnet) };
      }
      const wanted =
        subnetwork === undefined
          ? held.claim.subnet
          : unwrap(parseSubnetwork(subnetwork, held.network.plan.nodeBits));
      if (formatCidr(wanted) !== formatCidr(held.claim.subnet))
        throw new EdgewayError(
          'already_registered',
          `this node holds ${formatCidr(held.claim.subnet)} and was asked to register ${formatCidr(wanted)}: a node keeps its subnet`,
        );
      return { subnetwork: formatCidr(held.claim.subnet) };
    });
  }

  async deploy(request: DeployRequest): Promise<InstanceView> {
    refuseReserved(request.service);
    return viewInstance(await this.#deployAlone(request, undefined));
  }

  undeploy(service: ServiceId, instance: number | undefined): Promise<void> {
    return this.#alone(async () => {
      const node = this.#node();
      const isMeant = (one: Leaving): boolean =>
        one.service === service && (instance === undefined || one.instance === instance);
      for (const one of this.#resuming)
        if (isMeant(one)) this.#leaving.set(hostedKey(service, one.instance), one);
      this.#resuming = this.#resuming.filter((one) => !isMeant(one));
      for (const hosted of [...this.#hosted.values()]) if (isMeant(hosted)) this.#dismiss(node, hosted);
      await this.#writeState();
      for (const left of [...this.#leaving.values()]) if (isMeant(left)) await this.#leave(node, left);
    });
  }

  apply({ id, descriptor }: ParsedDescriptor): Promise<ServiceView> {
    refuseReserved(id);
    return this.#alone(async () => {
      const { kv, keys, network, routes, table } = this.#parts;
      const config = this.#registered?.network ?? (await ensureConfig(kv, keys, network));
      const { service, revision } = await applyService(kv, keys, config, descriptor);
      await this.#known(service.id);
      await routes.waitFor(revision, limits.READ_YOUR_WRITES_MS, service.id);
      return viewService(service, table.instancesOf(service.id).length);
    });
  }

  deleteService(service: ServiceId): Promise<void> {
    return this.#alone(async () => {
      const { kv, keys, routes } = this.#parts;
      const config = this.#registered?.network ?? (await ensureConfig(kv, keys, this.#parts.network));
      await this.#known(service);
      const revision = await deleteService(kv, keys, config, service);
      await routes.waitFor(revision, limits.READ_YOUR_WRITES_MS, service);
    });
  }

  async nodes(): Promise<Listing<NodeView>> {
    const { keys } = this.#parts;
    const { table, problems } = await this.#everything('nodes');
    const items = [...table.nodes()].map(viewNode).sort((a, b) => a.node.localeCompare(b.node));
    return { items, problems: viewProblems(problems, keys.prefix('nodes')) };
  }

  async services(): Promise<Listing<ServiceView>> {
    const { kv, keys } = this.#parts;
    const { table, problems } = await this.#everything('services', 'instances');
    // With etcd away the listing is what this node knows.
    const faults = await serviceFaults(kv, keys, table.services()).catch(() => []);
    const items = [...table.services()]
      .map((service) => viewService(service, table.instancesOf(service.id).length))
      .sort((a, b) => a.service.localeCompare(b.service));
    const refused = [...(this.#registered?.northSouth.refused() ?? [])].map(
      ([service, error]): [string, EdgewayError] => [keys.build({ kind: 'service', service }), error],
    );
    const all = new Map([...refused, ...problems, ...faults]);
    return { items, problems: viewProblems(all, keys.prefix('services')) };
  }

  async instances(): Promise<Listing<InstanceView>> {
    const { keys } = this.#parts;
    const { table, problems } = await this.#everything('instances');
    const items = [...table.instances()]
      .map(viewInstance)
      .sort((a, b) => a.service.localeCompare(b.service) || a.instance - b.instance);
    return { items, problems: viewProblems(problems, keys.prefix('instances')) };
  }

  async resolve(text: string): Promise<{ name: string; address: string; instances: InstanceView[] }> {
    const { table } = this.#parts;
    const words = (): string | undefined =>
      explainInWords(
        text,
        [...table.services()].map((service) => service.id),
      );
    const parsed = parseName(text);
    if (!parsed.ok) throw new EdgewayError(parsed.error.code, words() ?? parsed.error.message);
    const name = parsed.value;
    await this.#known(name.service);
    if (!table.synced)
      throw new EdgewayError(
        'coordination_unavailable',
        `"${text}": this node has not yet seen the keyspace`,
      );
    if ('instance' in name) {
      const instance = table.instance(name.service, name.instance);
      if (instance === undefined)
        throw new EdgewayError(
          'not_found',
          `"${text}": service ${name.service} has no instance ${name.instance} now`,
        );
      return { name: text, address: formatIpv4(instance.instanceIp), instances: [viewInstance(instance)] };
    }
    const address = table.service(name.service)?.addresses[name.policy];
    if (address === undefined)
      throw new EdgewayError(
        'not_found',
        words() ?? `"${text}": no service ${name.service} with a ${name.policy} address`,
      );
    return {
      name: text,
      address: formatIpv4(address),
      instances: table.instancesOf(name.service).map(viewInstance),
    };
  }

  status() {
    const { config, nodeIp, routes, table, runtime, version } = this.#parts;
    const node = this.#registered;
    return {
      node: config.node,
      cluster: config.cluster,
      nodeIp: formatIpv4(nodeIp),
      ewp: config.ewp,
      subnet: node === undefined ? null : formatCidr(node.claim.subnet),
      etcd: routes.live ? ('live' as const) : ('away' as const),
      revision: table.revision,
      instances: this.#hosted.size,
      flows: node?.loop.flows() ?? 0,
      runtime,
      version,
    };
  }

  /** Why this node serves nobody although it should; undefined when all is well. */
  ailment(): string | undefined {
    return this.#registered?.loop.down;
  }

  counters(): Readonly<Record<string, number>> {
    const node = this.#registered;
    if (node === undefined) return {};
    const chosen = [...node.steering.chosen()].map(([what, count]) => [`chosen_${what}`, count]);
    return {
      ...node.loop.counters(),
      ...node.names.counters(),
      ...node.steering.counters(),
      ...Object.fromEntries(chosen),
    };
  }

  async explain(text: string): Promise<ExplainView> {
    const { table } = this.#parts;
    const { steering } = this.#node();
    const address = parseIpv4(text);
    if (address.ok) await this.#parts.routes.askAddress(address.value);
    const name = address.ok ? table.nameOf(address.value) : unwrap(parseName(text));
    if (name === undefined)
      throw new EdgewayError('not_found', `${text}: no service or instance that this node knows has it`);
    await this.#known(name.service);
    const policy = 'policy' in name ? name.policy : 'roundrobin';
    const explanation = steering.explain(name.service, policy);
    const service = table.service(name.service);
    if (explanation === undefined || (service === undefined && table.instancesOf(name.service).length === 0))
      throw new EdgewayError('not_found', `"${text}": this node knows no service ${name.service}`);
    return viewExplanation(name, service, explanation, {
      healthOf: (instance) => steering.health(hostedKey(name.service, instance))?.why,
      addressOf: (instance) => table.instance(name.service, instance)?.instanceIp,
      choices: steering.choices(name.service).slice(-CHOICES_SHOWN),
    });
  }

  async watch(listener: (change: Change) => void): Promise<() => void> {
    const own = this.#parts.routes;
    const routes = own.interests === undefined || !own.live ? own : this.#parts.openAll();
    const close = (): void => {
      if (routes !== own) void routes.close();
    };
    const { table } = routes;
    await routes.synced(limits.READ_YOUR_WRITES_MS).catch((thrown: unknown) => {
      close();
      throw thrown;
    });
    const end = routes.onDelta((delta) => {
      for (const id of delta.services) {
        const service = table.service(id);
        const instances = table.instancesOf(id);
        listener({
          kind: 'service',
          name: id,
          service: service === undefined ? null : viewService(service, instances.length),
          instances: instances.map(viewInstance),
        });
      }
      for (const id of delta.nodes) {
        const node = table.node(id);
        listener({ kind: 'node', name: id, node: node === undefined ? null : viewNode(node) });
      }
    });
    return () => {
      end();
      close();
    };
  }

  /** The whole platform: this node's own table when it follows everything or etcd is away, else a fresh listing. */
  async #everything(
    ...subtrees: readonly RouteSubtree[]
  ): Promise<Pick<RouteFollower, 'table' | 'problems'>> {
    const { routes } = this.#parts;
    if (routes.interests === undefined || !routes.live) return routes;
    const all = this.#parts.openAll(subtrees);
    try {
      await all.synced(limits.READ_YOUR_WRITES_MS);
      return { table: all.table, problems: new Map(all.problems) };
    } finally {
      await all.close();
    }
  }

  /** Follows a service and waits, not for long, until the table can say whether there is one. */
  async #known(service: ServiceId): Promise<void> {
    const { routes, timers } = this.#parts;
    const told = routes.ask(service);
    if (told === undefined) return;
    let cancel = (): void => {};
    const late = new Promise<void>((resolve) => {
      cancel = timers.after(limits.DNS_LOOKUP_WAIT_MS, resolve);
    });
    await Promise.race([told, late]);
    cancel();
  }

  /** What the instances here are and declare to need is followed for as long as they run. */
  #pin(): void {
    const { routes, table } = this.#parts;
    const services = new Set<ServiceId>();
    for (const { service } of this.#hosted.values()) {
      services.add(service);
      for (const need of table.service(service)?.descriptor.needs ?? []) services.add(need);
    }
    routes.pin(services);
  }

  // ---- joining ----

  #join(subnetwork: string | undefined, saved?: SavedState): Promise<Registered> {
    return Undo.guard(this.#log, async (undo) => {
      const { config, kv, keys, environment, nodeIp, clock, timers } = this.#parts;
      const kept = await this.#keptIfAway(saved);
      const network = kept?.network ?? (await ensureConfig(kv, keys, this.#parts.network));
      const { plan, mtu } = network;
      const exact = subnetwork === undefined ? undefined : unwrap(parseSubnetwork(subnetwork, plan.nodeBits));
      const owner = { node: config.node, cluster: config.cluster, nodeIp };
      const avoid = await environment.hostRoutes();
      const claim =
        kept?.claim ??
        (await claimSubnet(kv, keys, network, owner, {
          avoid,
          ...(exact === undefined ? {} : { exact }),
        }));
      if (kept === undefined)
        undo.push('subnet claim', () => releaseSubnet(kv, keys, network, owner, claim.subnet));
      for (const route of avoid) this.#log.debug({ address: formatCidr(route) }, 'host route, kept clear of');

      undo.push('host network', () => environment.cleanNode());
      await environment.setupNode({
        subnet: claim.subnet,
        services: plan.services,
        platform: plan.platform,
        mtu,
        tunnelPort: config.ewp,
        stores: this.#parts.stores,
      });

      const loopConfig: ProxyConfig = {
        tun: config.tun,
        mtu,
        vni: network.vni,
        nodeIp,
        ewp: config.ewp,
        servicesBase: plan.services.base,
        servicesBits: plan.services.bits,
        subnetBase: claim.subnet.base,
        subnetBits: claim.subnet.bits,
        flowsMax: limits.FLOWS_MAX,
        flowsFile: `${config.dataDir}/flows`,
        seed: this.#seed(),
        ...(network.secret === undefined
          ? {}
          : { secret: new Uint8Array(Buffer.from(network.secret, 'hex')) }),
      };
      const attachTun = () => environment.attachTun({ services: plan.services });
      const loop = await LoopKeeper.start({
        start: (report) => this.#parts.startLoop(loopConfig, report),
        report: (report) => this.#loopReported(report),
        restarted: async () => {
          await attachTun();
          if (this.#registered !== undefined) this.#tellLoop(this.#registered);
        },
        timers,
        log: this.#log,
      });
      undo.push('packet loop', () => loop.stop());
      await attachTun();

      const names = await this.#parts.startNames(claim.subnet, (source) => this.#needsOf(source), network);
      undo.push('names', () => names.stop());

      const time = { monotonicMs: () => clock.monotonicMs(), after: timers.after };
      const lease = { kv, time, random: this.#parts.random, log: this.#log };
      const tenure = keepLease({
        ...lease,
        ttlS: network.tenureTtlS,
        resume: claim.lease,
        onHeld: async (held) => {
          await this.#renewTenure(held, claim, network);
          this.#tenureConfirmed();
        },
        onRenewed: () => this.#tenureConfirmed(),
      });
      undo.push('tenure', () => tenure.stop(false));
      const presence = keepLease({
        ...lease,
        ttlS: network.presenceTtlS,
        onHeld: async (held) => {
          try {
            await this.#publishAll(held, claim);
          } catch (thrown) {
            // The subnet may be what is lost, and then no other lease would help.
            if (CLAIM_LOST.has(toEdgewayError(thrown).code) && !(await this.#checkClaim(claim))) return;
            throw thrown;
          }
          if (!this.#alonePhase) return;
          this.#alonePhase = false;
          this.#log.info({}, 'etcd is back: published what went on without it');
        },
      });
      undo.push('presence', () => presence.stop(kept === undefined));
      this.#alonePhase = kept !== undefined;
      if (kept === undefined) await this.#publishNode(await presence.held(limits.READ_YOUR_WRITES_MS), claim);
      const steering = await this.#steer(network, claim, loop, presence);
      undo.push('steering', async () => steering.stop());
      const calls = new Calls({
        ...{ kv, keys, node: config.node, cluster: config.cluster, routes: this.#parts.routes, presence },
        send: (command) => loop.send(command),
        timers,
        log: this.#log,
      });
      undo.push('calls', async () => calls.stop());
      const northSouth = new NorthSouth({
        table: this.#parts.table,
        node: config.node,
        environment,
        isUp: ({ namespaceIp }) => steering.isUp(namespaceIp),
        openIngress: () => this.#openIngress(network, claim, loop, tenure, presence),
        timers,
        log: this.#log,
      });
      undo.push('published ports', () => northSouth.stop());

      const node: Registered = {
        network,
        claim,
        addresses: new NamespaceAddresses(claim.subnet, network.quarantineS * 1000, saved?.nextAddress),
        loop,
        names,
        presence,
        tenure,
        steering,
        calls,
        northSouth,
      };
      this.#registered = node;
      this.#tellLoop(node);
      names.changed({
        services: new Set([...this.#parts.table.services()].map(({ id }) => id)),
        nodes: new Set(),
      });
      steering.start(this.#resuming.length > 0);
      calls.update();
      northSouth.update();
      this.#watchClaim(node);
      this.#log.info({ node: config.node, subnet: formatCidr(claim.subnet) }, 'registered');
      return node;
    });
  }

  /**
   * What the last run held, when etcd does not answer soon: enough to go on with. Claims are not made then; they are
   * looked at again when etcd is back.
   */
  async #keptIfAway(
    saved: SavedState | undefined,
  ): Promise<{ network: NetworkConfig; claim: SubnetClaim } | undefined> {
    if (saved?.claim === undefined || saved.network === undefined) return undefined;
    const { kv, keys, timers, clock } = this.#parts;
    const ageMs = clock.wallMs() - (saved.tenureMs ?? clock.wallMs());
    // Somebody else may hold by now what this node held.
    if (ageMs >= saved.network.tenureTtlS * 1000) return undefined;
    let cancel = (): void => {};
    const late = new Promise<boolean>((resolve) => {
      cancel = timers.after(limits.AWAY_AFTER_MS, () => resolve(false));
    });
    const there = kv.get(keys.build({ kind: 'config' })).then(
      () => true,
      (thrown: unknown) => toEdgewayError(thrown).code !== 'coordination_unavailable',
    );
    const answered = await Promise.race([there, late]);
    cancel();
    if (answered) return undefined;
    this.#log.warn(
      { subnet: formatCidr(saved.subnet) },
      'etcd does not answer: going on with what the last run held',
    );
    return { network: saved.network, claim: { subnet: saved.subnet, ...saved.claim } };
  }

  /** Moves the node's claims to a new tenure lease, or joins anew when they are no longer its own. */
  async #renewTenure(lease: LeaseId, claim: SubnetClaim, network: NetworkConfig): Promise<void> {
    if (lease === claim.lease) return;
    const { kv, keys, config, nodeIp } = this.#parts;
    const owner = { node: config.node, cluster: config.cluster, nodeIp };
    try {
      const again = await claimSubnet(kv, keys, network, owner, { exact: claim.subnet, lease });
      if (again.epoch !== claim.epoch) throw new EdgewayError('lease_lost', 'the subnet was free meanwhile');
      const holding = this.#ingress === undefined ? [] : [this.#ingress];
      for (const { service, instance, instanceIp } of [...this.#hosted.values(), ...holding]) {
        const wish = {
          service,
          instance,
          node: config.node,
          lease,
          preferred: instanceIp,
          ...this.#within(),
        };
        const held = await claimInstance(kv, keys, network, wish);
        if (held.instanceIp !== instanceIp)
          throw new EdgewayError('lease_lost', `${formatIpv4(instanceIp)} has another holder`);
      }
    } catch (thrown) {
      const error = toEdgewayError(thrown);
      if (error.code !== 'lease_lost' && error.code !== 'subnet_taken') throw thrown;
      void this.#rejoin(error, claim.subnet);
    }
  }

  #within(): { within?: Cidr } {
    const { instanceIps } = this.#parts.config;
    return instanceIps === undefined ? {} : { within: instanceIps };
  }

  /** Tenure ended while nobody renewed it: everything that hung on it is claimed anew, and instances attached again. */
  async #rejoin(why: EdgewayError, lost: Cidr): Promise<void> {
    if (this.#rejoining || this.#stopping) return;
    this.#rejoining = true;
    this.#log.error({ code: why.code, error: why.message }, 'this node lost its claims: joining anew');
    await this.#alone(async () => {
      const node = this.#registered;
      this.#registered = undefined;
      this.#ingress = undefined;
      this.#resuming = [...this.#hosted.values(), ...this.#resuming];
      this.#hosted.clear();
      if (node !== undefined) await this.#close(node);
    }).catch((thrown: unknown) => this.#warn('not left cleanly', thrown));
    const again = async (): Promise<void> => {
      if (this.#stopping) return;
      try {
        await this.#registerAnew(formatCidr(lost));
        this.#rejoining = false;
        await this.#resume();
      } catch (thrown) {
        this.#warn('not joined yet', thrown);
        this.#parts.timers.after(RESUME_RETRY_MS, () => void again());
      }
    };
    await again();
  }

  /** Whether subnet and node id are still this host's; when one is not, the node joins anew. */
  async #checkClaim({ subnet, epoch }: SubnetClaim): Promise<boolean> {
    const { kv, keys, config, nodeIp } = this.#parts;
    const { node, cluster } = config;
    try {
      await checkClaim(kv, keys, { node, cluster, nodeIp, subnet, epoch });
      return true;
    } catch (thrown) {
      const error = toEdgewayError(thrown);
      if (!CLAIM_LOST.has(error.code)) throw thrown;
      void this.#rejoin(error, subnet);
      return false;
    }
  }

  /** A claim can vanish while both leases live: deleted by hand, or with an etcd that was restored from an old copy. */
  #watchClaim(node: Registered): void {
    this.#parts.timers.after(limits.CLAIM_CHECK_MS, () => {
      if (this.#registered !== node || this.#stopping) return;
      const checked = this.#alonePhase ? Promise.resolve(true) : this.#checkClaim(node.claim);
      // Away is no answer.
      checked.catch(() => true).then((held) => held && this.#watchClaim(node));
    });
  }

  #tenureConfirmed(): void {
    this.#tenureMs = this.#parts.clock.wallMs();
    void this.#writeState().catch((thrown: unknown) => this.#warn('the state is not saved', thrown));
  }

  async #close(node: Registered): Promise<void> {
    await node.northSouth.stop();
    node.steering.stop();
    node.calls.stop();
    await node.presence.stop(true).catch((thrown: unknown) => this.#warn('presence is not revoked', thrown));
    await node.tenure.stop(false);
    await node.names.stop();
    await node.loop.stop();
    await this.#parts.environment.cleanNode();
  }

  async #steer(
    network: NetworkConfig,
    claim: SubnetClaim,
    loop: LoopKeeper,
    presence: LeaseKeeper,
  ): Promise<Steering> {
    const { config, table, clock, timers, vitals, nonce, files } = this.#parts;
    const path = `${config.dataDir}/coordinate.json`;
    const text = await files.read(path);
    const kept = text === undefined ? undefined : decodeCoordinate(text);
    if (kept?.ok === false)
      this.#log.warn({ file: path, error: kept.error.message }, 'coordinate is not readable; starting anew');
    return new Steering({
      node: config.node,
      subnet: claim.subnet.base,
      subnetBits: network.plan.nodeBits,
      table,
      clock,
      timers,
      vitals,
      log: this.#log,
      seed: this.#seed(),
      nonce,
      ...(kept?.ok === true ? { coordinate: kept.value } : {}),
      send: (command) => loop.send(command),
      publish: (position) => {
        this.#position = position;
        const written = files.write(path, encodeCoordinate(position.coordinate));
        const told = presence
          .held(limits.READ_YOUR_WRITES_MS)
          .then((lease) => this.#publishNode(lease, claim));
        Promise.all([written, told]).catch((thrown: unknown) =>
          this.#log.debug({ error: toEdgewayError(thrown).message }, 'position is not published'),
        );
      },
      gone: (id) => this.#withdraw(id),
      healthChanged: () => this.#registered?.northSouth.update(),
    });
  }

  #publishNode(lease: LeaseId, claim: SubnetClaim): Promise<number> {
    const { kv, keys, config, nodeIp, nat } = this.#parts;
    const { node, cluster, ewp, nsp } = config;
    const { subnet, epoch } = claim;
    return publishNode(
      kv,
      keys,
      { node, cluster, nodeIp, ewp, nsp, subnet, epoch, ...(nat ? { nat } : {}), ...this.#position },
      lease,
    );
  }

  /** Everything that hangs on the presence lease, under a new one. Rejects when something may pass at another try. */
  async #publishAll(lease: LeaseId, claim: SubnetClaim): Promise<void> {
    const { kv, keys } = this.#parts;
    await this.#publishNode(lease, claim);
    // Not while an instance is being taken away: it would be published once more.
    await this.#alone(async () => {
      if (this.#registered?.claim !== claim) return;
      this.#registered.calls.update();
      const hosted = [...this.#hosted.values()].map((one) => this.#instanceOf(one, claim));
      for (const instance of this.#ingress === undefined ? hosted : [...hosted, this.#ingress])
        try {
          await publishInstance(kv, keys, claim.subnet, instance, lease);
        } catch (thrown) {
          const { code } = toEdgewayError(thrown);
          if (MAY_PASS.has(code) || code === 'lease_lost') throw thrown;
          this.#warn(`instance ${instance.instance} of ${instance.service} is not published again`, thrown);
        }
    });
  }

  /** Makes the node itself a sender: what enters by a published port and leaves for another node carries this
   *  InstanceIP. Its number is the subnet's, so no two nodes ask for the same. */
  async #openIngress(
    network: NetworkConfig,
    claim: SubnetClaim,
    loop: LoopKeeper,
    tenure: LeaseKeeper,
    presence: LeaseKeeper,
  ): Promise<void> {
    const { kv, keys, config, nodeIp } = this.#parts;
    const { node, cluster, ewp, nsp } = config;
    const instance = unwrap(subnetIndex(network.plan, claim.subnet)) + 1;
    const lease = await tenure.held(limits.READ_YOUR_WRITES_MS);
    const { instanceIp } = await claimInstance(kv, keys, network, {
      service: INGRESS,
      instance,
      node,
      ...this.#within(),
      lease,
    });
    const namespaceIp = layoutOf(claim.subnet).bridge;
    const ingress: Instance = {
      service: INGRESS,
      ...{ instance, node, cluster, nodeIp, ewp, nsp, namespaceIp, instanceIp },
      ports: [],
      epoch: claim.epoch,
    };
    loop.send(projectLocal(this.#parts.table, ingress));
    await publishInstance(kv, keys, claim.subnet, ingress, await presence.held(limits.READ_YOUR_WRITES_MS));
    this.#ingress = ingress;
  }

  // ---- instances ----

  /** `former`: what the instance had in the last run, kept if it still can be. */
  #deployAlone(request: DeployRequest | Hosted, former: Hosted | undefined): Promise<Instance> {
    const { service, instance, target } = request;
    const wanted = 'addresses' in request ? request : { service, instance, target, addresses: {} };
    return this.#alone(() => Undo.guard(this.#log, (undo) => this.#deploy(wanted, former, undo)));
  }

  /** The host first, the keyspace after it: what the host refuses has written nothing. */
  async #deploy(request: DeployRequest, former: Hosted | undefined, undo: Undo): Promise<Instance> {
    const { service, instance, target } = request;
    const { environment, routes, clock } = this.#parts;
    const node = this.#node();
    const id = hostedKey(service, instance);
    const already = this.#hosted.get(id);
    if (already !== undefined)
      throw new EdgewayError(
        'instance_exists',
        `instance ${instance} of ${service} runs on this node already, in ${describeTarget(already.target)}`,
      );
    const left = this.#leaving.get(id);
    if (left !== undefined) await this.#leave(node, left);
    const found = await this.#findTarget(target);
    const identity = target.kind === 'pid' ? this.#parts.vitals.identify(target) : undefined;
    if (former?.identity !== undefined && former.identity !== identity)
      throw new EdgewayError(
        'namespace_unknown',
        `${describeTarget(target)} is not the one that instance ${instance} of ${service} lived in`,
      );

    // Refused when the address lies in another subnet than this run's; then any other will do.
    if (former !== undefined) node.addresses.hold(id, former.namespaceIp, clock.monotonicMs());
    const namespaceIp = unwrap(node.addresses.take(id, clock.monotonicMs()));
    undo.push('namespace address', async () => node.addresses.giveBack(id, clock.monotonicMs()));
    undo.push('network of the instance', () => environment.detach({ id }));
    await environment.attach({
      id,
      target: found.target,
      namespaceIp,
      subnet: node.claim.subnet,
      mtu: node.network.mtu,
      resolvConf: { nameserver: layoutOf(node.claim.subnet).bridge },
      ...(found.container === undefined ? {} : { container: found.container }),
    });

    // With etcd away an instance of the last run goes on with what it held: its claim hangs on this node's tenure.
    const alone = former !== undefined && this.#alonePhase;
    const instanceIp = alone ? former.instanceIp : await this.#claimFor(node, request, former, undo);
    const hosted: Hosted = {
      service,
      instance,
      target,
      ...(identity === undefined ? {} : { identity }),
      namespaceIp,
      instanceIp,
    };
    undo.push('packet path', async () => node.loop.send({ kind: 'localGone', namespaceIp }));
    node.loop.send(projectLocal(this.#parts.table, hosted));
    undo.push('health', async () => node.steering.discharge(id));
    if (!node.steering.admit({ id, service, namespaceIp, home: found.target }))
      throw new EdgewayError('namespace_unknown', `${describeTarget(target)} ended while it was attached`);

    undo.push('hosted instance', async () => {
      this.#hosted.delete(id);
      this.#pin();
    });
    this.#hosted.set(id, hosted);
    this.#pin();
    if (!alone) await this.#known(service);
    const published = this.#instanceOf(hosted, node.claim);
    if (!alone) {
      // Alone, it is published with everything else as soon as presence is held.
      const lease = await node.presence.held(limits.READ_YOUR_WRITES_MS);
      const { kv, keys } = this.#parts;
      const revision = await publishInstance(kv, keys, node.claim.subnet, published, lease);
      await routes.waitFor(revision, limits.READ_YOUR_WRITES_MS, service);
    }
    await this.#writeState();
    this.#log.info(
      { service, instance, address: formatIpv4(namespaceIp), name: describeTarget(target) },
      'instance deployed',
    );
    return published;
  }

  /** The service's record, made when there is none, and the InstanceIP. */
  async #claimFor(
    node: Registered,
    { service, instance, addresses, instanceIp: wanted }: DeployRequest,
    former: Hosted | undefined,
    undo: Undo,
  ): Promise<Ipv4> {
    const { kv, keys, config } = this.#parts;
    const isNew = (await kv.get(keys.build({ kind: 'service', service }))) === undefined;
    if (isNew)
      undo.push('service', async () => {
        await deleteService(kv, keys, node.network, service).catch((thrown: unknown) => {
          // Somebody else deployed an instance of it, or took it away already.
          const { code } = toEdgewayError(thrown);
          if (code !== 'instance_exists' && code !== 'not_found') throw thrown;
        });
      });
    await ensureService(kv, keys, node.network, service, bareDescriptor(service), addresses);
    const wish = {
      service,
      instance,
      node: config.node,
      ...this.#within(),
      lease: await node.tenure.held(limits.READ_YOUR_WRITES_MS),
      ...(wanted === undefined ? {} : { wanted }),
      ...(former === undefined ? {} : { preferred: former.instanceIp }),
    };
    let claimed: Ipv4 | undefined;
    undo.push('instance address', async () => {
      const left = { service, instance, ...(claimed === undefined ? {} : { instanceIp: claimed }) };
      this.#leaving.set(hostedKey(service, instance), left);
      await this.#leave(node, left);
    });
    try {
      claimed = (await claimInstance(kv, keys, node.network, wish)).instanceIp;
    } catch (thrown) {
      // A claim whose answer was lost may stand all the same; who asks again meets it.
      if (MAY_PASS.has(toEdgewayError(thrown).code))
        claimed = await claimInstance(kv, keys, node.network, wish).then(
          ({ instanceIp }) => instanceIp,
          () => undefined,
        );
      if (claimed === undefined) throw thrown;
    }
    return claimed;
  }

  /** From now on nobody here uses it, whatever the keyspace says; `#leave` takes it away. */
  #dismiss(node: Registered, hosted: Hosted): void {
    const { service, instance } = hosted;
    const id = hostedKey(service, instance);
    this.#hosted.delete(id);
    this.#leaving.set(id, hosted);
    this.#pin();
    node.steering.discharge(id);
    this.#projectService(node, service);
  }

  /** First out of the keyspace, so that nobody chooses it; then off the host. What etcd does not take now is tried
   *  again until it does; it holds up nothing here. */
  async #leave(node: Registered, left: Leaving): Promise<void> {
    const { kv, keys, environment, routes, clock, config } = this.#parts;
    const { service, instance, instanceIp } = left;
    const id = hostedKey(service, instance);
    let released = false;
    try {
      const held = {
        service,
        instance,
        node: config.node,
        ...(instanceIp === undefined ? {} : { instanceIp }),
      };
      const revision = await releaseInstance(kv, keys, node.network, held);
      released = true;
      await routes.waitFor(revision, limits.READ_YOUR_WRITES_MS, service);
    } catch (thrown) {
      this.#warn(
        released ? `${id} left; this node's table does not show it yet` : `${id} is not withdrawn yet`,
        thrown,
      );
    }
    try {
      const namespaceIp = node.addresses.of(id);
      if (namespaceIp !== undefined) node.loop.send({ kind: 'localGone', namespaceIp });
      await environment.detach({ id });
      node.addresses.giveBack(id, clock.monotonicMs());
    } catch (thrown) {
      this.#leaveSoon();
      throw thrown;
    }
    if (released && this.#leaving.get(id) === left) this.#leaving.delete(id);
    if (this.#leaving.size > 0) this.#leaveSoon();
    await this.#writeState();
    this.#log.info({ service, instance }, 'instance undeployed');
  }

  /** Tries again, later, to take away what is still leaving. */
  #leaveSoon(ms = LEAVE_RETRY_MS): void {
    if (this.#leaveArmed || this.#stopping || this.#leaving.size === 0) return;
    this.#leaveArmed = true;
    this.#parts.timers.after(ms, () => {
      this.#leaveArmed = false;
      this.#alone(async () => {
        const node = this.#registered;
        for (const left of [...this.#leaving.values()])
          if (node !== undefined && !this.#stopping) await this.#leave(node, left);
      })
        .catch((thrown: unknown) => this.#warn('an instance is not taken away yet', thrown))
        .finally(() => this.#leaveSoon());
    });
  }

  /** Its process or namespace is gone, and steering lets nobody choose it any more. */
  #withdraw(id: string): void {
    this.#alone(async () => {
      const node = this.#registered;
      const hosted = this.#hosted.get(id);
      if (node === undefined || hosted === undefined) return;
      this.#dismiss(node, hosted);
      await this.#writeState();
      await this.#leave(node, hosted);
    }).catch((thrown: unknown) => this.#warn(`instance ${id} died and is not taken away yet`, thrown));
  }

  async #findTarget(
    target: Target,
  ): Promise<{ target: Exclude<Target, { kind: 'container' }>; container?: Container }> {
    if (target.kind !== 'container') return { target };
    const container = await this.#parts.engine.inspect(target.container);
    return { target: { kind: 'pid', pid: container.pid }, container };
  }

  #instanceOf(hosted: Hosted, claim: SubnetClaim): Instance {
    const { config, nodeIp, table } = this.#parts;
    return {
      service: hosted.service,
      instance: hosted.instance,
      node: config.node,
      cluster: config.cluster,
      nodeIp,
      ewp: config.ewp,
      nsp: config.nsp,
      namespaceIp: hosted.namespaceIp,
      instanceIp: hosted.instanceIp,
      ports: portNumbers(table.service(hosted.service)?.descriptor.ports ?? []),
      epoch: claim.epoch,
    };
  }

  // ---- routes and packets ----

  #routesChanged(delta: RouteDelta): void {
    const node = this.#registered;
    if (node === undefined) return;
    for (const service of delta.services) this.#projectService(node, service);
    for (const { service } of this.#hosted.values())
      if (delta.services.has(service)) {
        this.#pin();
        break;
      }
    node.steering.routesChanged(delta.services, delta.nodes.size > 0);
    node.calls.update();
    node.names.changed(delta);
    node.northSouth.update();
  }

  #projectService(node: Registered, id: ServiceId): void {
    const { table, config } = this.#parts;
    // One that left is not waited for until the keyspace has heard of it.
    const isHere = ({ service, instance }: Instance) => !this.#leaving.has(hostedKey(service, instance));
    node.loop.send(projectService(table, id, config.node, isHere));
    for (const hosted of this.#hosted.values())
      if (hosted.service === id) node.loop.send(projectLocal(table, hosted));
  }

  /** A loop starts empty; everything that is known already is news to it. */
  #tellLoop(node: Registered): void {
    const { table } = this.#parts;
    for (const { id } of table.services()) this.#projectService(node, id);
    for (const hosted of this.#hosted.values()) node.loop.send(projectLocal(table, hosted));
    if (this.#ingress !== undefined) node.loop.send(projectLocal(table, this.#ingress));
    node.calls.loopStarted();
    node.steering.loopStarted();
  }

  #needsOf(source: Ipv4): readonly ServiceId[] | undefined {
    for (const { namespaceIp, service } of this.#hosted.values())
      if (namespaceIp === source) return this.#parts.table.service(service)?.descriptor.needs;
    return undefined;
  }

  /**
   * A name of the service is asked for here, by nobody in particular when the node itself asks. As `ask` of the routes;
   * and who asks for what there is may be about to use it.
   */
  asked(service: ServiceId, asker?: Ipv4): Promise<boolean> | undefined {
    const told = this.#parts.routes.ask(service, asker);
    const expect = (): void => {
      if (asker !== undefined) this.#registered?.steering.expect(service, asker);
    };
    if (told === undefined) expect();
    else void told.then((isTold) => isTold && expect());
    return told;
  }

  #loopReported(report: ProxyReport): void {
    this.#registered?.steering.report(report);
    if (report.kind === 'notice') this.#log.warn({ reason: report.text }, 'the packet loop goes on without');
    const { routes } = this.#parts;
    if (report.kind === 'miss') void this.#lookUp(report.address);
    if (report.kind === 'chosen') for (const { service } of report.choices) void routes.ask(service);
    // What is in use stays followed, however long ago it was chosen.
    if (report.kind === 'flows') for (const service of report.services) void routes.ask(service);
  }

  /** The loop holds a packet meanwhile: it goes on with the route, or its sender is told that nobody has the address. */
  async #lookUp(address: Ipv4): Promise<void> {
    const { routes, table } = this.#parts;
    if ((await routes.askAddress(address)) && table.nameOf(address) === undefined)
      this.#registered?.loop.send({ kind: 'unowned', address });
  }

  // ---- small things ----

  #node(): Registered {
    if (this.#registered === undefined)
      throw new EdgewayError('not_registered', 'this node has no subnet yet: POST /register comes first');
    return this.#registered;
  }

  /** One request at a time: each leaves the node whole before the next begins. */
  #alone<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#queue.then(work);
    this.#queue = turn.catch(() => {});
    return turn;
  }

  #seed(): number {
    return Math.floor(this.#parts.random() * 2 ** 32);
  }

  #warn(what: string, thrown: unknown): void {
    const error = toEdgewayError(thrown);
    this.#log.warn({ code: error.code, error: error.message }, what);
  }

  async #readState(): Promise<SavedState | undefined> {
    const text = await this.#parts.files.read(this.#statePath);
    if (text === undefined) return undefined;
    const state = decodeState(text);
    if (state.ok) return state.value;
    this.#log.error(
      { file: this.#statePath, error: state.error.message },
      'saved state is not readable; starting anew',
    );
    return undefined;
  }

  async #writeState(): Promise<void> {
    const node = this.#registered;
    if (node === undefined) return;
    const { subnet, epoch } = node.claim;
    await this.#parts.files.write(
      this.#statePath,
      encodeState({
        subnet,
        claim: { epoch, lease: node.tenure.lease ?? node.claim.lease },
        ...(this.#tenureMs === undefined ? {} : { tenureMs: this.#tenureMs }),
        network: node.network,
        nextAddress: node.addresses.next,
        leaving: [...this.#leaving.values()],
        hosted: [
          ...this.#hosted.values(),
          ...this.#resuming.filter((one) => !this.#hosted.has(hostedKey(one.service, one.instance))),
        ],
      }),
    );
  }
}

/** Names under which the network itself appears. */
function refuseReserved(service: ServiceId): void {
  if (service.startsWith('edgeway.system.'))
    throw new EdgewayError(
      'invalid_request',
      `service ${service}: edgeway.system is reserved for the network itself`,
    );
}

function describeTarget(target: Target): string {
  switch (target.kind) {
    case 'container':
      return `container ${target.container}`;
    case 'netns':
      return `namespace ${target.name}`;
    case 'pid':
      return `process ${target.pid}`;
  }
}
