// From the keyspace to the routing table: a reducer that applies typed batches, and the follower that feeds it, tells
// others what changed, and answers "has my own write arrived?". It is the table's only author. It follows either
// everything or only what this node is interested in (interest.ts), and with each instance the record of its node.
// It decides nothing about policies and opens no connection itself.
import type { Keyspace, KeyspaceBatch, KeyspaceListener } from '../../coordinator/keyspace.ts';
import type { Cidr, Ipv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import type { Key, Keys } from '../../src/keys.ts';
import { CALLS_MAX, DNS_LOOKUP_WAIT_MS, UNOWNED_ADDRESSES_MAX } from '../../src/limits.ts';
import type { ServiceId } from '../../src/name.ts';
import { Interest, type InterestLimits } from './interest.ts';
import type { Snapshot } from './snapshot.ts';
import { type RouteDelta, RouteTable } from './table.ts';

/** Applies a batch to the table and says what changed. Keys that are no routes pass unnoticed. */
export function applyBatch(table: RouteTable, batch: KeyspaceBatch): RouteDelta {
  const services = new Set<ServiceId>();
  const nodes = new Set<string>();
  // Deletions first: an address that moved within one batch ends with its new owner.
  for (const key of batch.deletes) remove(table, key, services, nodes);
  for (const put of batch.puts)
    switch (put.kind) {
      case 'service':
        table.putService(put.value);
        services.add(put.value.id);
        break;
      case 'instance':
        table.putInstance(put.value);
        services.add(put.value.service);
        break;
      case 'node':
        table.putNode(put.value);
        nodes.add(put.value.node);
        break;
    }
  for (const heir of table.takeHeirs()) services.add(heir);
  table.revision = Math.max(table.revision, batch.revision);
  return { services, nodes };
}

function remove(table: RouteTable, key: Key, services: Set<ServiceId>, nodes: Set<string>): void {
  switch (key.kind) {
    case 'service':
      table.deleteService(key.service);
      services.add(key.service);
      break;
    case 'instance':
      table.deleteInstance(key.service, key.instance);
      services.add(key.service);
      break;
    case 'node':
      table.deleteNode(key.node);
      nodes.add(key.node);
      break;
  }
}

const ROUTE_SUBTREES = ['nodes', 'services', 'instances'] as const;
export type RouteSubtree = (typeof ROUTE_SUBTREES)[number];

export interface RouteFollowerOptions {
  readonly keys: Keys;
  /** Makes the keyspace that tells us; `main.ts` and the agent know the store, we do not. */
  readonly open: (listener: KeyspaceListener) => Keyspace;
  /** Runs once after that long; the returned function calls it off. */
  readonly after: (ms: number, run: () => void) => () => void;
  readonly table?: RouteTable;
  /** Absent: everything is followed. */
  readonly interest?: InterestOptions;
  /** Of everything, only these: for a listing that shows nothing else. */
  readonly subtrees?: readonly RouteSubtree[];
  /** What was followed before a restart; it serves until etcd has answered for each path. */
  readonly restored?: Snapshot;
}

export interface InterestOptions extends InterestLimits {
  /** Monotonic milliseconds. */
  readonly now: () => number;
  /** The service that a ServiceIP or InstanceIP belongs to, asked of the store. */
  readonly ownerOf: (address: Ipv4) => Promise<ServiceId | undefined>;
  /** Whether a node holds that subnet, asked of the store. */
  readonly subnetTaken: (subnet: Cidr) => Promise<boolean>;
  /** This node's id, when a NAT hides it: the records of those who call it are followed. */
  readonly called?: string;
}

interface Waiter {
  readonly revision: number;
  readonly service: ServiceId | undefined;
  readonly resolve: () => void;
}

interface Awaited {
  readonly service: ServiceId;
  readonly told: Promise<boolean>;
  readonly end: (isTold: boolean) => void;
}

const REFUSED = Promise.resolve(false);

/** Revisions remembered for `waitFor`: a burst of deploys waits for far fewer. */
const RECENT_MAX = 4_096;

/** How often idle interests are looked for, as a part of the shorter limit. */
const EXPIRY_FRACTION = 0.5;

export class RouteFollower {
  readonly table: RouteTable;
  readonly keyspace: Keyspace;
  readonly #keys: Keys;
  readonly #after: RouteFollowerOptions['after'];
  readonly #deltas = new Set<(delta: RouteDelta) => void>();
  readonly #liveness = new Set<(live: boolean) => void>();
  readonly #waiters = new Set<Waiter>();
  /** By each path of a service: those who wait for the first listings of it. */
  readonly #awaited = new Map<string, Awaited>();
  readonly #recent = new Set<number>();
  /** Keys from the snapshot whose path is not followed yet. */
  readonly #known = new Set<string>();
  readonly #options: InterestOptions | undefined;
  readonly #interest: Interest | undefined;
  #declared: ReadonlySet<ServiceId> = new Set();
  readonly #exposed = new Set<ServiceId>();
  /** Node paths that the instances of a service are on, those of callers by their ids, and how many want each. */
  readonly #nodesOf = new Map<ServiceId, ReadonlySet<string>>();
  readonly #callers = new Map<string, string>();
  readonly #nodeUsers = new Map<string, number>();
  /** When an address was last looked up in vain. */
  readonly #unowned = new Map<Ipv4, number>();
  /** Addresses that are being looked up; bases of node subnets among them. */
  readonly #asking = new Map<Ipv4, Promise<boolean>>();
  readonly #exists = (service: ServiceId): boolean =>
    this.table.service(service) !== undefined || this.table.instancesOf(service).length > 0;
  #cancelExpiry: () => void = () => {};
  #live = false;
  #closed = false;

  constructor(options: RouteFollowerOptions) {
    this.table = options.table ?? new RouteTable();
    this.#keys = options.keys;
    this.#after = options.after;
    this.#options = options.interest;
    this.#interest = options.interest === undefined ? undefined : new Interest(options.interest);
    this.keyspace = options.open({
      batch: (batch) => this.#take(batch),
      live: () => this.#judgeLive(),
    });
    // The plan is followed in any case: it is one key, and says whether the store is there.
    this.keyspace.follow(options.keys.prefix('config'));
    if (options.restored !== undefined) this.#restore(options.restored);
    if (this.#interest === undefined)
      for (const subtree of options.subtrees ?? ROUTE_SUBTREES) this.#follow(options.keys.prefix(subtree));
    else {
      this.keyspace.follow(options.keys.prefix('exposed'));
      const { called } = this.#options ?? {};
      if (called !== undefined) this.keyspace.follow(options.keys.callsTo(called));
      this.#armExpiry();
    }
  }

  /** True while everything that is followed is whole and watched. The table stays valid either way. */
  get live(): boolean {
    return this.#live;
  }
  /** Records that are ignored, by key, with the reason. */
  get problems(): ReadonlyMap<string, EdgewayError> {
    return this.keyspace.problems;
  }
  /** Services that are followed by interest; undefined when everything is. */
  get interests(): number | undefined {
    return this.#interest?.size;
  }

  /** Ids of the nodes that ask this one to greet them. */
  callers(): IterableIterator<string> {
    return this.#callers.keys();
  }

  /** Told after each batch, with the table already changed. Returns the way to stop. */
  onDelta(listener: (delta: RouteDelta) => void): () => void {
    this.#deltas.add(listener);
    return () => this.#deltas.delete(listener);
  }
  onLive(listener: (live: boolean) => void): () => void {
    this.#liveness.add(listener);
    return () => this.#liveness.delete(listener);
  }

  /** Services that instances here are or declare in `needs`: followed for as long as they are named here. */
  pin(services: ReadonlySet<ServiceId>): void {
    this.#declared = services;
    this.#repin();
  }

  /** Exposed services are published by every node, so every node follows them. */
  #repin(): void {
    const { interest, now } = this.#demand();
    if (interest === undefined) return;
    for (const service of interest.pin(new Set([...this.#declared, ...this.#exposed]), now))
      this.#begin(service);
  }

  /**
   * Somebody asks for a service; `asker` is whose budget new ones are taken from. Undefined when the table can answer
   * now (also that there is none); otherwise a promise that says whether it can: true once it does, false when the
   * store does not tell within DNS_LOOKUP_WAIT_MS or the service is not followed for want of room or budget. Never
   * rejects. All who wait for one service share one promise, so that waiting costs the same for any number of them.
   */
  ask(service: ServiceId, asker?: number): Promise<boolean> | undefined {
    const { interest, now } = this.#demand();
    if (interest === undefined) return undefined;
    const use = interest.use(service, now, this.#live, this.#exists, asker);
    if (use.kind === 'refused') return REFUSED;
    if (use.kind === 'begin') {
      if (use.end !== undefined) this.#end(use.end);
      this.#begin(service);
    }
    return this.#isTold(service) ? undefined : this.#wait(service);
  }

  /**
   * Somebody asks for an address that no route knows: finds its service and follows it. True when the table can tell
   * whose it is, or that it is nobody's; false as for `ask`. Never rejects.
   */
  async askAddress(address: Ipv4, asker?: number): Promise<boolean> {
    const { interest, now } = this.#demand();
    const options = this.#options;
    if (interest === undefined || options === undefined) return this.table.synced;
    const known = this.table.nameOf(address);
    if (known !== undefined) return this.ask(known.service) ?? true;
    const vain = this.#unowned.get(address);
    if (vain !== undefined && now - vain < options.negativeMs) return true;
    return this.#askOnce(address, asker, () => this.#findOwner(address, options));
  }

  /** The same for a subnet: true when the table can tell whether a node holds it. */
  async askSubnet(subnet: Cidr, asker?: number): Promise<boolean> {
    const { table } = this;
    if (table.isNodeSubnet(subnet.base) !== undefined) return true;
    if (this.#options === undefined) {
      // Every node is in the table.
      if (table.synced) table.tellSubnet(subnet.base, false);
      return table.synced;
    }
    const { subnetTaken } = this.#options;
    return this.#askOnce(subnet.base, asker, async () => {
      table.tellSubnet(subnet.base, await subnetTaken(subnet));
      return true;
    });
  }

  /** One look-up of an address at a time: a store that is away is not asked per packet or question. */
  #askOnce(address: Ipv4, asker: number | undefined, find: () => Promise<boolean>): Promise<boolean> {
    const { interest, now } = this.#demand();
    const held = this.#asking.get(address);
    if (held !== undefined) return held;
    if (this.#asking.size >= UNOWNED_ADDRESSES_MAX || interest?.afford(asker, now) === false) return REFUSED;
    const asking = find()
      .catch(() => false)
      .finally(() => this.#asking.delete(address));
    this.#asking.set(address, asking);
    return asking;
  }

  async #findOwner(address: Ipv4, options: InterestOptions): Promise<boolean> {
    const service = await options.ownerOf(address);
    if (service !== undefined) return (await this.ask(service)) ?? true;
    this.#unowned.delete(address);
    this.#unowned.set(address, options.now());
    if (this.#unowned.size > UNOWNED_ADDRESSES_MAX)
      for (const oldest of this.#unowned.keys()) {
        this.#unowned.delete(oldest);
        break;
      }
    return true;
  }

  /** Resolves when the first listing of everything that is followed is complete; rejects `timeout`. */
  synced(timeoutMs: number): Promise<void> {
    if (this.table.synced) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const end = this.onDelta(() => {
        if (!this.table.synced) return;
        cancel();
        end();
        resolve();
      });
      const cancel = this.#after(timeoutMs, () => {
        end();
        reject(new EdgewayError('timeout', `the keyspace was not listed within ${timeoutMs} ms`));
      });
    });
  }

  /**
   * Resolves when the table shows the write that had this revision (read your writes); at once for 0. Rejects
   * `timeout`. The write must have touched something that is followed; when all of it belongs to one service, naming
   * it tells a deletion also where a new listing swallowed it and other paths have nothing new.
   */
  waitFor(revision: number, timeoutMs: number, service?: ServiceId): Promise<void> {
    if (this.#reached(revision, service) || this.keyspace.holds(revision)) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const waiter: Waiter = {
        revision,
        service,
        resolve: () => {
          cancel();
          this.#waiters.delete(waiter);
          resolve();
        },
      };
      const cancel = this.#after(timeoutMs, () => {
        this.#waiters.delete(waiter);
        reject(
          new EdgewayError(
            'timeout',
            `the watch did not bring revision ${revision} within ${timeoutMs} ms; it stands at ${this.table.revision}`,
          ),
        );
      });
      this.#waiters.add(waiter);
    });
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.#cancelExpiry();
    for (const { end } of [...this.#awaited.values()]) end(false);
    this.#deltas.clear();
    this.#liveness.clear();
    await this.keyspace.close();
  }

  #demand(): { interest: Interest | undefined; now: number } {
    return { interest: this.#interest, now: this.#options?.now() ?? 0 };
  }

  #pathsOf(service: ServiceId): string[] {
    return [this.#keys.build({ kind: 'service', service }), this.#keys.instancesOf(service)];
  }

  #begin(service: ServiceId): void {
    for (const path of this.#pathsOf(service)) this.#follow(path);
  }

  /** Follows a path, and what the snapshot held below it is checked against the first listing. */
  #follow(path: string): void {
    const known = [...this.#known].filter(
      (key) => key === path || (path.endsWith('/') && key.startsWith(path)),
    );
    for (const key of known) this.#known.delete(key);
    this.keyspace.follow(path, known);
  }

  #restore({ revision, records }: Snapshot): void {
    // Of nodes, those that instances are on: who called may not do so any more, and is followed anew if it does.
    const homes = new Set(records.flatMap(({ kind, value }) => (kind === 'instance' ? [value.node] : [])));
    const kept = records.filter(
      ({ kind, value }) => this.#interest === undefined || kind !== 'node' || homes.has(value.node),
    );
    for (const { key } of kept) this.#known.add(this.#keys.build(key));
    const puts = kept.map((record) => ({ ...record, createRevision: 0, modRevision: 0 }));
    const delta = applyBatch(this.table, {
      kind: 'changes',
      path: this.#keys.root,
      revision,
      puts,
      deletes: [],
      brought: [],
    });
    this.table.synced = true;
    const { interest, now } = this.#demand();
    if (interest === undefined) return;
    for (const service of delta.services) {
      interest.resume(service, now);
      this.#begin(service);
      this.#followNodes(service);
    }
  }

  #end(service: ServiceId): void {
    for (const path of this.#pathsOf(service)) {
      this.#awaited.get(path)?.end(false);
      void this.keyspace.unfollow(path);
    }
  }

  #isTold(service: ServiceId): boolean {
    return this.#pathsOf(service).every((path) => this.keyspace.isComplete(path));
  }

  #wait(service: ServiceId): Promise<boolean> {
    const paths = this.#pathsOf(service);
    const held = this.#awaited.get(paths[0]!);
    if (held !== undefined) return held.told;
    let settle = (_told: boolean): void => {};
    const told = new Promise<boolean>((resolve) => {
      settle = resolve;
    });
    const end = (isTold: boolean): void => {
      cancel();
      for (const path of paths) this.#awaited.delete(path);
      settle(isTold);
    };
    const cancel = this.#after(DNS_LOOKUP_WAIT_MS, () => end(false));
    for (const path of paths) this.#awaited.set(path, { service, told, end });
    return told;
  }

  #armExpiry(): void {
    const options = this.#options;
    const interest = this.#interest;
    if (options === undefined || interest === undefined) return;
    const everyMs = Math.min(options.idleMs, options.negativeMs) * EXPIRY_FRACTION;
    this.#cancelExpiry = this.#after(everyMs, () => {
      if (this.#closed) return;
      const ended = interest.expire(options.now(), this.#live, this.#exists);
      for (const service of ended) this.#end(service);
      this.table.forgetSubnets();
      this.#armExpiry();
    });
  }

  #take(batch: KeyspaceBatch): void {
    const delta = applyBatch(this.table, batch);
    const wasSynced = this.table.synced;
    this.table.synced ||= this.keyspace.complete;
    for (const revision of batch.brought) this.#remember(revision);
    // A listing that swallowed the change somebody waits for still shows its revision.
    if (this.#waiters.size > 0) for (const { modRevision } of batch.puts) this.#remember(modRevision);
    let called = false;
    if (this.#interest !== undefined) {
      for (const service of delta.services) this.#followNodes(service);
      this.#takeExposed(batch);
      called = this.#takeCalls(batch);
    }
    if (delta.services.size > 0 || delta.nodes.size > 0 || called || wasSynced !== this.table.synced)
      for (const listener of this.#deltas) listener(delta);
    if (batch.kind === 'snapshot') {
      const awaited = this.#awaited.get(batch.path);
      if (awaited !== undefined && this.#isTold(awaited.service)) awaited.end(true);
    }
    for (const waiter of this.#waiters) if (this.#reached(waiter.revision, waiter.service)) waiter.resolve();
  }

  #takeExposed(batch: KeyspaceBatch): void {
    let changed = false;
    for (const key of batch.deletes)
      if (key.kind === 'exposed') changed = this.#exposed.delete(key.service) || changed;
    for (const { kind, key } of batch.puts)
      if (kind === 'exposed') {
        this.#exposed.add(key.service);
        changed = true;
      }
    if (changed) this.#repin();
  }

  /** Follows the records of the nodes that a service's instances are on, and no longer those that they left. */
  #followNodes(service: ServiceId): void {
    const before = this.#nodesOf.get(service) ?? new Set();
    const now = new Set<string>();
    for (const { cluster, node } of this.table.instancesOf(service))
      now.add(this.#keys.build({ kind: 'node', cluster, node }));
    for (const path of now) if (!before.has(path)) this.#useNode(path);
    for (const path of before) if (!now.has(path)) this.#leaveNode(path);
    if (now.size > 0) this.#nodesOf.set(service, now);
    else this.#nodesOf.delete(service);
  }

  /** True when others call than before. */
  #takeCalls(batch: KeyspaceBatch): boolean {
    let changed = false;
    for (const key of batch.deletes) {
      const path = key.kind === 'call' ? this.#callers.get(key.caller) : undefined;
      if (key.kind !== 'call' || path === undefined) continue;
      this.#callers.delete(key.caller);
      this.#leaveNode(path);
      changed = true;
    }
    for (const { kind, key, value } of batch.puts) {
      if (kind !== 'call') continue;
      const { caller } = key;
      const before = this.#callers.get(caller);
      const path = this.#keys.build({ kind: 'node', cluster: value.cluster, node: caller });
      if (before === path || (before === undefined && this.#callers.size >= CALLS_MAX)) continue;
      this.#callers.set(caller, path);
      this.#useNode(path);
      if (before !== undefined) this.#leaveNode(before);
      changed = true;
    }
    return changed;
  }

  #useNode(path: string): void {
    this.#nodeUsers.set(path, (this.#nodeUsers.get(path) ?? 0) + 1);
    this.#follow(path);
  }

  #leaveNode(path: string): void {
    const users = (this.#nodeUsers.get(path) ?? 1) - 1;
    if (users > 0) this.#nodeUsers.set(path, users);
    else {
      this.#nodeUsers.delete(path);
      void this.keyspace.unfollow(path);
    }
  }

  #reached(revision: number, service: ServiceId | undefined): boolean {
    if (revision <= this.keyspace.reached || this.#recent.has(revision)) return true;
    if (service === undefined) return false;
    return this.#pathsOf(service).every((path) => this.keyspace.reachedOf(path) >= revision);
  }

  #remember(revision: number): void {
    this.#recent.add(revision);
    if (this.#recent.size <= RECENT_MAX) return;
    for (const oldest of this.#recent) {
      this.#recent.delete(oldest);
      return;
    }
  }

  #judgeLive(): void {
    const live = this.keyspace.live;
    if (live === this.#live) return;
    this.#live = live;
    for (const listener of this.#liveness) listener(live);
  }
}
