// Steering: the agent's hand on the policies. It joins the machines (probe.ts, balance.ts, health.ts), turns what
// they decide into commands for the packet loop, and tells the agent what it must do itself: publish where this node
// is, take away an instance that died. It holds the clock's only timer for them; it measures and chooses nothing.
import { formatIpv4, type Ipv4, networkOf } from '../src/addr.ts';
import { Budget, Budgets } from '../src/budget.ts';
import { slowdown } from '../src/choose.ts';
import { type Coordinate, movedMs } from '../src/coordinate.ts';
import { EXPECTED_ASKER_BURST, EXPECTED_BURST, INTEREST_ASKERS_MAX } from '../src/limits.ts';
import type { Logger } from '../src/log.ts';
import type { ServiceId } from '../src/name.ts';
import type { Policy } from '../src/policy.ts';
import { Rng } from '../src/rng.ts';
import { type Deadline, earliest } from '../src/time.ts';
import { decodeProbeStatus, encodeProbeStatus } from '../src/wire/probe.ts';
import { Balancer, EXPECTED_MS, type Explanation } from './balance.ts';
import { HealthMonitor, type HealthView } from './health.ts';
import type { Clock, Home, Timers, Vitals } from './ports.ts';
import { type Peer, type ProbeOutput, Prober, type ProberCounters, type Status } from './probe.ts';
import type { Choice, ProxyCommand, ProxyReport } from './proxy/command.ts';
import type { RouteTable } from './routes/table.ts';

/** A node's record is written again at most this often … */
export const PUBLISH_MS = 30_000;
/** … or this often when its load has changed greatly; each time that it does so again doubles that, up to PUBLISH_MS,
 *  until it has been quiet for two PUBLISH_MS: a load that swings is no news. */
export const PUBLISH_BIG_MS = 5_000;
/** What counts as news: moved by this share of the way to the others' typical distance and by 2 ms. */
const MOVED_MS = 2;
const MOVED_SHARE = 0.1;
/** What counts as great: a request takes this many times as long, or as short. */
const SLOWER = 2;
/** A load that differs by less is the same. */
const LOAD_STEP = 0.2;
/** How often status bytes and load are refreshed. */
const STATUS_MS = 500;
/** An agent that attaches again what the last run hosted says nothing about itself for so long at most: peers take
 *  silence for suspicion, but an instance that is not attached yet for a dead one. Below DEAD_MS of probe.ts. */
export const QUIET_MS = 8_000;
/** How often services that went cold are let go. */
const FOLLOWED_MS = 10_000;
/** Choices kept for `explain`. */
export const CHOICES_KEPT = 256;

/** What this node says about itself in its record. */
export interface Position {
  readonly coordinate: Coordinate;
  readonly load?: number;
}

/** An instance on this node, as steering must know it. */
export interface Resident {
  readonly id: string;
  readonly service: ServiceId;
  readonly namespaceIp: Ipv4;
  readonly home: Home;
}

export interface SteeringParts {
  readonly node: string;
  /** First address of this node's subnet. */
  readonly subnet: Ipv4;
  /** Prefix length of every node's subnet. */
  readonly subnetBits: number;
  readonly table: RouteTable;
  readonly clock: Clock;
  readonly timers: Timers;
  readonly vitals: Vitals;
  readonly log: Logger;
  readonly seed: number;
  /** Unpredictable unsigned 32-bit integers. */
  readonly nonce: () => number;
  /** Where the last run ended. */
  readonly coordinate?: Coordinate;
  readonly send: (command: ProxyCommand) => void;
  /** Write this into the node's record; a failure is only a missed chance. */
  readonly publish: (position: Position) => void;
  /** That instance's process or namespace is gone: take it away. Called once. */
  readonly gone: (id: string, why: string) => void;
  /** An instance of this node is healthy by now, or not any more. */
  readonly healthChanged?: () => void;
}

/** A choice that was made, with the reason as it then was. */
export interface RecordedChoice extends Choice {
  readonly wallMs: number;
  readonly why: string;
}

export class Steering {
  readonly #parts: SteeringParts;
  readonly #prober: Prober;
  readonly #balancer: Balancer;
  readonly #health: HealthMonitor;
  /** With the identity that each was admitted with: another one is another life. */
  readonly #residents = new Map<string, Resident & { readonly identity: string }>();
  /** Services whose members the balancer must be told anew. */
  readonly #dirty = new Set<ServiceId>();
  readonly #choices: RecordedChoice[] = [];
  readonly #chosen = new Map<string, number>();
  #cancel: (() => void) | undefined;
  #armedAt = Number.POSITIVE_INFINITY;
  #started = false;
  #stopped = false;
  #peersStale = true;
  /** Other nodes by the first address of their subnet. */
  #nodeOf: ReadonlyMap<Ipv4, string> = new Map();
  #followedStale = true;
  readonly #expects = new Budget({
    burst: EXPECTED_BURST,
    perS: EXPECTED_BURST / (EXPECTED_MS / 1_000),
  });
  readonly #expectsOf = new Budgets({
    burst: EXPECTED_ASKER_BURST,
    perS: EXPECTED_ASKER_BURST / (EXPECTED_MS / 1_000),
    callersMax: INTEREST_ASKERS_MAX,
  });
  /** Choices that the loop made faster than it reports them one by one. */
  #unlisted = 0;
  #followedAt = Number.NEGATIVE_INFINITY;
  #statusAt = Number.NEGATIVE_INFINITY;
  #statusSent = '';
  #quietUntil = Number.NEGATIVE_INFINITY;
  #published: { readonly position: Position; readonly at: number } | undefined;
  #publishBigMs = PUBLISH_BIG_MS;

  constructor(parts: SteeringParts) {
    this.#parts = parts;
    const nowMs = parts.clock.monotonicMs();
    this.#prober = new Prober({
      rng: new Rng(parts.seed),
      nonce: parts.nonce,
      nowMs,
      ...(parts.coordinate === undefined ? {} : { coordinate: parts.coordinate }),
    });
    this.#balancer = new Balancer(this.#prober, {
      load: () => parts.vitals.load(),
      isUp: (ip) => this.#health.isUp(ip),
    });
    this.#health = new HealthMonitor((id) => {
      const resident = this.#residents.get(id);
      return resident === undefined ? undefined : parts.vitals.identify(resident.home);
    });
  }

  /** Begins with what the table holds; the packet loop has it already. `resuming`: instances of the last run are still
   *  to be admitted, `resumed` follows. */
  start(resuming = false): void {
    this.#started = true;
    if (resuming) this.#quietUntil = this.#parts.clock.monotonicMs() + QUIET_MS;
    for (const service of this.#parts.table.services()) this.#dirty.add(service.id);
    this.#turn();
  }

  /** A new packet loop has the table and nothing of what was sent to the last one. */
  loopStarted(): void {
    this.#statusSent = '';
    this.#statusAt = Number.NEGATIVE_INFINITY;
    this.#balancer.resend(this.#parts.clock.monotonicMs());
    this.#turn();
  }

  resumed(): void {
    if (this.#quietUntil === Number.NEGATIVE_INFINITY) return;
    this.#quietUntil = Number.NEGATIVE_INFINITY;
    this.#statusAt = Number.NEGATIVE_INFINITY;
    this.#turn();
  }

  get coordinate(): Coordinate {
    return this.#prober.coordinate;
  }

  /** Routes changed; the table has them already, and so has the loop. */
  routesChanged(services: Iterable<ServiceId>, nodesChanged: boolean): void {
    if (nodesChanged) this.#peersStale = true;
    for (const service of services) this.#dirty.add(service);
    this.#turn();
  }

  /** An instance lives here now. False when its process or namespace is gone already. */
  admit(resident: Resident): boolean {
    const identity = this.#parts.vitals.identify(resident.home);
    if (identity === undefined) return false;
    const lodged = { ...resident, identity };
    this.#residents.set(resident.id, lodged);
    this.#admit(lodged);
    this.#residentsChanged(resident.service);
    return true;
  }

  /** It is about to leave, or has died: from now on it is not chosen here, although the keyspace may still name it. */
  discharge(id: string): void {
    const resident = this.#residents.get(id);
    this.#residents.delete(id);
    this.#health.discharge(id);
    if (resident !== undefined) this.#residentsChanged(resident.service);
  }

  #residentsChanged(service: ServiceId): void {
    this.#dirty.add(service);
    this.#statusAt = Number.NEGATIVE_INFINITY;
    this.#turn();
  }

  /** Reports of the packet loop; those that are not about policies are ignored. */
  report(report: ProxyReport): void {
    const nowMs = this.#parts.clock.monotonicMs();
    if (report.kind === 'probed') {
      const status = decodeProbeStatus(report.status);
      if (!status.ok) {
        this.#parts.log.debug(
          { address: formatIpv4(report.nodeIp), error: status.error.message },
          'probe answer',
        );
        return;
      }
      this.#prober.handleAnswer({ ...status.value, nonce: report.token, rttMs: report.rttNs / 1e6 }, nowMs);
    } else if (report.kind === 'chosen') {
      for (const choice of report.choices) this.#record(choice, nowMs);
      for (const choice of report.unlisted) {
        this.#count(choice, choice.count, nowMs);
        this.#unlisted += choice.count;
      }
    } else if (report.kind === 'flows') {
      for (const subnet of report.subnets) {
        const host = this.#nodeOf.get(subnet);
        if (host !== undefined) this.#prober.handleUse(host, nowMs);
      }
    } else return;
    this.#turn();
  }

  /** Undefined when this node does not follow the service. Who asks is about to use it: its nodes are watched now. */
  explain(service: ServiceId, policy: Policy): Explanation | undefined {
    const nowMs = this.#parts.clock.monotonicMs();
    if (this.#balancer.warm(service, nowMs)) this.#followedStale = true;
    this.#turn();
    return this.#balancer.explain(service, policy, nowMs);
  }

  /**
   * Somebody here has asked for the service's name and may be about to use it: its nodes are watched for EXPECTED_MS,
   * the first probes leave at once. Questions beyond the budget bring nothing: the first flow warms the service then.
   */
  expect(service: ServiceId, asker: Ipv4): void {
    const nowMs = this.#parts.clock.monotonicMs();
    if (!this.#balancer.isCold(service, nowMs)) return;
    if (!this.#expectsOf.take(asker, nowMs) || !this.#expects.take(nowMs)) return;
    this.#balancer.expect(service, nowMs);
    this.#followedStale = true;
    this.#prober.hurry();
    this.#turn();
  }

  /** The newest last. */
  choices(service?: ServiceId): readonly RecordedChoice[] {
    return service === undefined
      ? this.#choices
      : this.#choices.filter((choice) => choice.service === service);
  }

  /** Choices per policy and instance since the start, by `service/instance policy`. */
  chosen(): ReadonlyMap<string, number> {
    return this.#chosen;
  }

  /** Nodes that are probed every second now. */
  watched(): readonly string[] {
    return this.#prober.watched();
  }
  status(node: string): Status | undefined {
    return this.#prober.view(node, this.#parts.clock.monotonicMs())?.status;
  }
  health(id: string): HealthView | undefined {
    return this.#health.view(id);
  }
  /** False for an instance of this node that is dead or unhealthy. */
  isUp(namespaceIp: Ipv4): boolean {
    return this.#health.isUp(namespaceIp);
  }
  load(): number | undefined {
    return this.#parts.vitals.load();
  }

  counters(): Readonly<Record<string, number>> {
    const entries = Object.entries(this.#prober.counters as Readonly<ProberCounters>);
    return {
      ...Object.fromEntries(entries.map(([name, value]) => [`probes_${name}`, value])),
      choices_unlisted: this.#unlisted,
    };
  }

  stop(): void {
    this.#stopped = true;
    this.#cancel?.();
  }

  #record(choice: Choice, nowMs: number): void {
    const why =
      choice.policy === 'fixed'
        ? 'its own address was dialled'
        : (this.#balancer.why(choice.service, choice.policy) ?? 'the service is not followed');
    this.#choices.push({ ...choice, wallMs: this.#parts.clock.wallMs(), why });
    if (this.#choices.length > CHOICES_KEPT) this.#choices.shift();
    this.#count(choice, 1, nowMs);
  }

  #count(choice: Pick<Choice, 'service' | 'policy' | 'instance'>, count: number, nowMs: number): void {
    const { table, node } = this.#parts;
    // The counters of a service go with it; a report may come behind.
    if (!this.#balancer.has(choice.service)) return;
    const key = `${choice.service}/${choice.instance} ${choice.policy}`;
    this.#chosen.set(key, (this.#chosen.get(key) ?? 0) + count);
    if (this.#balancer.warm(choice.service, nowMs)) this.#followedStale = true;
    const host = table.instance(choice.service, choice.instance)?.node;
    if (host !== undefined && host !== node) this.#prober.handleUse(host, nowMs);
  }

  #follow(service: ServiceId): void {
    const { table, node, clock } = this.#parts;
    const instances = table.instancesOf(service);
    if (table.service(service) === undefined && instances.length === 0) {
      this.#balancer.deleteService(service);
      for (const key of this.#chosen.keys()) if (key.startsWith(`${service}/`)) this.#chosen.delete(key);
    } else {
      const members = instances.map((instance) => ({
        instance: instance.instance,
        node: instance.node,
        local: instance.node === node,
        namespaceIp: instance.namespaceIp,
      }));
      this.#balancer.setService(service, members, clock.monotonicMs());
    }
    // A descriptor may have got another health check.
    for (const resident of this.#residents.values()) if (resident.service === service) this.#admit(resident);
  }

  /** What changed in the table since the last turn. Peers first: members are judged by their nodes. */
  #takeRoutes(nowMs: number): void {
    const { table, node: self } = this.#parts;
    const isNews = (node: string): boolean => node !== self && !this.#prober.knows(node);
    for (const service of this.#dirty)
      if (table.instancesOf(service).some(({ node }) => isNews(node))) this.#peersStale = true;
    if (this.#peersStale) this.#setPeers(nowMs);
    for (const service of this.#dirty) this.#follow(service);
    if (this.#dirty.size > 0) this.#followedStale = true;
    this.#dirty.clear();
    for (const { service } of this.#residents.values())
      for (const need of table.service(service)?.descriptor.needs ?? [])
        if (this.#balancer.warm(need, nowMs)) this.#followedStale = true;
    if (this.#followedStale || nowMs >= this.#followedAt) {
      this.#followedStale = false;
      this.#followedAt = nowMs + FOLLOWED_MS;
      this.#prober.setFollowed(this.#balancer.followed(nowMs));
    }
  }

  #admit({ id, service, namespaceIp, identity }: Resident & { readonly identity: string }): void {
    const { table, clock } = this.#parts;
    const check = table.service(service)?.descriptor.health;
    this.#health.admit(
      { id, namespaceIp, identity, ...(check === undefined ? {} : { check }) },
      clock.monotonicMs(),
    );
  }

  /** Nodes of the table, and nodes that only instances name: not every node's record need be followed. */
  #setPeers(nowMs: number): void {
    this.#peersStale = false;
    const { table, node: self, subnetBits } = this.#parts;
    const peers = new Map<string, Peer>();
    for (const { node, nodeIp, ewp, subnet, coordinate, load } of table.nodes())
      if (node !== self)
        peers.set(node, {
          node,
          nodeIp,
          ewp,
          subnet: subnet.base,
          ...(coordinate === undefined ? {} : { coordinate }),
          ...(load === undefined ? {} : { load }),
        });
    for (const { node, nodeIp, ewp, namespaceIp } of table.instances())
      if (node !== self && !peers.has(node))
        peers.set(node, { node, nodeIp, ewp, subnet: networkOf(namespaceIp, subnetBits) });
    this.#nodeOf = new Map([...peers.values()].map(({ subnet, node }) => [subnet, node]));
    this.#prober.setPeers([...peers.values()], nowMs);
  }

  /** One turn: every machine hears the time, every output is carried out, the next deadline is armed. */
  #turn(): void {
    if (!this.#started || this.#stopped) return;
    const { clock, timers } = this.#parts;
    const nowMs = clock.monotonicMs();
    this.#takeRoutes(nowMs);
    this.#prober.handleTimeout(nowMs);
    this.#health.handleTimeout(nowMs);
    this.#balancer.handleTimeout(nowMs);
    this.#drain(nowMs);
    if (nowMs >= this.#statusAt) {
      this.#statusAt = nowMs + STATUS_MS;
      this.#sendStatus();
      this.#publish(nowMs);
    }
    let next: Deadline | undefined = { at: this.#statusAt, why: 'status' };
    next = earliest(next, this.#prober.deadline());
    next = earliest(next, this.#health.deadline());
    next = earliest(next, this.#balancer.deadline());
    const at = Math.max(nowMs + 1, next?.at ?? Number.POSITIVE_INFINITY);
    if (this.#cancel !== undefined && at >= this.#armedAt && this.#armedAt > nowMs) return;
    this.#cancel?.();
    this.#armedAt = at;
    this.#cancel = timers.after(at - nowMs, () => {
      this.#cancel = undefined;
      this.#turn();
    });
  }

  #drain(nowMs: number): void {
    for (let output = this.#health.poll(); output !== undefined; output = this.#health.poll())
      this.#carryOutHealth(output, nowMs);
    const ended: ProxyCommand[] = [];
    let changed = false;
    for (let output = this.#prober.poll(); output !== undefined; output = this.#prober.poll()) {
      const { nodeIp, ewp } = output;
      if (output.kind === 'send') {
        this.#parts.send({ kind: 'probe', token: output.nonce, nodeIp, ewp });
        continue;
      }
      changed = true;
      this.#logStatus(output);
      if (output.to === 'suspect') ended.push({ kind: 'nodeSuspect', nodeIp, ewp });
      if (output.to === 'dead') ended.push({ kind: 'nodeDead', nodeIp, ewp });
    }
    if (changed) this.#balancer.reweigh(nowMs);
    for (let output = this.#balancer.poll(); output !== undefined; output = this.#balancer.poll()) {
      const { send, table } = this.#parts;
      const { service } = output;
      if (output.kind === 'weights') {
        const { instances, weights } = output.weights;
        send({ kind: 'weights', service, instances, weights });
      } else if (table.service(service)?.descriptor.health === undefined)
        // Without a health check there is nothing else that it can be but dead.
        send({ kind: 'instanceDead', service, instance: output.instance });
    }
    // Behind the weights: what is let go of is then chosen by them.
    for (const command of ended) this.#parts.send(command);
  }

  #logStatus({ node, from, to, why }: Extract<ProbeOutput, { kind: 'status' }>): void {
    const { log } = this.#parts;
    const fields = { peer: node, reason: why };
    if (to === 'suspect' || to === 'dead') log.info(fields, `node is ${to}`);
    else log.debug(fields, from === 'unknown' ? 'node answers' : 'node answers again');
  }

  #carryOutHealth(output: NonNullable<ReturnType<HealthMonitor['poll']>>, nowMs: number): void {
    const { vitals, log, clock } = this.#parts;
    const resident = this.#residents.get(output.id);
    if (resident === undefined) return;
    if (output.kind === 'check') {
      const { id, run, probe, namespaceIp, timeoutMs } = output;
      const take = (ok: boolean, detail: string): void => {
        this.#health.handleResult(id, run, ok, detail, clock.monotonicMs());
        this.#turn();
      };
      vitals.check(probe, namespaceIp, resident.home, timeoutMs).then(
        ({ ok, detail }) => take(ok, detail),
        (thrown: unknown) => take(false, String(thrown)),
      );
      return;
    }
    const fields = { name: output.id, address: formatIpv4(resident.namespaceIp), reason: output.why };
    if (output.kind === 'health')
      log.info(fields, output.up ? 'instance is healthy' : 'instance is unhealthy');
    else log.info(fields, 'instance is gone');
    this.#sendStatus();
    this.#balancer.reweighOne(resident.service, nowMs);
    this.#parts.healthChanged?.();
    if (output.kind === 'gone') this.#parts.gone(output.id, output.why);
  }

  /** The bytes of our answers to probes, when they changed. */
  #sendStatus(): void {
    const { vitals, subnet, send, clock } = this.#parts;
    if (clock.monotonicMs() < this.#quietUntil) return;
    let liveLow = 0;
    let liveHigh = 0;
    for (const ip of this.#health.up()) {
      const host = ip - subnet;
      if (host >= 0 && host < 32) liveLow = (liveLow | (1 << host)) >>> 0;
      else if (host >= 32 && host < 64) liveHigh = (liveHigh | (1 << (host - 32))) >>> 0;
    }
    const load = vitals.load();
    const status = encodeProbeStatus({
      subnet,
      coordinate: this.#prober.coordinate,
      liveLow,
      liveHigh,
      ...(load === undefined ? {} : { load }),
    });
    const key = status.join();
    if (key === this.#statusSent) return;
    this.#statusSent = key;
    send({ kind: 'probeStatus', status });
  }

  #publish(nowMs: number): void {
    const coordinate = this.#prober.coordinate;
    if (coordinate.error >= 1) return;
    const load = this.#parts.vitals.load();
    const last = this.#published;
    if (last !== undefined) {
      const elapsed = nowMs - last.at;
      const before = last.position.load;
      const ratio = load === undefined || before === undefined ? 1 : slowdown(load) / slowdown(before);
      const great = ratio >= SLOWER || ratio <= 1 / SLOWER;
      if (elapsed < (great ? this.#publishBigMs : PUBLISH_MS)) return;
      const moved = movedMs(last.position.coordinate, coordinate);
      const size = Math.hypot(...coordinate.vec) + coordinate.height;
      const news =
        great ||
        moved > Math.max(MOVED_MS, MOVED_SHARE * size) ||
        Math.abs((load ?? 0) - (before ?? 0)) > LOAD_STEP;
      if (!news) return;
      this.#publishBigMs =
        elapsed >= 2 * PUBLISH_MS
          ? PUBLISH_BIG_MS
          : great
            ? Math.min(2 * this.#publishBigMs, PUBLISH_MS)
            : this.#publishBigMs;
    }
    const position: Position = { coordinate, ...(load === undefined ? {} : { load }) };
    this.#published = { position, at: nowMs };
    this.#parts.publish(position);
  }
}
