// The name service inside a real agent: the host's own resolver as a setting, what a crash leaves, and what
// `edgeway resolve` says about a name that is wrong.
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Output, type Runtime, until } from '../../scripts/lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('names of an agent');
const SERVICE = 'shop.prod.cart.v1';
const NAME = `${SERVICE}.any.closest.local`;
const FLAGS = ['--register', 'auto', '--host-dns', 'on'];
let lab: Lab;
let original: string;

const conf = (): string => readFileSync(`/etc/netns/${lab.node(1).netns}/resolv.conf`, 'utf8');
const edgeway = (...args: string[]): Promise<Output> => lab.exec(lab.node(1).netns, lab.command(...args));
const registered = (): Promise<true> =>
  until('the host asks the resolver', 20_000, async () =>
    (await lab.api(1, 'GET', '/api/v1/status')).body.subnet !== null && conf() !== original
      ? true
      : undefined,
  );
async function hostResolves(): Promise<void> {
  const { stdout } = await lab.exec(lab.node(1).netns, ['getent', 'ahosts', NAME]);
  assert.match(stdout, /^172\.30\./);
}

async function bridgeAddress(): Promise<string> {
  const subnet = await until('registered', 20_000, async () => {
    const { body } = await lab.api(1, 'GET', '/api/v1/status');
    return body.subnet === null ? undefined : String(body.subnet);
  });
  return subnet.replace(/\d+\/\d+$/, (end) => String(Number.parseInt(end, 10) + 1));
}

test.before(async () => {
  lab = await Lab.up({ nodes: 1, runtime });
  original = conf();
});
test.after(async () => {
  await lab?.down();
});

test('--host-dns on: the host resolves service names, and a stop puts its resolv.conf back', async () => {
  const node = await lab.startAgent(1, FLAGS, '');
  await registered();
  const [appname, appnamespace, servicename, servicenamespace] = SERVICE.split('.');
  const body = { appname, appnamespace, servicename, servicenamespace };
  assert.is((await lab.api(1, 'POST', '/api/v1/services', body)).status, 200);
  await hostResolves();
  await lab.end(node.agent!);
  assert.is(conf(), original);
});

test('after kill -9 the next start takes over, and edgeway restore-resolver puts back what no start will', async () => {
  const first = await lab.startAgent(1, FLAGS, '');
  await registered();
  await lab.end(first.agent!, 'SIGKILL');
  assert.is.not(conf(), original);
  const second = await lab.startAgent(1, FLAGS, '');
  await until('names on the host', 20_000, async () =>
    (await lab.exec(second.netns, ['getent', 'ahosts', NAME])).stdout.startsWith('172.30.')
      ? true
      : undefined,
  );
  await lab.end(second.agent!, 'SIGKILL');
  assert.is.not(conf(), original);
  const dataDir = join(lab.dir, second.name);
  assert.match((await edgeway('restore-resolver', '--data-dir', dataDir)).stdout, 'put back');
  assert.is(conf(), original);
  assert.match((await edgeway('restore-resolver', '--data-dir', dataDir)).stdout, 'nothing to put back');
});

test('edgeway resolve names the label at fault and what was probably meant', async () => {
  const node = await lab.startAgent(1, ['--register', 'auto'], '');
  await until('the service is back', 20_000, async () =>
    (await lab.api(1, 'GET', '/api/v1/services')).body.items.length === 1 ? true : undefined,
  );
  const resolve = async (name: string): Promise<string> => {
    const { status, stdout, stderr } = await edgeway('resolve', name, '--api', `unix:${node.apiSocket}`);
    return `${status} ${stdout}${stderr}`;
  };
  assert.match(await resolve(NAME), /^0 .*172\.30\./);
  const wrong = await resolve(`${SERVICE}.2.closest.local`);
  assert.match(wrong, /^[1-9]/);
  assert.match(wrong, 'label "2": with a policy other than "fixed" stands "any"');
  assert.match(wrong, `perhaps ${SERVICE}.2.fixed.local`);
  assert.match(await resolve('shop.prod.crat.v1.any.closest.local'), `perhaps ${NAME} was meant`);
  await lab.end(node.agent!);
});

test('a start announces by multicast what the node knew already', async () => {
  const node = await lab.startAgent(1, ['--register', 'auto'], '');
  await until('announcements', 20_000, async () => {
    const { stdout } = await lab.exec(node.netns, [
      ...['curl', '-s', '--unix-socket', node.apiSocket, 'http://agent/metrics'],
    ]);
    const announced = /edgeway_mdns_total\{event="announced"\} (\d+)/.exec(stdout)?.[1];
    return Number(announced) >= 3 ? true : undefined;
  });
  await lab.end(node.agent!);
});

test('a service that is deleted over the API is gone from the names at once, and its TTL was two minutes at most', async () => {
  const node = await lab.startAgent(1, ['--register', 'auto'], '');
  const bridge = await bridgeAddress();
  const dig = async (...what: string[]): Promise<string> =>
    (await lab.exec(node.netns, ['dig', '+tries=3', '+time=3', `@${bridge}`, ...what])).stdout;
  const known = await dig(NAME);
  const [, ttl, address] = /IN\s+A\s/.test(known) ? (/\s(\d+)\s+IN\s+A\s+(\S+)/.exec(known) ?? []) : [];
  assert.ok(Number(ttl) <= 120, known);
  assert.match(await dig('-x', address!), NAME);
  assert.is((await lab.api(1, 'DELETE', `/api/v1/services/${SERVICE}`)).status, 200);
  await until('NXDOMAIN', 10_000, async () => (/status: NXDOMAIN/.test(await dig(NAME)) ? true : undefined));
  assert.match(await dig('-x', address!), /status: NXDOMAIN/);
  const unknown = await dig('-x', bridge);
  assert.match(unknown, /status: NOERROR/, 'in a node’s subnet; nobody knows a name of it');
  assert.match(unknown, /ANSWER: 0/);
  await lab.end(node.agent!);
});

test('other names go to the server that --upstreams says, and its answers come back', async () => {
  const { netns } = lab.node(1);
  const upstream = spawn('ip', [
    ...['netns', 'exec', netns, 'dnsmasq', '--keep-in-foreground', '--conf-file=/dev/null', '--no-resolv'],
    ...['--local=/test/', '--no-hosts', '--listen-address=127.0.0.9', '--port=5300'],
    ...['--bind-interfaces', '--pid-file=', '--user=root', '--host-record=www.example.test,192.0.2.80'],
  ]);
  const ended = new Promise<void>((resolve) => upstream.once('close', () => resolve()));
  try {
    const node = await lab.startAgent(1, ['--register', 'auto', '--upstreams', '127.0.0.9:5300'], '');
    const bridge = await bridgeAddress();
    const dig = async (...what: string[]): Promise<string> =>
      (await lab.exec(netns, ['dig', '+tries=3', '+time=5', `@${bridge}`, ...what])).stdout;
    await until('a foreign name', 20_000, async () =>
      (await dig('+short', 'www.example.test')).trim() === '192.0.2.80' ? true : undefined,
    );
    assert.is((await dig('+short', '+tcp', 'www.example.test')).trim(), '192.0.2.80');
    assert.match(await dig('nobody.example.test'), /status: NXDOMAIN/);
    await lab.end(node.agent!);
  } finally {
    upstream.kill('SIGTERM');
    await ended;
  }
});

test.run();
