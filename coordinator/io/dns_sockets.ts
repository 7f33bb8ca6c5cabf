// The sockets of a DNS server, inside a node or at the edge of the platform: UDP and TCP on one port of one address,
// and the talk with TCP clients. It knows how messages are framed and nothing of what they say. It refuses to hold more
// clients than the bounds, of one source or of all, a client that says nothing, and answers that a client does not
// read; and no message can make it throw.
import type { Buffer } from 'node:buffer';
import { Buffer as Bytes } from 'node:buffer';
import { createServer, type Server, type Socket } from 'node:net';
import { formatIpv4, type Ipv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import {
  DNS_TCP_CLIENTS_MAX,
  DNS_TCP_IDLE_MS,
  DNS_TCP_PIPELINE_MAX,
  DNS_TCP_SOURCE_CLIENTS_MAX,
  DNS_TCP_UNREAD_MAX,
  DNS_UDP_QUESTION_MAX,
} from '../../src/limits.ts';
import { bindUdp, type UdpServer } from './udp_server.ts';

/** An error answer that repeats no question. */
const HEADER_ONLY = 12;

export interface DnsSockets {
  readonly udp: UdpServer;
  readonly tcp: Server;
  readonly port: number;
  /** Resolves when both are closed; TCP clients must have been closed before. */
  close(): Promise<void>;
}

/**
 * Both sockets on one port, or none; port 0 takes a free one. `kernelBytes`: see UdpOptions. Rejects with
 * address_taken or host_unsupported.
 */
export async function bindDns(address: Ipv4, wanted: number, kernelBytes?: number): Promise<DnsSockets> {
  // A port that the kernel chose for UDP may be taken for TCP; only then is another try worth it.
  for (let tries = wanted === 0 ? 8 : 1; ; tries--) {
    const udp = await bindUdp({ address, port: wanted, messageMax: DNS_UDP_QUESTION_MAX, kernelBytes }).catch(
      (error: Error) => Promise.reject(bindError(error, 'UDP', formatIpv4(address), wanted)),
    );
    const { port } = udp;
    try {
      const tcp = await bindTcp(formatIpv4(address), port);
      const close = async (): Promise<void> => {
        await Promise.all([udp.close(), new Promise<void>((resolve) => tcp.close(() => resolve()))]);
      };
      return { udp, tcp, port, close };
    } catch (error) {
      await udp.close();
      if (tries <= 1) throw error;
    }
  }
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

/** What stands in the way, in words. */
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

/** False for a sender that no answer can reach: RFC 768 lets a source port be 0, and a socket throws at it. */
export const isAnswerable = (port: number): boolean => port !== 0;

/** RFC 1035 §4.2.2: over TCP a message is led by its length in two octets. */
export function frame(message: Buffer): Buffer {
  const framed = Bytes.allocUnsafe(message.length + 2);
  framed.writeUInt16BE(message.length, 0);
  message.copy(framed, 2);
  return framed;
}

export interface TcpService<Source> {
  /** Who is behind an address; undefined closes the connection. */
  readonly admit: (address: string) => Source | undefined;
  /** The answer to one message; undefined closes the connection, since silence is no way to go on. */
  readonly respond: (message: Buffer, source: Source) => Promise<Buffer | undefined>;
  /** `broken`: a client that does not ask questions. */
  readonly count: (event: 'client' | 'refused' | 'broken') => void;
  readonly failed: (error: Error) => void;
}

/** Serves the clients of a listening server. Returns the way to close them all. */
export function serveTcp<Source>(tcp: Server, service: TcpService<Source>): () => void {
  const { admit, respond, count, failed } = service;
  const open = new Set<Socket>();
  const bySource = new Map<string, number>();

  tcp.on('connection', (socket) => {
    socket.on('error', () => socket.destroy());
    const address = socket.remoteAddress ?? '';
    const source = admit(address);
    if (source === undefined) {
      socket.destroy();
      return;
    }
    const others = bySource.get(address) ?? 0;
    if (open.size >= DNS_TCP_CLIENTS_MAX || others >= DNS_TCP_SOURCE_CLIENTS_MAX) {
      count('refused');
      socket.destroy();
      return;
    }
    count('client');
    open.add(socket);
    bySource.set(address, others + 1);
    socket.on('close', () => {
      open.delete(socket);
      const left = bySource.get(address)! - 1;
      if (left > 0) bySource.set(address, left);
      else bySource.delete(address);
    });
    talk(socket, source);
  });

  function talk(socket: Socket, source: Source): void {
    socket.setNoDelay(true);
    socket.setTimeout(DNS_TCP_IDLE_MS, () => socket.destroy());
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
        respond(message, source)
          .then((reply) => {
            if (reply === undefined || reply.length === HEADER_ONLY) {
              // Not a question: whoever speaks so over TCP is not a resolver.
              count('broken');
              if (reply === undefined) socket.destroy();
              else socket.end(frame(reply));
            } else if (!socket.destroyed) socket.write(frame(reply));
          })
          .catch(failed)
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

  return () => {
    for (const socket of open) socket.destroy();
  };
}
