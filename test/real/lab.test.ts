// The laboratory itself: who may have a name, and what happens to a lab whose maker was killed.
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, run, until } from '../../scripts/lab.ts';

const test = suite('laboratory');
const root = fileURLToPath(new URL('../..', import.meta.url));

async function rejection(work: Promise<unknown>): Promise<string> {
  return await work.then(
    () => 'it succeeded',
    (error: Error) => error.message,
  );
}

test('Lab.create: a name that is in use is refused, and so is a bad number of nodes; the lab stays', async () => {
  const lab = await Lab.create({ nodes: 1 });
  try {
    assert.match(await rejection(Lab.create({ nodes: 0 })), 'nodes: 0 must be 1…');
    assert.match(await rejection(Lab.up({ nodes: 1 })), `down --lab ${lab.lab}`);
    assert.ok(existsSync(Lab.ledgerOf(lab.lab)));
  } finally {
    await lab.down();
  }
  assert.not(existsSync(Lab.ledgerOf(lab.lab)));
});

test('Lab.down: while the lab is built, and twice, leaves nothing', async () => {
  const lab = await Lab.create({ nodes: 2 });
  const built = rejection(lab.build());
  await until('the first host is there', 10_000, () => existsSync(`/run/netns/${lab.lab}-n1`) || undefined);
  await Promise.all([lab.down(), lab.down()]);
  assert.match(await built, /is being removed|ip /);
  assert.not.match((await run(['ip', 'netns', 'list'])).stdout, lab.lab);
  assert.not(existsSync(lab.dir));
});

test('Lab.sweepAbandoned: a killed owner is noticed, a living one is left alone', async () => {
  const name = `ewk${process.pid}`;
  const flags = process.versions['deno'] === undefined ? [] : ['run', '-A', '--quiet'];
  const child = spawn(process.execPath, [...flags, 'scripts/lab.ts', 'up', '--lab', name, '--nodes', '1'], {
    cwd: root,
    stdio: 'ignore',
  });
  const ended = new Promise((resolve) => child.on('close', resolve));
  const mine = await Lab.create({ nodes: 1 });
  try {
    await until('etcd runs', 30_000, () => existsSync(`/tmp/edgeway-lab-${name}/etcd`) || undefined);
    child.kill('SIGKILL');
    await ended;
    assert.ok((await Lab.sweepAbandoned()).includes(name));
    assert.not(existsSync(`/run/netns/${name}-net`));
    assert.not(existsSync(`/tmp/edgeway-lab-${name}`));
    assert.ok(existsSync(Lab.ledgerOf(mine.lab)));
  } finally {
    child.kill('SIGKILL');
    await mine.down();
    await Lab.sweep(name);
  }
});

test.run();
