// The unicast DNS server of a node: UDP and TCP on the bridge address. It answers what is ours from the table and
// sends the rest upstream. It refuses to answer clients outside its links, to answer answers, and to let one bad
// message or client touch another's.
import type { Buffer } from 'node:buffer';
import { Buffer as Bytes } from 'node:buffer';
import { createSocket, type RemoteInfo, type Socket as UdpSocket } from 'node:dgram';
import { createServer, type Server, type Socket } from 'node:net';
import { sizeReceives } from '#udp';
import { type Cidr, contains, formatIpv4, type Ipv4, parseIpv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import {
  DNS_LOOKUP_WAIT_MS,
  DNS_TCP_CLIENTS_MAX,
  DNS_TCP_IDLE_MS,
  DNS_TCP_PIPELINE_MAX,
  DNS_TCP_UNREAD_MAX,
  DNS_UDP_MESSAGE_MAX,
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
import { createForwarder, frame } from './dns_upstream.ts';

/** An error answer that repeats no question. */
const HEADER_ONLY = 12;
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
   * Told every valid name that is asked for, known or not (a known one that is asked again and again, once a second).
   * When it returns a promise, an unknown service waits for
   * it (at most DNS_LOOKUP_WAIT_MS) and is looked up once more; a promise that rejects or lasts longer is SERVFAIL.
   */
  readonly onLookup?: (service: ServiceId) => void | Promise<void>;
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
  const { table, log, clock, onLookup, needsOf, clients, plan } = options;
  const address = formatIpv4(options.address);
  const forwarder = createForwarder({ upstreams: options.upstreams, log, clock });
  const fast = new FastAnswers(table);
  const planOption = plan === undefined ? {} : { plan };
  const sources = new Map<string, Ipv4>();
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

  /** Undefined for a source that we do not serve (IPv6 cannot happen: both sockets are IPv4). */
  function sourceOf(text: string): Ipv4 | undefined {
    let source = sources.get(text);
    if (source === undefined) {
      const parsed = parseIpv4(text.replace(/^::ffff:/, ''));
      if (!parsed.ok) return undefined;
      source = parsed.value;
      if (sources.size >= 1024) sources.clear();
      sources.set(text, source);
    }
    const served =
      clients === undefined ||
      source === options.address ||
      source >>> 24 === 127 ||
      clients.some((cidr) => contains(cidr, source));
    return served ? source : undefined;
  }

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
    if (service !== undefined && decision.kind !== 'refused') {
      const wait = onLookup?.(service);
      const unknown = decision.kind === 'nxdomain' || decision.kind === 'servfail';
      if (wait !== undefined && unknown) {
        count('waited');
        const known = await within(wait, DNS_LOOKUP_WAIT_MS);
        decision = known
          ? decide(query, source)
          : { kind: 'servfail', service, why: `the keyspace has not told yet about ${service}` };
        fastKey = undefined;
      }
    }
    count(decision.kind);
    if (decision.kind === 'forward') return forward(query, limit);
    const reply = encodeDecision(query, decision, limit);
    if (fastKey !== undefined && service !== undefined && decision.kind !== 'refused') {
      const name = parseName(query.name);
      if (name.ok) fast.set(fastKey, name.value, decision.kind, reply);
    }
    return reply;
  }

  async function forward(query: Query, limit: number): Promise<Buffer> {
    const answered = await forwarder.resolve(query);
    if (answered === undefined) return encodeUnreachable(query, 'no upstream server answered', limit);
    return adoptAnswer(answered.message, query, answered.ttlOffsets, answered.ageS, limit);
  }

  function onDatagram(udp: UdpSocket, message: Buffer, from: RemoteInfo): void {
    counters['queries_udp']!++;
    const source = sourceOf(from.address);
    if (source === undefined) {
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
        const wait = isTold ? undefined : onLookup?.(service);
        if (wait === undefined || isFound) {
          counters['fast']!++;
          count(held.kind);
          // A copy: the socket may still hold the last one when the next asker's id is written.
          const reply = Bytes.from(held.reply);
          reply[0] = message[0]!;
          reply[1] = message[1]!;
          udp.send(reply, from.port, from.address);
          return;
        }
      }
    }
    respond(message, source, udpLimit, key).then(
      (reply) => {
        if (reply !== undefined && !stopped) udp.send(reply, from.port, from.address);
      },
      (error: Error) => log.error({ error: error.message, peer: from.address }, 'a DNS query failed'),
    );
  }

  function onClient(socket: Socket): void {
    const source = sourceOf(socket.remoteAddress ?? '');
    if (source === undefined || open.size >= DNS_TCP_CLIENTS_MAX) {
      count(source === undefined ? 'off_link' : 'tcp_refused');
      socket.destroy();
      return;
    }
    counters['tcp_clients']!++;
    open.add(socket);
    socket.setNoDelay(true);
    socket.setTimeout(DNS_TCP_IDLE_MS, () => socket.destroy());
    socket.on('error', () => socket.destroy());
    socket.on('close', () => open.delete(socket));
    let received: Buffer = Bytes.alloc(0);
    let waiting = 0;
    const drain = (): void => {
      while (received.length >= 2 && !socket.destroyed) {
        const length = received.readUInt16BE(0);
        if (received.length < 2 + length) break;
        // A client that asks and does not read must not make us hold its answers.
        if (waiting >= DNS_TCP_PIPELINE_MAX || socket.writableLength > DNS_TCP_UNREAD_MAX) {
          socket.pause();
          return;
        }
        const message = Bytes.from(received.subarray(2, 2 + length));
        received = received.subarray(2 + length);
        waiting++;
        counters['queries_tcp']!++;
        respond(message, source, () => TCP_MESSAGE_MAX, undefined)
          .then(
            (reply) => {
              if (reply === undefined || reply.length === HEADER_ONLY) {
                // Not a question: whoever speaks so over TCP is not a resolver.
                count('tcp_broken');
                if (reply === undefined) socket.destroy();
                else socket.end(frame(reply));
              } else if (!socket.destroyed) socket.write(frame(reply));
            },
            (error: Error) => log.error({ error: error.message }, 'a DNS query over TCP failed'),
          )
          .finally(() => {
            waiting--;
            goOn();
          });
      }
    };
    const goOn = (): void => {
      if (socket.writableLength > DNS_TCP_UNREAD_MAX) return;
      if (socket.isPaused()) socket.resume();
      drain();
    };
    socket.on('drain', goOn);
    socket.on('data', (chunk: Buffer) => {
      // At most one partial message plus what one read brings is held.
      received = received.length === 0 ? chunk : Bytes.concat([received, chunk]);
      drain();
    });
    socket.on('end', () => socket.end());
  }

  let stopped = false;
  const open = new Set<Socket>();
  const { udp, tcp, port } = await bindBoth(address, options.port ?? 53);
  udp.on('error', () => count('send_failed'));
  udp.on('message', (message, from) => onDatagram(udp, message, from));
  tcp.on('error', (error) =>
    log.warn({ error: error.message, address, port }, 'the DNS server over TCP failed'),
  );
  tcp.on('connection', onClient);
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
        for (const socket of open) socket.destroy();
        await Promise.all([closeUdp(udp), closeTcp(tcp)]);
      })();
      return ended;
    },
  };
}

/** True when the promise is fulfilled in time. */
async function within(wait: Promise<void>, ms: number): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(resolve, ms, false);
  });
  try {
    return await Promise.race([wait.then(() => true), late]);
  } catch {
    return false;
  } finally {
    clearTimeout(timer);
  }
}

/** Both sockets on one port, or none. */
async function bindBoth(
  address: string,
  wanted: number,
): Promise<{ readonly udp: UdpSocket; readonly tcp: Server; readonly port: number }> {
  // A port that the kernel chose for UDP may be taken for TCP; only then is another try worth it.
  for (let tries = wanted === 0 ? 8 : 1; ; tries--) {
    const udp = await bindUdp(address, wanted);
    const { port } = udp.address();
    try {
      return { udp, tcp: await bindTcp(address, port), port };
    } catch (error) {
      await closeUdp(udp);
      if (tries <= 1) throw error;
    }
  }
}

function bindUdp(address: string, port: number): Promise<UdpSocket> {
  return new Promise((resolve, reject) => {
    const udp = createSocket({
      type: 'udp4',
      // Peers are numeric addresses: nothing is to be looked up on the way out.
      lookup: (host, _options, done) => done(null, host, 4),
    });
    udp.once('error', (error) => {
      udp.close();
      reject(bindError(error, 'UDP', address, port));
    });
    udp.bind({ address, port, exclusive: true }, () => {
      udp.removeAllListeners('error');
      sizeReceives(udp, DNS_UDP_MESSAGE_MAX, RECEIVE_BUFFER);
      resolve(udp);
    });
  });
}

function bindTcp(address: string, port: number): Promise<Server> {
  return new Promise((resolve, reject) => {
    const tcp = createServer();
    tcp.once('error', (error) => reject(bindError(error, 'TCP', address, port)));
    tcp.listen({ host: address, port, backlog: DNS_TCP_CLIENTS_MAX }, () => {
      tcp.removeAllListeners('error');
      resolve(tcp);
    });
  });
}

/** What stands in the way, in words; shared with the multicast server. */
export function bindError(error: Error, protocol: string, address: string, port: number): EdgewayError {
  const code = (error as { code?: string }).code ?? '';
  const taken = code === 'EADDRINUSE' || /in use/i.test(error.message);
  const why = taken
    ? 'another program listens there'
    : code === 'EADDRNOTAVAIL'
      ? 'no interface carries this address'
      : code === 'EACCES'
        ? 'this needs CAP_NET_BIND_SERVICE'
        : error.message;
  return new EdgewayError(
    taken ? 'address_taken' : 'host_unsupported',
    `cannot listen on ${protocol} ${address}:${port}: ${why}`,
    { cause: error },
  );
}

function closeUdp(udp: UdpSocket): Promise<void> {
  return new Promise((resolve) => udp.close(() => resolve()));
}

function closeTcp(tcp: Server): Promise<void> {
  return new Promise((resolve) => tcp.close(() => resolve()));
}
