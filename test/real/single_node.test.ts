// One node without any configuration: its own etcd, a restart, a crash, and failures half-way. Each test looks at
// the host afterwards: what was not there before must not be there after.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime, run, until } from '../../scripts/lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('single node');
const SERVICE = 'shop.prod.cart.v1';
let lab: Lab;

interface HostState {
  readonly links: string[];
  readonly routes: string[];
  readonly tables: string;
  readonly forwarding: string;
}

async function hostState(): Promise<HostState> {
  const { netns } = lab.node(1);
  const at = async (...argv: string[]): Promise<string> => (await lab.exec(netns, argv)).stdout;
  const links = JSON.parse(await at('ip', '-j', 'link')) as { ifname: string }[];
  return {
    links: links.map((link) => link.ifname).sort(),
    routes: (await at('ip', '-4', 'route')).trim().split('\n').sort(),
    tables: await at('nft', 'list', 'tables'),
    forwarding: await at('sysctl', '-n', 'net.ipv4.ip_forward'),
  };
}

async function attach(
  instance: number,
  netns: string,
): Promise<{ status: number; body: { namespaceIp: string; code?: string } }> {
  return await lab.api(1, 'POST', '/api/v1/instances', { service: SERVICE, instance, netns });
}

/** Waits until the node hosts its instance again, which is later than the table knowing of it from disk and earlier
 *  than the keyspace. */
async function back(): Promise<string> {
  return await until('the instance is back', 20_000, async () => {
    const { body: status } = await lab.api(1, 'GET', '/api/v1/status');
    const { body } = await lab.api(1, 'GET', '/api/v1/instances');
    return status.instances === 1 ? body.items[0]?.namespaceIp : undefined;
  }).catch((error: Error) => assert.unreachable(`${error.message}\n${lab.tail(lab.node(1))}`));
}

let before: HostState;

test.before(async () => {
  lab = await Lab.up({ nodes: 1, runtime });
  before = await hostState();
});
test.after(async () => {
  await lab?.down();
});
test.after.each(async () => {
  const agent = lab.node(1).agent;
  if (agent !== undefined) await lab.end(agent);
});

test('without an endpoint the agent starts an etcd of its own, and ends it', async () => {
  const node = await lab.startAgent(1, ['--register', 'auto'], '');
  const status = await until('registered', 10_000, async () => {
    const { body } = await lab.api(1, 'GET', '/api/v1/status');
    return body.subnet === null ? undefined : body;
  });
  assert.is(status.etcd, 'live');
  const netns = await lab.addInstance('one');
  assert.is((await attach(1, netns)).status, 200, lab.tail(node));
  const { stdout } = await lab.exec(netns, ['getent', 'hosts', `${SERVICE}.1.fixed.local`]);
  assert.match(stdout, /^172\.30\./);
  await lab.end(node.agent!);
  assert.is(node.agent!.exitCode, 0, lab.tail(node));
  const listening = (await lab.exec(node.netns, ['ss', '-Hltn'])).stdout;
  assert.is(listening.trim(), '', 'nobody listens any more');
  assert.equal(await hostState(), before);
});

test('a restart takes up the same subnet and the same instance with the same addresses', async () => {
  await lab.startAgent(1, [], '');
  await back();
  const saved = JSON.parse(readFileSync(join(lab.dir, 'n1', 'agent.json'), 'utf8'));
  const { body } = await lab.api(1, 'GET', '/api/v1/instances');
  assert.is(body.items[0].namespaceIp, saved.hosted[0].namespaceIp);
  assert.is(body.items[0].instanceIp, saved.hosted[0].instanceIp);
});

test('kill -9 of the agent: the next start finds what was left and goes on', async () => {
  const node = await lab.startAgent(1, [], '');
  const address = await back();
  await lab.end(node.agent!, 'SIGKILL');
  assert.ok((await hostState()).links.includes('edgeway0'), 'a killed agent cleans nothing');
  await lab.startAgent(1, [], '');
  const again = await back();
  assert.is(again, address);
  const inside = (await lab.exec(`${lab.lab}-one`, ['ip', '-4', '-o', 'addr', 'show', 'dev', 'eth0'])).stdout;
  assert.match(inside, new RegExp(`inet ${address}/26`));
  assert.is((await lab.api(1, 'POST', '/docker/undeploy', { serviceName: SERVICE })).status, 200);
  await lab.end(lab.node(1).agent!);
  assert.equal(await hostState(), before);
});

test('register that fails half-way leaves nothing, and succeeds when the obstacle is gone', async () => {
  const node = await lab.startAgent(1, [], '');
  // The subnet's bridge address with port 53 taken: the last step of registering fails.
  const subnet = '172.19.0.0/26';
  const { netns } = node;
  await lab.exec(netns, ['sysctl', '-w', 'net.ipv4.ip_nonlocal_bind=1']);
  const obstacle = lab.spawn(
    netns,
    [
      process.execPath,
      ...(runtime === 'deno' ? ['run', '-A', '--quiet'] : []),
      'test/lab/echo.ts',
      '53',
      'obstacle',
    ],
    join(lab.dir, 'obstacle.log'),
  );
  await until('port 53 is taken', 10_000, async () =>
    (await lab.exec(netns, ['ss', '-Hlun', 'sport', '=', ':53'])).stdout !== '' ? true : undefined,
  );
  const answer = await lab.api(1, 'POST', '/register', { subnetwork: subnet });
  assert.is(answer.status, 409, JSON.stringify(answer.body));
  assert.is(answer.body.code, 'address_taken');
  const { links, routes, tables } = await hostState();
  assert.equal(
    { links, routes, tables },
    { links: before.links, routes: before.routes, tables: before.tables },
  );
  await lab.end(obstacle);
  assert.is((await lab.api(1, 'POST', '/register', { subnetwork: subnet })).status, 200, lab.tail(node));
  await lab.exec(netns, ['sysctl', '-w', 'net.ipv4.ip_nonlocal_bind=0']);
});

test('where no etcd is installed, the error names the package', async () => {
  const node = lab.node(1);
  // A PATH that has everything of this machine but etcd.
  const bin = join(lab.dir, 'bin');
  await run(['mkdir', '-p', bin]);
  for (const program of ['ip', 'nft', 'nsenter', 'sysctl', 'setpriv']) {
    const where = (await run(['sh', '-c', `command -v ${program}`])).stdout.trim();
    if (where !== '') await run(['ln', '-sf', where, join(bin, program)]);
  }
  const output = await lab.exec(
    node.netns,
    [
      'env',
      `PATH=${bin}`,
      ...lab.command(
        'agent',
        '--data-dir',
        join(lab.dir, 'bare'),
        '--api',
        `unix:${join(lab.dir, 'bare.sock')}`,
      ),
    ],
    { timeoutMs: 20_000 },
  );
  assert.is(output.status, 1, output.stderr);
  assert.match(output.stderr, 'etcd_not_installed');
  assert.match(output.stderr, 'etcd-server');
  assert.not(existsSync(join(lab.dir, 'bare.sock')));
});

test('a bad flag is refused before anything is touched', async () => {
  const output = await lab.exec(lab.node(1).netns, lab.command('agent', '--ewp', '99999'), {
    timeoutMs: 20_000,
  });
  assert.is(output.status, 2);
  assert.match(output.stderr, '--ewp "99999"');
});

test.run();
