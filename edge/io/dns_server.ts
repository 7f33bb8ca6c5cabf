// The unicast DNS server of a node: UDP and TCP on the bridge address. It answers what is ours from the table and
// sends the rest upstream. It refuses to answer clients outside its links, to answer answers, and to let one bad
// message or client touch another's.
import type { Buffer } from 'node:buffer';
import { Buffer as Bytes } from 'node:buffer';
import { bindDns, isAnswerable, serveTcp } from '../../coordinator/io/dns_sockets.ts';
import { type Cidr, contains, formatIpv4, type Ipv4, parseIpv4 } from '../../src/addr.ts';
import {
  DNS_LOOKUP_WAIT_MS,
  DNS_LOOKUPS_WAITING_MAX,
  DNS_UPSTREAM_SOURCE_PENDING_MAX,
} from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import { parseName, type ServiceId } from '../../src/name.ts';
import type { Plan } from '../../src/plan.ts';
import type { Clock } from '../ports.ts';
import { FastAnswers } from '../resolver/fast.ts';
import {
  adoptAnswer,
  encodeBadVersion,
  encodeDecision,
  encodeUnreachable,
  parseQuery,
  type Query,
  udpLimit,
} from '../resolver/message.ts';
import { answer, type Decision } from '../resolver/resolver.ts';
import type { NameTable } from '../routes/table.ts';
import { within } from './clock.ts';
import { createForwarder } from './dns_upstream.ts';

const TELL_EVERY_MS = 1_000;
/** 50 ms of 20,000 queries a second, at about 1 KiB of kernel memory each. */
const RECEIVE_BUFFER = 1024 * 1024;
const TCP_MESSAGE_MAX = 65_535; // RFC 1035 §4.2.2: the length has two octets

export interface DnsServerOptions {
  /** Address to listen on, UDP and TCP: the bridge's. */
  readonly address: Ipv4;
  /** 53 by default; 0 takes a free one. */
  readonly port?: number;
  readonly table: NameTable;
  /** Servers for everything that is not ours, in order: `address`, `address:port`, `[ipv6]:port`. */
  readonly upstreams: () => readonly string[];
  /**
   * Told every valid name that is asked for, known or not (a known one that is asked again and again, once a second),
   * and who asks. When it returns a promise, an unknown service waits for it (at most DNS_LOOKUP_WAIT_MS) and is
   * looked up once more; a promise that is fulfilled with false, rejects or lasts longer is SERVFAIL.
   */
  readonly onLookup?: (service: ServiceId, source: Ipv4) => undefined | Promise<unknown>;
  /** The same for an address of ours that the table knows nothing of, when its name is asked for. */
  readonly onAddress?: (address: Ipv4, source: Ipv4) => undefined | Promise<unknown>;
  /** Services that the instance behind a namespace IP may use; undefined = any. Others are REFUSED. */
  readonly needsOf?: (source: Ipv4) => readonly ServiceId[] | undefined;
  /** Prefixes whose hosts are served; the listening address itself and loopback always are. Undefined = everyone. */
  readonly clients?: readonly Cidr[];
  readonly plan?: Plan;
  readonly log: Logger;
  readonly clock: Clock;
}

export interface DnsServer {
  readonly port: number;
  /** Cumulative since start; every name begins with `dns_`. */
  counters(): Record<string, number>;
  /** Closes both sockets and every client; resolves when they are closed. Repeating it is harmless. */
  stop(): Promise<void>;
}

/** Rejects with address_taken or host_unsupported when the address cannot be bound; nothing stays open then. */
export async function startDnsServer(options: DnsServerOptions): Promise<DnsServer> {
  const { table, log, clock, onLookup, onAddress, needsOf, clients, plan } = options;
  const address = formatIpv4(options.address);
  const forwarder = createForwarder({ upstreams: options.upstreams, log, clock });
  const fast = new FastAnswers(table);
  const planOption = plan === undefined ? {} : { plan };
  /** Questions that wait for the keyspace. */
  let waiting = 0;
  /** Questions that wait for an upstream server, by asker. */
  const forwarding = new Map<Ipv4, number>();
  const counters: Record<string, number> = {
    queries_udp: 0,
    queries_tcp: 0,
    fast: 0,
    answer: 0,
    soa: 0,
    nodata: 0,
    nxdomain: 0,
    servfail: 0,
    refused: 0,
    forward: 0,
    forward_overload: 0,
    malformed: 0,
    silent: 0,
    off_link: 0,
    waited: 0,
    send_failed: 0,
    tcp_clients: 0,
    tcp_refused: 0,
    tcp_broken: 0,
  };
  const count = (name: string): void => {
    counters[name] = (counters[name] ?? 0) + 1;
  };

  const isServed = (source: Ipv4): boolean =>
    clients === undefined ||
    source === options.address ||
    source >>> 24 === 127 ||
    clients.some((cidr) => contains(cidr, source));

  function decide(query: Query, source: Ipv4): Decision {
    if (query.class !== 'IN' && query.class !== 'ANY')
      return { kind: 'refused', why: `class ${query.class} is not served` };
    if (!query.plain) {
      const decision = answer(query, table, planOption);
      if (decision.kind === 'forward') return decision;
      const zone = query.name.toLowerCase().split('.').slice(-2).join('.');
      return { kind: 'nxdomain', zone, ttl: 0, why: 'a label holds an octet that no name of ours has' };
    }
    return answer(query, table, { needs: needsOf?.(source), ...planOption });
  }

  /** The answer to one message; undefined when silence is the answer. `limitOf` gives the room for it, octets. */
  async function respond(
    message: Buffer,
    source: Ipv4,
    limitOf: (query: Query) => number,
    fastKey: string | undefined,
  ): Promise<Buffer | undefined> {
    const parsed = parseQuery(message);
    if ('reply' in parsed) {
      count(parsed.reply === undefined ? 'silent' : 'malformed');
      return parsed.reply;
    }
    const { query } = parsed;
    const limit = limitOf(query);
    if (query.edns !== undefined && query.edns.version !== 0) return encodeBadVersion(query, limit);
    let decision = decide(query, source);
    const service = 'service' in decision ? decision.service : undefined;
    const wait = lookUp(decision, source);
    if (wait !== undefined && (decision.kind === 'nxdomain' || decision.kind === 'servfail')) {
      fastKey = undefined;
      const isTold = waiting < DNS_LOOKUPS_WAITING_MAX && (await told(wait));
      const what = service ?? `the address of ${query.name}`;
      const why = `the keyspace has not told yet about ${what}`;
      decision = isTold ? decide(query, source) : { kind: 'servfail', why };
    }
    count(decision.kind);
    if (decision.kind === 'forward') return forward(query, source, limit);
    const reply = encodeDecision(query, decision, limit);
    if (fastKey !== undefined && service !== undefined && decision.kind !== 'refused') {
      const name = parseName(query.name);
      if (name.ok) fast.set(fastKey, name.value, decision.kind, reply);
    }
    return reply;
  }

  function lookUp(decision: Decision, source: Ipv4): undefined | Promise<unknown> {
    if (decision.kind === 'refused') return undefined;
    if ('service' in decision && decision.service !== undefined) return onLookup?.(decision.service, source);
    if ('address' in decision && decision.address !== undefined) return onAddress?.(decision.address, source);
    return undefined;
  }

  async function told(wait: Promise<unknown>): Promise<boolean> {
    count('waited');
    waiting++;
    try {
      return await within(wait, DNS_LOOKUP_WAIT_MS);
    } finally {
      waiting--;
    }
  }

  async function forward(query: Query, source: Ipv4, limit: number): Promise<Buffer> {
    const others = forwarding.get(source) ?? 0;
    if (others >= DNS_UPSTREAM_SOURCE_PENDING_MAX) {
      count('forward_overload');
      return encodeUnreachable(query, 'too many questions of this asker wait for an answer', limit);
    }
    forwarding.set(source, others + 1);
    const answered = await forwarder.resolve(query);
    const left = forwarding.get(source)! - 1;
    if (left > 0) forwarding.set(source, left);
    else forwarding.delete(source);
    if (answered === undefined) return encodeUnreachable(query, 'no upstream server answered', limit);
    return adoptAnswer(answered.message, query, answered.ttlOffsets, answered.ageS, limit);
  }

  function onDatagram(message: Buffer, source: Ipv4, from: number): void {
    counters['queries_udp']!++;
    if (!isAnswerable(from)) {
      count('malformed');
      return;
    }
    if (!isServed(source)) {
      count('off_link');
      return;
    }
    const key = fast.key(message);
    const held = key === undefined ? undefined : fast.get(key);
    if (held !== undefined && message.length >= 12) {
      const { service } = held.name;
      const needs = needsOf?.(source);
      if (needs === undefined || needs.includes(service)) {
        // Told once a second at most: who counts the uses of a service counts in minutes.
        const now = clock.monotonicMs();
        const isFound = held.kind === 'answer' || held.kind === 'nodata';
        const isTold = isFound && now - held.toldMs < TELL_EVERY_MS;
        if (!isTold) held.toldMs = now;
        const wait = isTold ? undefined : onLookup?.(service, source);
        if (wait === undefined || isFound) {
          counters['fast']!++;
          count(held.kind);
          held.reply[0] = message[0]!;
          held.reply[1] = message[1]!;
          udp.send(held.reply, source, from);
          return;
        }
      }
    }
    respond(Bytes.from(message), source, udpLimit, key).then(
      (reply) => {
        if (reply !== undefined && !stopped) udp.send(reply, source, from);
      },
      (error: Error) => log.error({ error: error.message, peer: formatIpv4(source) }, 'a DNS query failed'),
    );
  }

  let stopped = false;
  const sockets = await bindDns(options.address, options.port ?? 53, RECEIVE_BUFFER);
  const { udp, tcp, port } = sockets;
  udp.receive(onDatagram, () => count('send_failed'));
  tcp.on('error', (error) =>
    log.warn({ error: error.message, address, port }, 'the DNS server over TCP failed'),
  );
  const closeClients = serveTcp(tcp, {
    admit(text) {
      // The socket is of IPv4; no other form can come.
      const source = parseIpv4(text);
      if (source.ok && isServed(source.value)) return source.value;
      count('off_link');
      return undefined;
    },
    respond(message, source) {
      counters['queries_tcp']!++;
      return respond(message, source, () => TCP_MESSAGE_MAX, undefined);
    },
    count: (event) => count(event === 'client' ? 'tcp_clients' : `tcp_${event}`),
    failed: (error) => log.error({ error: error.message }, 'a DNS query over TCP failed'),
  });
  log.info({ address, port }, 'DNS server listens');

  let ended: Promise<void> | undefined;
  return {
    port,
    counters: () =>
      Object.fromEntries(
        Object.entries({ ...counters, ...forwarder.counters }).map(([name, value]) => [`dns_${name}`, value]),
      ),
    stop() {
      stopped = true;
      ended ??= (async () => {
        forwarder.stop();
        closeClients();
        await sockets.close();
      })();
      return ended;
    },
  };
}
