// etcd with authentication on, TLS and client certificates; rights from coordinator/rbac.sh, nothing else. What an
// agent, a cluster role and a root role need works; an agent cannot touch another node's claims or the plan.
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { type AddressInfo, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { promisify } from 'node:util';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import {
  applyService,
  claimInstance,
  claimSubnet,
  ensureConfig,
  publishInstance,
  publishNode,
  releaseInstance,
  releaseSubnet,
} from '../../coordinator/claims.ts';
import { connectEtcd, type EtcdCredentials } from '../../coordinator/etcd/client.ts';
import { systemTime } from '../../coordinator/etcd/time.ts';
import type { Kv } from '../../coordinator/kv.ts';
import { startRoles } from '../../coordinator/roles.ts';
import { parseCidr } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { SILENT } from '../../src/log.ts';
import { DEFAULT_NETWORK_CONFIG as config, decodeService } from '../../src/records.ts';
import { Mirror, rejectsWith } from '../conformance/kv.ts';
import { eventually } from '../support/eventually.ts';
import { CART, descriptor, instance, node, sid } from '../support/sample.ts';

const test = suite('etcd with authentication');
const run = promisify(execFile);
const keys = new Keys();
const SUBNETS = { n1: '172.16.3.64/26', n2: '172.16.3.128/26' } as const;

let dir: string;
let etcd: ChildProcess;
let ports: readonly [client: number, peer: number] | undefined;
let endpoint: string;
const clients: Kv[] = [];

const pem = (name: string): Promise<string> => readFile(join(dir, name), 'utf8');

async function certificate(name: string, extra = ''): Promise<void> {
  const file = (suffix: string): string => join(dir, `${name}.${suffix}`);
  await writeFile(file('ext'), `basicConstraints=CA:FALSE\n${extra}`);
  await run('openssl', [
    'req',
    '-newkey',
    'rsa:2048',
    '-nodes',
    '-subj',
    `/CN=${name}`,
    '-keyout',
    file('key'),
    '-out',
    file('csr'),
  ]);
  await run('openssl', [
    ...['x509', '-req', '-in', file('csr'), '-CA', join(dir, 'ca.crt'), '-CAkey', join(dir, 'ca.key')],
    ...['-CAcreateserial', '-days', '2', '-extfile', file('ext'), '-out', file('crt')],
  ]);
}

async function etcdctl(args: readonly string[], user?: string, command = 'etcdctl'): Promise<string> {
  const { stdout } = await run(command, [...args], {
    env: {
      ...process.env,
      ETCDCTL_API: '3',
      ETCDCTL_ENDPOINTS: endpoint,
      ETCDCTL_CACERT: join(dir, 'ca.crt'),
      ETCDCTL_CERT: join(dir, 'root.crt'),
      ETCDCTL_KEY: join(dir, 'root.key'),
      ...(user === undefined ? {} : { ETCDCTL_USER: user }),
    },
  });
  return stdout;
}

function connect(credentials: EtcdCredentials): Kv {
  const kv = connectEtcd({ endpoints: [endpoint], credentials, log: SILENT });
  clients.push(kv);
  return kv;
}
/** By certificate: its common name is the user. */
async function byCertificate(name: string): Promise<Kv> {
  return connect({
    rootCertificate: await pem('ca.crt'),
    certificate: await pem(`${name}.crt`),
    privateKey: await pem(`${name}.key`),
  });
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Again on the same ports: its clients know them. */
async function startEtcd(): Promise<void> {
  ports ??= [await freePort(), await freePort()];
  const [port] = ports;
  endpoint = `https://localhost:${port}`;
  const peer = `http://127.0.0.1:${ports[1]}`;
  etcd = spawn(
    'setpriv',
    [
      ...['--pdeathsig', 'KILL', '--', 'etcd', '--name', 'auth', '--data-dir', join(dir, 'data')],
      ...['--listen-client-urls', `https://127.0.0.1:${port}`, '--advertise-client-urls', endpoint],
      ...[
        '--listen-peer-urls',
        peer,
        '--initial-advertise-peer-urls',
        peer,
        '--initial-cluster',
        `auth=${peer}`,
      ],
      ...['--cert-file', join(dir, 'server.crt'), '--key-file', join(dir, 'server.key')],
      ...['--client-cert-auth', '--trusted-ca-file', join(dir, 'ca.crt'), '--log-level', 'error'],
    ],
    { stdio: 'ignore' },
  );
  await eventually(
    () =>
      etcdctl(['endpoint', 'health']).then(
        () => true,
        () => false,
      ),
    'etcd',
    20_000,
  );
}

test.before(async () => {
  dir = await mkdtemp(join(tmpdir(), 'edgeway-test-auth-'));
  const ca = ['-keyout', join(dir, 'ca.key'), '-out', join(dir, 'ca.crt')];
  await run('openssl', [
    'req',
    '-x509',
    '-newkey',
    'rsa:2048',
    '-nodes',
    '-days',
    '2',
    '-subj',
    '/CN=test-ca',
    ...ca,
  ]);
  await certificate('server', 'subjectAltName=DNS:localhost,IP:127.0.0.1\n');
  for (const name of ['root', 'n1', 'n2', 'boss', 'stranger']) await certificate(name);
  await startEtcd();
  const rbac = join(import.meta.dirname, '../../coordinator/rbac.sh');
  await etcdctl(['root', 'boss'], undefined, rbac);
  await etcdctl(['cluster', 'lab-role', 'lab'], undefined, rbac);
  await etcdctl(['node', 'n1', 'lab', 'n1', SUBNETS.n1, '172.30.201', CART], undefined, rbac);
  await etcdctl(['node', 'n2', 'lab', 'n2', SUBNETS.n2, '172.30.202', CART], undefined, rbac);
  await etcdctl(['node', 'n2', 'lab', 'n2', SUBNETS.n2, '172.30.202', CART], undefined, rbac);
  // Passwords for those who come without a certificate of their own name.
  await etcdctl(['user', 'delete', 'lab-role']);
  await etcdctl(['user', 'add', 'lab-role:secret']);
  await etcdctl(['user', 'grant-role', 'lab-role', 'edgeway-lab-role']);
  await etcdctl(['user', 'add', 'root:root']);
  await etcdctl(['user', 'grant-role', 'root', 'root']);
  await etcdctl(['auth', 'enable']);
});

test.after(async () => {
  await Promise.all(clients.map((kv) => kv.close()));
  const ended = new Promise((resolve) => etcd.once('exit', resolve));
  etcd.kill('SIGKILL');
  await ended;
  await rm(dir, { recursive: true, force: true });
});

const subnet = (id: 'n1' | 'n2') => unwrap(parseCidr(SUBNETS[id]));
const within = (text: string) => unwrap(parseCidr(text));

test('root and cluster roles do all their work with their own rights', async () => {
  const boss = await byCertificate('boss');
  // The TLS layer wants a certificate; who it is for etcd is said by user and password.
  const lab = connect({
    rootCertificate: await pem('ca.crt'),
    certificate: await pem('stranger.crt'),
    privateKey: await pem('stranger.key'),
    username: 'lab-role',
    password: 'secret',
  });
  const common = {
    keys,
    time: systemTime,
    random: Math.random,
    log: SILENT,
    cluster: 'lab',
    network: config,
  };
  const root = startRoles({ ...common, kv: boss, holder: 'boss', roles: ['root'] });
  const cluster = startRoles({ ...common, kv: lab, holder: 'lab-role', roles: ['cluster'] });
  await eventually(() => root.acting().length + cluster.acting().length === 2, 'both roles to act');
  await eventually(
    async () => (await boss.keys(keys.prefix('root'))).some((key) => key.includes('/blocks/')),
    'the cluster to be admitted and granted a block',
  );
  const [appname, appnamespace, servicename, servicenamespace] = CART.split('.');
  const key = keys.build({ kind: 'service', service: CART });
  const value = JSON.stringify({ v: 1, appname, appnamespace, servicename, servicenamespace, ports: [80] });
  await etcdctl(['put', key, value], 'root:root');
  await eventually(async () => {
    const entry = await boss.get(key);
    const record = entry === undefined ? undefined : decodeService(entry.value, CART);
    return record?.ok === true && Object.keys(record.value.addresses).length === 3;
  }, 'a record written by hand to get its addresses');
  await rejectsWith('permission_denied', () =>
    lab.txn([], [{ kind: 'put', key: keys.build({ kind: 'config' }), value: '{}' }]),
  );
  await rejectsWith('permission_denied', () => boss.txn([], [{ kind: 'put', key, value: '{}' }]));
  await root.stop();
  await cluster.stop();
});

test('an agent joins, deploys, follows and leaves with its own rights', async () => {
  const n1 = await byCertificate('n1');
  assert.equal(await ensureConfig(n1, keys, config), config);
  const claim = await claimSubnet(n1, keys, config, { node: 'n1', cluster: 'lab' }, { exact: subnet('n1') });
  const here = node('n1', 0, { subnet: claim.subnet, epoch: claim.epoch });
  const presence = await n1.grant(60);
  await publishNode(n1, keys, here, presence);
  // The service stands complete already: applying the same writes nothing, so it needs no right to.
  await applyService(n1, keys, config, descriptor(CART));
  const { instanceIp } = await claimInstance(n1, keys, config, {
    service: CART,
    instance: 1,
    node: 'n1',
    lease: claim.lease,
    within: within('172.30.201.0/24'),
  });
  const mirror = new Mirror(n1, keys.prefix('instances'));
  await publishInstance(n1, keys, claim.subnet, instance(here, CART, 1, { instanceIp }), presence);
  await eventually(() => mirror.entries.size === 1, 'the watch to show it');
  assert.ok((await n1.keepAlive(presence)) > 0);
  await releaseInstance(n1, keys, config, { service: CART, instance: 1, node: 'n1', instanceIp });
  await eventually(() => mirror.entries.size === 0, 'the watch to show its end');
  await n1.revoke(presence);
  await releaseSubnet(n1, keys, config, { node: 'n1', cluster: 'lab' }, claim.subnet);
  await mirror.follower.close();
});

test('an agent cannot write another node’s claims, the plan, roles, blocks or other services', async () => {
  const n1 = await byCertificate('n1');
  const n2 = await byCertificate('n2');
  const claim = await claimSubnet(n2, keys, config, { node: 'n2', cluster: 'lab' }, { exact: subnet('n2') });
  const { instanceIp } = await claimInstance(n2, keys, config, {
    service: CART,
    instance: 2,
    node: 'n2',
    lease: claim.lease,
    within: within('172.30.202.0/24'),
  });
  const forbidden = [
    keys.build({ kind: 'config' }),
    keys.build({ kind: 'rootLeader' }),
    keys.build({ kind: 'clusterLeader', cluster: 'lab' }),
    keys.build({ kind: 'cluster', cluster: 'lab' }),
    keys.build({ kind: 'block', block: within('172.16.0.0/20') }),
    keys.build({ kind: 'subnet', subnet: claim.subnet }),
    keys.build({ kind: 'subnet', subnet: within('172.16.9.0/26') }),
    keys.build({ kind: 'node', cluster: 'lab', node: 'n2' }),
    keys.build({ kind: 'address', address: instanceIp }),
    keys.build({ kind: 'service', service: CART }),
    keys.build({ kind: 'instance', service: sid('shop.prod.pay.v1'), instance: 1 }),
    '/elsewhere',
  ];
  for (const key of forbidden) {
    await rejectsWith('permission_denied', () => n1.txn([], [{ kind: 'put', key, value: '{"v":1}' }]));
    await rejectsWith('permission_denied', () => n1.txn([], [{ kind: 'delete', key }]));
  }
  await rejectsWith('permission_denied', () => n1.revoke(claim.lease));
  assert.ok(await n2.get(keys.build({ kind: 'subnet', subnet: claim.subnet })));
  await rejectsWith('permission_denied', () => n1.get('/elsewhere'));
});

test('wrong passwords, unknown users and missing certificates are refused with a clear error', async () => {
  const rootCertificate = await pem('ca.crt');
  const stranger = { certificate: await pem('stranger.crt'), privateKey: await pem('stranger.key') };
  for (const [credentials, what] of [
    [{ rootCertificate, ...stranger, username: 'lab-role', password: 'wrong' }, /authentication failed/],
    [{ rootCertificate, ...stranger, username: 'nobody', password: 'x' }, /authentication failed/],
    [{ rootCertificate, ...stranger }, /./],
    [{ rootCertificate }, /./],
  ] as const) {
    const kv = connect(credentials);
    const error = await kv.get(keys.build({ kind: 'config' })).then(
      () => undefined,
      (thrown: unknown) => thrown as Error & { code: string },
    );
    assert.ok(error, 'it was let in');
    assert.ok(['permission_denied', 'coordination_unavailable'].includes(error.code), error.code);
    assert.match(error.message, what);
  }
});

test('a token that died with its server is replaced: requests, renewals and watches go on', async () => {
  const lab = connect({
    rootCertificate: await pem('ca.crt'),
    certificate: await pem('stranger.crt'),
    privateKey: await pem('stranger.key'),
    username: 'lab-role',
    password: 'secret',
  });
  const key = keys.build({ kind: 'exposed', service: CART });
  const lease = await lab.grant(60);
  const mirror = new Mirror(lab, keys.prefix('exposed'));
  await eventually(() => mirror.live, 'live');
  const ended = new Promise((resolve) => etcd.once('exit', resolve));
  etcd.kill('SIGKILL');
  await ended;
  await startEtcd();
  await eventually(
    () =>
      lab.txn([], [{ kind: 'put', key, value: '{"v":1}', lease }]).then(
        () => true,
        () => false,
      ),
    'a write after the restart',
    20_000,
  );
  assert.ok((await lab.keepAlive(lease)) > 0);
  await eventually(() => mirror.live && mirror.entries.has(key), 'the watch after the restart', 20_000);
  await mirror.follower.close();
});

test.run();
