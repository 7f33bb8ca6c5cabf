import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { applyService } from '../../../coordinator/claims.ts';
import { Keyspace } from '../../../coordinator/keyspace.ts';
import { MemoryStore } from '../../../coordinator/memory.ts';
import { RouteFollower } from '../../../edge/routes/follow.ts';
import { decodeSnapshot, encodeSnapshot } from '../../../edge/routes/snapshot.ts';
import { RouteTable } from '../../../edge/routes/table.ts';
import { unwrap } from '../../../src/error.ts';
import { Keys } from '../../../src/keys.ts';
import { SILENT } from '../../../src/log.ts';
import { DEFAULT_NETWORK_CONFIG as config } from '../../../src/records.ts';
import { CART, descriptor, instance, ip, node, sid } from '../../support/sample.ts';
import { settle, VirtualTime } from '../../support/time.ts';

const keys = new Keys();
const OTHER = sid('shop.prod.other.v1');

function table(): RouteTable {
  const full = new RouteTable();
  const n1 = node('n1', 1, {
    coordinate: { vec: [1, 2, 3, 4, 5, 6, 7, 8], height: 0.1, error: 0.2, adjustment: 0 },
    load: 0.5,
  });
  full.putNode(n1);
  full.putService({ id: CART, descriptor: descriptor(), addresses: { closest: ip('172.30.0.9') } });
  full.putInstance(instance(n1, CART, 1));
  full.revision = 42;
  return full;
}

test('encodeSnapshot and decodeSnapshot are inverses, and the file reads like the keyspace', () => {
  const text = encodeSnapshot(table(), keys);
  const { revision, records } = unwrap(decodeSnapshot(text, keys));
  assert.is(revision, 42);
  assert.equal(records.map(({ kind }) => kind).sort(), ['instance', 'node', 'service']);
  const json = JSON.parse(text);
  assert.is(json.records['/edgeway/v1/services/shop.prod.cart.v1'].addresses.closest, '172.30.0.9');
});

test('decodeSnapshot is total, and leaves out the records that cannot be read', () => {
  const text = encodeSnapshot(table(), keys);
  const json = JSON.parse(text);
  json.records['/edgeway/v1/services/shop.prod.cart.v1'].v = 9;
  json.records['/wine'] = {};
  assert.is(unwrap(decodeSnapshot(JSON.stringify(json), keys)).records.length, 2);
  for (let cut = 0; cut < text.trimEnd().length; cut++)
    assert.not.ok(decodeSnapshot(text.slice(0, cut), keys).ok);
  fc.assert(
    fc.property(fc.oneof(fc.string(), fc.json()), (anything) => {
      decodeSnapshot(anything, keys);
    }),
    { numRuns: 500 },
  );
});

for (const mode of ['needed', 'all'] as const)
  test(`RouteFollower (${mode}) serves what was restored until etcd has answered, and then only what etcd holds`, async () => {
    const time = new VirtualTime();
    const store = new MemoryStore(() => time.monotonicMs());
    const writer = store.connect();
    const client = store.connect();
    const restored = unwrap(decodeSnapshot(encodeSnapshot(table(), keys), keys));
    client.partitioned = true;
    const routes = new RouteFollower({
      keys,
      restored,
      open: (listener) => new Keyspace(client, keys, SILENT, listener),
      after: (ms, run) => time.after(ms, run),
      ...(mode === 'all'
        ? {}
        : {
            interest: {
              idleMs: 600_000,
              negativeMs: 10_000,
              max: 10,
              now: () => time.monotonicMs(),
              ownerOf: async () => undefined,
              subnetTaken: async () => false,
            },
          }),
    });
    await settle();
    assert.ok(routes.table.synced, 'names are answered at once');
    assert.not.ok(routes.live);
    assert.ok(routes.table.instance(CART, 1) && routes.table.node('n1'));
    const gone: string[] = [];
    routes.onDelta(({ services, nodes }) => void gone.push(...services, ...nodes));
    // Meanwhile the instance went, and the service was changed.
    const { service } = await applyService(writer, keys, config, descriptor(CART, { ports: [81] }));
    await applyService(writer, keys, config, descriptor(OTHER));
    client.partitioned = false;
    await settle();
    assert.equal(routes.table.service(CART), service);
    assert.is(routes.table.instance(CART, 1), undefined);
    assert.is(routes.table.node('n1'), undefined);
    assert.is(routes.table.nameOf(ip('172.30.0.9')), undefined);
    assert.ok(gone.includes(CART) && gone.includes('n1'));
    assert.is(routes.table.service(OTHER) === undefined, mode === 'needed');
    await routes.close();
  });

test.run();
