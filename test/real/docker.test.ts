// A real Docker Engine with its default iptables rules inside the host namespace of host_lab.ts, and containers with
// `--network none` that we attach.
import { readFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { Environment } from '../../edge/host/environment.ts';
import { dockerEngine, targetsOf } from '../../edge/io/docker.ts';
import { hostFiles } from '../../edge/io/files.ts';
import { createKudo } from '../../edge/kudo/kudo.ts';
import type { Container } from '../../edge/ports.ts';
import { type Dockerd, importBusybox, startDockerd } from '../../scripts/docker_lab.ts';
import { Lab, type Runtime, until } from '../../scripts/lab.ts';
import { SILENT } from '../../src/log.ts';
import { address, codeOf, GATEWAY, HostLab, MTU, node, reaches, SUBNET, whoami, within } from './host_lab.ts';

const test = suite<{ lab: HostLab; dockerd: Dockerd; image: string }>('docker');
test.before(async (context) => {
  context.lab = await HostLab.up();
  try {
    context.dockerd = await startDockerd(context.lab.host, join(context.lab.dir, 'docker'));
    context.image = await importBusybox(context.dockerd);
  } catch (error) {
    await context.lab.down();
    throw error;
  }
});
test.after(async ({ lab, dockerd }) => {
  await dockerd.stop();
  await lab.down();
});

const sleeper = (name: string) => ({ name, command: ['sleep', '1000'] });
const attach = (environment: Environment, container: Container, ip: string) =>
  environment.attach({
    id: container.name,
    target: { kind: 'pid', pid: container.pid },
    namespaceIp: address(ip),
    subnet: SUBNET,
    mtu: MTU,
    resolvConf: { nameserver: GATEWAY },
    container,
  });

test('dockerEngine.inspect finds a container by name, id and prefix, and says what is wrong otherwise', async ({
  dockerd,
  image,
}) => {
  const id = await dockerd.run(image, sleeper('found'));
  const engine = dockerEngine({ socketPath: dockerd.socket });
  for (const key of ['found', id, id.slice(0, 12)]) {
    const container = await engine.inspect(key);
    assert.is(container.id, id);
    assert.is(container.name, 'found');
    assert.ok(container.pid > 1);
    assert.is(
      await readFile(container.resolvConfPath ?? '', 'utf8'),
      await dockerd.docker('exec', 'found', 'cat', '/etc/resolv.conf').then((text) => `${text}\n`),
    );
  }
  assert.match(await codeOf(engine.inspect('nosuch')), /^container_unknown: .*nosuch/);
  assert.match(await codeOf(engine.inspect('../../images/json')), /^container_unknown/);
  assert.match(await codeOf(engine.inspect('')), /^container_unknown/);
  await dockerd.docker('stop', '-t', '0', 'found');
  assert.match(await codeOf(engine.inspect('found')), /^container_not_running: container "found" is exited/);
  await dockerd.docker('rm', 'found');
  assert.match(
    await codeOf(dockerEngine({ socketPath: '/nosuch' }).inspect('x')),
    /^docker_unavailable: .*\/nosuch/,
  );
});

test('DOCKER_HOST is honoured, and one that we cannot speak to is named', async ({ dockerd, image }) => {
  const former = process.env['DOCKER_HOST'];
  try {
    const id = await dockerd.run(image, sleeper('hosted'));
    process.env['DOCKER_HOST'] = `unix://${dockerd.socket}`;
    assert.is((await dockerEngine().inspect('hosted')).id, id);
    process.env['DOCKER_HOST'] = 'ssh://somewhere';
    assert.match(await codeOf(dockerEngine().inspect('hosted')), /^docker_unavailable: DOCKER_HOST "ssh:/);
    await dockerd.docker('rm', '-f', 'hosted');
  } finally {
    if (former === undefined) delete process.env['DOCKER_HOST'];
    else process.env['DOCKER_HOST'] = former;
  }
  assert.equal(targetsOf('tcp://127.0.0.1:2376'), [{ host: '127.0.0.1', port: 2376 }]);
  assert.equal(targetsOf('tcp://[::1]'), [{ host: '::1', port: 2375 }]);
  assert.is(targetsOf(undefined).length, 2);
});

test('an engine that answers nonsense is unavailable, not a crash', async () => {
  const answers: [number, string][] = [
    [200, 'not json'],
    [200, '{}'],
    [200, '{"Id":"x","Name":5,"State":{}}'],
    [500, '{"message":"broken"}'],
    [200, '[]'],
  ];
  for (const [status, body] of answers) {
    const server: Server = createServer((_request, response) => {
      response.writeHead(status);
      response.end(body);
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as { port: number };
    const former = process.env['DOCKER_HOST'];
    process.env['DOCKER_HOST'] = `tcp://127.0.0.1:${port}`;
    try {
      assert.match(await codeOf(dockerEngine().inspect('x')), /^docker_unavailable/, body);
    } finally {
      if (former === undefined) delete process.env['DOCKER_HOST'];
      else process.env['DOCKER_HOST'] = former;
      await new Promise((resolve) => server.close(resolve));
    }
  }
});

test('attach serves a container beside Docker’s FORWARD DROP, before and after Docker restarts', async ({
  lab,
  dockerd,
  image,
}) => {
  const policy = async () => (await within(lab.host).run(['iptables', '-S', 'FORWARD'])).stdout;
  assert.match(await policy(), '-P FORWARD DROP');
  const before = await policy();
  const environment = lab.environment();
  await environment.setupNode(node);
  await dockerd.run(image, { ...sleeper('box'), options: ['--restart', 'no'] });
  const engine = dockerEngine({ socketPath: dockerd.socket });
  const container = await engine.inspect('box');
  const former = await readFile(container.resolvConfPath ?? '', 'utf8');
  const attached = await attach(environment, container, '172.16.0.80');
  assert.is(attached.interface, 'eth0');
  const inside = (...command: readonly string[]) => dockerd.docker('exec', 'box', ...command);
  assert.match(await inside('cat', '/etc/resolv.conf'), /^# edgeway.*\nnameserver 172\.16\.0\.65\n/);
  await inside('ping', '-c', '1', '-W', '2', '172.16.0.65');
  await inside('ping', '-c', '1', '-W', '2', '10.99.0.1');
  // What Docker's container does not publish is as closed to an instance as to anybody, and what it does is open.
  await dockerd.run(image, {
    name: 'closed',
    command: ['sh', '-c', 'nc -ll -p 91 -e echo secret & nc -ll -p 90 -e echo open'],
    network: 'bridge',
    options: ['-p', '9091:90'],
  });
  const knock = async (...where: readonly string[]): Promise<string> =>
    await inside('timeout', '4', 'nc', '-w', '3', ...where).catch(() => '');
  const reachable = async (when: string): Promise<void> => {
    const theirs = await dockerd.docker(
      ...['inspect', '-f', '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}', 'closed'],
    );
    for (const [port, answer] of [
      ['90', 'open\n'],
      ['91', 'secret\n'],
    ] as const)
      await until(`${theirs}:${port} answers the host`, 30_000, async () => {
        const { stdout } = await within(lab.host).run(['busybox', 'nc', '-w', '2', theirs, port]);
        return stdout === answer ? true : undefined;
      });
    assert.is(await knock('10.99.0.2', '9091'), 'open', `${when}: published`);
    assert.is(await knock(theirs, '91'), '', `${when}: not published`);
  };
  await reachable('before');
  // A container of Docker's own network still has its way out.
  await dockerd.run(image, { ...sleeper('plain'), network: 'bridge' });
  await dockerd.docker('exec', 'plain', 'ping', '-c', '1', '-W', '2', '10.99.0.1');
  await environment.detach({ id: 'box' });
  assert.is(await readFile(container.resolvConfPath ?? '', 'utf8'), former);

  await dockerd.restart();
  assert.match(await policy(), '-P FORWARD DROP');
  await dockerd.docker('start', 'box');
  await attach(environment, await engine.inspect('box'), '172.16.0.80');
  await inside('ping', '-c', '1', '-W', '2', '10.99.0.1');
  await dockerd.docker('start', 'closed');
  await reachable('after');
  await dockerd.docker('rm', '-f', 'box', 'plain', 'closed');
  await environment.detach({ id: 'box' });
  await environment.cleanNode();
  assert.is(await policy(), before);
  assert.not.match((await within(lab.host).run(['nft', 'list', 'ruleset'])).stdout, /edgeway|EW-/);
});

test('setupNode while Docker’s policy is not DROP yet: our rules hold when it arrives with a restart', async ({
  lab,
  dockerd,
  image,
}) => {
  const a = await lab.instance('first');
  const environment = lab.environment();
  await within(lab.host).run(['iptables', '-P', 'FORWARD', 'ACCEPT']);
  await environment.setupNode(node);
  await environment.attach({
    id: 'first',
    target: { kind: 'netns', name: a },
    namespaceIp: address('172.16.0.81'),
    subnet: SUBNET,
    mtu: MTU,
    ports: [{ source: 8080, destination: 80, protocol: 'tcp' }],
  });
  const server = await whoami(a, 80, 'us');
  try {
    const published = async (): Promise<string> =>
      (
        await within(lab.outside).run([
          'busybox',
          'timeout',
          '3',
          'busybox',
          'nc',
          '-w',
          '2',
          '10.99.0.2',
          '8080',
        ])
      ).stdout;
    assert.ok(await reaches(a, '10.99.0.1'), 'before');
    assert.is(await published(), 'us 10.99.0.1\n', 'before');
    // A port that Docker publishes is Docker's: ours is refused.
    await dockerd.run(image, { ...sleeper('theirs'), network: 'bridge', options: ['-p', '9090:90'] });
    const taken = environment.attach({
      ...{
        id: 'second',
        target: { kind: 'netns', name: await lab.instance('second') },
        subnet: SUBNET,
        mtu: MTU,
      },
      namespaceIp: address('172.16.0.82'),
      ports: [{ source: 9090, destination: 80, protocol: 'tcp' }],
    });
    assert.match(await codeOf(taken), /^port_taken: tcp port 9090 .* held by a process of this host/);
    await within(lab.host).run(['iptables', '-P', 'FORWARD', 'DROP']);
    await dockerd.restart();
    assert.ok(await reaches(a, '10.99.0.1'), 'after');
    assert.is(await published(), 'us 10.99.0.1\n', 'after');
  } finally {
    server.kill('SIGKILL');
    await environment.cleanNode();
  }
});

test.run();

const runtime: Runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const second = suite<{ lab: Lab }>('docker comes second');
second.before(async (context) => {
  context.lab = await Lab.up({ lab: `ewk${process.pid}`, nodes: 2, runtime });
});
second.after(async ({ lab }) => {
  await lab?.down();
});

second(
  'an agent and a Kudo node that were there before Docker serve on when it starts first, and restarts',
  async ({ lab }) => {
    const LISTEN = 8123;
    const self = (script: string, ...args: string[]): string[] =>
      runtime === 'deno'
        ? [process.execPath, 'run', '-A', '--quiet', script, ...args]
        : [process.execPath, script, ...args];
    interface Question {
      readonly what: string;
      readonly host: string;
      readonly port: number;
      readonly answer: RegExp;
    }
    /** What is answered wrongly, over either protocol: one client for all questions from a namespace. */
    const misheard = async (netns: string, questions: readonly Question[]): Promise<readonly string[]> => {
      const all = questions.flatMap((one) =>
        (['tcp', 'udp'] as const).map((protocol) => ({ ...one, protocol })),
      );
      const words = all.flatMap(({ protocol, host, port }) => [protocol, host, String(port), 'hello', '1']);
      const argv = self('test/lab/ask.ts', ...words);
      const { stdout, stderr } = await lab.exec(netns, argv, { timeoutMs: 60_000 });
      const heard = JSON.parse(stdout || '[]') as { text: string }[];
      return all.flatMap(({ what, protocol, answer }, at) => {
        const text = heard[at]?.text ?? stderr;
        return answer.test(text) ? [] : [`${what}, ${protocol}: ${text}`];
      });
    };
    await lab.startAll();

    // Ours: `near` on the host that Docker comes to, `far` on the other; each is published by both.
    const places = { near: 1, far: 2 } as const;
    const homes = new Map<string, string>();
    for (const [label, place] of Object.entries(places)) {
      const service = `shop.prod.${label}.v1`;
      const applied = await lab.api(1, 'POST', '/api/v1/services', {
        ...{
          appname: 'shop',
          appnamespace: 'prod',
          servicename: label,
          servicenamespace: 'v1',
          exposed: true,
        },
        ports: (['tcp', 'udp'] as const).map((protocol) => ({
          ...{ source: 8080 + place, destination: LISTEN, protocol },
        })),
      });
      assert.is(applied.status, 200, JSON.stringify(applied.body));
      const netns = await lab.addInstance(label);
      const attached = await lab.api(place, 'POST', '/api/v1/instances', { service, instance: 1, netns });
      assert.is(attached.status, 200, JSON.stringify(attached.body));
      lab.spawn(netns, self('test/lab/echo.ts', String(LISTEN), label), join(lab.dir, `${label}.log`));
      homes.set(label, netns);
    }

    // Kudo's: an instance on each host, the kernel carries between them.
    const id = (n: number): string => `k${n}-${process.pid}`;
    const cidr = (n: number): string => `10.0.${n}.1/24`;
    const kudos = ([1, 2] as const).map((n) =>
      createKudo({
        runner: within(lab.node(n).netns),
        files: hostFiles,
        log: SILENT,
        stateDir: join(lab.dir, `kudo${n}`),
        port: 4791,
      }),
    );
    const carried: string[] = [];
    try {
      for (const [index, kudo] of kudos.entries()) {
        const [n, other] = index === 0 ? [1, 2] : [2, 1];
        const peer = {
          nodeId: `k${other}`,
          nodeIp: { clusterIpCidr: cidr(other), externalIpAddr: lab.node(other).ip },
        };
        await kudo.setupNode({ nodeId: `k${n}`, nodeIpCidr: cidr(n), nodesIps: [peer] });
        const made = await kudo.setupInstance({
          nodeId: `k${n}`,
          nodeIpAddr: `10.0.${n}.1`,
          instanceId: id(n),
          instanceIpCidr: `10.0.${n}.2/24`,
          ports: [{ source: 8090, destination: LISTEN }],
        });
        carried.push(made.namespaceName);
        lab.spawn(
          made.namespaceName,
          self('test/lab/echo.ts', String(LISTEN), `k${n}`),
          join(lab.dir, `k${n}.log`),
        );
      }
      const [n1, n2] = [lab.node(1), lab.node(2)];
      const [k1 = '', k2 = ''] = carried;
      const wrong = async (when: string): Promise<readonly string[]> => {
        const name = (label: string): string => `shop.prod.${label}.v1.any.roundrobin.local`;
        const question = (what: string, host: string, port: number, answer: RegExp): Question => {
          return { what: `${when}: ${what}`, host, port, answer };
        };
        const found = await Promise.all([
          misheard(homes.get('near')!, [
            question('to the other node', name('far'), LISTEN, /^far 172\.30\./),
          ]),
          misheard(homes.get('far')!, [
            question('from the other node', name('near'), LISTEN, /^near 172\.30\./),
          ]),
          misheard(lab.switch, [
            question('published, the instance is here', n1.ip, 8081, /^near 10\.77\.0\.254 /),
            question('published, it is there', n1.ip, 8082, /^far 172\.30\./),
            question('published there, it is here', n2.ip, 8081, /^near 172\.30\./),
            question('published by Kudo', n1.ip, 8090, /^k1 10\.77\.0\.254 /),
          ]),
          misheard(k1, [question('carried to the other node', '10.0.2.2', LISTEN, /^k2 10\.0\.1\.2 /)]),
          misheard(k2, [question('carried from the other node', '10.0.1.2', LISTEN, /^k1 10\.0\.2\.2 /)]),
        ]);
        return found.flat();
      };
      const serves = (when: string): Promise<string> =>
        until(when, 60_000, async () => {
          const found = await wrong(when);
          if (found.length > 0) throw new Error(found.join('; '));
          return 'everything';
        });
      const policy = async () => (await within(n1.netns).run(['iptables', '-S', 'FORWARD'])).stdout;
      const theirs = (when: string): Promise<true> =>
        until<true>(`${when}: what Docker publishes answers`, 30_000, async () => {
          const knocked = ['busybox', 'nc', '-w', '2', n1.ip, '9090'];
          return (await within(lab.switch).run(knocked)).stdout === 'docker\n' ? true : undefined;
        });

      await serves('before Docker');
      assert.match(await policy(), '-P FORWARD ACCEPT');
      // Docker sets the policy only where it turns forwarding on itself.
      await within(n1.netns).run(['tee', '/proc/sys/net/ipv4/ip_forward'], '0');
      const dockerd = await lab.startDocker(1);
      assert.match(await policy(), '-P FORWARD DROP');
      assert.equal(await wrong('after Docker came'), []);
      await dockerd.run(await importBusybox(dockerd), {
        name: 'theirs',
        command: ['nc', '-ll', '-p', '90', '-e', 'echo', 'docker'],
        network: 'bridge',
        options: ['-p', '9090:90'],
      });
      await theirs('after Docker came');
      await dockerd.restart();
      await dockerd.docker('start', 'theirs');
      assert.match(await policy(), '-P FORWARD DROP');
      assert.equal(await wrong('after Docker restarted'), []);
      await theirs('after Docker restarted');

      // We go, Docker stays: its way in needs the forwarding that we turned on.
      await kudos[0]?.cleanNode({ nodeId: 'k1' });
      if (n1.agent !== undefined) await lab.end(n1.agent);
      await theirs('after we left');
      assert.not.match(await policy(), 'EW-');
    } finally {
      for (const [index, kudo] of kudos.entries()) await kudo.cleanNode({ nodeId: `k${index + 1}` });
    }
  },
);

second.run();
