// The multicast face of the answer table: RFC 6762 as a state machine without I/O. Decoded queries and table changes
// go in with the time, messages to send come out of `poll`, and `deadline` says when to come back. It answers only
// names of ours; what it does not own gets silence, never NXDOMAIN (§6). Every node gives the same answer for a
// service, so nothing is probed or renamed (§6.6, §9: identical records do not conflict).
import type { Answer, DecodedPacket, Packet } from 'dns-packet';
import { AUTHORITATIVE_ANSWER } from 'dns-packet';
import { Budget, Budgets } from '../../src/budget.ts';
import {
  MDNS_ASKERS_MAX,
  MDNS_BURST_MAX,
  MDNS_BURST_PAUSE_MS,
  MDNS_HEADERS_BYTES,
  MDNS_NAMES_MAX,
  MDNS_PENDING_MAX,
  MDNS_QUESTIONS_MAX,
  MDNS_RECORDS_BYTES_MAX,
  MDNS_SOURCE_UNICAST_PER_S_MAX,
  MDNS_UNICAST_PER_S_MAX,
} from '../../src/limits.ts';
import { formatName, type ServiceId } from '../../src/name.ts';
import type { Plan } from '../../src/plan.ts';
import { POLICIES } from '../../src/policy.ts';
import { Rng } from '../../src/rng.ts';
import type { NameTable } from '../routes/table.ts';
import {
  covers,
  type Facts,
  factsOf,
  goodbyeOf,
  isSame,
  nsecSet,
  packed,
  type RecordSet,
  setsOf,
  TTL_S,
} from './mdns_records.ts';
import { answer, type Decision, type Question } from './resolver.ts';

export const MDNS_PORT = 5353;
const LEGACY_TTL_S = 10; // §6.7
const QU = 0x8000; // §5.4, the top bit of a question's class
const CLASS_IN = 1;
const CLASS_ANY = 255;
const AGAIN_MS = 1_000; // §6: the same record is not multicast again within a second …
const DEFEND_MS = 250; // … but a probe is answered after a quarter of one
const KNOWN_MORE_MS = 400; // §7.2: 400–500 ms for the rest of a long known-answer list
const FRESH_MS = (TTL_S * 1000) / 4; // §5.4: unicast will do while a multicast is this young

export interface MdnsSource {
  /** Dotted quad. */
  readonly address: string;
  readonly port: number;
  /** True when the message came to our own address and not to the group (§5.5). */
  readonly direct: boolean;
}

export type MdnsOutput =
  | { readonly kind: 'multicast'; readonly packet: Packet }
  | { readonly kind: 'unicast'; readonly packet: Packet; readonly to: MdnsSource };

export interface MdnsOptions {
  readonly table: NameTable;
  readonly plan?: Plan;
  /** For the random waits of §7.2. */
  readonly seed: number;
  /** Of the link; an Ethernet's when not given. */
  readonly mtu?: number;
  /** Other names than the table's: a LAN's aliases. */
  readonly names?: {
    readonly resolve: (question: Question) => Decision;
    /** Those of a service, to be announced. */
    readonly of: (service: ServiceId) => readonly string[];
  };
}

interface Spoken {
  /** Whose name it is. */
  readonly service: ServiceId;
  readonly set: RecordSet;
  readonly additionals: readonly RecordSet[];
}

interface Held extends Spoken {
  dueMs: number;
  /** Who may still send known answers; undefined once somebody waits who will not. */
  askers: Set<string> | undefined;
}

interface Announcement {
  readonly dueMs: number;
  readonly set: RecordSet;
}

interface Published {
  readonly service: ServiceId;
  /** Lower case. */
  readonly name: string;
  /** What was multicast of it, by type. */
  readonly sets: Map<string, RecordSet>;
}

export class MdnsResponder {
  readonly counters: Record<string, number> = {
    mdns_queries: 0,
    mdns_multicast: 0,
    mdns_unicast: 0,
    mdns_legacy: 0,
    mdns_known: 0,
    mdns_held: 0,
    mdns_unowned: 0,
    mdns_announced: 0,
    mdns_goodbye: 0,
    mdns_overload: 0,
  };
  readonly #namesOf: (service: ServiceId) => readonly string[];
  readonly #resolve: (question: Question, needs?: readonly ServiceId[]) => Decision;
  readonly #output: MdnsOutput[] = [];
  /** Last multicast per set, in order of insertion: the oldest is forgotten first. */
  readonly #sent = new Map<string, { readonly set: RecordSet; readonly atMs: number }>();
  readonly #held = new Map<string, Held>();
  readonly #published = new Map<string, Published>();
  readonly #byService = new Map<ServiceId, Set<string>>();
  /** Sets waiting to be announced, by when. */
  #announcements: Announcement[] = [];
  #burstAtMs = 0;
  readonly #rng: Rng;
  readonly #octetsMax: number;
  readonly #unicasts = new Budget({ burst: MDNS_UNICAST_PER_S_MAX, perS: MDNS_UNICAST_PER_S_MAX });
  readonly #unicastsBySource = new Budgets({
    burst: MDNS_SOURCE_UNICAST_PER_S_MAX,
    perS: MDNS_SOURCE_UNICAST_PER_S_MAX,
    callersMax: MDNS_ASKERS_MAX,
  });

  constructor(options: MdnsOptions) {
    const { table, names } = options;
    const plan = options.plan === undefined ? {} : { plan: options.plan };
    this.#resolve = names?.resolve ?? ((question, needs) => answer(question, table, { needs, ...plan }));
    this.#namesOf = names?.of ?? ((service) => POLICIES.map((policy) => formatName({ service, policy })));
    this.#rng = new Rng(options.seed);
    const mtu = options.mtu ?? Number.POSITIVE_INFINITY;
    this.#octetsMax = Math.min(MDNS_RECORDS_BYTES_MAX, mtu - MDNS_HEADERS_BYTES);
  }

  /** Next message to send; drain until undefined after every input. */
  poll(): MdnsOutput | undefined {
    return this.#output.shift();
  }

  /** When handleTimeout wants to be called, on the caller's monotonic clock; undefined = never. */
  deadline(): number | undefined {
    let next: number | undefined;
    for (const { dueMs } of this.#held.values()) if (next === undefined || dueMs < next) next = dueMs;
    const announce = this.#announcements[0];
    if (announce !== undefined) {
      const at = Math.max(announce.dueMs, this.#burstAtMs);
      if (next === undefined || at < next) next = at;
    }
    return next;
  }

  /** A decoded query. `needs` are the services that its sender may use; undefined = any. */
  handleQuery(
    packet: DecodedPacket,
    from: MdnsSource,
    nowMs: number,
    needs?: readonly ServiceId[] | undefined,
  ): void {
    this.counters['mdns_queries']!++;
    const known = factsOf(packet.answers, TTL_S / 2); // §7.1: for at least half of its life
    // §7.2: a message without questions continues the list of an earlier one.
    if (known.size > 0) this.#suppress(from.address, known);
    const questions = (packet.questions ?? []).slice(0, MDNS_QUESTIONS_MAX);
    const legacy = from.port !== MDNS_PORT;
    const probe = (packet.authorities ?? []).length > 0;
    const more = packet.flag_tc === true && !legacy;
    const now = new Map<string, RecordSet>();
    const extra = new Map<string, RecordSet>();
    const spoken = new Map<string, Spoken>();
    for (const question of questions) {
      const klass = classOf(question.class as string | undefined);
      if ((klass & ~QU) !== CLASS_IN && (klass & ~QU) !== CLASS_ANY) continue;
      const { service, answers, additionals } = this.#recordsFor(question.name, question.type, needs);
      if (service === undefined) {
        this.counters['mdns_unowned']!++;
        continue;
      }
      const unicast = (klass & QU) !== 0 || from.direct;
      for (const set of answers) {
        if (!legacy && covers(known, set)) {
          this.counters['mdns_known']!++;
          continue;
        }
        const sentMs = this.#sentMs(set);
        if (legacy || (unicast && (probe || nowMs - sentMs < FRESH_MS))) {
          now.set(set.key, set);
          for (const other of additionals) extra.set(other.key, other);
          continue;
        }
        const free = sentMs + (probe ? DEFEND_MS : AGAIN_MS);
        const said = { service, set, additionals };
        if (more) this.#hold(said, Math.max(free, nowMs + this.#longWait()), from.address);
        else if (free > nowMs) this.#hold(said, free);
        else spoken.set(set.key, said);
      }
    }
    this.#multicast([...spoken.values()], nowMs);
    for (const key of now.keys()) extra.delete(key);
    if (now.size > 0) this.#unicast(packet, from, [...now.values()], [...extra.values()], legacy, nowMs);
  }

  /** A decoded answer of somebody else: what it multicasts need not be said again (§7.4). */
  handleResponse(packet: DecodedPacket, nowMs: number): void {
    const facts = factsOf(packet.answers, TTL_S);
    for (const key of facts.keys()) {
      const held = this.#held.get(key);
      if (held !== undefined && covers(facts, held.set)) this.#remember(held.set, nowMs);
    }
  }

  /**
   * The table has changed for these services: what is new or different is announced (§8.3, §8.4), what is gone says
   * goodbye (§10.1).
   */
  changed(services: Iterable<ServiceId>, nowMs: number): void {
    const gone: RecordSet[] = [];
    for (const service of services) {
      for (const name of [...(this.#byService.get(service) ?? [])]) {
        const { sets } = this.#published.get(name)!;
        for (const said of [...sets.values()]) {
          const set = this.#current(said);
          if (set === undefined) {
            sets.delete(said.type);
            gone.push(said);
          } else if (!isSame(set, said)) this.#announce(service, set, nowMs);
        }
        if (sets.size === 0) this.#unpublish(name);
      }
      for (const name of this.#namesOf(service)) {
        if (this.#published.get(name)?.sets.has('A') === true) continue;
        const [set] = this.#recordsFor(name, 'A', undefined).answers;
        if (set?.type === 'A') this.#announce(service, set, nowMs);
      }
    }
    this.#announcements.sort((a, b) => a.dueMs - b.dueMs);
    this.#sayGoodbye(gone);
    this.handleTimeout(nowMs);
  }

  /** Says goodbye to everything that was multicast; the responder is about to end. */
  goodbye(): void {
    this.#sayGoodbye([...this.#published.values()].flatMap(({ sets }) => [...sets.values()]));
    this.#published.clear();
    this.#byService.clear();
    this.#announcements = [];
    this.#held.clear();
  }

  /** Sends what is due. */
  handleTimeout(nowMs: number): void {
    const spoken: Spoken[] = [];
    for (const [key, held] of this.#held) {
      if (held.dueMs > nowMs) continue;
      this.#held.delete(key);
      // It may have changed while it waited.
      const set = this.#current(held.set);
      if (set !== undefined) spoken.push({ ...held, set });
    }
    this.#multicast(spoken, nowMs);
    if (this.#burstAtMs > nowMs) return;
    const due: RecordSet[] = [];
    const later: Announcement[] = [];
    let records = 0;
    while (this.#announcements.length > 0 && this.#announcements[0]!.dueMs <= nowMs) {
      if (records >= MDNS_BURST_MAX * 16) break;
      const { set } = this.#announcements.shift()!;
      const current = this.#current(set);
      if (current === undefined || !isSame(current, set)) continue;
      const free = this.#sentMs(set) + AGAIN_MS;
      if (free > nowMs) later.push({ dueMs: free, set });
      else {
        due.push(set);
        records += set.records.length;
      }
    }
    if (later.length > 0)
      this.#announcements = [...this.#announcements, ...later].sort((a, b) => a.dueMs - b.dueMs);
    if (due.length === 0) return;
    this.#burstAtMs = nowMs + MDNS_BURST_PAUSE_MS;
    this.counters['mdns_announced']! += due.length;
    this.#emit(due, []);
    for (const set of due) this.#remember(set, nowMs);
  }

  #announce(service: ServiceId, set: RecordSet, nowMs: number): void {
    this.#publish(service, set);
    this.#announcements.push({ dueMs: nowMs, set }, { dueMs: nowMs + AGAIN_MS, set });
  }

  #sayGoodbye(gone: readonly RecordSet[]): void {
    this.counters['mdns_goodbye']! += gone.length;
    this.#emit(gone.map(goodbyeOf), []);
  }

  /** The set of that name and type as it is now; undefined when there is none. */
  #current({ name, type, key }: RecordSet): RecordSet | undefined {
    const { answers } = this.#recordsFor(name, type === 'NSEC' ? 'AAAA' : type, undefined);
    return answers.find((set) => set.key === key);
  }

  #recordsFor(
    name: string,
    type: string,
    needs: readonly ServiceId[] | undefined,
  ): {
    /** Undefined when there is nothing to say. */
    readonly service: ServiceId | undefined;
    readonly answers: readonly RecordSet[];
    readonly additionals: readonly RecordSet[];
  } {
    const decision = this.#resolve({ name, type }, needs);
    if (decision.kind === 'answer') {
      const answers = setsOf(decision.records);
      const additionals = setsOf(decision.additionals);
      // §6.1: who asks for A will ask for AAAA; the NSEC spares it the wait.
      if (answers.some((set) => set.type === 'A')) {
        const other = this.#resolve({ name, type: 'AAAA' }, needs);
        if (other.kind === 'nodata') additionals.push(nsecSet(name, other.types));
      }
      return { service: decision.service, answers, additionals };
    }
    if (decision.kind === 'nodata' && decision.service !== undefined && decision.types.length > 0)
      return { service: decision.service, answers: [nsecSet(name, decision.types)], additionals: [] };
    return { service: undefined, answers: [], additionals: [] };
  }

  /** Notes what caches hold of a name from now on. */
  #publish(service: ServiceId, set: RecordSet): void {
    const name = set.name.toLowerCase();
    const entry = this.#published.get(name) ?? { service, name, sets: new Map<string, RecordSet>() };
    entry.sets.set(set.type, set);
    this.#published.delete(name);
    this.#published.set(name, entry);
    let names = this.#byService.get(service);
    if (names === undefined) {
      names = new Set();
      this.#byService.set(service, names);
    }
    names.add(name);
    if (this.#published.size > MDNS_NAMES_MAX) this.#unpublish(this.#published.keys().next().value!);
  }

  #unpublish(name: string): void {
    const entry = this.#published.get(name);
    if (entry === undefined) return;
    this.#published.delete(name);
    const names = this.#byService.get(entry.service);
    names?.delete(name);
    if (names?.size === 0) this.#byService.delete(entry.service);
  }

  /** When exactly this was multicast last. */
  #sentMs(set: RecordSet): number {
    const sent = this.#sent.get(set.key);
    return sent !== undefined && isSame(sent.set, set) ? sent.atMs : Number.NEGATIVE_INFINITY;
  }

  /** Everybody has heard it: nobody waits for it any more. */
  #remember(set: RecordSet, nowMs: number): void {
    this.#held.delete(set.key);
    this.#sent.delete(set.key);
    this.#sent.set(set.key, { set, atMs: nowMs });
    if (this.#sent.size > MDNS_NAMES_MAX) this.#sent.delete(this.#sent.keys().next().value!);
  }

  #hold(spoken: Spoken, dueMs: number, from?: string): void {
    const { set } = spoken;
    const held = this.#held.get(set.key);
    if (held !== undefined) {
      // An earlier asker is not made to wait longer by a later one.
      held.dueMs = Math.min(held.dueMs, dueMs);
      if (from === undefined || (held.askers?.size ?? 0) >= MDNS_ASKERS_MAX) held.askers = undefined;
      else held.askers?.add(from);
      return;
    }
    if (this.#held.size >= MDNS_PENDING_MAX) {
      this.counters['mdns_overload']!++;
      return;
    }
    this.counters['mdns_held']!++;
    const askers = from === undefined ? undefined : new Set([from]);
    this.#held.set(set.key, { ...spoken, dueMs, askers });
  }

  /** What the last one who waits for it knows is not sent. */
  #suppress(from: string, known: Facts): void {
    for (const key of known.keys()) {
      const held = this.#held.get(key);
      if (held?.askers?.has(from) !== true || !covers(known, held.set)) continue;
      this.counters['mdns_known']!++;
      held.askers.delete(from);
      if (held.askers.size === 0) this.#held.delete(key);
    }
  }

  /** 400–500 ms. */
  #longWait(): number {
    return KNOWN_MORE_MS + this.#rng.below(101);
  }

  /** Several answers share messages (§6: "aggregate as many responses as possible"). */
  #multicast(spoken: readonly Spoken[], nowMs: number): void {
    if (spoken.length === 0) return;
    const additionals = new Map<string, RecordSet>();
    for (const { additionals: more } of spoken) for (const other of more) additionals.set(other.key, other);
    for (const { set } of spoken) {
      this.#remember(set, nowMs);
      additionals.delete(set.key);
    }
    const answers = spoken.map(({ set }) => set);
    this.counters['mdns_multicast']! += this.#emit(answers, [...additionals.values()]);
    for (const { service, set, additionals: more } of spoken)
      for (const said of [set, ...more]) this.#publish(service, said);
  }

  /** §18: QR and AA set, id 0, no question; §10.2: cache-flush, since a set is always sent whole. */
  #emit(answers: readonly RecordSet[], additionals: readonly RecordSet[]): number {
    const parts = packed(answers, additionals, this.#octetsMax);
    for (const part of parts)
      this.#output.push({
        kind: 'multicast',
        packet: { type: 'response', id: 0, flags: AUTHORITATIVE_ANSWER, ...part },
      });
    return parts.length;
  }

  #unicast(
    packet: DecodedPacket,
    to: MdnsSource,
    answers: readonly RecordSet[],
    additionals: readonly RecordSet[],
    legacy: boolean,
    nowMs: number,
  ): void {
    if (!this.#unicastsBySource.take(to.address, nowMs) || !this.#unicasts.take(nowMs)) {
      this.counters['mdns_overload']!++;
      return;
    }
    this.counters[legacy ? 'mdns_legacy' : 'mdns_unicast']!++;
    const questions = legacy ? (packet.questions ?? []).slice(0, MDNS_QUESTIONS_MAX) : [];
    const octets = questions.reduce((sum, { name }) => sum + name.length + 6, 0);
    // What does not fit one frame is left out: the asker may ask for it by type.
    const [part, rest] = packed(answers, additionals, this.#octetsMax - octets);
    if (part === undefined) return;
    // §6.7: a conventional DNS answer: id and question repeated, no cache-flush, ten seconds. A set that was cut does
    // not speak for what was left out.
    const dress = (record: Answer): Answer => {
      if (legacy) return { ...record, flush: false, ttl: LEGACY_TTL_S } as Answer;
      return rest === undefined ? record : ({ ...record, flush: false } as Answer);
    };
    this.#output.push({
      kind: 'unicast',
      to,
      packet: {
        type: 'response',
        id: legacy ? (packet.id ?? 0) : 0,
        flags: AUTHORITATIVE_ANSWER,
        questions: questions.map(({ name, type }) => ({ name, type, class: 'IN' })),
        answers: part.answers.map(dress),
        additionals: part.additionals.map(dress),
      },
    });
  }
}

/** dns-packet gives a question's class as a mnemonic, or `UNKNOWN_n` when the QU bit is set. */
function classOf(text: string | undefined): number {
  if (text === undefined || text === 'IN') return CLASS_IN;
  if (text === 'ANY') return CLASS_ANY;
  const match = /^UNKNOWN_(\d+)$/.exec(text);
  return match === null ? 0 : Number(match[1]);
}
