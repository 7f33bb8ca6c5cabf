// Real agents, two of them behind real NATs (nftables), each following only what it needs: whoever opens a flow to a
// node behind a NAT has never heard from it.
//
//   n1 10.77.0.1: web        n2 10.78.2.2 ── router 10.77.0.102: cart        n3 10.78.3.2 ── router 10.77.0.103: desk
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime, until } from '../../scripts/lab.ts';
import { PEER_KEEPALIVE_MS } from '../../src/limits.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('agents behind NATs');
const CART = 'shop.prod.cart.v1';
const NAME = `${CART}.any.roundrobin.local`;
/** A SYN that was lost is repeated after 1, 3 and 7 s; the rest is for a busy machine. */
const SOON_MS = 30_000;
let lab: Lab;
let web: string;
let desk: string;

const self = (script: string, ...args: string[]): string[] =>
  runtime === 'deno'
    ? [process.execPath, 'run', '-A', '--quiet', script, ...args]
    : [process.execPath, script, ...args];

async function deploy(node: number, label: string, service: string): Promise<string> {
  const netns = await lab.addInstance(label);
  const body = { service, instance: 1, netns };
  const answer = await lab.api(node, 'POST', '/api/v1/instances', body);
  assert.is(answer.status, 200, JSON.stringify(answer.body));
  return netns;
}

const calls = async (): Promise<string[]> => {
  const keys = await lab.etcdctl('get', '--prefix', '--keys-only', '/edgeway/v1/calls/');
  return keys.split('\n').filter((key) => key !== '');
};

/** Resolves when the cart has answered a new connection from there. */
async function reaches(netns: string, withinMs: number): Promise<void> {
  await until(`an answer from ${NAME} in ${netns}`, withinMs, async () => {
    const { stdout } = await lab.exec(netns, self('test/lab/ask.ts', 'tcp', NAME, '8123', 'hello', '1'));
    const [answer] = JSON.parse(stdout) as [{ text: string }];
    if (!answer.text.startsWith('cart ')) throw new Error(answer.text);
    return true;
  });
}

test.before(async () => {
  lab = await Lab.up({ lab: `ewv${process.pid}`, nodes: 3, runtime });
  try {
    await lab.behindNat(2);
    await lab.behindNat(3);
    await lab.startAll();
    const cart = await deploy(2, 'cart', CART);
    lab.spawn(cart, self('test/lab/echo.ts', '8123', 'cart'), `${lab.dir}/cart.log`);
    web = await deploy(1, 'web', 'shop.prod.web.v1');
    desk = await deploy(3, 'desk', 'shop.prod.desk.v1');
  } catch (thrown) {
    for (const node of lab.nodes) console.log(lab.tail(node));
    await lab.down();
    throw thrown;
  }
});
test.after(async () => lab.down());

test('the first connection to a node behind a NAT, which knows nobody, is answered', async () => {
  assert.equal(await calls(), []);
  await reaches(web, SOON_MS);
  assert.equal(await calls(), ['/edgeway/v1/calls/n2/n1']);
});

test('the list of nodes says who is behind a NAT', async () => {
  const { body } = await lab.api(1, 'GET', '/api/v1/nodes');
  assert.equal(
    body.items.map((one: { node: string; nat: boolean }) => `${one.node} ${one.nat}`),
    ['n1 false', 'n2 true', 'n3 true'],
  );
});

test('so is one from behind another NAT, as long as both keep ports', async () => {
  await reaches(desk, SOON_MS);
  assert.ok((await calls()).includes('/edgeway/v1/calls/n2/n3'));
});

test('a NAT that forgot all and gives another port lets new flows in within a keep-alive', async () => {
  const learned = async (): Promise<number> =>
    (await lab.api(1, 'GET', '/api/v1/counters')).body.peers_learned as number;
  const before = await learned();
  await lab.forgetNat(2);
  await until('n2 to be seen elsewhere', PEER_KEEPALIVE_MS + SOON_MS, async () =>
    (await learned()) > before ? true : undefined,
  );
  await reaches(web, SOON_MS);
});

test('who leaves calls no more', async () => {
  await lab.end(lab.node(1).agent!);
  await until('its call to end', SOON_MS, async () =>
    (await calls()).includes('/edgeway/v1/calls/n2/n1') ? undefined : true,
  );
});

test.run();
