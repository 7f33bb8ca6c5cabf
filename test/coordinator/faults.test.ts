import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { applyService } from '../../coordinator/claims.ts';
import { serviceFaults } from '../../coordinator/faults.ts';
import { MemoryStore } from '../../coordinator/memory.ts';
import { formatIpv4 } from '../../src/addr.ts';
import { Keys } from '../../src/keys.ts';
import { DEFAULT_NETWORK_CONFIG as config } from '../../src/records.ts';
import { CART, descriptor, ip, sid } from '../support/sample.ts';

const keys = new Keys();

test('serviceFaults names whose address or port it is, what is not claimed, and nothing else', async () => {
  const kv = new MemoryStore(() => 0).connect();
  const ports = [{ source: 443, destination: 1, protocol: 'tcp' as const }];
  const { service: cart } = await applyService(kv, keys, config, descriptor(CART, { exposed: true, ports }));
  const id = sid('shop.prod.thief.v1');
  const stolen = cart.addresses.closest!;
  const scribbled = ip('172.30.9.9');
  await kv.txn(
    [],
    [{ kind: 'put', key: keys.build({ kind: 'address', address: scribbled }), value: 'scribble' }],
  );
  const thief = {
    id,
    descriptor: descriptor(id, { exposed: true, ports }),
    addresses: { closest: stolen, fastest: scribbled },
  };
  const faults = await serviceFaults(kv, keys, [cart, thief]);
  assert.equal([...faults.keys()], [keys.build({ kind: 'service', service: id })]);
  assert.is(
    [...faults.values()][0]?.message,
    'has no address for roundrobin yet; ' +
      `address ${formatIpv4(stolen)} (closest) is held by policy closest of ${CART}; ` +
      'address 172.30.9.9 (fastest) has a claim that cannot be read; ' +
      `tcp port 443 leads to service ${CART}`,
  );
});

test.run();
