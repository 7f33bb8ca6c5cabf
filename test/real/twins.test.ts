// Hosts that were given one node id: clones that join together, and one of another cluster.
//
//   n1 10.77.0.1, n2 10.77.0.2: --node edge      n3 10.77.0.3: --node edge --cluster west
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime } from '../../scripts/lab.ts';
import { eventually } from '../support/eventually.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('hosts with one node id');
const ROOT = '/edgeway/v1';
let lab: Lab;

const held = async (subtree: string): Promise<string[]> =>
  (await lab.etcdctl('get', '--prefix', '--print-value-only', `${ROOT}/${subtree}/`))
    .split('\n')
    .filter((line) => line !== '');

test.before(async () => {
  lab = await Lab.up({ lab: `ewt${process.pid}`, nodes: 3, runtime });
  for (const index of [1, 2]) await lab.startAgent(index, ['--node', 'edge', '--cluster', 'lab']);
  await lab.startAgent(3, ['--node', 'edge', '--cluster', 'west']);
});
test.after(async () => lab?.down());

test('of clones that register together one joins, and the other is told who has the id', async () => {
  const answers = await Promise.all([1, 2].map((index) => lab.api(index, 'POST', '/register', {})));
  assert.equal(answers.map(({ status }) => status).sort(), [200, 409], JSON.stringify(answers));
  const winner = answers.findIndex(({ status }) => status === 200) + 1;
  const loser = answers.find(({ status }) => status === 409)!.body;
  assert.is(loser.code, 'conflict');
  assert.match(JSON.stringify(loser), lab.node(winner).ip);

  const again = await lab.api(3 - winner, 'POST', '/register', {});
  assert.is(again.status, 409);
  assert.match(JSON.stringify(again.body), `in use by a live node at ${lab.node(winner).ip}`);
  const west = await lab.api(3, 'POST', '/register', {});
  assert.is(west.status, 409);
  assert.match(JSON.stringify(west.body), `belongs to a host of cluster lab at ${lab.node(winner).ip}`);

  // What the others undid was their own.
  const subnets = await held('subnets');
  assert.is(subnets.filter((value) => !value.includes('resting')).length, 1);
  assert.match((await held('hosts')).join(), lab.node(winner).ip);
  await eventually(async () => (await held('nodes')).join().includes(lab.node(winner).ip), 'its record');
});

test.run();
