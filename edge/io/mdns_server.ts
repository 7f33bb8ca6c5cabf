// The sockets of the multicast face, on one interface: the bridge, or a LAN when the operator asks for it. mdns-server
// makes and reads them and sends what goes to the group. Five things go around it, because it cannot do them: it joins
// the group wherever the default route points, it sends unicast replies nowhere, it does not say whether a message
// came to the group or to us, it makes room for as many records as a header promises, and it loses the sockets of a
// failed start. Refuses messages from outside the
// interface's own subnet (RFC 6762 §11): Linux hands a socket every group packet that any socket of the host joined.
import type { Buffer } from 'node:buffer';
import { randomInt } from 'node:crypto';
import type { RemoteInfo, Socket } from 'node:dgram';
import { type DecodedPacket, encode, type Packet } from 'dns-packet';
import createMdns from 'mdns-server';
import { sizeReceives } from '#udp';
import { bindError, isAnswerable } from '../../coordinator/io/dns_sockets.ts';
import { type Cidr, contains, formatIpv4, type Ipv4, parseIpv4 } from '../../src/addr.ts';
import { EdgewayError, toEdgewayError } from '../../src/error.ts';
import { DNS_LOOKUP_WAIT_MS, MDNS_LOOKUPS_WAITING_MAX, MDNS_MESSAGE_MAX } from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import { LABEL_LENGTH_MAX, parseName, type ServiceId } from '../../src/name.ts';
import type { Plan } from '../../src/plan.ts';
import { countsFit, questionLabels } from '../../src/wire/dns.ts';
import type { Clock } from '../ports.ts';
import { MDNS_PORT, MdnsResponder, type MdnsSource } from '../resolver/mdns.ts';
import { type Alias, AliasClaims } from '../resolver/mdns_alias.ts';
import type { NameTable } from '../routes/table.ts';
import { within } from './clock.ts';

const GROUP = '224.0.0.251';
/** mdns-server opens two sockets in turn; it has no deadline of its own. */
const START_LIMIT_MS = 3_000;
/** Turns of the event loop that a stop waits for its last messages; each needs one or two. */
const LEAVE_TURNS_MAX = 1_000;

export interface MdnsServerOptions {
  /** Interface to serve, by name; it must carry `address`. */
  readonly interface: string;
  readonly address: Ipv4;
  /** The link's prefix: who asks from elsewhere is off-link (RFC 6762 §11). Not asked of the runtime, which hides
   *  interfaces without carrier, such as a bridge before its first instance. */
  readonly subnet: Cidr;
  readonly table: NameTable;
  /** As for the unicast server; a promise makes the question be looked at again when it is fulfilled. */
  readonly onLookup?: (service: ServiceId, source: Ipv4) => undefined | Promise<unknown>;
  /** As for the unicast server; what is outside gets silence. */
  readonly needsOf?: (source: Ipv4) => readonly ServiceId[] | undefined;
  readonly plan?: Plan;
  /** Of the interface; an Ethernet's when not given. */
  readonly mtu?: number;
  /** On a LAN: only these two-label names are served, and they lead to `address` (mdns_alias.ts). */
  readonly aliases?: readonly Alias[];
  readonly log: Logger;
  readonly clock: Clock;
}

export interface MdnsServer {
  /** To be called with every service whose routes changed, and with all known ones after the first snapshot. */
  changed(services: Iterable<ServiceId>): void;
  counters(): Record<string, number>;
  /** Says goodbye to what was multicast and closes; resolves when closed. Repeating it is harmless. */
  stop(): Promise<void>;
}

/** How a message came; mdns-server hands it on. */
interface Arrival extends RemoteInfo {
  /** To our own address and not to the group. */
  readonly direct: boolean;
  /** Of each question's name. */
  readonly labels: readonly number[];
}

/** The parts of mdns-server 1.0.11 that are used. */
interface MdnsEmitter {
  on(event: 'ready' | 'destroyed', listener: () => void): void;
  on(event: 'error' | 'warning', listener: (error: Error) => void): void;
  on(event: 'query' | 'response', listener: (packet: DecodedPacket, from: Arrival) => void): void;
  initServer(): void;
  destroy(done: () => void): void;
}

/** Rejects with address_taken or host_unsupported; nothing stays open then. */
export async function startMdns(options: MdnsServerOptions): Promise<MdnsServer> {
  const { table, log, clock, onLookup, needsOf, plan, subnet } = options;
  const address = formatIpv4(options.address);
  const counters = {
    mdns_malformed: 0,
    mdns_off_link: 0,
    mdns_own: 0,
    mdns_send_failed: 0,
    mdns_unsendable: 0,
  };
  const seed = randomInt(1, 0xffffffff);
  const claims =
    options.aliases === undefined
      ? undefined
      : new AliasClaims({ aliases: options.aliases, table, address: options.address, seed });
  const responder = new MdnsResponder({
    table,
    seed,
    ...(plan === undefined ? {} : { plan }),
    ...(options.mtu === undefined ? {} : { mtu: options.mtu }),
    ...(claims === undefined
      ? {}
      : {
          names: {
            resolve: (question) => claims.resolve(question),
            of: (service) => claims.namesOf(service),
          },
        }),
  });
  const sockets = await open(options.interface, address, log, counters);
  let timer: ReturnType<typeof setTimeout> | undefined;
  let stopped = false;
  /** Messages handed to the kernel whose callback is still to come. */
  let leaving = 0;
  /** Questions that wait for the keyspace. */
  let waiting = 0;

  function send(packet: Packet, port: number, host: string): void {
    const bytes = encodeChecked(packet);
    if (bytes === undefined) {
      counters.mdns_unsendable++;
      return;
    }
    leaving++;
    const sent = (error?: Error | null): void => {
      leaving--;
      if (error !== null && error !== undefined) counters.mdns_send_failed++;
    };
    try {
      sockets.send.send(bytes, 0, bytes.length, port, host, sent);
    } catch (error) {
      sent(error as Error);
    }
  }

  /** Sends what the machines want to say and sleeps until the next deadline. */
  function drain(): void {
    for (let out = claims?.poll(); out !== undefined; out = claims?.poll())
      if (out.kind === 'probe') send(out.packet, MDNS_PORT, GROUP);
      else responder.changed([out.service], clock.monotonicMs());
    for (let out = responder.poll(); out !== undefined; out = responder.poll())
      if (out.kind === 'unicast') send(out.packet, out.to.port, out.to.address);
      else send(out.packet, MDNS_PORT, GROUP);
    clearTimeout(timer);
    timer = undefined;
    const next = [responder.deadline(), claims?.deadline()]
      .filter((at) => at !== undefined)
      .reduce<number | undefined>((least, at) => Math.min(least ?? at, at), undefined);
    if (next === undefined || stopped) return;
    timer = setTimeout(
      () => {
        responder.handleTimeout(clock.monotonicMs());
        claims?.handleTimeout(clock.monotonicMs());
        drain();
      },
      Math.max(1, next - clock.monotonicMs()),
    );
  }

  /** A name that nobody here asked for before: the question is put again when the keyspace has told of it. */
  async function answerLater(
    wait: Promise<unknown>,
    packet: DecodedPacket,
    asker: MdnsSource,
    needs: readonly ServiceId[] | undefined,
  ): Promise<void> {
    waiting++;
    const isTold = await within(wait, DNS_LOOKUP_WAIT_MS);
    waiting--;
    if (!isTold || stopped) return;
    responder.handleQuery(packet, asker, clock.monotonicMs(), needs);
    drain();
  }

  /** On-link by source address; undefined and counted otherwise. */
  function sourceOf(from: RemoteInfo): Ipv4 | undefined {
    const source = parseIpv4(from.address);
    if (source.ok && (contains(subnet, source.value) || source.value === options.address))
      return source.value;
    counters.mdns_off_link++;
    return undefined;
  }

  sockets.mdns.on('query', (decoded, from) => {
    const source = sourceOf(from);
    if (source === undefined || stopped) return;
    const needs = needsOf?.(source);
    const asker: MdnsSource = { address: from.address, port: from.port, direct: from.direct };
    // A label with a dot inside looks like two, and no name of ours has one.
    const plain = (decoded.questions ?? []).filter(
      ({ name }, i) => name.split('.').length === from.labels[i],
    );
    const packet = { ...decoded, questions: plain } as DecodedPacket;
    if (claims !== undefined && source !== options.address) claims.handleProbe(packet, clock.monotonicMs());
    responder.handleQuery(packet, asker, clock.monotonicMs(), needs);
    drain();
    if (onLookup === undefined || claims !== undefined) return;
    for (const { name } of plain.slice(0, 4)) {
      const parsed = parseName(name);
      if (!parsed.ok) continue;
      const { service } = parsed.value;
      if (needs !== undefined && !needs.includes(service)) continue;
      const unknown = table.service(service) === undefined;
      const wait = onLookup(service, source);
      if (wait === undefined || !unknown || waiting >= MDNS_LOOKUPS_WAITING_MAX) continue;
      const questions = plain.filter((question) => question.name === name);
      void answerLater(wait, { ...packet, questions }, asker, needs);
    }
  });
  sockets.mdns.on('response', (packet, from) => {
    if (from.address === address) {
      // Our own, looped back for other programs of this host (§15).
      counters.mdns_own++;
      return;
    }
    if (sourceOf(from) === undefined || stopped) return;
    responder.handleResponse(packet, clock.monotonicMs());
    claims?.handleResponse(packet, clock.monotonicMs());
    drain();
  });
  sockets.mdns.on('warning', () => {
    counters.mdns_malformed++;
  });
  log.info({ interface: options.interface, address }, 'multicast DNS responder listens');

  claims?.changed(clock.monotonicMs());
  drain();

  let ended: Promise<void> | undefined;
  return {
    changed(services) {
      if (stopped) return;
      claims?.changed(clock.monotonicMs());
      responder.changed(services, clock.monotonicMs());
      drain();
    },
    counters: () => ({ ...responder.counters, ...claims?.counters, ...counters }),
    stop() {
      ended ??= (async () => {
        stopped = true;
        responder.goodbye();
        drain();
        // A goodbye must have left before its socket closes.
        for (let turns = 0; leaving > 0 && turns < LEAVE_TURNS_MAX; turns++)
          await new Promise<void>((resolve) => setImmediate(resolve));
        await sockets.close();
      })();
      return ended;
    },
  };
}

/** dns-packet writes an over-long label as a broken message without complaint. */
function encodeChecked(packet: Packet): Buffer | undefined {
  const names = [...(packet.questions ?? []), ...(packet.answers ?? []), ...(packet.additionals ?? [])];
  for (const { name } of [...names, ...(packet.authorities ?? [])])
    if (name.length > 253 || name.split('.').some((label) => label.length > LABEL_LENGTH_MAX))
      return undefined;
  try {
    return encode(packet);
  } catch {
    return undefined;
  }
}

interface Sockets {
  readonly mdns: MdnsEmitter;
  readonly send: Socket;
  close(): Promise<void>;
}

/** mdns-server on one interface, with the shims that make it serve exactly that one. */
async function open(
  name: string,
  address: string,
  log: Logger,
  counters: { mdns_malformed: number; mdns_send_failed: number },
): Promise<Sockets> {
  const made = new Set<Socket>();
  const failures: Error[] = [];
  let send: Socket | undefined;
  let receive: Socket | undefined;
  const adopt = (socket: Socket): void => {
    made.add(socket);
    socket.once('close', () => made.delete(socket));
    socket.on('error', (error) => failures.push(error));
    // What arrives at the socket bound to our own address was sent to us alone.
    const direct = socket === send;
    const readers = socket.listeners('message') as ((message: Buffer, from: RemoteInfo) => void)[];
    socket.removeAllListeners('message');
    socket.on('message', (message, from) => {
      if (!isAnswerable(from.port) || !countsFit(message)) counters.mdns_malformed++;
      else
        for (const read of readers)
          read(message, { ...from, direct, labels: questionLabels(message) } as Arrival);
    });
  };
  // mdns-server writes its sockets into the interface object that it is given: that is where they are caught.
  const face = {
    name,
    address,
    family: 'IPv4',
    get socketSend(): Socket | null {
      return send ?? null;
    },
    set socketSend(socket: Socket | null) {
      send = socket ?? undefined;
      if (socket !== null) adopt(socket);
    },
    get socketRecv(): Socket | null {
      return receive ?? null;
    },
    set socketRecv(socket: Socket | null) {
      receive = socket ?? undefined;
      if (socket === null) return;
      adopt(socket);
      const join = socket.addMembership.bind(socket);
      // It would join on "the interface 224.0.0.251" or wherever the default route points.
      socket.addMembership = (group) => join(group, address);
    },
  };
  const mdns = createMdns({
    interfaces: [face],
    srcPort: MDNS_PORT,
    reuseAddr: true,
    noInit: true,
  }) as unknown as MdnsEmitter;
  const closeAll = async (): Promise<void> => {
    await Promise.all(
      [...made].map(
        (socket) =>
          new Promise<void>((resolve) => {
            socket.once('close', () => resolve());
            try {
              socket.close();
            } catch {
              resolve(); // closed already
            }
          }),
      ),
    );
  };
  try {
    await new Promise<void>((resolve, reject) => {
      const timer = setTimeout(
        () => reject(new EdgewayError('timeout', `multicast DNS on ${name}: the sockets did not open`)),
        START_LIMIT_MS,
      );
      mdns.on('ready', () => {
        clearTimeout(timer);
        resolve();
      });
      mdns.on('error', (error) => {
        clearTimeout(timer);
        reject(
          bindError(failures.at(-1) ?? error, 'UDP', `${address} (multicast DNS on ${name})`, MDNS_PORT),
        );
      });
      mdns.initServer();
    });
    if (send === undefined || receive === undefined)
      throw new EdgewayError('internal', 'mdns-server is ready without sockets');
  } catch (error) {
    await closeAll();
    throw toEdgewayError(error);
  }
  for (const socket of [send, receive]) sizeReceives(socket, MDNS_MESSAGE_MAX);
  const sender: Socket = send;
  sender.setMulticastInterface(address);
  mdns.on('error', (error) => {
    counters.mdns_send_failed++;
    log.debug({ interface: name, error: error.message }, 'multicast DNS socket error');
  });
  return { mdns, send: sender, close: closeAll };
}
