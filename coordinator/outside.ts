// The way in by name: authoritative DNS for a domain that the operator delegates to the coordinator.
// `service.servicens.app.appns.DOMAIN` has the addresses of the nodes that are up, for services that are exposed. A
// pure function from a message to its answer; sockets are elsewhere. It refuses to recurse, to answer for another
// zone, and to hand the zone out (AXFR). RFC 1034/1035, 2308 (negative answers), 6891 (EDNS), 8020 (NXDOMAIN means
// nothing below), 8482 (ANY).
import { Buffer } from 'node:buffer';
import * as packet from 'dns-packet';
import { formatIpv4, type Ipv4 } from '../src/addr.ts';
import { fail, ok, type Result } from '../src/error.ts';
import {
  DNS_UDP_EDNS_MAX,
  DNS_UDP_PLAIN_MAX,
  OUTSIDE_ADDRESSES_MAX,
  OUTSIDE_NEGATIVE_TTL_S,
  OUTSIDE_TTL_S,
} from '../src/limits.ts';
import { publishedPorts } from '../src/model.ts';
import { LABEL_LENGTH_MAX, type ServiceId, splitServiceId } from '../src/name.ts';
import { countsFit } from '../src/wire/dns.ts';
import type { View } from './view.ts';

export interface Zone {
  /** Lower case, without the trailing dot. */
  readonly domain: string;
  /** Name of the server in the NS and SOA records; `ns.DOMAIN` unless the delegation says otherwise. */
  readonly nameServer: string;
  /** Address of `ns.DOMAIN`, when that is the name server's name. */
  readonly address?: Ipv4;
}

const HEADER = 12; // RFC 1035 §4.1.1
const FLAG = { qr: 0x8000, opcode: 0x7800, aa: 0x0400, tc: 0x0200, rd: 0x0100 } as const;
const RCODE = { ok: 0, formerr: 1, servfail: 2, nxdomain: 3, notimp: 4, refused: 5 } as const;
const BADVERS_EXTENDED = 1; // RFC 6891 §9
/** SOA timers (RFC 1035 §3.3.13): secondaries there are none, so they matter to nobody but monitoring. */
const SOA = { refresh: 300, retry: 60, expire: 3_600 } as const;

/** `edge.example.org`; a domain of one label would be a top-level domain. */
export function parseZone(
  domain: string,
  options: { readonly nameServer?: string; readonly address?: Ipv4 } = {},
): Result<Zone> {
  const names = [domain, ...(options.nameServer === undefined ? [] : [options.nameServer])];
  for (const text of names) {
    const labels = text.toLowerCase().replace(/\.$/, '').split('.');
    const sound = labels.every(
      (label) => /^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/.test(label) && label.length <= LABEL_LENGTH_MAX,
    );
    // 253 octets of text; the longest service name below it is 255, which the labels' own bound excludes in practice.
    if (!sound || labels.length < 2 || text.length > 120)
      return fail(
        'invalid_request',
        `"${text}" is not a domain that can be delegated, such as edge.example.org`,
      );
  }
  const zone = domain.toLowerCase().replace(/\.$/, '');
  const own = `ns.${zone}`;
  const nameServer = options.nameServer?.toLowerCase().replace(/\.$/, '') ?? own;
  const glue = nameServer === own && options.address !== undefined ? { address: options.address } : {};
  return ok({ domain: zone, nameServer, ...glue });
}

/** The outside name of a service. */
export function outsideName(id: ServiceId, zone: Zone): string {
  const { app, appNs, service, serviceNs } = splitServiceId(id);
  return `${service}.${serviceNs}.${app}.${appNs}.${zone.domain}`.toLowerCase();
}

/** What the zone says now; built from the view, once per change. */
export interface ZoneTable {
  readonly zone: Zone;
  /** False until the first listing: then everything is SERVFAIL, since nothing is known. */
  readonly synced: boolean;
  readonly serial: number;
  /** By outside name: the addresses, nodes that run an instance first. Empty: the service has none now. */
  readonly addresses: ReadonlyMap<string, readonly Ipv4[]>;
  /** Names that exist only because something lies below them. */
  readonly above: ReadonlySet<string>;
}

export function zoneTable(view: View, zone: Zone, synced: boolean, serial: number): ZoneTable {
  const addresses = new Map<string, readonly Ipv4[]>();
  const above = new Set<string>();
  const nodes = [...view.all('node').values()].map(({ value }) => value);
  const present = new Set(nodes.map(({ node }) => node));
  const hosts = new Map<ServiceId, Set<Ipv4>>();
  for (const { value: instance } of view.all('instance').values()) {
    let known = hosts.get(instance.service);
    if (known === undefined) {
      known = new Set();
      hosts.set(instance.service, known);
    }
    if (present.has(instance.node)) known.add(instance.nodeIp);
  }
  for (const { value: service } of view.all('service').values()) {
    if (publishedPorts(service.descriptor).length === 0) continue;
    const name = outsideName(service.id, zone);
    const running = hosts.get(service.id) ?? new Set<Ipv4>();
    const all = running.size === 0 ? [] : [...new Set([...running, ...nodes.map(({ nodeIp }) => nodeIp)])];
    addresses.set(name, all);
    for (
      let dot = name.indexOf('.');
      name.length - dot - 1 > zone.domain.length;
      dot = name.indexOf('.', dot + 1)
    )
      above.add(name.slice(dot + 1));
  }
  return { zone, synced, serial: serial >>> 0, addresses, above };
}

/** The answer to one message, or undefined where silence is right. `limit`: octets that the transport takes; over
 *  UDP the asker's EDNS may raise it. */
export function answerOutside(
  table: ZoneTable,
  message: Uint8Array,
  transport: 'udp' | 'tcp',
): Buffer | undefined {
  const bytes = Buffer.from(message.buffer, message.byteOffset, message.byteLength);
  if (bytes.length < HEADER) return undefined;
  const flags = bytes.readUInt16BE(2);
  // An answer is never answered: two servers would talk for ever.
  if ((flags & FLAG.qr) !== 0) return undefined;
  if ((flags & FLAG.opcode) !== 0) return bare(bytes, RCODE.notimp);
  if (bytes.readUInt16BE(4) !== 1 || !countsFit(bytes)) return bare(bytes, RCODE.formerr);
  let query: packet.DecodedPacket;
  try {
    query = packet.decode(bytes);
  } catch {
    return bare(bytes, RCODE.formerr);
  }
  const question = query.questions?.[0];
  const options = (query.additionals ?? []).filter(({ type }) => type === 'OPT');
  if (question === undefined || options.length > 1) return bare(bytes, RCODE.formerr);
  const edns = options[0] as { readonly udpPayloadSize: number; readonly ednsVersion: number } | undefined;
  const limit =
    transport === 'tcp'
      ? 65_535
      : Math.max(DNS_UDP_PLAIN_MAX, Math.min(edns?.udpPayloadSize ?? 0, DNS_UDP_EDNS_MAX));
  const reply = (decision: Reply): Buffer => {
    const opt: packet.Answer[] =
      edns === undefined
        ? []
        : [
            {
              type: 'OPT',
              name: '.',
              udpPayloadSize: DNS_UDP_EDNS_MAX,
              extendedRcode: decision.badVersion === true ? BADVERS_EXTENDED : 0,
              ednsVersion: 0,
              flags: 0,
              flag_do: false,
              options: [],
            },
          ];
    const encode = (answers: packet.Answer[], authorities: packet.Answer[], truncated: number): Buffer =>
      packet.encode({
        id: bytes.readUInt16BE(0),
        type: 'response',
        flags:
          (flags & FLAG.rd) | (decision.rcode === RCODE.refused ? 0 : FLAG.aa) | truncated | decision.rcode,
        questions: [question],
        answers,
        authorities,
        additionals: opt,
      });
    // Fewer addresses do as well as all; only what does not fit at all is left to TCP.
    const { answers = [], authorities = [] } = decision;
    for (let count = answers.length; count > 0 || answers.length === 0; count--) {
      const whole = encode(answers.slice(0, count), authorities, 0);
      if (whole.length <= limit) return whole;
      if (count === 0) break;
    }
    return encode([], [], FLAG.tc);
  };
  if (edns !== undefined && edns.ednsVersion !== 0) return reply({ rcode: RCODE.ok, badVersion: true });
  return reply(decide(table, question, bytes.readUInt16BE(0)));
}

interface Reply {
  readonly rcode: number;
  readonly answers?: packet.Answer[];
  readonly authorities?: packet.Answer[];
  readonly badVersion?: true;
}

/** `turn`: where the list of addresses begins, so that askers spread; the message id will do. */
function decide(table: ZoneTable, question: packet.Question, turn: number): Reply {
  const { zone } = table;
  const name = question.name.toLowerCase();
  const type = question.type as string;
  const inside = name === zone.domain || name.endsWith(`.${zone.domain}`);
  if (!inside || (question.class ?? 'IN') !== 'IN' || type === 'AXFR' || type === 'IXFR')
    return { rcode: RCODE.refused };
  if (!table.synced) return { rcode: RCODE.servfail };
  const negative = [soa(table, OUTSIDE_NEGATIVE_TTL_S)];
  const nodata: Reply = { rcode: RCODE.ok, authorities: negative };
  if (name === zone.domain) {
    if (type === 'SOA') return { rcode: RCODE.ok, answers: [soa(table, OUTSIDE_TTL_S)] };
    if (type === 'NS' || type === 'ANY')
      return {
        rcode: RCODE.ok,
        answers: [{ type: 'NS', name: question.name, ttl: OUTSIDE_TTL_S, data: zone.nameServer }],
      };
    return nodata;
  }
  const a = (address: Ipv4): packet.Answer => ({
    type: 'A',
    name: question.name,
    ttl: OUTSIDE_TTL_S,
    data: formatIpv4(address),
  });
  const wantsA = type === 'A' || type === 'ANY';
  if (name === `ns.${zone.domain}` && zone.address !== undefined)
    return wantsA ? { rcode: RCODE.ok, answers: [a(zone.address)] } : nodata;
  const addresses = table.addresses.get(name);
  if (addresses === undefined)
    return table.above.has(name) ? nodata : { rcode: RCODE.nxdomain, authorities: negative };
  if (!wantsA || addresses.length === 0) return nodata;
  const few = addresses.slice(0, OUTSIDE_ADDRESSES_MAX);
  const first = turn % few.length;
  return { rcode: RCODE.ok, answers: [...few.slice(first), ...few.slice(0, first)].map(a) };
}

function soa({ zone, serial }: ZoneTable, ttl: number): packet.Answer {
  return {
    type: 'SOA',
    name: zone.domain,
    ttl,
    data: {
      mname: zone.nameServer,
      rname: `hostmaster.${zone.domain}`,
      serial,
      ...SOA,
      minimum: OUTSIDE_NEGATIVE_TTL_S,
    },
  };
}

/** An error without the question, which could not be read. */
function bare(bytes: Buffer, rcode: number): Buffer {
  const reply = Buffer.alloc(HEADER);
  reply.writeUInt16BE(bytes.readUInt16BE(0), 0);
  reply.writeUInt16BE(FLAG.qr | (bytes.readUInt16BE(2) & (FLAG.opcode | FLAG.rd)) | rcode, 2);
  return reply;
}
