// Roles inside agents, records written and deleted by hand, and a standby that takes over.
//
//   n1, n2: agents with --roles root,cluster        n2: cart 1 (namespace)
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime, until } from '../../scripts/lab.ts';
import { unwrap } from '../../src/error.ts';
import { ROLE_TTL_S } from '../../src/limits.ts';
import { decodeLeader } from '../../src/records.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('roles in agents');
const ROOT = '/edgeway/v1';
let lab: Lab;

const value = async (key: string): Promise<string> =>
  (await lab.etcdctl('get', '--print-value-only', `${ROOT}/${key}`)).trim();
const holder = async (key: string): Promise<string | undefined> => {
  const text = await value(key);
  return text === '' ? undefined : unwrap(decodeLeader(text)).holder;
};
const byHand = (service: string, more = ''): string => {
  const [appname, appnamespace, servicename, servicenamespace] = service.split('.');
  const text = JSON.stringify({ v: 1, appname, appnamespace, servicename, servicenamespace });
  return more === '' ? text : text.replace('}', `,${more}}`);
};
const services = async (index: number) =>
  (await lab.api(index, 'GET', '/api/v1/services')).body as {
    items: { service: string; addresses: Record<string, string>; instances: number }[];
    problems: { key: string; reason: string }[];
  };

test.before(async () => {
  lab = await Lab.up({ nodes: 2, runtime, agentFlags: ['--roles', 'root,cluster', '--presence-ttl', '15'] });
  await lab.startAll();
});
test.after(async () => lab?.down());

test('one agent acts as root and cluster: plan, admission, a block, and nodes inside it', async () => {
  await until('a block to be granted', 20_000, async () =>
    (await lab.etcdctl('get', '--prefix', `${ROOT}/root/blocks/`)).includes('"cluster":"default"')
      ? true
      : undefined,
  );
  assert.match(await value('clusters/default'), '"admitted":true');
  assert.match(await value('config/network'), '"nodePrefix":26');
  assert.ok(await holder('root/leader'));
  assert.ok(await holder('clusters/default/leader'));
});

test('a service written by hand takes effect like any other; a wrong one is reported and harms nothing', async () => {
  await lab.etcdctl('put', `${ROOT}/services/shop.prod.cart.v1`, byHand('shop.prod.cart.v1'));
  await lab.etcdctl(
    'put',
    `${ROOT}/services/shop.prod.bad.v1`,
    byHand('shop.prod.bad.v1', '"ports":["http"]'),
  );
  await until('cart to have its addresses everywhere', 30_000, async () => {
    for (const { index } of lab.nodes) {
      const cart = (await services(index)).items.find(({ service }) => service === 'shop.prod.cart.v1');
      if (cart === undefined || Object.keys(cart.addresses).length !== 3) return undefined;
    }
    return true;
  });
  const { items, problems } = await services(1);
  assert.not.ok(items.some(({ service }) => service === 'shop.prod.bad.v1'));
  const problem = problems.find(({ key }) => key.endsWith('shop.prod.bad.v1'));
  assert.match(problem?.reason ?? '', 'ports.0');
  const resolved = await lab.api(1, 'GET', '/api/v1/resolve?name=shop.prod.cart.v1.any.closest.local');
  assert.is(resolved.status, 200, JSON.stringify(resolved.body));
});

test('deleting an instance key by hand takes the instance away; the agent can deploy it again', async () => {
  const netns = await lab.addInstance('cart1');
  const body = { service: 'shop.prod.cart.v1', instance: 1, netns };
  assert.is((await lab.api(2, 'POST', '/api/v1/instances', body)).status, 200);
  const seen = async () =>
    (await services(1)).items.find(({ service }) => service === 'shop.prod.cart.v1')?.instances;
  await until('n1 to see it', 15_000, async () => ((await seen()) === 1 ? true : undefined));
  await lab.etcdctl('del', `${ROOT}/instances/shop.prod.cart.v1/1`);
  await until('n1 to lose it', 15_000, async () => ((await seen()) === 0 ? true : undefined));
  assert.is((await lab.api(2, 'DELETE', '/api/v1/instances/shop.prod.cart.v1/1')).status, 200);
  assert.is((await lab.api(2, 'POST', '/api/v1/instances', body)).status, 200);
  await until('n1 to see it again', 15_000, async () => ((await seen()) === 1 ? true : undefined));
});

test('the acting agent is killed: the other takes over, and goes on with the chores', async () => {
  const first = await holder('root/leader');
  const index = lab.nodes.find(({ name }) => name === first)!.index;
  const other = lab.nodes.find(({ name }) => name !== first)!;
  const node = lab.node(index);
  await lab.end(node.agent!, 'SIGKILL');
  node.agent = undefined;
  const since = performance.now();
  await until('the standby to act', (ROLE_TTL_S + 15) * 1_000, async () =>
    (await holder('root/leader')) === other.name && (await holder('clusters/default/leader')) === other.name
      ? true
      : undefined,
  );
  console.log(`      taken over after ${Math.round(performance.now() - since)} ms (lease ${ROLE_TTL_S} s)`);
  await lab.etcdctl('put', `${ROOT}/services/shop.prod.late.v1`, byHand('shop.prod.late.v1'));
  await until('late to have its addresses', 30_000, async () =>
    (await value('services/shop.prod.late.v1')).includes('"fastest"') ? true : undefined,
  );
});

test.run();
