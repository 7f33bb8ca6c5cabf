// The whole path on real things: etcd, three agents, TUN devices, dockerd, resolvers.
//
//   n1: cart 1, cart 2 (namespaces), client near      n2: cart 3 (Docker container)      n3: client far
//
// Every client declares `needs`; every assertion is about what a program inside an instance saw.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { type Dockerd, importBusybox } from '../../scripts/docker_lab.ts';
import { Lab, type Runtime, run, until } from '../../scripts/lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('network');
const SERVICE = 'shop.prod.cart.v1';
const PORT = 8123;
const name = (policy: string, instance = 'any'): string => `${SERVICE}.${instance}.${policy}.local`;

let lab: Lab;
let docker: Dockerd;
let near: string;
let far: string;

const self = (script: string, ...args: string[]): string[] =>
  runtime === 'deno'
    ? [process.execPath, 'run', '-A', '--quiet', script, ...args]
    : [process.execPath, script, ...args];

interface Answer {
  readonly text: string;
  readonly address: string;
}

async function ask(
  netns: string,
  protocol: 'tcp' | 'udp',
  host: string,
  count = 1,
  text = 'hello',
): Promise<Answer[]> {
  const { status, stdout, stderr } = await lab.exec(
    netns,
    self('test/lab/ask.ts', protocol, host, String(PORT), text, String(count)),
    { timeoutMs: 60_000 },
  );
  assert.is(status, 0, stderr);
  return JSON.parse(stdout);
}

/** Who answered, by count. */
function tally(answers: readonly Answer[]): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const { text } of answers) {
    const who = text.split(' ')[0]!;
    counts[who] = (counts[who] ?? 0) + 1;
  }
  return counts;
}

function descriptor(service: string, needs: readonly string[]) {
  const [appname, appnamespace, servicename, servicenamespace] = service.split('.');
  return { appname, appnamespace, servicename, servicenamespace, needs };
}

async function refused(
  answer: { status: number; body: { code?: string; message?: string } },
  status: number,
  code: string,
  what: string,
): Promise<void> {
  assert.is(answer.status, status, JSON.stringify(answer.body));
  assert.is(answer.body.code, code, JSON.stringify(answer.body));
  assert.ok(answer.body.message?.includes(what), `${answer.body.message} should speak of ${what}`);
}

async function client(node: number, label: string): Promise<string> {
  const netns = await lab.addInstance(label);
  const service = `shop.prod.${label}.v1`;
  const applied = await lab.api(node, 'POST', '/api/v1/services', descriptor(service, [SERVICE]));
  assert.is(applied.status, 200, JSON.stringify(applied.body));
  const attached = await lab.api(node, 'POST', '/api/v1/instances', { service, instance: 1, netns });
  assert.is(attached.status, 200, `${JSON.stringify(attached.body)}\n${lab.tail(lab.node(node))}`);
  return netns;
}

test.before(async () => {
  lab = await Lab.up({
    nodes: 3,
    runtime,
    agentFlags: ['--presence-ttl', '4', '--docker', Lab.dockerSocket(`ewl${process.pid}`)],
  });
  for (const node of lab.nodes) await lab.startAgent(node.index);
});

test.after(async () => {
  await lab?.down();
});

test('deploy before register is refused and says what comes first', async () => {
  for (const [path, body] of [
    [
      '/docker/deploy',
      {
        containerId: 'x',
        appName: SERVICE,
        instanceNumber: 1,
        nodeIp: '10.77.0.1',
        nodePort: 4790,
        serviceIp: [],
      },
    ],
    ['/docker/undeploy', { serviceName: SERVICE }],
    ['/api/v1/instances', { service: SERVICE, instance: 1, netns: 'x' }],
  ] as const)
    await refused(await lab.api(1, 'POST', path, body), 409, 'not_registered', '/register');
});

test('register claims the subnet asked for, is repeatable, and refuses another', async () => {
  assert.equal((await lab.api(1, 'POST', '/register', { subnetwork: '172.18.0.64/26' })).body, {
    subnetwork: '172.18.0.64/26',
  });
  assert.is((await lab.api(1, 'POST', '/register', { subnetwork: '172.18.0.64/26' })).status, 200);
  assert.is((await lab.api(1, 'POST', '/register', {})).body.subnetwork, '172.18.0.64/26');
  await refused(
    await lab.api(1, 'POST', '/register', { subnetwork: '172.18.0.128/26' }),
    409,
    'already_registered',
    '172.18.0.64/26',
  );
  await refused(
    await lab.api(2, 'POST', '/register', { subnetwork: '172.18.0.64/26' }),
    409,
    'subnet_taken',
    'n1',
  );
  await refused(
    await lab.api(2, 'POST', '/register', { subnetwork: '172.30.0.0/26' }),
    400,
    'address_not_in_plan',
    'services',
  );
  await refused(
    await lab.api(2, 'POST', '/register', { subnetwork: '172.18.0.1/26' }),
    400,
    'invalid_request',
    'host bits',
  );
  for (const index of [2, 3])
    assert.is((await lab.api(index, 'POST', '/register', {})).status, 200, lab.tail(lab.node(index)));
  await until('n1 sees three nodes', 5_000, async () =>
    (await lab.api(1, 'GET', '/api/v1/nodes')).body.items.length === 3 ? true : undefined,
  );
});

test('namespaces and a Docker container become instances', async () => {
  for (const instance of [1, 2]) {
    const netns = await lab.addInstance(`cart${instance}`);
    lab.spawn(
      netns,
      self('test/lab/echo.ts', String(PORT), `cart-${instance}`),
      join(lab.dir, `cart${instance}.log`),
    );
    const answer = await lab.api(1, 'POST', '/api/v1/instances', { service: SERVICE, instance, netns });
    assert.is(answer.status, 200, `${JSON.stringify(answer.body)}\n${lab.tail(lab.node(1))}`);
    assert.is(answer.body.node, 'n1');
  }
  docker = await lab.startDocker(2);
  await docker.run(await importBusybox(docker), {
    name: 'cart-3',
    command: ['sh', '-c', 'while :; do sleep 1000; done'],
  });
  const answer = await lab.api(2, 'POST', '/docker/deploy', {
    containerId: 'cart-3',
    appName: SERVICE,
    instanceNumber: 3,
    nodeIp: lab.node(2).ip,
    nodePort: 4790,
    serviceIp: [],
  });
  assert.is(answer.status, 200, `${JSON.stringify(answer.body)}\n${lab.tail(lab.node(2))}`);
  assert.is(answer.body.serviceName, SERVICE);
  assert.match(answer.body.nsAddress, /^172\.\d+\.\d+\.\d+$/);
  // The image holds only busybox: the echo server is started from outside in the container's network namespace.
  const pid = await docker.docker('inspect', '-f', '{{.State.Pid}}', 'cart-3');
  lab.spawn(
    lab.node(2).netns,
    ['nsenter', `--net=/proc/${pid}/ns/net`, ...self('test/lab/echo.ts', String(PORT), 'cart-3')],
    join(lab.dir, 'cart3.log'),
  );
  near = await client(1, 'near');
  far = await client(3, 'far');
  await until('every client reaches every instance', 15_000, async () => {
    for (const netns of [near, far])
      for (const instance of ['1', '2', '3'])
        if (tally(await ask(netns, 'tcp', name('fixed', instance)))[`cart-${instance}`] !== 1)
          return undefined;
    return true;
  });
});

test('fixed: every instance answers alone, TCP and UDP, on the same node and across nodes, from its own address', async () => {
  for (const netns of [near, far])
    for (const protocol of ['tcp', 'udp'] as const)
      for (const instance of ['1', '2', '3']) {
        const { body } = await lab.api(1, 'GET', `/api/v1/resolve?name=${name('fixed', instance)}`);
        const answers = await ask(netns, protocol, name('fixed', instance), 5);
        assert.equal(tally(answers), { [`cart-${instance}`]: 5 }, `${netns} ${protocol} ${instance}`);
        for (const answer of answers) assert.is(answer.address, body.address);
      }
});

test('roundrobin: 60 connections, each of three instances answers at least 12, all from the ServiceIP', async () => {
  const { body } = await lab.api(3, 'GET', `/api/v1/resolve?name=${name('roundrobin')}`);
  for (const netns of [near, far])
    for (const protocol of ['tcp', 'udp'] as const) {
      const answers = await ask(netns, protocol, name('roundrobin'), 60);
      const counts = tally(answers);
      assert.equal(Object.keys(counts).sort(), ['cart-1', 'cart-2', 'cart-3'], JSON.stringify(counts));
      for (const count of Object.values(counts)) assert.ok(count >= 12, JSON.stringify(counts));
      for (const answer of answers) assert.is(answer.address, body.address);
    }
});

test("an instance sees its client by the client's InstanceIP, wherever the client is", async () => {
  const { body } = await lab.api(1, 'GET', '/api/v1/instances');
  for (const [netns, service] of [
    [near, 'shop.prod.near.v1'],
    [far, 'shop.prod.far.v1'],
  ] as const) {
    const own = body.items.find((one: { service: string }) => one.service === service).instanceIp;
    for (const instance of ['1', '3'])
      for (const { text } of await ask(netns, 'udp', name('fixed', instance), 2))
        assert.is(text.split(' ')[1], own, text);
  }
});

test('a service outside needs is neither told nor reached', async () => {
  const { stdout } = await lab.exec(near, ['dig', '+tries=1', '+time=3', 'shop.prod.far.v1.1.fixed.local']);
  assert.match(stdout, /status: REFUSED/);
  const { body } = await lab.api(1, 'GET', '/api/v1/resolve?name=shop.prod.far.v1.1.fixed.local');
  const before = (await lab.api(1, 'GET', '/api/v1/counters')).body.drop_not_needed;
  const answers = await ask(near, 'tcp', body.address);
  assert.match(answers[0]?.text ?? '', /^error/);
  const after = (await lab.api(1, 'GET', '/api/v1/counters')).body.drop_not_needed;
  assert.ok(after > before, `the drop is counted: ${before} → ${after}`);
});

test('a service that needs nobody still answers those who need it, TCP and UDP, near and far', async () => {
  const closed = { ...descriptor(SERVICE, []), ports: [PORT] };
  assert.is((await lab.api(1, 'POST', '/api/v1/services', closed)).status, 200);
  for (const netns of [near, far])
    for (const protocol of ['tcp', 'udp'] as const)
      for (const instance of ['1', '3'])
        assert.equal(tally(await ask(netns, protocol, name('fixed', instance), 3)), {
          [`cart-${instance}`]: 3,
        });
});

test('the packet on the underlay is VXLAN-GPE to tcpdump, with InstanceIP and namespace IP inside', async () => {
  const log = join(lab.dir, 'capture.log');
  const capture = lab.spawn(
    lab.node(3).netns,
    // The fourth octet of the header is the next protocol: 1 is IPv4, ours are probes.
    ['tcpdump', '-l', '-nni', 'eth0', '-c', '2', 'udp port 4790 and udp[11] = 1'],
    log,
  );
  const captured = (): string => readFileSync(log, 'utf8');
  await until('tcpdump listens', 20_000, () => captured().includes('listening on') || undefined);
  await ask(far, 'udp', name('fixed', '3'), 3);
  await until('two packets are captured', 20_000, () => capture.exitCode ?? undefined);
  const stdout = captured();
  const { body } = await lab.api(3, 'GET', '/api/v1/instances');
  const one = (service: string, number: number) =>
    body.items.find(
      (item: { service: string; instance: number }) => item.service === service && item.instance === number,
    );
  const [client, server] = [one('shop.prod.far.v1', 1), one(SERVICE, 3)];
  assert.match(stdout, /VXLAN-GPE/i, stdout);
  assert.match(stdout, /10\.77\.0\.3\.\d+ > 10\.77\.0\.2\.4790/, stdout);
  assert.match(
    stdout,
    new RegExp(`IP ${client.instanceIp}\\.\\d+ > ${server.namespaceIp}\\.${PORT}: UDP`),
    stdout,
  );
  assert.match(
    stdout,
    new RegExp(`IP ${server.instanceIp}\\.${PORT} > ${client.namespaceIp}\\.\\d+: UDP`),
    stdout,
  );
});

test('unchanged resolvers: getent, dig over UDP and TCP, AAAA, and names that are not there', async () => {
  const { body } = await lab.api(3, 'GET', `/api/v1/resolve?name=${name('roundrobin')}`);
  const getent = await lab.exec(far, ['getent', 'hosts', name('roundrobin')]);
  assert.ok(getent.stdout.startsWith(body.address), getent.stdout);
  for (const tcp of [[], ['+tcp']]) {
    const { stdout } = await lab.exec(far, [
      'dig',
      '+short',
      '+tries=1',
      '+time=3',
      ...tcp,
      name('roundrobin'),
    ]);
    assert.is(stdout.trim(), body.address);
  }
  const aaaa = await lab.exec(far, ['dig', '+tries=1', '+time=3', 'AAAA', name('roundrobin')]);
  assert.match(aaaa.stdout, /status: NOERROR/);
  assert.match(aaaa.stdout, /ANSWER: 0/);
  const nobody = await lab.exec(far, ['dig', '+tries=1', '+time=3', name('fixed', '9')]);
  assert.match(nobody.stdout, /status: NXDOMAIN/);
  const outside = await lab.exec(far, ['dig', '+tries=1', '+time=3', 'cart.v1.any.sometimes.closest.local']);
  assert.match(outside.stdout, /status: NXDOMAIN/);
});

test('a new service resolves on every node that asked for it, a deleted one on none; no address of a node is denied', async () => {
  const brief = 'shop.prod.brief.v1';
  const bridges = await Promise.all(
    lab.nodes.map(async ({ index }) => {
      const { body } = await lab.api(index, 'GET', '/api/v1/status');
      return String(body.subnet).replace(/\d+\/\d+$/, (end) => String(Number.parseInt(end, 10) + 1));
    }),
  );
  const statuses = (...question: string[]): Promise<string[]> =>
    Promise.all(
      lab.nodes.map(async ({ netns }, i) => {
        const dig = ['dig', '+tries=1', '+time=3', `@${bridges[i]}`, ...question];
        return /status: (\w+)/.exec((await lab.exec(netns, dig)).stdout)?.[1] ?? 'none';
      }),
    );
  const everywhere = (status: string): Promise<true> =>
    until(`${status} on every node`, 10_000, async () =>
      (await statuses(`${brief}.any.closest.local`)).every((said) => said === status) ? true : undefined,
    );
  assert.equal(await statuses(`${brief}.any.closest.local`), ['NXDOMAIN', 'NXDOMAIN', 'NXDOMAIN']);
  assert.is((await lab.api(1, 'POST', '/api/v1/services', descriptor(brief, []))).status, 200);
  await everywhere('NOERROR');
  assert.is((await lab.api(2, 'DELETE', `/api/v1/services/${brief}`)).status, 200);
  await everywhere('NXDOMAIN');
  const { items } = (await lab.api(1, 'GET', '/api/v1/instances')).body;
  for (const address of [...bridges, ...items.map((one: { namespaceIp: string }) => one.namespaceIp)])
    assert.equal(await statuses('-x', address), ['NOERROR', 'NOERROR', 'NOERROR'], address);
});

test('bad requests: unknown container, double deploy, number taken elsewhere, unknown namespace, names outside the grammar', async () => {
  const deploy = {
    containerId: 'cart-3',
    appName: SERVICE,
    instanceNumber: 3,
    nodeIp: lab.node(2).ip,
    nodePort: 4790,
    serviceIp: [],
  };
  await refused(
    await lab.api(2, 'POST', '/docker/deploy', { ...deploy, containerId: 'nobody', instanceNumber: 9 }),
    404,
    'container_unknown',
    'nobody',
  );
  await refused(await lab.api(2, 'POST', '/docker/deploy', deploy), 409, 'instance_exists', 'instance 3');
  const spare = await lab.addInstance('spare');
  await refused(
    await lab.api(1, 'POST', '/api/v1/instances', { service: SERVICE, instance: 3, netns: spare }),
    409,
    'instance_exists',
    'n2',
  );
  await refused(
    await lab.api(1, 'POST', '/api/v1/instances', { service: SERVICE, instance: 9, netns: 'nowhere' }),
    404,
    'namespace_unknown',
    'nowhere',
  );
  await refused(
    await lab.api(1, 'POST', '/api/v1/instances', {
      service: SERVICE,
      instance: 9,
      pid: spawnSync('true').pid, // it has ended
    }),
    404,
    'namespace_unknown',
    'process',
  );
  await refused(
    await lab.api(1, 'GET', '/api/v1/resolve?name=shop.prod.cart.v1.any.fixed.local'),
    400,
    'invalid_name',
    'number from 1',
  );
  await refused(
    await lab.api(1, 'GET', '/api/v1/resolve?name=shop.prod.none.v1.any.closest.local'),
    404,
    'not_found',
    'no service',
  );
  // None of the refusals left anything.
  const { body } = await lab.api(1, 'GET', '/api/v1/instances');
  assert.is(body.items.filter((one: { service: string }) => one.service === SERVICE).length, 3);
  const links = (await lab.exec(lab.node(1).netns, ['ip', '-o', 'link', 'show', 'master', 'edgeway0'])).stdout
    .trim()
    .split('\n');
  assert.is(links.length, 3, links.join('\n'));
});

test('hand-broken JSON in the keyspace is shown with its reason and harms nothing', async () => {
  await lab.etcdctl('put', '/edgeway/v1/services/hand.made.wrong.v1', '{"v":1,');
  await lab.etcdctl(
    'put',
    '/edgeway/v1/instances/hand.made.wrong.v1/1',
    '{"v":1,"service":"hand.made.wrong.v1"}',
  );
  const problems = await until('the problem is listed', 5_000, async () => {
    const { body } = await lab.api(1, 'GET', '/api/v1/services');
    return body.problems.length > 0 ? body.problems : undefined;
  });
  assert.is(problems[0].key, '/edgeway/v1/services/hand.made.wrong.v1');
  assert.match(problems[0].reason, 'JSON');
  assert.is(tally(await ask(far, 'tcp', name('roundrobin'), 3))['error:'], undefined);
  await lab.etcdctl('del', '/edgeway/v1/services/hand.made.wrong.v1');
  await lab.etcdctl('del', '/edgeway/v1/instances/hand.made.wrong.v1/1');
  await until('the problem is gone', 5_000, async () =>
    (await lab.api(1, 'GET', '/api/v1/services')).body.problems.length === 0 ? true : undefined,
  );
});

test('the edgeway command lists, resolves and speaks JSON', async () => {
  const api = ['--api', `unix:${lab.node(1).apiSocket}`];
  const cli = (...args: string[]) => run(lab.command(...args, ...api));
  const nodes = await cli('get', 'nodes');
  assert.match(nodes.stdout, /n1\s+default\s+10\.77\.0\.1:4790\s+no\s+172\.18\.0\.64\/26/);
  const instances = JSON.parse((await cli('get', 'instances', SERVICE, '-o', 'json')).stdout);
  assert.is(instances.items.length, 3);
  const resolved = await cli('resolve', name('roundrobin'));
  assert.match(resolved.stdout, /172\.30\./);
  const described = await cli('describe', SERVICE);
  assert.match(described.stdout, /shop\.prod\.cart\.v1\.3\.fixed\.local\s+172\.30\./);
  const wrong = await cli('resolve', 'shop.prod.cart.v1.any.nearest.local');
  assert.is(wrong.status, 1);
  assert.match(wrong.stderr, /label "nearest": .*roundrobin/);
});

test('undeploy takes an instance out of the names at once; of what is gone it succeeds', async () => {
  assert.is((await lab.api(2, 'POST', '/docker/undeploy', { serviceName: SERVICE })).status, 200);
  assert.is((await lab.api(2, 'POST', '/docker/undeploy', { serviceName: SERVICE })).status, 200);
  await until('two instances are left', 5_000, async () =>
    (await lab.api(3, 'GET', `/api/v1/resolve?name=${name('roundrobin')}`)).body.instances.length === 2
      ? true
      : undefined,
  );
  assert.equal(Object.keys(tally(await ask(far, 'tcp', name('roundrobin'), 20))).sort(), [
    'cart-1',
    'cart-2',
  ]);
  const links = await lab.exec(lab.node(2).netns, ['ip', '-o', 'link', 'show', 'master', 'edgeway0']);
  assert.is(links.stdout.trim(), '');
});

test('a host that dies is passed over when its presence ends', async () => {
  await lab.killHost(1);
  await until('n3 forgets the instances of n1', 20_000, async () =>
    (await lab.api(3, 'GET', `/api/v1/instances`)).body.items.every(
      (one: { node: string }) => one.node !== 'n1',
    )
      ? true
      : undefined,
  );
});

test('SIGTERM leaves the host as it was found', async () => {
  const node = lab.node(3);
  assert.ok(node.agent);
  await lab.end(node.agent);
  assert.is(node.agent.exitCode, 0, lab.tail(node));
  const links = JSON.parse((await lab.exec(node.netns, ['ip', '-j', 'link'])).stdout) as { ifname: string }[];
  assert.equal(links.map((link) => link.ifname).sort(), ['eth0', 'lo']);
  assert.is((await lab.exec(node.netns, ['nft', 'list', 'tables'])).stdout.trim(), '');
  const routes = (await lab.exec(node.netns, ['ip', '-4', 'route'])).stdout;
  assert.not.match(routes, /172\./);
});

test.run();
