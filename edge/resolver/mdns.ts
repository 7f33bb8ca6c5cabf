// The multicast face of the answer table: RFC 6762 as a state machine without I/O. Decoded queries and table changes
// go in with the time, messages to send come out of `poll`, and `deadline` says when to come back. It answers only
// names of ours; what it does not own gets silence, never NXDOMAIN (§6). Every node gives the same answer for a
// service, so nothing is probed or renamed (§6.6, §9: identical records do not conflict).
import type { Answer, DecodedPacket, Packet } from 'dns-packet';
import { AUTHORITATIVE_ANSWER } from 'dns-packet';
import { formatIpv4, type Ipv4 } from '../../src/addr.ts';
import {
  DNS_TTL_S,
  MDNS_BURST_MAX,
  MDNS_BURST_PAUSE_MS,
  MDNS_NAMES_MAX,
  MDNS_PENDING_MAX,
  MDNS_QUESTIONS_MAX,
  MDNS_RECORDS_BYTES_MAX,
  MDNS_UNICAST_PER_S_MAX,
} from '../../src/limits.ts';
import { formatName, parseName, type ServiceId } from '../../src/name.ts';
import type { Plan } from '../../src/plan.ts';
import { POLICIES } from '../../src/policy.ts';
import { Rng } from '../../src/rng.ts';
import type { NameTable } from '../routes/table.ts';
import { answer, type Decision, type LocalRecord, type Question } from './resolver.ts';

export const MDNS_PORT = 5353;
const TTL_S = DNS_TTL_S; // §10: 120 s for records tied to an address
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
  /** Other names than the table's: a LAN's aliases. */
  readonly resolve?: (question: Question) => Decision;
}

/** A record that we may send, and how it is recognised in known-answer lists. */
interface Ours {
  readonly key: string;
  readonly record: Answer;
  readonly data: string;
}

interface Spoken {
  readonly ours: Ours;
  readonly additionals: readonly Ours[];
}

interface Held extends Spoken {
  readonly dueMs: number;
  /** Set while the asker may still send known answers. */
  readonly from?: string;
}

interface Published {
  readonly service: ServiceId;
  /** As multicast, lower case. */
  readonly name: string;
  readonly address: Ipv4;
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
  readonly #table: NameTable;
  readonly #resolve: (question: Question, needs?: readonly ServiceId[]) => Decision;
  readonly #output: MdnsOutput[] = [];
  /** Last multicast per record, in order of insertion: the oldest is forgotten first. */
  readonly #sentMs = new Map<string, number>();
  readonly #held = new Map<string, Held>();
  readonly #published = new Map<string, Published>();
  readonly #byService = new Map<ServiceId, Set<string>>();
  /** Records waiting to be announced, by when. */
  #announcements: { readonly dueMs: number; readonly ours: Ours }[] = [];
  #burstAtMs = 0;
  readonly #rng: Rng;
  #unicastLeft = MDNS_UNICAST_PER_S_MAX;
  #unicastSinceMs = 0;

  constructor(options: MdnsOptions) {
    this.#table = options.table;
    const { table, resolve } = options;
    const plan = options.plan === undefined ? {} : { plan: options.plan };
    this.#resolve = resolve ?? ((question, needs) => answer(question, table, { needs, ...plan }));
    this.#rng = new Rng(options.seed);
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
    const known = knownAnswers(packet);
    // §7.2: a message without questions continues the list of an earlier one.
    if (known.size > 0) this.#suppress(from.address, known);
    const questions = (packet.questions ?? []).slice(0, MDNS_QUESTIONS_MAX);
    const legacy = from.port !== MDNS_PORT;
    const probe = (packet.authorities ?? []).length > 0;
    const more = packet.flag_tc === true && !legacy;
    const now: Ours[] = [];
    const extra = new Map<string, Ours>();
    const spoken = new Map<string, Spoken>();
    for (const question of questions) {
      const klass = classOf(question.class as string | undefined);
      if ((klass & ~QU) !== CLASS_IN && (klass & ~QU) !== CLASS_ANY) continue;
      const { answers, additionals } = this.#recordsFor(question.name, question.type, needs);
      if (answers.length === 0) this.counters['mdns_unowned']!++;
      const unicast = (klass & QU) !== 0 || from.direct;
      for (const ours of answers) {
        if (!legacy && known.get(ours.key) === ours.data) {
          this.counters['mdns_known']!++;
          continue;
        }
        const sent = this.#sentMs.get(ours.key);
        if (legacy || (unicast && (probe || (sent !== undefined && nowMs - sent < FRESH_MS)))) {
          now.push(ours);
          for (const other of additionals) extra.set(other.key, other);
          continue;
        }
        const free = (sent ?? Number.NEGATIVE_INFINITY) + (probe ? DEFEND_MS : AGAIN_MS);
        if (more) this.#hold(ours, additionals, Math.max(free, nowMs + this.#longWait()), from.address);
        else if (free > nowMs) this.#hold(ours, additionals, free);
        else spoken.set(ours.key, { ours, additionals });
      }
    }
    this.#multicast([...spoken.values()], nowMs);
    if (now.length > 0) this.#unicast(packet, from, now, [...extra.values()], legacy, nowMs);
  }

  /** A decoded answer of somebody else: what it multicasts need not be said again (§7.4). */
  handleResponse(packet: DecodedPacket, nowMs: number): void {
    for (const record of packet.answers ?? []) {
      const heard = oursOf(record);
      if (heard === undefined || (record as { ttl?: number }).ttl! < TTL_S) continue;
      const held = this.#held.get(heard.key);
      if (held === undefined || held.ours.data !== heard.data) continue;
      this.#held.delete(heard.key);
      this.#remember(heard.key, nowMs);
    }
  }

  /** The table has changed for these services: what is new is announced (§8.3), what is gone says goodbye (§10.1). */
  changed(services: Iterable<ServiceId>, nowMs: number): void {
    const gone: Ours[] = [];
    for (const id of services) {
      const current = this.#namesOf(id);
      for (const name of this.#byService.get(id) ?? []) {
        if (current.has(name)) continue;
        gone.push(goodbyeOf(this.#published.get(name)!));
        this.#unpublish(name);
      }
      for (const [name, address] of current) {
        if (this.#published.get(name)?.address === address) continue;
        this.#publish({ service: id, name, address });
        const ours = addressRecord(name, address);
        this.#announcements.push({ dueMs: nowMs, ours }, { dueMs: nowMs + AGAIN_MS, ours });
      }
    }
    this.#announcements.sort((a, b) => a.dueMs - b.dueMs);
    this.counters['mdns_goodbye']! += gone.length;
    for (const part of packed(gone)) this.#emit(part);
    this.handleTimeout(nowMs);
  }

  /** Says goodbye to everything that was multicast; the responder is about to end. */
  goodbye(): void {
    const all = [...this.#published.values()].map(goodbyeOf);
    this.counters['mdns_goodbye']! += all.length;
    for (const part of packed(all)) this.#emit(part);
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
      if (this.#isCurrent(held.ours)) spoken.push(held);
    }
    this.#multicast(spoken, nowMs);
    if (this.#burstAtMs > nowMs) return;
    const due: Ours[] = [];
    while (this.#announcements.length > 0 && this.#announcements[0]!.dueMs <= nowMs) {
      if (due.length >= MDNS_BURST_MAX * 16) break;
      const { ours } = this.#announcements.shift()!;
      if (this.#isCurrent(ours)) due.push(ours);
    }
    if (due.length === 0) return;
    this.#burstAtMs = nowMs + MDNS_BURST_PAUSE_MS;
    this.counters['mdns_announced']! += due.length;
    for (const part of packed(due)) this.#emit(part);
    for (const { key } of due) this.#remember(key, nowMs);
  }

  /** A record may have changed while it waited. */
  #isCurrent(ours: Ours): boolean {
    const type = ours.record.type === 'NSEC' ? 'AAAA' : ours.record.type;
    const { answers } = this.#recordsFor((ours.record as { name: string }).name, type, undefined);
    return answers.some(({ key, data }) => key === ours.key && data === ours.data);
  }

  #recordsFor(
    name: string,
    type: string,
    needs: readonly ServiceId[] | undefined,
  ): { readonly answers: readonly Ours[]; readonly additionals: readonly Ours[] } {
    const decision = this.#resolve({ name, type }, needs);
    if (decision.kind === 'answer') {
      const answers = decision.records.map(localRecord);
      const additionals = decision.additionals.map(localRecord);
      const address = answers.find(({ record }) => record.type === 'A');
      // §6.1: who asks for A will ask for AAAA; the NSEC spares it the wait.
      if (address !== undefined) {
        const other = this.#resolve({ name, type: 'AAAA' }, needs);
        if (other.kind === 'nodata') additionals.push(nsec(name, other.types));
      }
      return { answers, additionals };
    }
    if (decision.kind === 'nodata' && decision.service !== undefined && decision.types.length > 0)
      return { answers: [nsec(name, decision.types)], additionals: [] };
    return { answers: [], additionals: [] };
  }

  #namesOf(id: ServiceId): Map<string, Ipv4> {
    const names = new Map<string, Ipv4>();
    const service = this.#table.service(id);
    for (const policy of POLICIES) {
      const address = service?.addresses[policy];
      if (address !== undefined) names.set(formatName({ service: id, policy }), address);
    }
    // Names of single instances are published when they are asked for; here only whether they still stand.
    for (const held of this.#byService.get(id) ?? []) {
      const name = parseName(held);
      if (!name.ok || !('instance' in name.value)) continue;
      const instance = this.#table.instance(id, name.value.instance);
      if (instance !== undefined) names.set(held, instance.instanceIp);
    }
    return names;
  }

  #publish(entry: Published): void {
    this.#published.delete(entry.name);
    this.#published.set(entry.name, entry);
    let names = this.#byService.get(entry.service);
    if (names === undefined) {
      names = new Set();
      this.#byService.set(entry.service, names);
    }
    names.add(entry.name);
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

  #remember(key: string, nowMs: number): void {
    this.#sentMs.delete(key);
    this.#sentMs.set(key, nowMs);
    if (this.#sentMs.size > MDNS_NAMES_MAX) this.#sentMs.delete(this.#sentMs.keys().next().value!);
  }

  #hold(ours: Ours, additionals: readonly Ours[], dueMs: number, from?: string): void {
    if (this.#held.size >= MDNS_PENDING_MAX) {
      this.counters['mdns_overload']!++;
      return;
    }
    // An earlier asker is not made to wait longer by a later one.
    if (this.#held.has(ours.key)) return;
    this.counters['mdns_held']!++;
    this.#held.set(ours.key, { ours, additionals, dueMs, ...(from === undefined ? {} : { from }) });
  }

  #suppress(from: string, known: ReadonlyMap<string, string>): void {
    for (const [key, data] of known) {
      const held = this.#held.get(key);
      if (held?.from !== from || held.ours.data !== data) continue;
      this.#held.delete(key);
      this.counters['mdns_known']!++;
    }
  }

  /** 400–500 ms. */
  #longWait(): number {
    return KNOWN_MORE_MS + this.#rng.below(101);
  }

  /** Several answers share messages (§6: "aggregate as many responses as possible"). */
  #multicast(spoken: readonly Spoken[], nowMs: number): void {
    const additionals = new Map<string, Ours>();
    for (const { ours, additionals: more } of spoken) {
      this.#remember(ours.key, nowMs);
      for (const other of more) additionals.set(other.key, other);
      const { record } = ours;
      if (record.type !== 'A') continue;
      const name = (record as { name: string }).name.toLowerCase();
      const parsed = parseName(name);
      const address = this.#addressOf(name);
      if (parsed.ok && address !== undefined) this.#publish({ service: parsed.value.service, name, address });
    }
    for (const { ours } of spoken) additionals.delete(ours.key);
    for (const part of packed(spoken.map(({ ours }) => ours))) {
      this.counters['mdns_multicast']!++;
      this.#emit(part, packed([...additionals.values()]).next().value ?? []);
      additionals.clear();
    }
  }

  #addressOf(name: string): Ipv4 | undefined {
    const decision = this.#resolve({ name, type: 'A' });
    const record = decision.kind === 'answer' ? decision.records[0] : undefined;
    return record?.type === 'A' ? record.address : undefined;
  }

  /** §18: QR and AA set, id 0, no question; §10.2: cache-flush on records of which there is one set. */
  #emit(records: readonly Ours[], additionals: readonly Ours[] = []): void {
    this.#output.push({
      kind: 'multicast',
      packet: {
        type: 'response',
        id: 0,
        flags: AUTHORITATIVE_ANSWER,
        answers: records.map(({ record }) => record),
        additionals: additionals.map(({ record }) => record),
      },
    });
  }

  #unicast(
    packet: DecodedPacket,
    to: MdnsSource,
    records: readonly Ours[],
    additionals: readonly Ours[],
    legacy: boolean,
    nowMs: number,
  ): void {
    if (nowMs - this.#unicastSinceMs >= 1_000) {
      this.#unicastSinceMs = nowMs;
      this.#unicastLeft = MDNS_UNICAST_PER_S_MAX;
    }
    if (this.#unicastLeft-- <= 0) {
      this.counters['mdns_overload']!++;
      return;
    }
    this.counters[legacy ? 'mdns_legacy' : 'mdns_unicast']!++;
    // §6.7: a conventional DNS answer: id and question repeated, no cache-flush, ten seconds.
    const dress = ({ record }: Ours): Answer =>
      legacy ? ({ ...record, flush: false, ttl: LEGACY_TTL_S } as Answer) : record;
    const questions = legacy ? (packet.questions ?? []).slice(0, MDNS_QUESTIONS_MAX) : [];
    this.#output.push({
      kind: 'unicast',
      to,
      packet: {
        type: 'response',
        id: legacy ? (packet.id ?? 0) : 0,
        flags: AUTHORITATIVE_ANSWER,
        questions: questions.map(({ name, type }) => ({ name, type, class: 'IN' })),
        // What does not fit one frame is left out: the asker may ask for it by type.
        answers: (packed(records).next().value ?? []).map(dress),
        additionals: (packed(additionals).next().value ?? []).map(dress),
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

const keyOf = (name: string, type: string): string => `${name.toLowerCase()} ${type}`;

function addressRecord(name: string, address: Ipv4): Ours {
  return localRecord({ type: 'A', name, ttl: TTL_S, address });
}

function localRecord(record: LocalRecord): Ours {
  const { name } = record;
  const common = { name, ttl: TTL_S, flush: true } as const;
  switch (record.type) {
    case 'A': {
      const data = formatIpv4(record.address);
      return { key: keyOf(name, 'A'), data, record: { type: 'A', ...common, data } };
    }
    case 'PTR':
      return {
        key: keyOf(name, 'PTR'),
        data: record.target,
        record: { type: 'PTR', ...common, data: record.target },
      };
    case 'SRV': {
      const data = { priority: 0, weight: 0, port: record.port, target: record.target };
      return {
        // Several SRV records of one name are one set; each is known or not by itself.
        key: `${keyOf(name, 'SRV')} ${record.port}`,
        data: String(record.port),
        record: { type: 'SRV', ...common, data },
      };
    }
  }
}

/** §6.1: the next name is the name itself, the bitmap holds what exists. */
function nsec(name: string, types: readonly string[]): Ours {
  return {
    key: keyOf(name, 'NSEC'),
    data: types.join(' '),
    record: {
      type: 'NSEC',
      name,
      ttl: TTL_S,
      flush: true,
      data: { nextDomain: name, rrtypes: [...types] },
    } as unknown as Answer,
  };
}

function goodbyeOf({ name, address }: Published): Ours {
  const ours = addressRecord(name, address);
  return { ...ours, record: { ...ours.record, ttl: 0 } as Answer };
}

/** A record as heard from others, in our terms; undefined for types that we never send. */
function oursOf(record: Answer): Ours | undefined {
  const { type } = record;
  if (type === 'A' || type === 'PTR')
    return { key: keyOf(record.name, type), data: String(record.data), record };
  if (type === 'SRV') {
    const { port } = record.data;
    return { key: `${keyOf(record.name, type)} ${port}`, data: String(port), record };
  }
  if (type === 'NSEC') {
    const { rrtypes } = record.data as unknown as { rrtypes: readonly string[] };
    return { key: keyOf(record.name, type), data: rrtypes.join(' '), record };
  }
  return undefined;
}

/** §7.1: what the asker knows for at least half of its life need not be told. */
function knownAnswers(packet: DecodedPacket): ReadonlyMap<string, string> {
  const known = new Map<string, string>();
  for (const record of (packet.answers ?? []).slice(0, 256)) {
    const heard = oursOf(record);
    if (heard !== undefined && ((record as { ttl?: number }).ttl ?? 0) * 2 >= TTL_S)
      known.set(heard.key, heard.data);
  }
  return known;
}

/** Cuts a list into parts that fit one message each. A record is its name, 12 octets, and data of at most 8 octets
 *  and the name once more (SRV, NSEC). */
function* packed(records: readonly Ours[]): Generator<readonly Ours[], undefined> {
  let part: Ours[] = [];
  let size = 0;
  for (const ours of records) {
    const name = (ours.record as { name: string }).name.length + 2;
    const octets = 10 + name + (ours.record.type === 'A' ? 4 : 8 + name);
    if (size + octets > MDNS_RECORDS_BYTES_MAX && part.length > 0) {
      yield part;
      part = [];
      size = 0;
    }
    part.push(ours);
    size += octets;
  }
  if (part.length > 0) yield part;
  return undefined;
}
