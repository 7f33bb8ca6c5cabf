// Asks the host's upstream servers: over UDP from a fresh port for every question, over TCP when the answer was cut,
// one server after the other within a fixed time, and remembers what it may. It refuses an answer that does not match
// in address, port, id and question (RFC 5452 §9.1), and never forwards what identifies the asker.
import type { Buffer } from 'node:buffer';
import { Buffer as Bytes } from 'node:buffer';
import { randomInt } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { connect } from 'node:net';
import { LRUCache } from 'lru-cache';
import { sizeReceives } from '#udp';
import { frame } from '../../coordinator/io/dns_sockets.ts';
import {
  DNS_CACHE_BYTES_MAX,
  DNS_CACHE_ENTRIES_MAX,
  DNS_CACHE_NEGATIVE_MAX_S,
  DNS_CACHE_TTL_MAX_S,
  DNS_UDP_MESSAGE_MAX,
  DNS_UPSTREAM_PENDING_MAX,
  DNS_UPSTREAM_REST_MS,
  DNS_UPSTREAM_TRIES_MS,
} from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import type { Clock } from '../ports.ts';
import {
  checkUpstreamAnswer,
  encodeUpstreamQuery,
  type Query,
  RCODE,
  type UpstreamAnswer,
  upstreamKey,
} from '../resolver/message.ts';
import { parseUpstream, type Upstream } from '../resolver/upstream.ts';

/** An answer from upstream, or from memory; `ageS` is how long ago it came. The bytes are shared: do not write. */
export interface Forwarded {
  readonly message: Buffer;
  readonly ttlOffsets: readonly number[];
  readonly ageS: number;
}

export interface Forwarder {
  /** Resolves to undefined when no server gave an answer in time. Never rejects. */
  resolve(query: Query): Promise<Forwarded | undefined>;
  readonly counters: Record<string, number>;
  /** Open questions resolve to undefined at once. */
  stop(): void;
}

export interface ForwarderOptions {
  /** `address`, `address:port`, `[ipv6]:port`, in order of preference. Asked again for every question. */
  readonly upstreams: () => readonly string[];
  readonly log: Logger;
  readonly clock: Clock;
}

interface Remembered {
  readonly message: Buffer;
  readonly ttlOffsets: readonly number[];
  readonly storedMs: number;
  readonly ttlMs: number;
}

type Reply = { readonly message: Buffer; readonly answer: UpstreamAnswer };

export function createForwarder(options: ForwarderOptions): Forwarder {
  const { upstreams, log, clock } = options;
  const counters = {
    upstream_queries: 0,
    upstream_answers: 0,
    upstream_cached: 0,
    upstream_joined: 0,
    upstream_timeout: 0,
    upstream_mismatch: 0,
    upstream_tcp: 0,
    upstream_failed: 0,
    upstream_overload: 0,
    upstream_unreadable_server: 0,
  };
  const memory = new LRUCache<string, Remembered>({
    max: DNS_CACHE_ENTRIES_MAX,
    maxSize: DNS_CACHE_BYTES_MAX,
    sizeCalculation: ({ message }, key) => message.length + key.length,
  });
  const pending = new Map<string, Promise<Reply | undefined>>();
  const restingUntil = new Map<string, number>();
  const abort = new Set<() => void>();
  let stopped = false;

  async function resolve(query: Query): Promise<Forwarded | undefined> {
    const key = upstreamKey(query);
    const held = memory.get(key);
    if (held !== undefined) {
      const ageMs = clock.monotonicMs() - held.storedMs;
      if (ageMs < held.ttlMs) {
        counters.upstream_cached++;
        return { message: held.message, ttlOffsets: held.ttlOffsets, ageS: Math.floor(ageMs / 1000) };
      }
      memory.delete(key);
    }
    // Askers of one question share one exchange: many open exchanges for it would make guessing easy (RFC 5452 §5).
    let exchange = pending.get(key);
    if (exchange === undefined) {
      if (stopped || pending.size >= DNS_UPSTREAM_PENDING_MAX) {
        counters.upstream_overload++;
        return undefined;
      }
      exchange = askAround(query)
        .catch((error: Error) => {
          log.debug({ error: error.message }, 'upstream exchange failed');
          return undefined;
        })
        .finally(() => pending.delete(key));
      pending.set(key, exchange);
      const reply = await exchange;
      if (reply !== undefined) remember(key, reply);
      return reply && { message: reply.message, ttlOffsets: reply.answer.ttlOffsets, ageS: 0 };
    }
    counters.upstream_joined++;
    const reply = await exchange;
    return reply && { message: reply.message, ttlOffsets: reply.answer.ttlOffsets, ageS: 0 };
  }

  function remember(key: string, { message, answer }: Reply): void {
    const limit = answer.negative ? DNS_CACHE_NEGATIVE_MAX_S : DNS_CACHE_TTL_MAX_S;
    const ttlS = Math.min(answer.ttlS, limit);
    if (ttlS <= 0) return;
    const stored = {
      message,
      ttlOffsets: answer.ttlOffsets,
      storedMs: clock.monotonicMs(),
      ttlMs: ttlS * 1000,
    };
    memory.set(key, stored);
  }

  /** Usable servers first, those that failed lately last; within that, the configured order. */
  function candidates(): readonly Upstream[] {
    const now = clock.monotonicMs();
    const fresh: Upstream[] = [];
    const resting: Upstream[] = [];
    for (const text of upstreams()) {
      const server = parseUpstream(text);
      if (server === undefined) {
        counters.upstream_unreadable_server++;
        continue;
      }
      ((restingUntil.get(id(server)) ?? 0) > now ? resting : fresh).push(server);
    }
    return [...fresh, ...resting];
  }

  async function askAround(query: Query): Promise<Reply | undefined> {
    const servers = candidates();
    if (servers.length === 0) return undefined;
    let lastRefusal: Reply | undefined;
    for (const [i, timeoutMs] of DNS_UPSTREAM_TRIES_MS.entries()) {
      if (stopped) return undefined;
      const server = servers[i % servers.length]!;
      const reply = await ask(server, query, timeoutMs);
      if (reply === undefined) {
        restingUntil.set(id(server), clock.monotonicMs() + DNS_UPSTREAM_REST_MS);
        if (restingUntil.size > 64) restingUntil.delete(restingUntil.keys().next().value!);
        continue;
      }
      restingUntil.delete(id(server));
      const { rcode } = reply.answer;
      if (rcode !== RCODE.servfail && rcode !== RCODE.refused && rcode !== RCODE.notimp) return reply;
      lastRefusal = reply;
      if (i + 1 >= servers.length) break; // everyone has had a say
    }
    if (lastRefusal === undefined) counters.upstream_failed++;
    return lastRefusal;
  }

  async function ask(server: Upstream, query: Query, timeoutMs: number): Promise<Reply | undefined> {
    const id = randomInt(0x10000);
    const message = encodeUpstreamQuery(query, id);
    const deadline = clock.monotonicMs() + timeoutMs;
    counters.upstream_queries++;
    const reply = await askUdp(server, message, id, query.question, timeoutMs);
    if (reply?.answer.truncated !== true) return reply;
    counters.upstream_tcp++;
    const left = Math.max(200, deadline - clock.monotonicMs());
    // A server that truncates but refuses TCP: the cut answer is still the truth about the question.
    return (await askTcp(server, message, id, query.question, left)) ?? reply;
  }

  function askUdp(
    server: Upstream,
    message: Buffer,
    id: number,
    question: Buffer,
    timeoutMs: number,
  ): Promise<Reply | undefined> {
    return new Promise((resolve) => {
      // Bound to port 0: every question leaves from an unpredictable port of its own.
      const socket = createSocket(server.family === 4 ? 'udp4' : 'udp6');
      const end = (reply: Reply | undefined): void => {
        if (!abort.delete(cancel)) return;
        clearTimeout(timer);
        socket.close();
        if (reply === undefined) counters.upstream_timeout++;
        else counters.upstream_answers++;
        resolve(reply);
      };
      const cancel = (): void => end(undefined);
      abort.add(cancel);
      const timer = setTimeout(cancel, timeoutMs);
      socket.on('error', cancel);
      socket.on('message', (bytes, from) => {
        const answer =
          from.port === server.port && withoutZone(from.address) === withoutZone(server.address)
            ? checkUpstreamAnswer(bytes, id, question)
            : undefined;
        if (answer === undefined) counters.upstream_mismatch++;
        else end({ message: bytes, answer });
      });
      // Connected: the kernel drops what comes from elsewhere and tells of an unreachable port at once. That there is
      // no route to the server, or no such link, is told here and not by 'error'.
      socket.connect(server.port, server.address, (error?: Error) => {
        if (!abort.has(cancel)) return;
        if (error !== undefined && error !== null) return cancel();
        sizeReceives(socket, DNS_UDP_MESSAGE_MAX);
        socket.send(message, (failed) => failed && cancel());
      });
    });
  }

  function askTcp(
    server: Upstream,
    message: Buffer,
    id: number,
    question: Buffer,
    timeoutMs: number,
  ): Promise<Reply | undefined> {
    return new Promise((resolve) => {
      const socket = connect({ host: server.address, port: server.port });
      let received: Buffer = Bytes.alloc(0);
      const end = (reply: Reply | undefined): void => {
        if (!abort.delete(cancel)) return;
        clearTimeout(timer);
        socket.destroy();
        resolve(reply);
      };
      const cancel = (): void => end(undefined);
      abort.add(cancel);
      const timer = setTimeout(cancel, timeoutMs);
      socket.on('error', cancel);
      socket.on('close', cancel);
      socket.on('connect', () => socket.write(frame(message)));
      socket.on('data', (chunk: Buffer) => {
        received = Bytes.concat([received, chunk]);
        if (received.length < 2) return;
        const length = received.readUInt16BE(0);
        if (received.length < 2 + length) return;
        const bytes = received.subarray(2, 2 + length);
        const answer = checkUpstreamAnswer(bytes, id, question);
        if (answer === undefined) counters.upstream_mismatch++;
        end(answer === undefined ? undefined : { message: bytes, answer });
      });
    });
  }

  return {
    resolve,
    counters,
    stop() {
      stopped = true;
      for (const cancel of [...abort]) cancel();
      memory.clear();
    },
  };
}

/** The runtimes differ in whether they name the link that a link-local answer came by. */
const withoutZone = (address: string): string => address.replace(/%.*$/, '');
const id = (server: Upstream): string => `${server.address}#${server.port}`;
