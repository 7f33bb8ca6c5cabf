// client ── relay ── etcd    (one relay per client, so that one client can be cut off while others go on)
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import type { Kv } from '../../coordinator/kv.ts';
import { SILENT } from '../../src/log.ts';
import { kvSuite } from '../conformance/kv.ts';
import { startTestEtcd } from '../support/etcd.ts';
import { Relay } from '../support/relay.ts';

kvSuite('etcd', async () => {
  const etcd = await startTestEtcd();
  const relays = new Map<Kv, Relay>();
  const relay = await Relay.to(etcd.endpoint);
  const spare: Relay[] = await Promise.all(Array.from({ length: 16 }, () => Relay.to(etcd.endpoint)));
  return {
    connect: () => {
      const own = spare.pop() ?? relay;
      const kv = connectEtcd({ endpoints: [own.endpoint], log: SILENT });
      relays.set(kv, own);
      return kv;
    },
    advance: async () => {},
    compact: async () => {
      const { revision } = await connectOnce(etcd.endpoint, (kv) => kv.range('/none'));
      await etcd.etcdctl('compact', String(revision));
    },
    interrupt: async (kv, meanwhile) => {
      const own = relays.get(kv)!;
      own.cut();
      await meanwhile();
      own.mend();
    },
    close: async () => {
      for (const [kv, own] of relays) {
        await kv.close();
        await own.close();
      }
      await Promise.all([...spare, relay].map((one) => one.close()));
      await etcd.remove();
    },
  };
});

async function connectOnce<T>(endpoint: string, use: (kv: Kv) => Promise<T>): Promise<T> {
  const kv = connectEtcd({ endpoints: [endpoint], log: SILENT });
  try {
    return await use(kv);
  } finally {
    await kv.close();
  }
}
