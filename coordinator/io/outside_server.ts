// Sockets of the outside DNS: UDP and TCP on one address. It refuses to hold a connection that says nothing, and more
// of them than the bound; one bad client never touches another.
import type { Buffer } from 'node:buffer';
import { Buffer as Bytes } from 'node:buffer';
import { createSocket } from 'node:dgram';
import { createServer, type Socket } from 'node:net';
import { sizeReceives } from '#udp';
import { EdgewayError } from '../../src/error.ts';
import type { Keys } from '../../src/keys.ts';
import { DNS_TCP_CLIENTS_MAX, DNS_TCP_IDLE_MS, DNS_UDP_MESSAGE_MAX } from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import { followKeyspace } from '../keyspace.ts';
import type { Kv } from '../kv.ts';
import { answerOutside, type Zone, type ZoneTable, zoneTable } from '../outside.ts';
import { View } from '../view.ts';

export interface OutsideServer {
  readonly port: number;
  stop(): Promise<void>;
}

/** Answers from a view of its own, which outlives the store: with etcd away the last answers go on. */
export async function serveOutside(options: {
  readonly kv: Kv;
  readonly keys: Keys;
  readonly zone: Zone;
  readonly host: string;
  /** 0 takes a free one. */
  readonly port: number;
  readonly log: Logger;
}): Promise<OutsideServer> {
  const { kv, keys, zone, host, port, log } = options;
  const view = new View(keys);
  const paths = [keys.prefix('services'), keys.prefix('instances'), keys.prefix('nodes')];
  let table: ZoneTable | undefined;
  let revision = 0;
  const keyspace = followKeyspace(kv, keys, paths, log, {
    batch(batch) {
      view.apply(batch);
      revision = Math.max(revision, batch.revision);
      table = undefined;
    },
    live() {},
  });
  const current = (): ZoneTable => {
    const synced = paths.every((path) => keyspace.isComplete(path));
    // Not kept until it is complete: completeness comes without a batch of its own.
    if (table === undefined || !table.synced) table = zoneTable(view, zone, synced, revision);
    return table;
  };
  const close = async (): Promise<void> => {
    for (const path of paths) await keyspace.unfollow(path);
  };

  const udp = createSocket('udp4');
  udp.on('message', (message, from) => {
    const reply = answerOutside(current(), message, 'udp');
    // A reply that cannot be sent is a lost datagram.
    if (reply !== undefined) udp.send(reply, from.port, from.address, () => {});
  });
  const clients = new Set<Socket>();
  const tcp = createServer((socket) => {
    socket.on('error', () => socket.destroy());
    socket.setTimeout(DNS_TCP_IDLE_MS, () => socket.destroy());
    if (clients.size >= DNS_TCP_CLIENTS_MAX) {
      socket.destroy();
      return;
    }
    clients.add(socket);
    socket.on('close', () => clients.delete(socket));
    let pending: Buffer = Bytes.alloc(0);
    socket.on('data', (chunk: Buffer) => {
      pending = Bytes.concat([pending, chunk]);
      // RFC 1035 §4.2.2: each message follows its length in two octets.
      while (pending.length >= 2 && pending.length >= 2 + pending.readUInt16BE(0)) {
        const length = pending.readUInt16BE(0);
        const reply = answerOutside(current(), pending.subarray(2, 2 + length), 'tcp');
        pending = pending.subarray(2 + length);
        if (reply === undefined) {
          socket.destroy();
          return;
        }
        const head = Bytes.alloc(2);
        head.writeUInt16BE(reply.length);
        socket.write(Bytes.concat([head, reply]));
      }
    });
  });
  try {
    await new Promise<void>((resolve, reject) => {
      udp.once('error', reject);
      udp.bind(port, host, () => {
        udp.removeListener('error', reject);
        resolve();
      });
    });
    sizeReceives(udp, DNS_UDP_MESSAGE_MAX);
    const bound = udp.address().port;
    udp.on('error', (error) => log.debug({ error: error.message }, 'outside DNS socket'));
    await new Promise<void>((resolve, reject) => {
      tcp.once('error', reject);
      tcp.listen(bound, host, () => {
        tcp.removeListener('error', reject);
        resolve();
      });
    });
    tcp.on('error', (error) => log.debug({ error: error.message }, 'outside DNS socket'));
    log.info({ name: zone.domain, port: bound }, 'outside DNS is up');
    return {
      port: bound,
      async stop() {
        for (const socket of clients) socket.destroy();
        await new Promise<void>((resolve) => tcp.close(() => resolve()));
        await new Promise<void>((resolve) => udp.close(() => resolve()));
        await close();
      },
    };
  } catch (cause) {
    await new Promise<void>((resolve) => udp.close(() => resolve()));
    await close();
    throw new EdgewayError(
      'host_command_failed',
      `outside DNS cannot listen on ${host}:${port}: ${(cause as Error).message}`,
      { cause },
    );
  }
}
