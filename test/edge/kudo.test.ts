import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { Kudo } from '../../edge/kudo/kudo.ts';
import { networkService } from '../../edge/kudo/service.ts';
import { EdgewayError } from '../../src/error.ts';

test('edgeway/kudo is the entry that other packages import, with the nine functions', async () => {
  const kudo = await import('edgeway/kudo');
  for (const name of [
    'setupNode',
    'setupIptables',
    'addOtherNodes',
    'newNodeInCluster',
    'deleteNodeInCluster',
    'setupInstance',
    'getNamespaceName',
    'cleanInstance',
    'cleanNode',
  ] as const)
    assert.type(kudo[name], 'function', name);
  assert.is(kudo.getNamespaceName('instance'), 'knsinstance');
});

test('getNamespaceName keeps twelve plain characters, and hashes what would collide or could not be a name', async () => {
  const { getNamespaceName } = await import('edgeway/kudo');
  assert.is(getNamespaceName('abcdefghij-1'), 'knsabcdefghij-1');
  const names = ['abcdefghijkl-1', 'abcdefghijkl-2', 'ABC', 'ä', 'a.b', 'a/b', 'a b'].map(getNamespaceName);
  for (const name of names) assert.match(name, /^kns[0-9a-f]{12}$/);
  assert.is(new Set(names).size, names.length);
  for (const bad of ['', 'x'.repeat(254), 'a\nb', 'a\0b'])
    assert.throws(
      () => getNamespaceName(bad),
      (error: unknown) => error instanceof EdgewayError && error.code === 'invalid_request',
    );
});

test('networkService reads every spelling of a sub-network and refuses the rest', async () => {
  const asked: string[] = [];
  // A node that is not there, and that remembers what it was asked for.
  const kudo = {
    describeNode: async () => undefined,
    setupNode: async ({ nodeId, nodeIpCidr }: { nodeId: string; nodeIpCidr: string }) => {
      asked.push(`${nodeId} ${nodeIpCidr}`);
      return { interfaceName: `kbr${nodeId}` };
    },
  } as unknown as Kudo;
  const service = networkService(kudo);
  const create = (sub_network: string, ip_address = '10.0.0.1') =>
    service.CreateContainerNetworkInterface({ ip_address, sub_network });
  for (const text of ['24', '/24', '10.0.0.0/24', '255.255.255.0'])
    assert.equal(await create(text), { interface_name: 'kbr0a000001' }, text);
  assert.equal(asked, Array(4).fill('0a000001 10.0.0.1/24'));
  for (const text of ['', '33', '/33', '255.0.255.0', '10.1.0.0/24', '10.0.0.1/24', 'x', '10.0.0.0/24/1'])
    try {
      await create(text);
      assert.unreachable(text);
    } catch (error) {
      assert.ok(error instanceof EdgewayError && error.code === 'invalid_request', `${text}: ${error}`);
    }
});

test.run();
