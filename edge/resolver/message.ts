// DNS messages for the unicast face: a query's bytes into what is asked, a decision into bytes. Encoding and decoding
// are dns-packet's; around it stands what it does not check (label lengths, dots inside labels, pointers in
// questions), and a walk over an upstream's answer that never needs to understand a record. Every function takes
// hostile bytes and returns a value; none throws. The question of an answer is always the asker's own bytes, so its
// spelling (0x20) survives.
//
//    0      2      4        6        8        10       12
//   ├── id ─┼flags─┼qdcount─┼ancount─┼nscount─┼arcount─┼ question … answers … authorities … additionals
import { Buffer } from 'node:buffer';
import * as packet from 'dns-packet';
import { formatIpv4 } from '../../src/addr.ts';
import { DNS_UDP_EDNS_MAX, DNS_UDP_PLAIN_MAX } from '../../src/limits.ts';
import { LABEL_LENGTH_MAX } from '../../src/name.ts';
import { countsFit } from '../../src/wire/dns.ts';
import type { Decision, LocalRecord } from './resolver.ts';

const HEADER = 12; // RFC 1035 §4.1.1
const NAME_MAX = 255; // RFC 1035 §2.3.4, with length octets and the root
const QR = 0x8000;
const AA = 0x0400;
const TC = 0x0200;
const RD = 0x0100;
const RA = 0x0080;
const CD = 0x0010;
const OPCODE = 0x7800;
const TYPE_SOA = 6;
const TYPE_OPT = 41;
const TYPE_ANY = 255;

export const RCODE = { ok: 0, formerr: 1, servfail: 2, nxdomain: 3, notimp: 4, refused: 5 } as const;
const BADVERS_EXTENDED = 1; // RCODE 16 = 1 in the OPT's upper eight bits (RFC 6891 §9)

/** Extended DNS errors (RFC 8914 §4) that we attach when the asker speaks EDNS; `dig` prints them. */
const EDE = { other: 0, notReady: 14, prohibited: 18, noReachable: 22 } as const;
const EDE_OPTION = 15;

export interface Query {
  readonly id: number;
  readonly flags: number;
  /** As asked, without the trailing dot; `.` is the root. */
  readonly name: string;
  /** IANA mnemonic, or `UNKNOWN_n`. */
  readonly type: string;
  readonly class: string;
  /** The question section, byte for byte. */
  readonly question: Buffer;
  /** False when a label holds a dot or a byte outside ASCII: such a name never is one of ours. */
  readonly plain: boolean;
  /** EDNS0, when the asker sent an OPT record (RFC 6891). */
  readonly edns?: { readonly version: number; readonly udpSize: number; readonly dnssecOk: boolean };
}

/** `reply` is the error answer to send; without it the datagram deserves silence. */
export type Parsed = { readonly query: Query } | { readonly reply: Buffer | undefined };

/** A query's meaning, or the error answer that it deserves. */
export function parseQuery(message: Buffer): Parsed {
  if (message.length < HEADER) return { reply: undefined };
  const flags = message.readUInt16BE(2);
  // An answer is never answered: two servers would talk for ever.
  if ((flags & QR) !== 0) return { reply: undefined };
  if ((flags & OPCODE) !== 0) return { reply: bare(message, RCODE.notimp) };
  if (message.readUInt16BE(4) !== 1 || !countsFit(message)) return { reply: bare(message, RCODE.formerr) };
  const end = questionEnd(message);
  if (end === undefined) return { reply: bare(message, RCODE.formerr) };
  let decoded: packet.DecodedPacket;
  try {
    decoded = packet.decode(message);
  } catch {
    return { reply: bare(message, RCODE.formerr) };
  }
  const asked = decoded.questions?.[0];
  if (asked === undefined) return { reply: bare(message, RCODE.formerr) };
  const options = (decoded.additionals ?? []).filter(({ type }) => type === 'OPT');
  if (options.length > 1) return { reply: bare(message, RCODE.formerr) }; // RFC 6891 §6.1.1
  const opt = options[0] as
    | { readonly ednsVersion: number; readonly udpPayloadSize: number; readonly flag_do: boolean }
    | undefined;
  const query: Query = {
    id: message.readUInt16BE(0),
    flags,
    name: asked.name,
    type: asked.type,
    class: asked.class ?? 'IN',
    question: Buffer.from(message.subarray(HEADER, end)),
    plain: isPlain(message, end),
    ...(opt === undefined
      ? {}
      : {
          edns: { version: opt.ednsVersion, udpSize: opt.udpPayloadSize, dnssecOk: opt.flag_do },
        }),
  };
  return { query };
}

/** Offset behind the one question; undefined when it is cut off, too long, or uses compression. */
function questionEnd(message: Buffer): number | undefined {
  let offset = HEADER;
  for (;;) {
    const length = message[offset];
    if (length === undefined || length > LABEL_LENGTH_MAX) return undefined;
    offset += length + 1;
    if (offset - HEADER > NAME_MAX) return undefined;
    if (length === 0) break;
  }
  return offset + 4 <= message.length ? offset + 4 : undefined;
}

function isPlain(message: Buffer, end: number): boolean {
  for (let offset = HEADER; offset < end - 5; ) {
    const length = message[offset]!;
    for (let i = offset + 1; i <= offset + length; i++) {
      const octet = message[i]!;
      if (octet === 0x2e || octet <= 0x20 || octet > 0x7e) return false;
    }
    offset += length + 1;
  }
  return true;
}

/** An answer without any record, when the query could not be read far enough to repeat its question. */
function bare(message: Buffer, rcode: number): Buffer {
  const reply = Buffer.alloc(HEADER);
  reply.writeUInt16BE(message.readUInt16BE(0), 0);
  reply.writeUInt16BE(QR | (message.readUInt16BE(2) & (OPCODE | RD)) | rcode, 2);
  return reply;
}

/** Largest answer that this asker takes over UDP, octets. */
export function udpLimit(query: Query): number {
  if (query.edns === undefined) return DNS_UDP_PLAIN_MAX;
  return Math.min(DNS_UDP_EDNS_MAX, Math.max(DNS_UDP_PLAIN_MAX, query.edns.udpSize));
}

interface Reply {
  readonly rcode: number;
  readonly authoritative?: boolean;
  readonly answers?: packet.Answer[];
  readonly authorities?: packet.Answer[];
  readonly additionals?: packet.Answer[];
  readonly extendedRcode?: number;
  readonly error?: { readonly code: number; readonly text: string };
}

/** Puts our header and records behind the asker's own question bytes; cut to the header when `limit` is passed. */
function encode(query: Query, reply: Reply, limit: number): Buffer {
  const additionals: packet.Answer[] = [...(reply.additionals ?? [])];
  if (query.edns !== undefined) {
    const text = Buffer.from(reply.error?.text ?? '', 'utf8').subarray(0, 200);
    const code = Buffer.alloc(2);
    code.writeUInt16BE(reply.error?.code ?? 0);
    additionals.push({
      type: 'OPT',
      name: '.',
      udpPayloadSize: DNS_UDP_EDNS_MAX,
      extendedRcode: reply.extendedRcode ?? 0,
      ednsVersion: 0,
      flags: query.edns.dnssecOk ? packet.DNSSEC_OK : 0, // RFC 3225 §3: repeated
      flag_do: query.edns.dnssecOk,
      options: reply.error === undefined ? [] : [{ code: EDE_OPTION, data: Buffer.concat([code, text]) }],
    } as unknown as packet.Answer);
  }
  const flags = RA | (query.flags & (RD | CD)) | (reply.authoritative === true ? AA : 0) | reply.rcode;
  const body = packet.encode({
    type: 'response',
    id: query.id,
    flags,
    answers: reply.answers ?? [],
    authorities: reply.authorities ?? [],
    additionals,
  });
  const message = Buffer.concat([body.subarray(0, HEADER), query.question, body.subarray(HEADER)]);
  message.writeUInt16BE(1, 4);
  return message.length <= limit ? message : truncate(message, query, limit);
}

/** The same answer without its records and with TC set (RFC 2181 §9); the asker comes again over TCP. */
export function truncate(message: Buffer, query: Query, limit: number): Buffer {
  const cut = encode(query, { rcode: 0 }, Math.max(limit, DNS_UDP_PLAIN_MAX));
  cut.writeUInt16BE(message.readUInt16BE(2) | TC, 2);
  return cut;
}

function toPacket(record: LocalRecord): packet.Answer {
  const { name, ttl } = record;
  switch (record.type) {
    case 'A':
      return { type: 'A', name, ttl, data: formatIpv4(record.address) };
    case 'PTR':
      return { type: 'PTR', name, ttl, data: record.target };
    case 'SRV':
      return {
        type: 'SRV',
        name,
        ttl,
        data: { priority: 0, weight: 0, port: record.port, target: record.target },
      };
  }
}

/** `ttl` is also the negative TTL (RFC 2308 §4 takes the smaller of the two). */
function soa(zone: string, ttl: number): packet.Answer {
  return {
    type: 'SOA',
    name: zone,
    ttl,
    data: {
      mname: zone,
      rname: `hostmaster.${zone}`,
      serial: 1,
      refresh: 3_600,
      retry: 600,
      expire: 86_400,
      minimum: ttl,
    },
  };
}

/** The bytes of a local decision; `limit` in octets. */
export function encodeDecision(
  query: Query,
  decision: Exclude<Decision, { kind: 'forward' }>,
  limit: number,
): Buffer {
  switch (decision.kind) {
    case 'answer': {
      const answers = decision.records.map(toPacket);
      const additionals = decision.additionals.map(toPacket);
      return encode(query, { rcode: RCODE.ok, authoritative: true, answers, additionals }, limit);
    }
    case 'soa':
      return encode(
        query,
        { rcode: RCODE.ok, authoritative: true, answers: [soa(decision.zone, decision.ttl)] },
        limit,
      );
    case 'nodata':
      return encode(
        query,
        { rcode: RCODE.ok, authoritative: true, authorities: [soa(decision.zone, decision.ttl)] },
        limit,
      );
    case 'nxdomain':
      return encode(
        query,
        {
          rcode: RCODE.nxdomain,
          authoritative: true,
          authorities: [soa(decision.zone, decision.ttl)],
          error: { code: EDE.other, text: decision.why },
        },
        limit,
      );
    case 'servfail':
      return encode(
        query,
        { rcode: RCODE.servfail, error: { code: EDE.notReady, text: decision.why } },
        limit,
      );
    case 'refused':
      return encode(
        query,
        { rcode: RCODE.refused, error: { code: EDE.prohibited, text: decision.why } },
        limit,
      );
  }
}

/** No upstream server gave an answer. */
export function encodeUnreachable(query: Query, why: string, limit: number): Buffer {
  return encode(query, { rcode: RCODE.servfail, error: { code: EDE.noReachable, text: why } }, limit);
}

/** EDNS of a version that we do not speak (RFC 6891 §6.1.3). */
export function encodeBadVersion(query: Query, limit: number): Buffer {
  return encode(query, { rcode: RCODE.ok, extendedRcode: BADVERS_EXTENDED }, limit);
}

/** What we ask an upstream server: the asker's question and nothing else that identifies the asker. */
export function encodeUpstreamQuery(query: Query, id: number): Buffer {
  const body = packet.encode({
    type: 'query',
    id,
    flags: query.flags & (RD | CD),
    additionals:
      query.edns === undefined
        ? []
        : [
            {
              type: 'OPT',
              name: '.',
              udpPayloadSize: DNS_UDP_EDNS_MAX,
              extendedRcode: 0,
              ednsVersion: 0,
              flags: query.edns.dnssecOk ? packet.DNSSEC_OK : 0,
              flag_do: query.edns.dnssecOk,
              options: [],
            } as unknown as packet.Answer,
          ],
  });
  const message = Buffer.concat([body.subarray(0, HEADER), query.question, body.subarray(HEADER)]);
  message.writeUInt16BE(1, 4);
  return message;
}

/** Everything that makes two upstream questions the same one. */
export function upstreamKey(query: Query): string {
  const { edns } = query;
  const kind = edns === undefined ? 0 : edns.dnssecOk ? 2 : 1;
  return `${query.flags & (RD | CD)} ${kind} ${foldCase(query.question).toString('latin1')}`;
}

/** The question with A–Z as a–z; a length octet is below 64 and cannot be mistaken for a letter. */
function foldCase(question: Buffer): Buffer {
  const folded = Buffer.from(question);
  for (let i = 0; i < folded.length - 4; i++) {
    const octet = folded[i]!;
    if (octet >= 0x41 && octet <= 0x5a) folded[i] = octet + 0x20;
  }
  return folded;
}

/** What a forwarder must know of an upstream's answer. */
export interface UpstreamAnswer {
  readonly rcode: number;
  readonly truncated: boolean;
  /** That there is no such name, or no such record, also at the end of a chain of aliases. */
  readonly negative: boolean;
  /** Seconds that the answer may be remembered; 0 = not at all. */
  readonly ttlS: number;
  /** Offsets of the TTL fields, for counting down. */
  readonly ttlOffsets: readonly number[];
}

/**
 * Checks that the bytes are an answer to exactly this question (RFC 5452 §9.1: id, question; the caller checks the
 * address and port) and walks its records. Undefined when they are not, or when they are cut off.
 */
export function checkUpstreamAnswer(
  message: Buffer,
  id: number,
  question: Buffer,
): UpstreamAnswer | undefined {
  if (message.length < HEADER || message.readUInt16BE(0) !== id) return undefined;
  const flags = message.readUInt16BE(2);
  if ((flags & QR) === 0 || (flags & OPCODE) !== 0) return undefined;
  const rcode = flags & 0x000f;
  const truncated = (flags & TC) !== 0;
  if (message.readUInt16BE(4) !== 1) return undefined;
  const end = HEADER + question.length;
  if (message.length < end || !foldCase(question).equals(foldCase(message.subarray(HEADER, end))))
    return undefined;
  const counts = [message.readUInt16BE(6), message.readUInt16BE(8), message.readUInt16BE(10)];
  const ttlOffsets: number[] = [];
  let offset = end;
  const wanted = question.readUInt16BE(question.length - 4);
  let least = Number.POSITIVE_INFINITY;
  let denial = 0;
  let found = false;
  for (const [section, count] of counts.entries()) {
    for (let i = 0; i < count; i++) {
      const header = skipName(message, offset);
      if (header === undefined || header + 10 > message.length) return truncated ? cutOff(rcode) : undefined;
      const type = message.readUInt16BE(header);
      const length = message.readUInt16BE(header + 8);
      const next = header + 10 + length;
      if (next > message.length) return truncated ? cutOff(rcode) : undefined;
      if (type !== TYPE_OPT) {
        // An OPT's TTL field holds flags.
        const ttl = ttlAt(message, header + 4);
        ttlOffsets.push(header + 4);
        if (section === 0) {
          least = Math.min(least, ttl);
          found ||= type === wanted || wanted === TYPE_ANY;
        }
        if (section === 1 && type === TYPE_SOA && length >= 20)
          denial = Math.min(ttl, ttlAt(message, next - 4)); // RFC 2308 §5
      }
      offset = next;
    }
  }
  const positive = rcode === RCODE.ok && found;
  const negative = rcode === RCODE.nxdomain || (rcode === RCODE.ok && !found);
  // RFC 2308 §2.1: aliases may stand before a denial, and it is kept no longer than they are.
  const ttlS = truncated ? 0 : positive ? least : negative ? Math.min(least, denial) : 0;
  return { rcode, truncated, negative, ttlS, ttlOffsets };
}

function cutOff(rcode: number): UpstreamAnswer {
  return { rcode, truncated: true, negative: false, ttlS: 0, ttlOffsets: [] };
}

/** RFC 2181 §8: a TTL with the top bit set counts as 0. */
function ttlAt(message: Buffer, offset: number): number {
  const ttl = message.readUInt32BE(offset);
  return ttl > 0x7fffffff ? 0 : ttl;
}

/** Offset behind a name that may end in a compression pointer; the pointer is not followed. */
function skipName(message: Buffer, from: number): number | undefined {
  let offset = from;
  for (;;) {
    const length = message[offset];
    if (length === undefined) return undefined;
    if (length === 0) return offset + 1;
    if (length >= 0xc0) return offset + 2;
    if (length > LABEL_LENGTH_MAX || offset - from > NAME_MAX) return undefined;
    offset += length + 1;
  }
}

/** An upstream's answer as this asker's: id and spelling of the question are the asker's, TTLs are `ageS` older. */
export function adoptAnswer(
  message: Buffer,
  query: Query,
  ttlOffsets: readonly number[],
  ageS: number,
  limit: number,
): Buffer {
  const own = Buffer.from(message);
  own.writeUInt16BE(query.id, 0);
  query.question.copy(own, HEADER);
  if (ageS > 0)
    for (const offset of ttlOffsets) own.writeUInt32BE(Math.max(0, ttlAt(own, offset) - ageS), offset);
  return own.length <= limit ? own : truncate(own, query, limit);
}
