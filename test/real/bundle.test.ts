// What `npm run build` makes, as it is shipped: in a directory far from this checkout, with koffi and nothing else in
// node_modules, under Node. Deno runs the sources and needs no bundle.
import { cpSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, must, run, until } from '../../scripts/lab.ts';

const test = suite('bundle');
const root = fileURLToPath(new URL('../..', import.meta.url));
const SERVICE = 'shop.prod.cart.v1';
let lab: Lab;

/** The shipped file under Node, from a directory that is not ours. */
const shipped = (file: string, ...args: string[]): string[] => [
  ...['env', '-C', '/', lab.command()[0]!, join(lab.dir, 'shipped/bin', file)],
  ...args,
];

test.before(async () => {
  lab = await Lab.up({ nodes: 1, runtime: 'node' });
  const [node] = lab.command();
  const tsup = join(root, 'node_modules/tsup/dist/cli-default.js');
  await must(['env', '-C', root, node!, tsup, '--config', 'scripts/tsup.config.ts', '--silent']);
  const there = join(lab.dir, 'shipped');
  cpSync(join(root, 'dist'), there, { recursive: true });
  for (const name of [
    'koffi',
    ...readdirSync(join(root, 'node_modules/@koromix')).map((one) => `@koromix/${one}`),
  ])
    cpSync(join(root, 'node_modules', name), join(there, 'node_modules', name), { recursive: true });
  mkdirSync(join(lab.dir, 'consumer/node_modules'), { recursive: true });
  symlinkSync(there, join(lab.dir, 'consumer/node_modules/edgeway'));
});
test.after(async () => {
  await lab?.down();
});

test('edgeway.js: says its version', async () => {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
  const { status, stdout, stderr } = await run(shipped('edgeway.js', '--version'));
  assert.is(status, 0, stderr);
  assert.is(stdout.trim(), version);
  assert.is(stderr, '');
});

test('edgeway.js: an agent registers with an etcd of its own, attaches an instance and answers its name', async () => {
  const node = lab.node(1);
  const api = `unix:${node.apiSocket}`;
  const flags = ['--node', node.name, '--node-ip', node.ip, '--api', api, '--data-dir', join(lab.dir, 'n1')];
  node.agent = lab.spawn(
    node.netns,
    shipped('edgeway.js', 'agent', ...flags, '--register', 'auto'),
    node.log,
  );
  await until('the agent has registered', 30_000, async () =>
    (await lab.api(1, 'GET', '/api/v1/status')).body.subnet === null ? undefined : true,
  ).catch((error: Error) => assert.unreachable(`${error.message}\n${lab.tail(node)}`));
  const netns = await lab.addInstance('one');
  const attached = await run(shipped('edgeway.js', 'attach', SERVICE, '1', '--netns', netns, '--api', api));
  assert.is(attached.status, 0, `${attached.stderr}\n${lab.tail(node)}`);
  const { stdout } = await lab.exec(netns, ['getent', 'hosts', `${SERVICE}.1.fixed.local`]);
  assert.match(stdout, /^172\.30\./);
  // What is loaded when it is asked for.
  assert.match((await lab.api(1, 'GET', '/metrics')).body, 'edgeway_');
  assert.is((await lab.api(1, 'GET', '/api/v1/openapi.json')).status, 200);
  await lab.end(node.agent);
  assert.is(node.agent.exitCode, 0, lab.tail(node));
});

/** Runs a program of somebody who depends on the package. */
async function consume(...argv: readonly string[]): Promise<{ status: number; said: string }> {
  const { status, stdout, stderr } = await run(['env', '-C', join(lab.dir, 'consumer'), ...argv]);
  return { status, said: stdout + stderr };
}

test("edgeway/kudo: is Kudo's library", async () => {
  const source = "console.log(Object.keys(await import('edgeway/kudo')).join())";
  const { said } = await consume(lab.command()[0]!, '--input-type=module', '-e', source);
  assert.match(said, 'setupNode');
});

test("edgeway kudo: serves Kudo's gRPC, whose .proto file is in the package", async () => {
  const proto = "console.log(import.meta.resolve('edgeway/kudo/network.proto'))";
  const { said } = await consume(lab.command()[0]!, '--input-type=module', '-e', proto);
  assert.match(readFileSync(new URL(said.trim()), 'utf8'), 'service Network');
  const socket = join(lab.dir, 'kudo.sock');
  const log = join(lab.dir, 'kudo.log');
  const flags = ['--listen', `unix:${socket}`, '--state-dir', join(lab.dir, 'kudo')];
  const served = lab.spawn(lab.node(1).netns, shipped('edgeway.js', 'kudo', ...flags), log);
  await until('the service is up', 30_000, async () =>
    readFileSync(log, 'utf8').includes('service is up') ? true : undefined,
  );
  await lab.end(served);
  assert.is(served.exitCode, 0, readFileSync(log, 'utf8'));
});

test('edgeway/kudo: its types take the records of the contract and refuse others, with nothing else installed', async () => {
  const write = (file: string, text: string): void => writeFileSync(join(lab.dir, 'consumer', file), text);
  write('package.json', '{"type":"module"}');
  const peer = "{ nodeId: 'b', nodeIp: { clusterIpCidr: '10.0.1.1/24', externalIpAddr: '10.99.0.2' } }";
  const named = "nodeId: 'a', nodeIpAddr: '10.0.0.1', instanceId: 'i', instanceIpCidr: '10.0.0.2/24'";
  write(
    'right.ts',
    `import * as kudo from 'edgeway/kudo';
import { EdgewayError, type ErrorCode, type Kudo, type NodeRequest } from 'edgeway/kudo';
const peer: NodeRequest = ${peer};
const node: { interfaceName: string } = await kudo.setupNode({ nodeId: 'a', nodeIpCidr: '10.0.0.1/24', nodesIps: [peer] });
await kudo.setupIptables({ nodeId: 'a' });
await kudo.addOtherNodes([peer]);
await kudo.newNodeInCluster(peer);
await kudo.deleteNodeInCluster(peer);
const ports: readonly kudo.Port[] = [{ source: 80, destination: 8080 }, { source: 53, destination: 53, protocol: 'udp' }];
const made: { interfaceName: string; namespaceName: string } = await kudo.setupInstance({ ${named}, ports });
const same: boolean = kudo.getNamespaceName('i') === made.namespaceName;
await kudo.cleanInstance({ instanceId: 'i', ports, instanceIpCidr: '10.0.0.2/24' });
await kudo.cleanNode({ nodeId: 'a' }).catch((error: unknown): ErrorCode | undefined =>
  error instanceof EdgewayError ? error.code : undefined);
export const all: [typeof node, boolean, Pick<Kudo, 'setupNode'>] = [node, same, kudo];
`,
  );
  write(
    'wrong.ts',
    `import * as kudo from 'edgeway/kudo';
await kudo.setupNode({ nodeId: 'a', nodeIpCidr: '10.0.0.1/24' });
await kudo.setupInstance({ ${named}, ports: [80] });
await kudo.addOtherNodes([{ nodeId: 'b' }]);
await kudo.cleanNode({ node_id: 'a' });
(await kudo.setupInstance({ ${named}, ports: [] })).interface_name;
`,
  );
  const tsc = (file: string) =>
    consume(
      ...[lab.command()[0]!, join(root, 'node_modules/typescript/bin/tsc'), '--noEmit', '--pretty', 'false'],
      ...['--strict', '--skipLibCheck', 'false', '--module', 'nodenext', '--moduleResolution', 'nodenext'],
      ...['--target', 'es2022', '--lib', 'es2022', file],
    );
  assert.equal(await tsc('right.ts'), { status: 0, said: '' });
  const { said } = await tsc('wrong.ts');
  assert.equal(
    [...said.matchAll(/^wrong\.ts\((\d+),/gm)].map(([, line]) => Number(line)),
    [2, 3, 4, 5, 6],
    said,
  );
});

test.run();
