// etcd goes away, agents are killed and started again without it, etcd comes back: what is running goes on.
//
//   n1: cart 1 (namespace)        n2: client (namespace), needs cart
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime, until } from '../../scripts/lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('etcd away');
const SERVICE = 'shop.prod.cart.v1';
const CLIENT = 'shop.prod.client.v1';
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
  // What a restart needs is on disk.
  await until('the routes are saved', 10_000, async () => {
    for (const node of lab.nodes) {
      const files = readdirSync(join(lab.dir, node.name));
      if (!files.includes('routes.json')) return undefined;
    }
    return readFileSync(join(lab.dir, 'n2', 'routes.json'), 'utf8').includes(`/instances/${SERVICE}/1`)
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

test('etcd back: within 10 s it shows what goes on, with the same addresses', async () => {
  const before = readFileSync(join(lab.dir, 'n1', 'agent.json'), 'utf8');
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
  const ms = performance.now() - since;
  assert.ok(ms < 10_000, `${ms} ms`);
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
