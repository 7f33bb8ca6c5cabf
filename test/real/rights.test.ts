// Real processes with nothing but the rights of coordinator/rbac.sh: a root role, a cluster role, and an agent that
// publishes a port. What they may not do shows as `permission_denied` in their logs, so there must be none.
//
//   switch 10.77.0.254: etcd with users, two coordinators, a client      n1 10.77.0.1: web 1, port 8080
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime, until } from '../../scripts/lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('least rights');
const WEB = 'shop.prod.web.v1';
const SUBNET = '172.31.4.64/26';
const ROOT = '/edgeway/v1';
let lab: Lab;

const asRoot = (...args: string[]): Promise<string> => lab.etcdctl('--user', 'root:root', ...args);
const value = async (key: string): Promise<string> =>
  (await asRoot('get', '--print-value-only', `${ROOT}/${key}`)).trim();

async function rbac(...args: string[]): Promise<void> {
  const script = join(import.meta.dirname!, '../../coordinator/rbac.sh');
  const { status, stderr } = await lab.exec(lab.switch, [
    ...['env', 'ETCDCTL_USER=root:root', 'sh', script, ...args],
  ]);
  assert.is(status, 0, stderr);
}
const asUser = (user: string): string[] => [
  ...['--etcd-user', user, '--etcd-password-file', join(lab.dir, 'password')],
];
const logs = (): string =>
  ['root.log', 'cluster.log', 'n1.log'].map((file) => readFileSync(join(lab.dir, file), 'utf8')).join('');

test.before(async () => {
  lab = await Lab.up({ lab: `ewr${process.pid}`, nodes: 1, runtime });
  writeFileSync(join(lab.dir, 'password'), 'secret\n');
  await lab.etcdctl('user', 'add', 'root:root');
  await lab.etcdctl('user', 'grant-role', 'root', 'root');
  for (const user of ['boss', 'chore', 'n1']) await lab.etcdctl('user', 'add', `${user}:secret`);
  await lab.etcdctl('auth', 'enable');
  await rbac('root', 'boss');
  await rbac('cluster', 'chore', 'default');
  await rbac('node', 'n1', 'default', 'n1', SUBNET, '172.30.201', WEB);
  for (const [role, user] of [
    ['root', 'boss'],
    ['cluster', 'chore'],
  ] as const)
    lab.spawn(
      lab.switch,
      lab.command(...['coordinator', '--etcd', lab.etcd, '--roles', role, '--holder', user, ...asUser(user)]),
      join(lab.dir, `${role}.log`),
    );
  await until('the plan', 30_000, async () => (await value('config/network')) !== '');
  const flags = ['--cluster', 'default', '--register', SUBNET, '--instance-ips', '172.30.201.0/24'];
  await lab.startAgent(1, [...flags, ...asUser('n1')]);
});
test.after(async () => lab?.down());

test('an exposed service written by hand is completed, and an agent publishes its port', async () => {
  const [appname, appnamespace, servicename, servicenamespace] = WEB.split('.');
  const ports = [{ source: 8080, destination: 8123, protocol: 'tcp' }];
  const record = { v: 1, appname, appnamespace, servicename, servicenamespace, exposed: true, ports };
  await asRoot('put', `${ROOT}/services/${WEB}`, JSON.stringify(record));
  await until('its addresses', 30_000, async () => (await value(`services/${WEB}`)).includes('"fastest"'));
  assert.match(await value('ports/tcp/8080'), WEB);
  const netns = await lab.addInstance('web');
  await until('the agent to have joined', 30_000, async () => {
    const { body } = await lab.api(1, 'GET', '/api/v1/status');
    return body.subnet === SUBNET;
  });
  const deployed = await lab.api(1, 'POST', '/api/v1/instances', { service: WEB, instance: 1, netns });
  assert.is(deployed.status, 200, JSON.stringify(deployed.body));
  const self = (script: string, ...args: string[]): string[] =>
    runtime === 'deno'
      ? [process.execPath, 'run', '-A', '--quiet', script, ...args]
      : [process.execPath, script, ...args];
  lab.spawn(netns, self('test/lab/echo.ts', '8123', 'web'), join(lab.dir, 'web.log'));
  await until('an answer through the node', 30_000, async () => {
    const ask = self('test/lab/ask.ts', 'tcp', lab.node(1).ip, '8080', 'hello', '1');
    return (await lab.exec(lab.switch, ask)).stdout.includes('web 10.77.0.254 hello');
  });
  const ingress = await asRoot('get', '--prefix', `${ROOT}/instances/edgeway.system.ingress.v1/`);
  assert.match(ingress, '"node":"n1"');
  assert.not.match(logs(), 'permission_denied');
});

test('repeating rbac.sh under running processes takes away only what is no longer named', async () => {
  const rights = (): Promise<string> => asRoot('role', 'get', 'edgeway-n1');
  const before = await rights();
  await rbac('node', 'n1', 'default', 'n1', SUBNET, '172.30.201', WEB);
  assert.is(await rights(), before);
  await rbac('node', 'n1', 'default', 'n1', SUBNET, '172.30.201', WEB, 'shop.prod.db.v1');
  assert.match(await rights(), 'instances/shop.prod.db.v1/');
  await rbac('node', 'n1', 'default', 'n1', SUBNET, '172.30.201', WEB);
  assert.is(await rights(), before);
  assert.not.match(logs(), 'permission_denied');
});

test.run();
