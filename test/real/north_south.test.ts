// The way in from outside on real agents. The client stands on the switch, outside every node.
//
//   client 10.77.0.254 ── n1 10.77.0.1: web 1, neighbour    n2 10.77.0.2: web 2 (later)    n3 10.77.0.3: nothing
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { Lab, type Runtime, until } from '../../scripts/lab.ts';
import { DelayedLab } from '../../scripts/relay.ts';
import { says } from './host_lab.ts';

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const test = suite('north-south');
const WEB = 'shop.prod.web.v1';
const LISTEN = 8123;
const PORTS = [
  { source: 8080, destination: LISTEN, protocol: 'tcp' },
  { source: 5300, destination: LISTEN, protocol: 'udp' },
];

let lab: Lab;
let neighbour: string;

const self = (script: string, ...args: string[]): string[] =>
  runtime === 'deno'
    ? [process.execPath, 'run', '-A', '--quiet', script, ...args]
    : [process.execPath, script, ...args];

function descriptor(service: string, more: object) {
  const [appname, appnamespace, servicename, servicenamespace] = service.split('.');
  return { appname, appnamespace, servicename, servicenamespace, ...more };
}

/** Answers of `LABEL CLIENT`; a refused or lost request is an empty string. */
async function ask(
  netns: string,
  protocol: 'tcp' | 'udp',
  host: string,
  port: number,
  count = 1,
): Promise<string[]> {
  const { stdout } = await lab.exec(
    netns,
    self('test/lab/ask.ts', protocol, host, String(port), 'hello', String(count)),
    { timeoutMs: 120_000 },
  );
  return (JSON.parse(stdout) as { text: string }[]).map(({ text }) =>
    text.startsWith('error') ? '' : text.replace(/ hello$/, ''),
  );
}
const outside = (protocol: 'tcp' | 'udp', node: number, count = 1) =>
  ask(lab.switch, protocol, lab.node(node).ip, protocol === 'tcp' ? 8080 : 5300, count);
const labels = (answers: readonly string[]): string[] =>
  [...new Set(answers.map((text) => text.split(' ')[0] ?? ''))].sort();

async function deploy(node: number, label: string, service: string, instance: number): Promise<string> {
  const netns = await lab.addInstance(label);
  const answer = await lab.api(node, 'POST', '/api/v1/instances', { service, instance, netns });
  assert.is(answer.status, 200, JSON.stringify(answer.body));
  lab.spawn(netns, self('test/lab/echo.ts', String(LISTEN), label), `${lab.dir}/${label}.log`);
  return netns;
}

test.before(async () => {
  lab = await Lab.up({ lab: `ewn${process.pid}`, nodes: 3, runtime });
  try {
    await lab.startAll();
    const applied = await lab.api(
      1,
      'POST',
      '/api/v1/services',
      descriptor(WEB, { exposed: true, ports: PORTS }),
    );
    assert.is(applied.status, 200, JSON.stringify(applied.body));
    assert.equal(applied.body.ports, PORTS);
    neighbour = await deploy(1, 'neighbour', 'shop.prod.neighbour.v1', 1);
  } catch (thrown) {
    for (const node of lab.nodes) console.log(lab.tail(node));
    await lab.down();
    throw thrown;
  }
});
test.after(async () => {
  await lab.down();
});

test('without an instance nobody answers', async () => {
  assert.equal(await outside('tcp', 1), ['']);
});

test('the only instance is reached through its node with the client’s address, and through every other node', async () => {
  await deploy(1, 'web1', WEB, 1);
  for (const node of [1, 2, 3])
    await until(`n${node} publishes`, 30_000, async () =>
      (await outside('tcp', node))[0] !== '' ? true : undefined,
    );
  assert.equal(await outside('tcp', 1), ['web1 10.77.0.254']);
  assert.equal(await outside('udp', 1), ['web1 10.77.0.254']);
  for (const node of [2, 3]) {
    // Another node's InstanceIP: the path through the tunnel does not keep the client's address.
    assert.match((await outside('tcp', node))[0] ?? '', /^web1 172\.30\.\d+\.\d+$/);
    assert.match((await outside('udp', node))[0] ?? '', /^web1 172\.30\.\d+\.\d+$/);
  }
});

test('hairpin: an instance reaches a published port of its own node, and the node does too', async () => {
  assert.equal(labels(await ask(neighbour, 'tcp', lab.node(1).ip, 8080)), ['web1']);
  assert.equal(labels(await ask(neighbour, 'tcp', lab.node(3).ip, 8080)), ['web1']);
  assert.equal(labels(await ask(lab.node(1).netns, 'tcp', lab.node(1).ip, 8080)), ['web1']);
  assert.equal(labels(await ask(lab.node(3).netns, 'tcp', lab.node(3).ip, 8080)), ['web1']);
});

test('a port that is not published, and the overlay’s own addresses, stay closed to the outside', async () => {
  assert.equal(await ask(lab.switch, 'tcp', lab.node(1).ip, LISTEN), ['']);
  const { body } = await lab.api(1, 'GET', '/api/v1/instances');
  const web = body.items.find((one: { service: string }) => one.service === WEB);
  await lab.exec(lab.switch, ['ip', 'route', 'add', '172.16.0.0/12', 'via', lab.node(1).ip]);
  assert.equal(await ask(lab.switch, 'tcp', web.namespaceIp, LISTEN), ['']);
  assert.equal(await ask(lab.switch, 'tcp', web.instanceIp, LISTEN), ['']);
  await lab.exec(lab.switch, ['ip', 'route', 'del', '172.16.0.0/12']);
});

test('two instances on two nodes: any node’s port balances over both', async () => {
  await deploy(2, 'web2', WEB, 2);
  for (const node of [1, 2, 3]) {
    await until(`n${node} knows both`, 30_000, async () =>
      labels([...(await outside('tcp', node)), ...(await outside('tcp', node))]).join() === 'web1,web2'
        ? true
        : undefined,
    );
    const answers = await outside('tcp', node, 20);
    assert.not(answers.includes(''), `n${node} lost an answer: ${answers.join(', ')}`);
    const first = answers.filter((text) => text.startsWith('web1')).length;
    assert.ok(first >= 6 && first <= 14, `n${node}: ${first} of 20 went to web1: ${answers.join(', ')}`);
  }
});

test('another service cannot have the port: an error when it is applied', async () => {
  const other = descriptor('shop.prod.other.v1', {
    exposed: true,
    ports: [{ source: 8080, destination: 1 }],
  });
  const answer = await lab.api(2, 'POST', '/api/v1/services', other);
  assert.is(answer.status, 409);
  assert.is(answer.body.code, 'port_taken');
  assert.match(answer.body.message, 'tcp port 8080 leads to service shop.prod.web.v1 already');
  const bad = await lab.api(
    2,
    'POST',
    '/api/v1/services',
    descriptor('shop.prod.other.v1', { exposed: true, ports: [{ source: 0, destination: 1 }] }),
  );
  assert.is(bad.status, 400);
});

test('outside DNS: a delegated name has the addresses of the nodes that are up, over UDP and TCP', async () => {
  const zone = 'edge.example.org';
  lab.spawn(
    lab.switch,
    [
      ...self('coordinator/main.ts', '--etcd', lab.etcd, '--roles', 'root'),
      ...['--outside-domain', zone, '--outside-listen', `10.77.0.254:53`],
    ],
    `${lab.dir}/coordinator.log`,
  );
  const dig = async (...args: string[]): Promise<string> => {
    const { stdout } = await lab.exec(lab.node(3).netns, [
      'dig',
      '@10.77.0.254',
      '+tries=1',
      '+time=2',
      ...args,
    ]);
    return stdout;
  };
  const name = `web.v1.shop.prod.${zone}`;
  const short = async (...args: string[]) =>
    (await dig('+short', ...args)).trim().split('\n').sort().join(' ');
  await until('outside DNS knows all three nodes', 20_000, async () =>
    (await short(name)) === '10.77.0.1 10.77.0.2 10.77.0.3' ? true : undefined,
  );
  assert.is(await short('+tcp', name), '10.77.0.1 10.77.0.2 10.77.0.3');
  assert.match(await dig(name), /flags: qr aa rd; .*ANSWER: 3[\s\S]*\s10\s+IN\s+A\s/);
  assert.match(await dig(name, 'AAAA'), /status: NOERROR[\s\S]*SOA/);
  assert.match(await dig(`nosuch.${zone}`), /status: NXDOMAIN/);
  assert.match(await dig('example.com'), /status: REFUSED/);
  const node = lab.node(3);
  if (node.agent !== undefined) await lab.end(node.agent);
  await until('n3 left the answer', 30_000, async () =>
    (await short(name)) === '10.77.0.1 10.77.0.2' ? true : undefined,
  );
  await lab.startAgent(3);
});

test('while the local instance is unhealthy its port is closed, and open again after', async () => {
  const port = 8124;
  const service = 'shop.prod.sick.v1';
  const applied = await lab.api(
    1,
    'POST',
    '/api/v1/services',
    descriptor(service, {
      exposed: true,
      ports: [{ source: 8090, destination: LISTEN }],
      health: { tcp: { port }, intervalMs: 200, timeoutMs: 1_000, fall: 2, rise: 1 },
    }),
  );
  assert.is(applied.status, 200, JSON.stringify(applied.body));
  const netns = await deploy(3, 'sick', service, 1);
  const asked = async () => (await ask(lab.switch, 'tcp', lab.node(3).ip, 8090))[0] ?? '';
  await until('the unhealthy one is not published', 30_000, async () =>
    (await asked()) === '' ? true : undefined,
  );
  lab.spawn(netns, self('test/lab/echo.ts', String(port), 'healthy'), `${lab.dir}/healthy.log`);
  await until('the healthy one is', 30_000, async () =>
    (await asked()).startsWith('sick ') ? true : undefined,
  );
  assert.is((await lab.api(3, 'DELETE', `/api/v1/instances/${service}/1`)).status, 200);
});

test('a port that a process of the node has: its problem is listed until the process ends', async () => {
  const service = 'shop.prod.late.v1';
  const holder = lab.spawn(
    lab.node(1).netns,
    self('test/lab/echo.ts', '8091', 'holder'),
    `${lab.dir}/holder.log`,
  );
  await until('the holder listens', 30_000, async () =>
    (await ask(lab.switch, 'tcp', lab.node(1).ip, 8091))[0]?.startsWith('holder') ? true : undefined,
  );
  await lab.api(
    1,
    'POST',
    '/api/v1/services',
    descriptor(service, { exposed: true, ports: [{ source: 8091, destination: LISTEN }] }),
  );
  await deploy(1, 'late', service, 1);
  const problems = async () => {
    const { body } = await lab.api(1, 'GET', '/api/v1/services');
    return (body.problems as { key: string; code: string; reason: string }[]).filter(({ key }) =>
      key.endsWith(`/${service}`),
    );
  };
  const [problem] = await until('n1 says so', 30_000, async () => {
    const found = await problems();
    return found.length > 0 ? found : undefined;
  });
  assert.is(problem?.code, 'port_taken');
  assert.match(
    problem?.reason ?? '',
    /node n1 does not publish it: tcp\/8091 belongs to a process of this host/,
  );
  await until('another node publishes it', 30_000, async () =>
    (await ask(lab.switch, 'tcp', lab.node(2).ip, 8091))[0]?.startsWith('late') ? true : undefined,
  );
  await lab.end(holder, 'SIGKILL');
  await until('n1 publishes it by itself', 30_000, async () =>
    (await ask(lab.switch, 'tcp', lab.node(1).ip, 8091))[0]?.startsWith('late') ? true : undefined,
  );
  await until('and has no problem', 30_000, async () => ((await problems()).length === 0 ? true : undefined));
});

test('no instance speaks to another node’s tunnel, nor to etcd', async () => {
  const [n1, n2] = [lab.node(1), lab.node(2)];
  // An IPv4 packet of identification 0xbeef in a frame of this network.
  const frame = '0c00000100455700' + '4500001cbeef00004011000000000000ac1e0001' + '1000100000080000';
  await lab.exec(n2.netns, ['nft', 'add table inet forged']);
  await lab.exec(n2.netns, ['nft', 'add chain inet forged input { type filter hook input priority -200; }']);
  const rule = 'udp dport 4790 @th,160,16 0xbeef counter';
  await lab.exec(n2.netns, ['nft', `add rule inet forged input ${rule}`]);
  const arrived = async () =>
    Number(/packets (\d+)/.exec((await lab.exec(n2.netns, ['nft', 'list table inet forged'])).stdout)?.[1]);
  try {
    assert.match(await says(neighbour, 'udp', n2.ip, 4790, `hex:${frame}`), /^error /);
    assert.is(await arrived(), 0);
    await says(n1.netns, 'udp', n2.ip, 4790, `hex:${frame}`);
    assert.is(await arrived(), 1, 'from the node itself it comes through');
  } finally {
    await lab.exec(n2.netns, ['nft', 'delete table inet forged']);
  }
  const [host = '', port = ''] = lab.etcd.split(':');
  assert.match(await says(neighbour, 'tcp', host, Number(port)), /^error /);
  assert.not.match(await says(n1.netns, 'tcp', host, Number(port)), /^error /);
});

test('a node whose instance is undeployed passes requests on, and none fails meanwhile', async () => {
  let stop = false;
  const asking = [1, 2, 3].map(async (node) => {
    const heard: string[] = [];
    while (!stop) heard.push(...(await outside('tcp', node, 10)));
    return heard;
  });
  const gone = await lab.api(1, 'DELETE', `/api/v1/instances/${WEB}/1`);
  assert.is(gone.status, 200);
  await until('only web2 answers', 30_000, async () =>
    labels(await outside('tcp', 1, 3)).join() === 'web2' ? true : undefined,
  );
  stop = true;
  const answers = (await Promise.all(asking)).flat();
  const failed = answers.filter((text) => text === '').length;
  assert.is(failed, 0, `${failed} of ${answers.length} requests failed`);
  assert.equal(await outside('tcp', 2), ['web2 10.77.0.254'], 'at home it sees the client');
  assert.match((await outside('udp', 1))[0] ?? '', /^web2 172\.30\./);
});

test('a killed and restarted agent publishes again', async () => {
  const node = lab.node(3);
  if (node.agent !== undefined) await lab.end(node.agent, 'SIGKILL');
  await lab.startAgent(3);
  await until('n3 publishes again', 30_000, async () =>
    labels(await outside('tcp', 3)).join() === 'web2' ? true : undefined,
  );
});

test('a descriptor that is not exposed any more closes the ports everywhere, and another service may have them', async () => {
  await lab.api(1, 'POST', '/api/v1/services', descriptor(WEB, { exposed: false, ports: PORTS }));
  for (const node of [1, 2, 3])
    await until(`n${node} closes`, 30_000, async () =>
      (await outside('tcp', node))[0] === '' ? true : undefined,
    );
  const other = descriptor('shop.prod.other.v1', {
    exposed: true,
    ports: [{ source: 8080, destination: 1 }],
  });
  assert.is((await lab.api(2, 'POST', '/api/v1/services', other)).status, 200);
});

test('policy closest: a port leads to an instance on its node, else to the nearest, and roundrobin again to all', async () => {
  const delayed = await DelayedLab.over(lab);
  delayed.setRtts([
    [0, 60, 10],
    [60, 0, 40],
    [10, 40, 0],
  ]);
  const service = 'shop.prod.near.v1';
  const apply = async (policy: string): Promise<void> => {
    const answer = await lab.api(
      1,
      'POST',
      '/api/v1/services',
      descriptor(service, { exposed: true, policy, ports: [{ source: 8070, destination: LISTEN }] }),
    );
    assert.is(answer.status, 200, JSON.stringify(answer.body));
    assert.is(answer.body.policy, policy);
  };
  const asked = (node: number, count: number) => ask(lab.switch, 'tcp', lab.node(node).ip, 8070, count);
  const answers = (what: string, node: number, wanted: string) =>
    until(what, 60_000, async () => (labels(await asked(node, 6)).join() === wanted ? true : undefined));
  const wrong = await lab.api(
    1,
    'POST',
    '/api/v1/services',
    descriptor(service, { exposed: true, policy: 'fixed', ports: [] }),
  );
  assert.is(wrong.status, 400);
  assert.match(wrong.body.message, 'policy');
  await apply('closest');
  await deploy(1, 'near1', service, 1);
  await deploy(2, 'near2', service, 2);
  await answers('n3 leads to the nearer n1', 3, 'near1');
  for (const node of [1, 2]) {
    await answers(`n${node} leads to its own`, node, `near${node}`);
    assert.equal(await asked(node, 2), Array(2).fill(`near${node} 10.77.0.254`), 'which sees the client');
  }
  delayed.setRtts([
    [0, 60, 50],
    [60, 0, 10],
    [50, 10, 0],
  ]);
  await answers('n3 leads to n2 when that is nearer', 3, 'near2');
  await apply('roundrobin');
  for (const node of [1, 2, 3]) await answers(`n${node} leads to both`, node, 'near1,near2');
});

test.run();
