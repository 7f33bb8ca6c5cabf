// The operator's commands, as an operator runs them: their output for people and for programs, and their errors.
//
//   n1: agent ── etcd of the lab        edgeway COMMAND --api unix:…   one process each
import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Output, type Runtime, run, until } from '../../scripts/lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('command line');
const root = fileURLToPath(new URL('../..', import.meta.url));
const CART = 'shop.prod.cart.v1';
const WEB = 'shop.prod.web.v1';
const [cart, web, pay] = ['cart', 'web', 'pay'].map((servicename) => ({
  appname: 'shop',
  appnamespace: 'prod',
  servicename,
  servicenamespace: 'v1',
}));
let lab: Lab;

/** A command that asks the agent, with what it reads from standard input. */
function edgeway(words: string, stdin?: string): Promise<Output> {
  const argv = [...words.split(' '), '--api', `unix:${lab.node(1).apiSocket}`];
  return run(lab.command(...argv), stdin === undefined ? {} : { stdin });
}

async function done(words: string, stdin?: string): Promise<string> {
  const { status, stdout, stderr } = await edgeway(words, stdin);
  assert.is(status, 0, `${words}: ${stderr}\n${lab.tail(lab.node(1))}`);
  assert.is(stderr, '', words);
  return stdout;
}

async function refused(words: string, status: number, message: RegExp | string): Promise<void> {
  const output = await edgeway(words);
  assert.is(output.status, status, `${words}: ${output.stdout}${output.stderr}`);
  assert.match(output.stderr, message, words);
  assert.is(output.stdout, '', words);
}

test.before(async () => {
  lab = await Lab.up({ nodes: 1, runtime });
  await lab.startAgent(1);
});
test.after(async () => {
  await lab?.down();
});

test('register, status, get nodes', async () => {
  assert.is(await done('register 172.19.0.0/26'), 'registered with 172.19.0.0/26\n');
  assert.equal(JSON.parse(await done('register -o json')), { subnetwork: '172.19.0.0/26' });
  await refused('register 172.19.0.64/26', 1, /172\.19\.0\.0\/26.*\(already_registered\)/);
  assert.match(await done('status'), /^subnet +172\.19\.0\.0\/26$/m);
  assert.is(JSON.parse(await done('status -o json')).node, 'n1');
  assert.match(await done('get nodes'), /^NODE .*\nn1 .* 172\.19\.0\.0\/26 /);
  assert.is(JSON.parse(await done('get nodes n1 -o json')).items[0].subnet, '172.19.0.0/26');
  await refused('get nodes n9', 1, 'no nodes "n9" (not_found)');
});

test('apply: one descriptor from a file, one from standard input, an array; get services, describe, delete', async () => {
  const file = join(lab.dir, 'cart.json');
  writeFileSync(file, JSON.stringify(cart));
  assert.is(await done(`apply -f ${file}`), `service ${CART} applied\n`);
  assert.is(await done('apply -f -', JSON.stringify({ ...web, needs: [CART] })), `service ${WEB} applied\n`);
  const both = JSON.parse(await done('apply --file - -o json', JSON.stringify([cart, pay])));
  assert.equal(
    both.map((one: { service: string }) => one.service),
    [CART, 'shop.prod.pay.v1'],
  );
  const listed = await done('get services');
  assert.match(listed, /^SERVICE +INSTANCES +ROUNDROBIN/);
  assert.match(listed, new RegExp(`^${WEB} +0 .* ${CART}$`, 'm'));
  assert.is(JSON.parse(await done('get services -o json')).items.length, 3);
  // The shipped script, from a directory of the caller's: the path is relative to that.
  const there = ['env', '-C', lab.dir, join(root, 'scripts/edgeway'), 'apply', '-f', 'cart.json'];
  const applied = await run([...there, '--api', `unix:${lab.node(1).apiSocket}`]);
  assert.is(applied.stdout, `service ${CART} applied\n`, applied.stderr);

  assert.match(await done(`describe ${CART}`), `${CART}.any.roundrobin.local  172.30.`);

  await refused(`apply -f ${lab.dir}/none.json`, 1, /none\.json: .*ENOENT/);
  writeFileSync(file, '{');
  await refused(`apply -f ${file}`, 1, /cart\.json: is not JSON/);
  writeFileSync(file, JSON.stringify({ ...cart, appname: 'No!' }));
  await refused(`apply -f ${file}`, 1, /appname.*\(invalid_/);

  // What is wrong with the command is said before anything is done.
  await refused('delete shop.prod.pay.v1 -o yaml', 1, '--output "yaml": must be table or json');
  assert.is(JSON.parse(await done('get services -o json')).items.length, 3);
  assert.is(await done('delete shop.prod.pay.v1'), 'service shop.prod.pay.v1 deleted\n');
  assert.equal(JSON.parse(await done(`delete ${WEB} -o json`)), { deleted: WEB });
  assert.is(JSON.parse(await done('get services -o json')).items.length, 1);
  await refused(`describe ${WEB}`, 1, `no service "${WEB}" (not_found)`);
});

test('attach, get instances, resolve, explain, detach', async () => {
  const netns = await lab.addInstance('one');
  assert.match(
    await done(`attach ${CART} 1 --netns ${netns}`),
    new RegExp(`^SERVICE .*\\n${CART} +1 +172\\.30\\.`),
  );
  const [instance] = JSON.parse(await done('get instances -o json')).items;
  assert.is(instance.node, 'n1');
  assert.match(
    await done(`resolve ${CART}.any.roundrobin.local`),
    new RegExp(`\\n${CART} +1 +${instance.instanceIp} `),
  );
  assert.is(JSON.parse(await done(`resolve ${CART}.1.fixed.local -o json`)).address, instance.instanceIp);
  assert.match(await done(`explain ${instance.instanceIp}`), '100 %');

  await refused(`attach ${CART} abc --netns ${netns}`, 1, 'instance "abc": must be a number');
  await refused(`attach ${CART} 2 --pid self`, 1, '--pid "self": must be the number of a process');
  await refused(`attach ${CART} 2`, 1, 'exactly one of netns, pid, container');
  await refused(`attach ${CART} 2 --netns none`, 1, '(namespace_unknown)');
  await refused(`detach ${CART} 1x`, 1, 'instance "1x": must be a number');
  assert.is(await done(`detach ${CART} 1`), `instance 1 of ${CART} detached\n`);
  assert.equal(JSON.parse(await done(`detach ${CART} 1 -o json`)), { detached: CART, instance: 1 });
  assert.equal(JSON.parse(await done('get instances -o json')).items, []);
});

test('a flag that a command does not have, a value that is missing, an argument too many: status 2', async () => {
  await refused('agent --etdc 10.0.0.5:2379', 2, '--etdc: there is no such flag; --etcd?');
  await refused('get nodes --ouput json', 2, '--ouput: there is no such flag; --output?');
  await refused('status --zzz', 2, /--zzz: there is no such flag$/m);
  await refused('agent --etcd --register auto', 2, '--etcd: its value is missing');
  await refused('get nodes n1 n2', 2, 'n2: one argument too many');
  await refused('--output json get nodes', 2, '--output: no flag comes before the command');
});

/** `watch` with what it has said so far. */
function watch() {
  const [command, ...args] = lab.command('watch', '-o', 'json', '--api', `unix:${lab.node(1).apiSocket}`);
  const child = spawn(command!, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  const said = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const)
    child[name].on('data', (chunk: Buffer) => {
      said[name] += chunk.toString();
    });
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
  const ready = () => until('watch is ready', 20_000, () => /watching/.test(said.stderr) || undefined);
  return { child, said, ended, ready };
}

test('watch: from "watching" on, every change and nothing from before', async () => {
  const { child, said, ready } = watch();
  try {
    await ready();
    await done('apply -f -', JSON.stringify({ ...web, needs: [CART] }));
    const lines = await until('the change is shown', 20_000, () =>
      said.stdout.endsWith('\n') ? said.stdout.trim().split('\n') : undefined,
    );
    assert.equal(
      lines.map((line) => JSON.parse(line).name),
      [WEB],
      said.stdout,
    );
  } finally {
    child.kill('SIGKILL');
  }
});

test('watch: an agent that goes, in order or not, is an error', async () => {
  for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
    const { child, said, ended, ready } = watch();
    try {
      await ready();
      await lab.end(lab.node(1).agent!, signal);
      assert.is(await ended, 1, said.stderr);
      assert.match(said.stderr, 'ended before its answer did');
    } finally {
      child.kill('SIGKILL');
    }
    await refused('status', 1, /no agent answers at unix:.*Start one with/);
    await lab.startAgent(1);
  }
});

test.run();
