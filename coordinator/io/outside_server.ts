// The outside DNS on its sockets, answering from a view of its own. One bad client never touches another.
import type { Ipv4 } from '../../src/addr.ts';
import type { Keys } from '../../src/keys.ts';
import type { Logger } from '../../src/log.ts';
import { followKeyspace } from '../keyspace.ts';
import type { Kv } from '../kv.ts';
import { answerOutside, type Zone, type ZoneTable, zoneTable } from '../outside.ts';
import { View } from '../view.ts';
import { bindDns, type DnsSockets, isAnswerable, serveTcp } from './dns_sockets.ts';

export interface OutsideServer {
  readonly port: number;
  stop(): Promise<void>;
}

/** Answers from a view of its own, which outlives the store: with etcd away the last answers go on. */
export async function serveOutside(options: {
  readonly kv: Kv;
  readonly keys: Keys;
  readonly zone: Zone;
  /** To listen on; 0 is all. */
  readonly address: Ipv4;
  /** 0 takes a free one. */
  readonly port: number;
  readonly log: Logger;
}): Promise<OutsideServer> {
  const { kv, keys, zone, address, port, log } = options;
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

  let sockets: DnsSockets;
  try {
    sockets = await bindDns(address, port);
  } catch (error) {
    await close();
    throw error;
  }
  const { udp, tcp } = sockets;
  const failed = (error: Error): void => log.debug({ error: error.message }, 'outside DNS socket');
  udp.receive(
    (message, asker, from) => {
      if (!isAnswerable(from)) return;
      const reply = answerOutside(current(), message, 'udp');
      if (reply !== undefined) udp.send(reply, asker, from);
    },
    () => log.debug({}, 'outside DNS: a datagram was lost'),
  );
  tcp.on('error', failed);
  const closeClients = serveTcp(tcp, {
    admit: (address) => address,
    respond: async (message) => answerOutside(current(), message, 'tcp'),
    count: () => {},
    failed,
  });
  log.info({ name: zone.domain, port: sockets.port }, 'outside DNS is up');
  return {
    port: sockets.port,
    async stop() {
      closeClients();
      await sockets.close();
      await close();
    },
  };
}
