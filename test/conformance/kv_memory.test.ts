import { type MemoryKv, MemoryStore } from '../../coordinator/memory.ts';
import { kvSuite } from './kv.ts';

kvSuite('memory', async () => {
  let now = 0;
  const store = new MemoryStore(() => now);
  return {
    connect: () => store.connect(),
    advance: async (ms) => {
      now += ms;
      store.expire();
    },
    compact: async () => store.compact(),
    interrupt: async (kv, meanwhile) => {
      const client = kv as MemoryKv;
      client.partitioned = true;
      await meanwhile();
      client.partitioned = false;
    },
    close: async () => {},
  };
});
