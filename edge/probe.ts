// Probing of other nodes: whom to ask and when, how far they are, how loaded, and whether they still answer. Sans-I/O:
// answers and time come in, probes to send and changes of status come out; nothing is sent or timed here.
//
// Whom: `explore` asks one node every ~1 s: in turn those of followed services that nobody watches, and anybody (that
// moves the coordinate and finds nearer nodes); `watch` asks the nodes that choices depend on every ~1 s: those in use,
// of a followed service all when they are few, else the best three by RTT and by cost. Whoever of a followed service
// leaves an explore unanswered is watched until it is clear why. So a node sends O(services followed) probes, never
// O(nodes).
//
// Status of a watched node, with the times of the worst case (the node dies just after an answer):
//
//            first answer               1.5 s and 3 probes unanswered          10 s unanswered
//   unknown ─────────────▶ alive ──────────────────────────────────▶ suspect ──────────────────▶ dead
//                            ▲     next probe ≤ 1.1 s + 1.5 s = 2.6 s   │                           │
//                            └────── three answers in a row over a hold time that doubles with ─────┘
//                                    every relapse (1 s … 60 s) and halves with every quiet minute
import type { Ipv4 } from '../src/addr.ts';
import { costMs } from '../src/choose.ts';
import { type Coordinate, distanceMs, OwnCoordinate } from '../src/coordinate.ts';
import type { Rng } from '../src/rng.ts';
import type { Deadline } from '../src/time.ts';

/** Mean time between two probes of a watched node, and its jitter. */
export const WATCH_INTERVAL_MS = 1_000;
const JITTER = 0.1;
/** One more while no answer has come; long RTTs wait longer, so that an answer on its way is not overtaken. */
const RETRY_MIN_MS = 300;
const RETRY_MAX_MS = 1_000;
const RETRY_UNKNOWN_MS = 500;
/** Unanswered for so long, and at least so often, is suspect. */
export const SUSPECT_MS = 1_500;
const SUSPECT_PROBES = 3;
/** Unanswered for so long is dead: its established flows are reset. */
export const DEAD_MS = 10_000;
/** A node that is back must answer three in a row over this time; doubled with every relapse. */
export const HOLD_MS = 1_000;
const HOLD_MAX_MS = 60_000;
const HOLD_ANSWERS = 3;
/** Quiet time after which one relapse is forgiven. */
const FORGIVE_MS = 60_000;
/** Suspects are asked at the watch interval for a minute, then rarely. */
const LOST_INTERVAL_MS = 5_000;
const LOST_AFTER_MS = 60_000;
/** Explore: at first fast, so that a new node soon knows where it is. */
const EXPLORE_INTERVAL_MS = 1_000;
const EXPLORE_FIRST_MS = 200;
const EXPLORE_FIRST_COUNT = 50;
/** Answers of which the lowest RTT counts: a little longer way shows after so many seconds, a shorter one at once … */
const RECENT = 8;
/** … and one that is longer by half and by 5 ms after three: no queue of ours stands that high for so long. */
const RISE = 1.5;
const RISE_MS = 5;
const RISE_ANSWERS = 3;
/** How long a measured RTT stands before coordinates know better. Paths change rarely, loads do not: see LOAD_FRESH_MS. */
export const RTT_FRESH_MS = 600_000;
export const LOAD_FRESH_MS = 5_000;
/** A node is watched for so long after a choice, or after the last word that flows of ours live there. */
const USE_MS = 30_000;
/** First probes are spread over so long: many agents learn of the same change at the same moment. */
const SPREAD_MS = 50;
const BEST = 3;
/** Services on at most so many nodes are watched whole: whoever of them dies is known before the next flow comes. */
const FEW = 8;
/** Nodes watched at once, reached only by who uses that many: 256 probes per second of 108 octets are 221 kbit/s
 *  each way. */
export const WATCH_MAX = 256;
/** Probes on their way that are remembered. */
const PENDING_MAX = 1_024;
/** A peer that is watched moves the coordinate this often at most: near nodes asked every second would bend it. */
const COORDINATE_SAMPLE_MS = 10_000;
/** A timer that comes this late shows that this process stood still: what it did not hear meanwhile proves nothing. */
const STALL_MS = 250;

/** Another node, as the keyspace knows it. */
export interface Peer {
  readonly node: string;
  readonly nodeIp: Ipv4;
  readonly ewp: number;
  /** First address of its subnet: its identity in probes. */
  readonly subnet: Ipv4;
  /** As published; probes bring fresher ones. */
  readonly coordinate?: Coordinate;
  readonly load?: number;
}

/** What a probe's answer says. */
export interface ProbeAnswer {
  readonly nonce: number;
  readonly rttMs: number;
  /** Subnet of whoever answered. */
  readonly subnet: Ipv4;
  readonly coordinate?: Coordinate;
  readonly load?: number;
  /** Bit h (of low for 0…31, of high for 32…63): the instance at host h of the subnet is alive and healthy. */
  readonly liveLow: number;
  readonly liveHigh: number;
}

export const STATUSES = ['unknown', 'alive', 'suspect', 'dead'] as const;
export type Status = (typeof STATUSES)[number];

export type ProbeOutput =
  | {
      readonly kind: 'send';
      readonly node: string;
      readonly nodeIp: Ipv4;
      readonly ewp: number;
      readonly nonce: number;
    }
  | {
      readonly kind: 'status';
      readonly node: string;
      readonly nodeIp: Ipv4;
      readonly ewp: number;
      readonly from: Status;
      readonly to: Status;
      readonly why: string;
    };

/** What is known of a node, for choosing and explaining. */
export interface PeerView {
  readonly status: Status;
  readonly rttMs?: number;
  /** The RTT was measured, and not too long ago. */
  readonly confirmed: boolean;
  readonly load?: number;
  /** Milliseconds since its last answer. */
  readonly answeredAgoMs?: number;
}

interface State {
  peer: Peer;
  status: Status;
  /** RTTs of the last answers, newest last; none is older than RTT_FRESH_MS. */
  recent: { readonly ms: number; readonly at: number }[];
  /** The lowest of them: how far it is. What lies above is queues, and hosts that are busy with something else. */
  baseMs: number | undefined;
  /** Smoothed RTT and its mean deviation (RFC 6298 §2): how long to wait for it. */
  rttMs: number | undefined;
  deviationMs: number;
  measuredAt: number;
  coordinate: Coordinate | undefined;
  coordinateAt: number;
  load: number | undefined;
  loadAt: number;
  liveLow: number;
  liveHigh: number;
  /** When the probe was sent that `live` answers; -Infinity: none yet. */
  liveAsOf: number;
  /** Send times of the probes since the last answer, oldest first. */
  unanswered: number[];
  askedAt: number;
  nextAt: number;
  watched: boolean;
  /** Left an explore unanswered: watched until it answers or is suspect. */
  doubted: boolean;
  usedAt: number;
  /** Recovery: answers in a row since the first, and when that was. */
  answers: number;
  answersSince: number;
  relapses: number;
  statusSince: number;
}

export interface ProberCounters {
  sent: number;
  answered: number;
  /** Answers without a matching probe: late beyond memory, doubled or forged. */
  unmatched: number;
  /** Answers by a node that is not the one asked. */
  misdirected: number;
  suspected: number;
  recovered: number;
  stalls: number;
}

export class Prober {
  readonly counters: ProberCounters = {
    sent: 0,
    answered: 0,
    unmatched: 0,
    misdirected: 0,
    suspected: 0,
    recovered: 0,
    stalls: 0,
  };
  readonly #rng: Rng;
  readonly #nonce: () => number;
  readonly #own: OwnCoordinate;
  readonly #peers = new Map<string, State>();
  /** Those that are watched or owe an answer: what the clock is about. */
  readonly #active = new Set<State>();
  /** Those used within USE_MS, and some that were. */
  readonly #used = new Set<State>();
  #names: string[] = [];
  #followed: ReadonlyMap<string, readonly string[]> = new Map();
  /** All nodes of #followed. */
  #followedNodes: ReadonlySet<string> = new Set();
  readonly #pending = new Map<number, { readonly node: string; readonly at: number }>();
  readonly #outputs: ProbeOutput[] = [];
  #exploreAt: number;
  #explored = 0;
  #armed: number | undefined;
  /** The latest time told. */
  #now: number;
  #replan = true;
  /** See `hurry`. */
  #hurried = false;

  /** `nonce` gives unpredictable unsigned 32-bit integers: who never saw a probe cannot answer it. */
  constructor(options: { rng: Rng; nonce: () => number; coordinate?: Coordinate; nowMs: number }) {
    this.#rng = options.rng;
    this.#nonce = options.nonce;
    this.#own = new OwnCoordinate(options.rng, options.coordinate);
    this.#now = options.nowMs;
    this.#exploreAt = options.nowMs + options.rng.unit() * EXPLORE_FIRST_MS;
  }

  get coordinate(): Coordinate {
    return this.#own.position;
  }

  /** All nodes that are known, without this one. What was measured of those that stay is kept. */
  setPeers(peers: readonly Peer[], nowMs: number): void {
    const present = new Set<string>();
    for (const peer of peers) {
      present.add(peer.node);
      const old = this.#peers.get(peer.node);
      if (old !== undefined && old.peer.subnet === peer.subnet) {
        old.peer = peer;
        continue;
      }
      if (old !== undefined) this.#drop(old);
      this.#peers.set(peer.node, newState(peer, nowMs));
    }
    for (const [node, state] of this.#peers)
      if (!present.has(node)) {
        this.#drop(state);
        this.#peers.delete(node);
        this.#own.forget(node);
      }
    this.#names = [...this.#peers.keys()];
    this.#replan = true;
  }

  knows(node: string): boolean {
    return this.#peers.has(node);
  }

  /** Per followed service the nodes of its instances, this node left out. */
  setFollowed(followed: ReadonlyMap<string, readonly string[]>): void {
    this.#followed = followed;
    this.#followedNodes = new Set([...followed.values()].flat());
    this.#replan = true;
  }

  /** Whom the next plan adds is asked at once: somebody is about to choose among them. */
  hurry(): void {
    this.#hurried = true;
    this.#replan = true;
  }

  /** Somebody depends on this node: a new flow went there, flows live there, or an instance there may come back. */
  handleUse(node: string, nowMs: number): void {
    const state = this.#peers.get(node);
    if (state === undefined) return;
    state.usedAt = nowMs;
    this.#used.add(state);
    if (!state.watched) this.#replan = true;
  }

  handleAnswer(answer: ProbeAnswer, nowMs: number): void {
    this.#now = nowMs;
    const probe = this.#pending.get(answer.nonce);
    const state = probe === undefined ? undefined : this.#peers.get(probe.node);
    if (probe === undefined || state === undefined) {
      this.counters.unmatched++;
      return;
    }
    this.#pending.delete(answer.nonce);
    if (answer.subnet !== state.peer.subnet) {
      this.counters.misdirected++;
      return;
    }
    this.counters.answered++;
    this.#measure(state, answer, nowMs);
    if (probe.at >= state.liveAsOf) {
      state.liveLow = answer.liveLow;
      state.liveHigh = answer.liveHigh;
      state.liveAsOf = probe.at;
      state.load = answer.load;
      state.loadAt = nowMs;
    }
    state.doubted = false;
    state.unanswered = state.unanswered.filter((at) => at > probe.at);
    if (!state.watched && state.unanswered.length === 0) this.#active.delete(state);
    this.#recover(state, nowMs);
    if (state.watched) {
      const interval = state.status === 'alive' ? WATCH_INTERVAL_MS : RETRY_MIN_MS;
      state.nextAt = Math.max(nowMs, probe.at + this.#rng.jitter(interval, JITTER));
    }
  }

  /** Call at the deadline, or any time. */
  handleTimeout(nowMs: number): void {
    this.#now = nowMs;
    const late = this.#armed === undefined ? 0 : nowMs - this.#armed;
    if (late > STALL_MS) {
      this.counters.stalls++;
      for (const state of this.#active)
        state.unanswered = state.unanswered.map((at) => Math.min(nowMs, at + late));
    }
    if (this.#replan) this.#plan(nowMs);
    this.#forgetPending(nowMs);
    for (const state of this.#active) {
      this.#judge(state, nowMs);
      if (state.watched && state.nextAt <= nowMs) this.#send(state, nowMs);
    }
    if (this.#exploreAt <= nowMs) this.#explore(nowMs);
    this.#armed = undefined;
  }

  poll(): ProbeOutput | undefined {
    return this.#outputs.shift();
  }

  deadline(): Deadline {
    let at = this.#exploreAt;
    let why = 'explore';
    for (const state of this.#active) {
      if (state.watched && state.nextAt < at) {
        at = state.nextAt;
        why = 'watch';
      }
      const judged = this.#judgedAt(state);
      if (judged < at) {
        at = judged;
        why = 'judge';
      }
    }
    if (this.#replan) {
      at = Number.NEGATIVE_INFINITY;
      why = 'plan';
    } else this.#armed = Math.max(at, this.#now);
    return { at, why };
  }

  view(node: string, nowMs: number): PeerView | undefined {
    const state = this.#peers.get(node);
    if (state === undefined) return undefined;
    const confirmed = this.#isMeasured(state, nowMs);
    const rttMs = this.#rtt(state, nowMs);
    const load = this.#load(state, nowMs);
    return {
      status: state.status,
      confirmed,
      ...(rttMs === undefined ? {} : { rttMs }),
      ...(load === undefined ? {} : { load }),
      ...(Number.isFinite(state.measuredAt) ? { answeredAgoMs: nowMs - state.measuredAt } : {}),
    };
  }

  /** Whether the node's own agent says that the instance at this address is dead or unhealthy. An answer to a probe
   *  that left before the instance was known here (`knownSinceMs`) says nothing about it. */
  isDown(node: string, namespaceIp: Ipv4, knownSinceMs: number): boolean {
    const state = this.#peers.get(node);
    if (state === undefined || state.liveAsOf <= knownSinceMs) return false;
    const host = namespaceIp - state.peer.subnet;
    if (host < 0 || host > 63) return false;
    return (((host < 32 ? state.liveLow : state.liveHigh) >>> (host & 31)) & 1) === 0;
  }

  /** Nodes that are watched at present. */
  watched(): string[] {
    return [...this.#active].filter((state) => state.watched).map((state) => state.peer.node);
  }

  #isMeasured(state: State, nowMs: number): boolean {
    return state.baseMs !== undefined && nowMs - state.measuredAt < RTT_FRESH_MS;
  }

  /** As measured, or as coordinates estimate it: its own word, or what it published when that word is old. */
  #rtt(state: State, nowMs: number): number | undefined {
    if (this.#isMeasured(state, nowMs)) return state.baseMs;
    const { coordinate } = nowMs - state.measuredAt < RTT_FRESH_MS ? state : state.peer;
    const known = coordinate ?? state.coordinate;
    return known === undefined ? undefined : distanceMs(this.#own.position, known);
  }

  #load(state: State, nowMs: number): number | undefined {
    return nowMs - state.loadAt < LOAD_FRESH_MS ? state.load : (state.peer.load ?? state.load);
  }

  #measure(state: State, answer: ProbeAnswer, nowMs: number): void {
    const sample = answer.rttMs;
    state.recent = state.recent.filter(({ at }) => nowMs - at < RTT_FRESH_MS).slice(1 - RECENT);
    state.recent.push({ ms: sample, at: nowMs });
    state.baseMs = lowest(state.recent);
    const latest = state.recent.slice(-RISE_ANSWERS);
    if (latest.length === RISE_ANSWERS && lowest(latest) > state.baseMs * RISE + RISE_MS) {
      state.recent = latest;
      state.baseMs = lowest(latest);
    }
    if (state.rttMs === undefined) {
      state.rttMs = sample;
      state.deviationMs = sample / 2;
      this.#replan = true;
    } else {
      state.deviationMs += (Math.abs(sample - state.rttMs) - state.deviationMs) / 4;
      state.rttMs += (sample - state.rttMs) / 4;
    }
    state.measuredAt = nowMs;
    if (answer.coordinate === undefined) return;
    state.coordinate = answer.coordinate;
    const often = state.watched || this.#followedNodes.has(state.peer.node);
    if (often && nowMs - state.coordinateAt < COORDINATE_SAMPLE_MS) return;
    state.coordinateAt = nowMs;
    this.#own.update(state.peer.node, answer.coordinate, sample);
  }

  #recover(state: State, nowMs: number): void {
    if (state.status === 'alive') {
      const quiet = Math.floor((nowMs - state.statusSince) / FORGIVE_MS);
      if (quiet > 0 && state.relapses > 0) {
        state.relapses = Math.max(0, state.relapses - quiet);
        state.statusSince = nowMs;
      }
      return;
    }
    if (state.status === 'unknown') {
      this.#become(state, 'alive', 'it answers', nowMs);
      return;
    }
    if (state.answers === 0) state.answersSince = nowMs;
    state.answers++;
    const hold = Math.min(HOLD_MS * 2 ** (state.relapses - 1), HOLD_MAX_MS);
    if (state.answers < HOLD_ANSWERS || nowMs - state.answersSince < hold) return;
    this.counters.recovered++;
    this.#become(state, 'alive', `${state.answers} answers in a row over ${Math.round(hold)} ms`, nowMs);
  }

  /** Long RTTs get the time that they need. */
  #patience(state: State): number {
    return SUSPECT_MS + Math.max(0, (state.rttMs ?? 0) + 4 * state.deviationMs - RETRY_UNKNOWN_MS);
  }

  #judgedAt(state: State): number {
    const first = state.unanswered[0];
    if (first === undefined) return Number.POSITIVE_INFINITY;
    if (!state.watched) return first + this.#patience(state);
    if (state.status === 'dead') return Number.POSITIVE_INFINITY;
    // Silent for so long as a suspect too: what was lost long before it proves nothing.
    if (state.status === 'suspect') return Math.max(first, state.statusSince - SUSPECT_MS) + DEAD_MS;
    const last = state.unanswered[SUSPECT_PROBES - 1];
    if (last === undefined) return Number.POSITIVE_INFINITY;
    return Math.max(first + this.#patience(state), last + this.#retry(state));
  }

  #judge(state: State, nowMs: number): void {
    const first = state.unanswered[0];
    if (first === undefined) return;
    if (state.status !== 'alive' && nowMs - first > this.#retry(state)) state.answers = 0;
    if (this.#judgedAt(state) > nowMs) return;
    if (!state.watched) {
      // One that is only explored is asked too rarely to be judged.
      this.#relax(state);
      state.doubted = this.#followedNodes.has(state.peer.node);
      if (state.doubted) this.#replan = true;
      return;
    }
    const silent = Math.round(nowMs - first);
    if (state.status === 'suspect') {
      this.#become(state, 'dead', `no answer for ${silent} ms`, nowMs);
      return;
    }
    this.counters.suspected++;
    state.relapses++;
    state.answers = 0;
    state.doubted = false;
    this.#become(
      state,
      'suspect',
      `${state.unanswered.length} probes in ${silent} ms without an answer`,
      nowMs,
    );
  }

  #become(state: State, to: Status, why: string, nowMs: number): void {
    const from = state.status;
    state.status = to;
    state.statusSince = nowMs;
    this.#replan = true;
    const { node, nodeIp, ewp } = state.peer;
    this.#outputs.push({ kind: 'status', node, nodeIp, ewp, from, to, why });
  }

  #retry(state: State): number {
    if (state.rttMs === undefined) return RETRY_UNKNOWN_MS;
    return Math.min(RETRY_MAX_MS, Math.max(RETRY_MIN_MS, state.rttMs + 4 * state.deviationMs));
  }

  #send(state: State, nowMs: number): void {
    let nonce = this.#nonce();
    while (this.#pending.has(nonce)) nonce = this.#nonce();
    this.#pending.set(nonce, { node: state.peer.node, at: nowMs });
    state.askedAt = nowMs;
    state.unanswered.push(nowMs);
    this.#active.add(state);
    if (state.unanswered.length > 64) state.unanswered.splice(1, 1);
    const lost = isLost(state);
    const rarely = lost && state.answers === 0 && nowMs - state.statusSince > LOST_AFTER_MS;
    const wait = rarely ? LOST_INTERVAL_MS : lost ? WATCH_INTERVAL_MS : this.#retry(state);
    state.nextAt = nowMs + (lost ? this.#rng.jitter(wait, JITTER) : wait);
    this.counters.sent++;
    const { node, nodeIp, ewp } = state.peer;
    this.#outputs.push({ kind: 'send', node, nodeIp, ewp, nonce });
  }

  #explore(nowMs: number): void {
    const interval = this.#explored < EXPLORE_FIRST_COUNT ? EXPLORE_FIRST_MS : EXPLORE_INTERVAL_MS;
    this.#replan = true;
    this.#exploreAt = nowMs + this.#rng.jitter(interval, JITTER);
    if (this.#names.length === 0) return;
    this.#explored++;
    const state = (this.#explored & 1) === 1 ? (this.#unwatched() ?? this.#anybody()) : this.#anybody();
    if (state === undefined || (state.watched && state.unanswered.length > 0)) return;
    this.#send(state, nowMs);
  }

  #anybody(): State | undefined {
    return this.#peers.get(this.#names[this.#rng.below(this.#names.length)]!);
  }

  /** Of followed services who is not watched and was asked longest ago. */
  #unwatched(): State | undefined {
    let longest: State | undefined;
    for (const node of this.#followedNodes) {
      const state = this.#peers.get(node);
      if (state === undefined || state.watched) continue;
      if (longest === undefined || state.askedAt < longest.askedAt) longest = state;
    }
    return longest;
  }

  /** Decides who is watched, as far as WATCH_MAX reaches: half of it is for the best of each service, then come those
   *  that owe an answer and those in use, then the lost and the rest of the small services. */
  #plan(nowMs: number): void {
    this.#replan = false;
    const best = new Set<State>();
    const lost = new Set<State>();
    const few = new Set<State>();
    for (const nodes of this.#followed.values()) {
      const ranked: { readonly state: State; readonly rtt: number; readonly cost: number }[] = [];
      for (const node of nodes) {
        const state = this.#peers.get(node);
        if (state === undefined) continue;
        if (nodes.length <= FEW) few.add(state);
        if (isLost(state)) lost.add(state);
        else {
          const rttMs = this.#rtt(state, nowMs) ?? Number.POSITIVE_INFINITY;
          const load = this.#load(state, nowMs);
          const cost = costMs({ local: false, rttMs, ...(load === undefined ? {} : { load }) });
          ranked.push({ state, rtt: rttMs, cost });
        }
      }
      for (const r of ranked.sort((a, b) => a.rtt - b.rtt).slice(0, BEST)) best.add(r.state);
      for (const r of ranked.sort((a, b) => a.cost - b.cost).slice(0, BEST)) best.add(r.state);
    }
    const owing: State[] = [];
    for (const state of this.#active)
      if (state.watched && state.unanswered.length > 0 && !isLost(state)) owing.push(state);
    for (const node of this.#followedNodes) {
      const state = this.#peers.get(node);
      if (state?.doubted) owing.push(state);
    }
    for (const state of this.#used) if (nowMs - state.usedAt >= USE_MS) this.#used.delete(state);
    const wanted = [
      ...[...best].slice(0, WATCH_MAX / 2),
      ...[owing, this.#used, best, lost, few].flatMap((states) => [...states]),
    ];
    const kept = new Set<State>();
    for (const state of wanted) if (kept.size < WATCH_MAX) kept.add(state);
    for (const state of kept)
      if (!state.watched) {
        state.watched = true;
        state.unanswered = [];
        this.#active.add(state);
        state.nextAt = this.#hurried ? nowMs : nowMs + this.#rng.unit() * SPREAD_MS;
      }
    this.#hurried = false;
    for (const state of this.#active) if (state.watched && !kept.has(state)) this.#relax(state);
  }

  /** Nothing is expected of it any more. */
  #relax(state: State): void {
    state.watched = false;
    state.unanswered = [];
    state.nextAt = Number.POSITIVE_INFINITY;
    this.#active.delete(state);
  }

  #drop(state: State): void {
    this.#relax(state);
    this.#used.delete(state);
  }

  #forgetPending(nowMs: number): void {
    for (const [nonce, { at }] of this.#pending) {
      if (nowMs - at < DEAD_MS && this.#pending.size <= PENDING_MAX) break;
      this.#pending.delete(nonce);
    }
  }
}

function lowest(samples: readonly { readonly ms: number }[]): number {
  return samples.reduce((least, { ms }) => Math.min(least, ms), Number.POSITIVE_INFINITY);
}

function isLost(state: State): boolean {
  return state.status === 'suspect' || state.status === 'dead';
}

function newState(peer: Peer, nowMs: number): State {
  return {
    peer,
    status: 'unknown',
    recent: [],
    baseMs: undefined,
    rttMs: undefined,
    deviationMs: 0,
    measuredAt: Number.NEGATIVE_INFINITY,
    coordinate: peer.coordinate,
    coordinateAt: Number.NEGATIVE_INFINITY,
    load: undefined,
    loadAt: Number.NEGATIVE_INFINITY,
    liveLow: 0,
    liveHigh: 0,
    liveAsOf: Number.NEGATIVE_INFINITY,
    unanswered: [],
    askedAt: Number.NEGATIVE_INFINITY,
    nextAt: Number.POSITIVE_INFINITY,
    watched: false,
    doubted: false,
    usedAt: Number.NEGATIVE_INFINITY,
    answers: 0,
    answersSince: nowMs,
    relapses: 0,
    statusSince: nowMs,
  };
}
