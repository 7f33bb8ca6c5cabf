// Policies on real agents behind delays: who is chosen, what explain says, and who is passed over when something dies.
//
//   n1: client ── 10 ms ── n2: cart 1 (process), pay 1 (namespace)
//           └──── 25 ms ── n3: cart 2 (process), pay 2 (namespace)
//
// Bounds here are generous; how fast it really is, `npm run bench -- policies` measures.
import type { ChildProcess } from 'node:child_process';
import { readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, must, type Runtime, run, until } from '../../scripts/lab.ts';
import { DelayedLab } from '../../scripts/relay.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('policies');
const PORT = 7000;
const CART = 'shop.prod.cart.v1';
const PAY = 'shop.prod.pay.v1';

let lab: Lab;
let delayed: DelayedLab;
let client: string;
const processes = new Map<string, ChildProcess>();

const self = (script: string, ...args: string[]): string[] =>
  runtime === 'deno'
    ? [process.execPath, 'run', '-A', '--quiet', script, ...args]
    : [process.execPath, '--disable-warning=ExperimentalWarning', script, ...args];

// biome-ignore lint/suspicious/noExplicitAny: whatever the API answered
async function call(node: number, method: string, path: string, body?: unknown): Promise<any> {
  const answer = await lab.api(node, method, path, body);
  assert.is(
    answer.status,
    200,
    `${method} ${path}: ${JSON.stringify(answer.body)}\n${lab.tail(lab.node(node))}`,
  );
  return answer.body;
}

async function apply(service: string, more: object = {}): Promise<void> {
  const [appname, appnamespace, servicename, servicenamespace] = service.split('.');
  await call(1, 'POST', '/api/v1/services', {
    appname,
    appnamespace,
    servicename,
    servicenamespace,
    ...more,
  });
}

/** A listener as a bare process in a network namespace of its own, attached by its pid. */
async function attachProcess(service: string, instance: number, node: number): Promise<void> {
  const { netns, name } = lab.node(node);
  const child = lab.spawn(
    netns,
    ['unshare', '--net', ...self('test/lab/echo.ts', String(PORT), name)],
    join(lab.dir, `echo-${service}-${instance}.log`),
  );
  const pid = child.pid!;
  const host = readlinkSync(`/proc/${lab.node(node).agent!.pid}/ns/net`);
  await until('it has a namespace of its own and listens', 20_000, () => {
    const ns = readlinkSync(`/proc/${pid}/ns/net`);
    if (ns === host || ns === readlinkSync('/proc/self/ns/net')) return undefined;
    return readFileSync(`/proc/${pid}/net/tcp`, 'utf8').includes(':1B58 ') ? true : undefined;
  });
  await call(node, 'POST', '/api/v1/instances', { service, instance, pid });
  processes.set(`${service} ${instance}`, child);
}

/** Who answers `count` new flows. */
async function ask(service: string, policy: string, count = 6): Promise<string[]> {
  const name = `${service}.any.${policy}.local`;
  const argv = self('test/lab/ask.ts', 'tcp', name, String(PORT), 'hi', String(count));
  const { status, stdout, stderr } = await lab.exec(client, argv, { timeoutMs: 60_000 });
  assert.is(status, 0, stderr);
  return (JSON.parse(stdout) as { text: string }[]).map(({ text }) => text.split(' ')[0]!);
}
/** Until that node alone answers new flows. */
const answers = (service: string, policy: string, who: string): Promise<true> =>
  until(`${who} alone answers ${service} ${policy}`, 60_000, async () =>
    (await ask(service, policy, 3)).every((one) => one === who) ? true : undefined,
  );

/** A connection that stays; `log` gives the lines of test/lab/hold.ts. */
async function hold(service: string, policy: string): Promise<{ who: string; log: () => string }> {
  const file = join(lab.dir, `hold-${service}-${policy}-${Date.now()}.log`);
  lab.spawn(client, self('test/lab/hold.ts', `${service}.any.${policy}.local`, String(PORT)), file);
  const log = (): string => readFileSync(file, 'utf8');
  const who = await until('it is answered', 60_000, () => /^open (\S+)/m.exec(log())?.[1]);
  return { who, log };
}
const isReset = (what: string, held: { log: () => string }): Promise<true> =>
  until(`${what} is reset`, 60_000, () => (/^end ECONNRESET$/m.test(held.log()) ? true : undefined));

async function counter(name: string): Promise<number> {
  return (await call(1, 'GET', '/api/v1/counters'))[name] ?? 0;
}

interface Explained {
  readonly name: string;
  readonly address: string;
  readonly policy: string;
  readonly candidates: readonly {
    readonly instance: number;
    readonly instanceIp: string;
    readonly node: string;
    readonly health: string;
    readonly rttMs: number | null;
    readonly rttBy: string | null;
    readonly share: number;
    readonly reason: string;
  }[];
  readonly choices: readonly { readonly instance: number; readonly policy: string; readonly why: string }[];
}
const explain = (of: string): Promise<Explained> => call(1, 'GET', `/api/v1/explain?of=${of}`);
/** Shares by node, in whole percent. */
async function shares(service: string, policy: string): Promise<Record<string, number>> {
  const { candidates } = await explain(`${service}.any.${policy}.local`);
  return Object.fromEntries(candidates.map(({ node, share }) => [node, Math.round(share * 100)]));
}
const becomes = (
  what: string,
  service: string,
  policy: string,
  wanted: Record<string, number>,
): Promise<true> =>
  until(what, 60_000, async () => {
    const seen = await shares(service, policy);
    return Object.entries(wanted).every(([node, share]) => seen[node] === share) ? true : undefined;
  });

test.before(async () => {
  lab = await Lab.up({
    nodes: 3,
    runtime,
    agentFlags: ['--mdns', 'off', '--presence-ttl', '30', '--health-commands', 'on'],
  });
  delayed = await DelayedLab.over(lab);
  delayed.setRtts([
    [0, 10, 25],
    [10, 0, 20],
    [25, 20, 0],
  ]);
  await lab.startAll();
  await apply(CART);
  await apply(PAY, {
    health: { tcp: { port: PORT }, intervalMs: 200, timeoutMs: 5_000, fall: 2, rise: 1 },
  });
  await apply('shop.prod.client.v1', { needs: [CART, PAY, 'shop.prod.web.v1', 'shop.prod.gone.v1'] });
  client = await lab.addInstance('client');
  await call(1, 'POST', '/api/v1/instances', { service: 'shop.prod.client.v1', instance: 1, netns: client });
  for (const node of [2, 3]) await attachProcess(CART, node - 1, node);
});

test.after(async () => {
  await lab?.down();
});

test('closest: every flow goes to the nearer node, and explain says why by name, ServiceIP and InstanceIP', async () => {
  await becomes('both nodes are measured', CART, 'closest', { n2: 100, n3: 0 });
  await answers(CART, 'closest', 'n2');
  // The relay's delay is a floor under what is measured; above it lies whatever else this machine does.
  const byName = await until(
    'the choices are reported, and the RTTs are near the truth',
    60_000,
    async () => {
      const seen = await explain(`${CART}.any.closest.local`);
      const [near, far] = seen.candidates;
      assert.ok(near!.rttMs! >= 10 && far!.rttMs! >= 25, `${near!.rttMs} ${far!.rttMs}`);
      return seen.choices.length >= 3 && near!.rttMs! < 25 && far!.rttMs! < 60 ? seen : undefined;
    },
  );
  assert.equal(
    new Set(byName.choices.slice(-3).map((c) => `${c.instance} ${c.policy}`)),
    new Set(['1 closest']),
  );
  const [near, far] = byName.candidates;
  assert.is(near!.rttBy, 'probe');
  const byAddress = await explain(byName.address);
  assert.is(byAddress.name, `${CART}.any.closest.local`);
  const fixed = await explain(far!.instanceIp);
  assert.equal([fixed.policy, fixed.candidates.map((c) => [c.node, c.share])], ['fixed', [['n3', 1]]]);
  const cli = await run([
    ...['ip', 'netns', 'exec', lab.node(1).netns],
    ...lab.command('explain', byName.address, '--api', `unix:${lab.node(1).apiSocket}`),
  ]);
  assert.is(cli.status, 0, cli.stderr);
  assert.match(cli.stdout, /closest: lowest RTT/);
  assert.match(cli.stdout, /1 +n2 +100 %/);
  const unknown = await lab.api(1, 'GET', '/api/v1/explain?of=172.30.255.254');
  assert.is(unknown.status, 404);
});

test('roundrobin: both nodes get half', async () => {
  await ask(CART, 'roundrobin', 60);
  const counts = await until('the choices are counted', 60_000, async () => {
    const seen = await Promise.all([1, 2].map((n) => counter(`chosen_${CART}/${n} roundrobin`)));
    return seen[0]! + seen[1]! >= 60 ? seen : undefined;
  });
  assert.ok(Math.abs(counts[0]! - counts[1]!) <= 4, counts.join(' '));
});

test('one-way partition: the node is passed over and taken back', async () => {
  await ask(CART, 'closest', 1);
  delayed.cut(2, 1);
  await becomes('n2 is passed over', CART, 'closest', { n2: 0, n3: 100 });
  await answers(CART, 'closest', 'n3');
  const { candidates } = await explain(`${CART}.any.closest.local`);
  assert.match(candidates[0]!.reason, /^node (suspect|dead)/);
  delayed.heal();
  await becomes('n2 is back', CART, 'closest', { n2: 100, n3: 0 });
  await answers(CART, 'closest', 'n2');
});

test('health check: an instance is chosen from when its port answers until it does not', async () => {
  const listeners = new Map<number, ChildProcess>();
  const listen = async (node: number, netns: string): Promise<void> => {
    listeners.set(
      node,
      lab.spawn(netns, self('test/lab/echo.ts', String(PORT), `n${node}`), join(lab.dir, `pay${node}.log`)),
    );
  };
  const namespaces = [await lab.addInstance('pay1'), await lab.addInstance('pay2')];
  for (const [k, netns] of namespaces.entries())
    await call(k + 2, 'POST', '/api/v1/instances', { service: PAY, instance: k + 1, netns });
  await becomes('nobody is healthy', PAY, 'roundrobin', { n2: 0, n3: 0 });
  await listen(3, namespaces[1]!);
  await becomes('n3 listens', PAY, 'roundrobin', { n2: 0, n3: 100 });
  await answers(PAY, 'closest', 'n3');
  await listen(2, namespaces[0]!);
  await becomes('n2 listens too', PAY, 'closest', { n2: 100, n3: 0 });
  await lab.end(listeners.get(2)!, 'SIGKILL');
  await becomes('n2 listens no more', PAY, 'closest', { n2: 0, n3: 100 });
  const { candidates } = await explain(`${PAY}.any.closest.local`);
  assert.equal(
    [candidates[0]!.health, candidates[0]!.reason],
    ['down', 'its node says that it is dead or unhealthy'],
  );
  await listen(2, namespaces[0]!);
  await becomes('n2 listens again', PAY, 'closest', { n2: 100, n3: 0 });
});

test('health check by http: 503 takes the instance out of new choices, 200 brings it back; explain says so', async () => {
  const service = 'shop.prod.web.v1';
  const check = { port: 8080, path: '/healthy' };
  await apply(service, { health: { http: check, intervalMs: 200, timeoutMs: 5_000, fall: 2, rise: 1 } });
  const file = join(lab.dir, 'broken');
  for (const node of [2, 3]) {
    const netns = await lab.addInstance(`web${node}`);
    const log = (what: string): string => join(lab.dir, `web${node}-${what}.log`);
    lab.spawn(netns, self('test/lab/echo.ts', String(PORT), `n${node}`), log('echo'));
    // Only the nearer one breaks.
    const broken = node === 2 ? file : join(lab.dir, 'never');
    lab.spawn(netns, self('test/lab/http_health.ts', '8080', '/healthy', broken), log('health'));
    await call(node, 'POST', '/api/v1/instances', { service, instance: node - 1, netns });
  }
  await becomes('both are healthy', service, 'roundrobin', { n2: 50, n3: 50 });
  await answers(service, 'closest', 'n2');
  writeFileSync(file, '');
  await becomes('n2 says 503', service, 'closest', { n2: 0, n3: 100 });
  await answers(service, 'closest', 'n3');
  const [broken, well] = (await explain(`${service}.any.closest.local`)).candidates;
  assert.equal([broken!.node, broken!.health, well!.node, well!.health], ['n2', 'down', 'n3', 'up']);
  const cli = await run([
    ...['ip', 'netns', 'exec', lab.node(1).netns],
    ...lab.command('explain', `${service}.any.closest.local`, '--api', `unix:${lab.node(1).apiSocket}`),
  ]);
  assert.match(cli.stdout, /1 +n2 +0 % .*down/, cli.stderr);
  rmSync(file);
  await becomes('n2 says 200', service, 'closest', { n2: 100, n3: 0 });
  await answers(service, 'closest', 'n2');
});

test('a namespace that is deleted under its agent is out of choices on its own node at once, before the keyspace says so', async () => {
  const service = 'shop.prod.gone.v1';
  await apply(service);
  const netns = await lab.addInstance('gone1');
  await call(1, 'POST', '/api/v1/instances', { service, instance: 1, netns });
  await attachProcess(service, 2, 3);
  await becomes('the local one is nearest', service, 'closest', { n1: 100, n3: 0 });
  // Cut off from etcd: what follows is this node's own finding.
  const rules =
    'table inet away { chain output { type filter hook output priority 0; tcp dport 2379 drop; }; }';
  await must(['ip', 'netns', 'exec', lab.node(1).netns, 'nft', rules]);
  await must(['ip', 'netns', 'del', netns]);
  await becomes('the local one is passed over', service, 'closest', { n3: 100 });
  await answers(service, 'closest', 'n3');
  await must(['ip', 'netns', 'exec', lab.node(1).netns, 'nft', 'delete table inet away']);
  await until('its key is gone', 60_000, async () =>
    (await lab.etcdctl('get', '--prefix', '--keys-only', `/edgeway/v1/instances/${service}/1`)).trim() === ''
      ? true
      : undefined,
  );
});

test('health command: it runs in the namespace, and its verdict counts; a namespace that goes takes the instance along', async () => {
  const service = 'shop.prod.flag.v1';
  const file = join(lab.dir, 'flag');
  await apply(service, {
    health: { command: ['test', '-e', file], intervalMs: 200, timeoutMs: 5_000, fall: 2, rise: 1 },
  });
  const netns = await lab.addInstance('flag1');
  await call(2, 'POST', '/api/v1/instances', { service, instance: 1, netns });
  await becomes('it has not passed', service, 'roundrobin', { n2: 0 });
  writeFileSync(file, '');
  await becomes('it passes', service, 'roundrobin', { n2: 100 });
  rmSync(file);
  await becomes('it fails', service, 'roundrobin', { n2: 0 });
  await must(['ip', 'netns', 'del', netns]);
  await until('its key is gone', 60_000, async () =>
    (await lab.etcdctl('get', '--prefix', '--keys-only', `/edgeway/v1/instances/${service}/1`)).trim() === ''
      ? true
      : undefined,
  );
});

test('instance killed: it is withdrawn from the keyspace, and new flows go elsewhere', async () => {
  await lab.end(processes.get(`${CART} 1`)!, 'SIGKILL');
  await until('its key is gone', 60_000, async () =>
    (await lab.etcdctl('get', '--prefix', '--keys-only', `/edgeway/v1/instances/${CART}/1`)).trim() === ''
      ? true
      : undefined,
  );
  await answers(CART, 'closest', 'n3');
  await attachProcess(CART, 1, 2);
  await becomes('it is back', CART, 'closest', { n2: 100, n3: 0 });
  await answers(CART, 'closest', 'n2');
});

test('etcd away: a killed instance and then a killed agent are passed over, and their connections reset', async () => {
  const toCart = await hold(CART, 'closest');
  const toPay = await hold(PAY, 'closest');
  assert.equal([toCart.who, toPay.who], ['n2', 'n2']);
  const rules =
    'table inet cut { chain input { type filter hook input priority 0; tcp dport 2379 iif "under" drop; }; }';
  await must(['ip', 'netns', 'exec', lab.switch, 'nft', rules]);
  // Cut off first: its kernel would else end the connection in good order.
  const inside = ['nsenter', '-t', String(processes.get(`${CART} 1`)!.pid), '-n', 'ip'];
  for (const { ifname } of JSON.parse(await must([...inside, '-j', 'link'])) as { ifname: string }[])
    if (ifname !== 'lo') await must([...inside, 'link', 'set', ifname, 'down']);
  await lab.end(processes.get(`${CART} 1`)!, 'SIGKILL');
  await becomes('cart 1 is passed over', CART, 'closest', { n2: 0, n3: 100 });
  await isReset('the connection to cart 1', toCart);
  await answers(CART, 'closest', 'n3');
  await answers(PAY, 'closest', 'n2'); // its node lives
  assert.not(toPay.log().includes('end'));
  const node = lab.node(2);
  const agent = node.agent!;
  node.agent = undefined;
  await lab.end(agent, 'SIGKILL');
  await becomes('n2 is passed over', PAY, 'closest', { n2: 0, n3: 100 });
  await answers(PAY, 'closest', 'n3');
  await isReset('the connection to pay 1', toPay);
});

test.run();
