// etcd goes away, agents are killed and started again without it, etcd comes back: what is running goes on.
//
//   n1: cart 1 (namespace)        n2: client (namespace), needs cart
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { isDeepStrictEqual } from 'node:util';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime, until } from '../../scripts/lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('etcd away');
const SERVICE = 'shop.prod.cart.v1';
const CLIENT = 'shop.prod.client.v1';
const ROOT = '/edgeway/v1/';
const PORT = 8123;
const PRESENCE_S = 4;

let lab: Lab;
let client: string;

const self = (script: string, ...args: string[]): string[] =>
  runtime === 'deno'
    ? [process.execPath, 'run', '-A', '--quiet', script, ...args]
    : [process.execPath, script, ...args];

async function asks(host: string, count = 1): Promise<string[]> {
  const argv = self('test/lab/ask.ts', 'tcp', host, String(PORT), 'hello', String(count));
  const { stdout } = await lab.exec(client, argv, { timeoutMs: 30_000 });
  return (JSON.parse(stdout || '[]') as { text: string }[]).map(({ text }) => text.split(' ')[0] ?? '');
}
const reaches = async (host: string): Promise<true | undefined> =>
  (await asks(host))[0] === 'cart-1' ? true : undefined;

function descriptor(service: string, needs: readonly string[]) {
  const [appname, appnamespace, servicename, servicenamespace] = service.split('.');
  return { appname, appnamespace, servicename, servicenamespace, needs };
}

/** The lab's etcd, found by its command line inside the lab's own switch namespace. */
async function killEtcd(): Promise<void> {
  const { stdout } = await lab.exec(lab.switch, ['ip', 'netns', 'pids', lab.switch]);
  for (const pid of stdout.trim().split(/\s+/)) {
    // The process that listed them is among them, and gone.
    const file = `/proc/${pid}/cmdline`;
    const argv = existsSync(file) ? readFileSync(file, 'utf8').split('\0') : [];
    if (argv[0] === 'etcd') process.kill(Number(pid), 'SIGKILL');
  }
  await until('etcd to be gone', 15_000, async () => {
    const { status: health } = await lab.exec(lab.switch, ['etcdctl', 'get', 'x', '--dial-timeout=200ms']);
    return health !== 0 ? true : undefined;
  });
}

type Json = Record<string, unknown>;

/** Every record, read from etcd itself. */
async function stored(): Promise<Map<string, Json>> {
  const listed = JSON.parse(await lab.etcdctl('get', '--prefix', ROOT, '-w', 'json')) as {
    kvs: { key: string; value: string }[];
  };
  const text = (base64: string): string => Buffer.from(base64, 'base64').toString();
  return new Map(listed.kvs.map(({ key, value }) => [text(key), JSON.parse(text(value)) as Json]));
}

/** The whole table of a node, as it keeps it on disk, and what etcd holds of the same services and their nodes. */
async function tableAndStore(index: number): Promise<{ table: Json; store: Json }> {
  const file = readFileSync(join(lab.dir, lab.node(index).name, 'routes.json'), 'utf8');
  const { records: table } = JSON.parse(file) as { records: Json };
  const partsOf = (key: string): string[] => key.slice(ROOT.length).split('/');
  const routed = (key: string): boolean => ['services', 'instances'].includes(partsOf(key)[0]!);
  const services = new Set(
    Object.keys(table)
      .filter(routed)
      .map((key) => partsOf(key)[1]),
  );
  const all = await stored();
  const store: Json = {};
  for (const [key, value] of all) if (routed(key) && services.has(partsOf(key)[1])) store[key] = value;
  for (const [key, { node, cluster }] of Object.entries(store) as [string, Json][]) {
    const home = `${ROOT}nodes/${cluster}/${node}`;
    if (partsOf(key)[0] === 'instances' && all.has(home)) store[home] = all.get(home);
  }
  return { table, store };
}

/** An instance of the client on a host that has no agent, as a person or a program of somebody else's writes it. */
async function writeByHand(number: number, host: string, octet: number): Promise<void> {
  const all = await stored();
  const place = { node: host, nodeIp: `192.0.2.${octet}` };
  const record = { ...all.get(`${ROOT}nodes/default/n2`), ...place, subnet: `172.20.${octet}.0/26` };
  const instance = {
    ...all.get(`${ROOT}instances/${CLIENT}/1`),
    ...{ ...place, instance: number, namespaceIp: `172.20.${octet}.2`, instanceIp: `172.30.200.${octet}` },
  };
  await lab.etcdctl('put', `${ROOT}nodes/default/${host}`, '--', JSON.stringify(record));
  await lab.etcdctl('put', `${ROOT}instances/${CLIENT}/${number}`, '--', JSON.stringify(instance));
}

async function status(index: number): Promise<Record<string, unknown>> {
  return (await lab.api(index, 'GET', '/api/v1/status')).body as Record<string, unknown>;
}

/** Kills the agent as a crash would, and starts it again while etcd is away. */
async function restartAlone(index: number): Promise<void> {
  const node = lab.node(index);
  await lab.end(node.agent!, 'SIGKILL');
  const started = performance.now();
  await lab.startAgent(index);
  await until(`${node.name} serves from disk`, 15_000, async () =>
    (await status(index))['subnet'] !== null && (await status(index))['instances'] === 1 ? true : undefined,
  ).catch((error: unknown) => {
    throw new Error(`${String(error)}\n${lab.tail(node)}`);
  });
  console.log(`      ${node.name} serves ${Math.round(performance.now() - started)} ms after its start`);
}

test.before(async () => {
  lab = await Lab.up({ nodes: 2, runtime, agentFlags: ['--presence-ttl', String(PRESENCE_S)] });
  await lab.startAll();
  const cart = await lab.addInstance('cart1');
  lab.spawn(cart, self('test/lab/echo.ts', String(PORT), 'cart-1'), join(lab.dir, 'cart1.log'));
  client = await lab.addInstance('client');
  for (const [index, service, needs, netns] of [
    [1, SERVICE, [], cart],
    [2, CLIENT, [SERVICE], client],
  ] as const) {
    const applied = await lab.api(index, 'POST', '/api/v1/services', descriptor(service, needs));
    assert.is(applied.status, 200, JSON.stringify(applied.body));
    const attached = await lab.api(index, 'POST', '/api/v1/instances', { service, instance: 1, netns });
    assert.is(attached.status, 200, `${JSON.stringify(attached.body)}\n${lab.tail(lab.node(index))}`);
  }
  await until('the client reaches cart', 15_000, () => reaches(`${SERVICE}.any.roundrobin.local`));
  await writeByHand(8, 'x8', 8);
  // What a restart needs is on disk.
  await until('the routes are saved', 10_000, async () => {
    for (const node of lab.nodes) {
      const files = readdirSync(join(lab.dir, node.name));
      if (!files.includes('routes.json')) return undefined;
    }
    const saved = readFileSync(join(lab.dir, 'n2', 'routes.json'), 'utf8');
    return [`${SERVICE}/1`, `${CLIENT}/8`].every((key) => saved.includes(`/instances/${key}`))
      ? true
      : undefined;
  });
});
test.after(async () => lab?.down());

test('etcd killed: names resolve and connections open, also after presence has ended', async () => {
  await killEtcd();
  await until('n2 notices', 15_000, async () => ((await status(2))['etcd'] === 'away' ? true : undefined));
  await until('presence to be lost', 30_000, async () =>
    lab.tail(lab.node(1), 200).includes('lease lost') ? true : undefined,
  );
  assert.equal(await asks(`${SERVICE}.any.roundrobin.local`, 3), ['cart-1', 'cart-1', 'cart-1']);
  assert.equal(await asks(`${SERVICE}.1.fixed.local`, 1), ['cart-1']);
});

test('agents killed and started without etcd serve from disk; the client connects', async () => {
  await restartAlone(2);
  await until('the client reaches cart again', 10_000, () => reaches(`${SERVICE}.any.roundrobin.local`));
  await restartAlone(1);
  await until('the client reaches cart again', 10_000, () => reaches(`${SERVICE}.any.closest.local`));
  const refusal = await lab.api(1, 'POST', '/api/v1/services', descriptor('shop.prod.new.v1', []));
  assert.is(refusal.status, 503, 'only new claims wait');
});

test('etcd back after another client changed it: within 10 s it shows what goes on, and the tables are etcd’s', async () => {
  const before = readFileSync(join(lab.dir, 'n1', 'agent.json'), 'utf8');
  // For the agents it is still away.
  await lab.startEtcd({ loopback: true });
  const service = { ...(await stored()).get(`${ROOT}services/${SERVICE}`), ports: [PORT, 9_999] };
  await lab.etcdctl('put', `${ROOT}services/${SERVICE}`, '--', JSON.stringify(service));
  await writeByHand(9, 'x9', 9);
  await lab.etcdctl('del', `${ROOT}instances/${CLIENT}/8`);
  await lab.etcdctl('del', `${ROOT}nodes/default/x8`);
  assert.is((await status(2))['etcd'], 'away');
  await killEtcd();
  await lab.startEtcd();
  const since = performance.now();
  await until('both nodes and both instances are published', 20_000, async () => {
    const keys = await lab.etcdctl('get', '--prefix', '/edgeway/v1/', '--keys-only');
    const published = [
      '/nodes/default/n1',
      '/nodes/default/n2',
      `/instances/${SERVICE}/1`,
      `/instances/${CLIENT}/1`,
    ];
    return published.every((key) => keys.includes(key)) ? true : undefined;
  });
  let seen: { table: Json; store: Json }[] = [];
  await until('every record of both tables', 20_000, async () => {
    seen = [await tableAndStore(1), await tableAndStore(2)];
    return seen.every(({ table, store }) => isDeepStrictEqual(table, store)) ? true : undefined;
  }).catch(() => {
    for (const { table, store } of seen) assert.equal(table, store);
  });
  const ms = performance.now() - since;
  assert.ok(ms < 10_000, `${ms} ms`);
  const table = seen[1]?.table ?? {};
  assert.equal((table[`${ROOT}services/${SERVICE}`] as Json)['ports'], [PORT, 9_999]);
  assert.is((table[`${ROOT}instances/${CLIENT}/9`] as Json)['node'], 'x9');
  assert.is((table[`${ROOT}nodes/default/x9`] as Json)['nodeIp'], '192.0.2.9');
  assert.not.ok(JSON.stringify(table).includes('x8'));
  assert.equal(await asks(`${SERVICE}.any.roundrobin.local`, 1), ['cart-1']);
  const state = (text: string) => {
    const { subnet, hosted, claim } = JSON.parse(text);
    return { subnet, hosted, epoch: claim.epoch };
  };
  assert.equal(state(readFileSync(join(lab.dir, 'n1', 'agent.json'), 'utf8')), state(before));
  const applied = await lab.api(1, 'POST', '/api/v1/services', descriptor('shop.prod.new.v1', []));
  assert.is(applied.status, 200, JSON.stringify(applied.body));
});

test.run();
