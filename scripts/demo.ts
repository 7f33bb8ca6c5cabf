// The main job on one screen: three nodes find each other, resolve a name, balance over three instances and survive
// the loss of a host. Everything is real: namespaces, etcd, agents, TUN devices, Docker, getent and curl.
//   npm run demo -- [--runtime node|deno] [--keep | --down] [--json FILE]
import { mkdirSync, openSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { styleText } from 'node:util';
import { readArguments } from './arguments.ts';
import { importBusybox } from './docker_lab.ts';
import { endOnSignals, Lab, must, type Runtime, run, until } from './lab.ts';

const SERVICE = 'shop.prod.cart.v1';
const CLIENT = 'shop.prod.web.v1';
const NAME = `${SERVICE}.any.roundrobin.local`;
const REQUESTS = 60;
/** Name of the one lab that --keep leaves behind. */
const KEPT = 'ewdemo';
const PRESENCE_TTL_S = 4;
/** As many requests in a row answered by the living: with a third of them still lost, 1 run in 130 would be wrong. */
const MOVED_ON_AFTER = 12;

const { values: options } = readArguments(import.meta.url, {
  options: {
    runtime: { type: 'string', default: 'node' },
    keep: { type: 'boolean', default: false },
    down: { type: 'boolean', default: false },
    json: { type: 'string' },
  },
});

const started = performance.now();
const say = (text: string): void => console.log(text);
const seconds = (): string => `${((performance.now() - started) / 1000).toFixed(1).padStart(5)} s`;
const step = (text: string): void => say(`\n${styleText('dim', seconds())}  ${styleText('bold', text)}`);
const detail = (text: string): void => say(text.replace(/^/gm, '         '));

/** A web server that says who it is, in an instance's namespace. */
function serveHttp(lab: Lab, netns: string, label: string): void {
  const www = join(lab.dir, `www-${label}`);
  mkdirSync(www, { recursive: true });
  writeFileSync(join(www, 'index.html'), `${label}\n`);
  lab.spawn(netns, ['busybox', 'httpd', '-f', '-p', '80', '-h', www], join(lab.dir, `${label}.log`));
}

interface Seen {
  runtime: string;
  versions: Record<string, string>;
  answers: Record<string, number>;
  fixed: Record<string, string>;
  resolve_ms: number;
  first_request_ms: number;
  failover_ms: number;
  after_failover: Record<string, number>;
  total_s: number;
}

async function curl(lab: Lab, netns: string, url: string, timeoutS = 2): Promise<string | undefined> {
  const { status, stdout } = await lab.exec(netns, ['curl', '-s', '--max-time', String(timeoutS), url]);
  return status === 0 ? stdout.trim() : undefined;
}

function tally(answers: readonly (string | undefined)[]): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const answer of answers) counts[answer ?? 'no answer'] = (counts[answer ?? 'no answer'] ?? 0) + 1;
  return Object.fromEntries(Object.entries(counts).sort());
}

function bars(counts: Record<string, number>): string {
  return Object.entries(counts)
    .map(([who, count]) => `${who.padEnd(12)} ${String(count).padStart(3)}  ${'▇'.repeat(count)}`)
    .join('\n');
}

async function deploy(lab: Lab, node: number, body: object): Promise<void> {
  const answer = await lab.api(node, 'POST', '/api/v1/instances', body);
  if (answer.status !== 200)
    throw new Error(`deploy on n${node}: ${JSON.stringify(answer.body)}\n${lab.tail(lab.node(node))}`);
}

async function versions(lab: Lab): Promise<Record<string, string>> {
  const first = async (argv: string[]): Promise<string> =>
    (await run(argv)).stdout.split('\n')[0]?.trim() ?? '';
  const { body } = await lab.api(1, 'GET', '/api/v1/status');
  return {
    edgeway: body.version,
    runtime: body.runtime,
    etcd: await first(['etcd', '--version']),
    docker: await first(['dockerd', '--version']),
    kernel: await first(['uname', '-r']),
  };
}

async function demo(lab: Lab): Promise<Seen> {
  step('three nodes join');
  await lab.startAll();
  detail(
    (await must([...inNode(lab, 1), 'get', 'nodes', '--api', `unix:${lab.node(1).apiSocket}`])).trimEnd(),
  );

  step(`deploy ${SERVICE}: two namespaces on n1, one Docker container on n2; a client on n3`);
  for (const instance of [1, 2]) {
    const netns = await lab.addInstance(`cart${instance}`);
    serveHttp(lab, netns, `cart-${instance}`);
    await deploy(lab, 1, { service: SERVICE, instance, netns });
  }
  const docker = await lab.startDocker(2);
  const container = await docker.run(await importBusybox(docker), {
    name: 'cart-3',
    command: ['sh', '-c', 'echo cart-3 > /www/index.html; exec httpd -f -p 80 -h /www'],
  });
  const deployed = await lab.api(2, 'POST', '/docker/deploy', {
    containerId: container,
    appName: SERVICE,
    instanceNumber: 3,
    nodeIp: lab.node(2).ip,
    nodePort: 4790,
    serviceIp: [],
  });
  if (deployed.status !== 200)
    throw new Error(`docker deploy: ${JSON.stringify(deployed.body)}\n${lab.tail(lab.node(2))}`);
  const client = await lab.addInstance('web1');
  await lab.api(3, 'POST', '/api/v1/services', {
    appname: 'shop',
    appnamespace: 'prod',
    servicename: 'web',
    servicenamespace: 'v1',
    needs: [SERVICE],
  });
  await deploy(lab, 3, { service: CLIENT, instance: 1, netns: client });
  await until('n3 knows three instances', 10_000, async () => {
    const { status, body } = await lab.api(3, 'GET', `/api/v1/resolve?name=${NAME}`);
    return status === 200 && body.instances.length === 3 ? true : undefined;
  });
  detail(
    (await must([...inNode(lab, 3), 'get', 'instances', '--api', `unix:${lab.node(3).apiSocket}`])).trimEnd(),
  );

  step('inside the client: an unchanged resolver, an unchanged HTTP client');
  const before = performance.now();
  const resolved = await lab.exec(client, ['getent', 'hosts', NAME]);
  const resolveMs = performance.now() - before;
  if (resolved.status !== 0) throw new Error(`getent hosts ${NAME}: status ${resolved.status}`);
  detail(
    `$ getent hosts ${NAME}\n${resolved.stdout.trim()}     (${resolveMs.toFixed(0)} ms with process start)`,
  );
  const beforeRequest = performance.now();
  const first = await curl(lab, client, `http://${NAME}/`);
  const firstRequestMs = performance.now() - beforeRequest;
  detail(`$ curl http://${NAME}/\n${first}     (${firstRequestMs.toFixed(0)} ms)`);

  step(`${REQUESTS} requests through the name`);
  const answers: (string | undefined)[] = [];
  for (let i = 0; i < REQUESTS; i++) answers.push(await curl(lab, client, `http://${NAME}/`));
  const counts = tally(answers);
  detail(bars(counts));

  step('one instance by its own name');
  const fixed: Record<string, string> = {};
  for (const instance of [1, 2, 3]) {
    const name = `${SERVICE}.${instance}.fixed.local`;
    fixed[name] = (await curl(lab, client, `http://${name}/`)) ?? 'no answer';
    detail(`$ curl http://${name}/     ${fixed[name]}`);
  }

  step('the keyspace, as an operator reads it');
  const keys = (await lab.etcdctl('get', '--prefix', '/edgeway/v1/', '--keys-only'))
    .split('\n')
    .filter((line) => line !== '');
  detail(`$ etcdctl get --prefix /edgeway/v1/ --keys-only\n${keys.join('\n')}`);
  detail(
    `$ etcdctl get /edgeway/v1/services/${SERVICE} --print-value-only\n${(await lab.etcdctl('get', `/edgeway/v1/services/${SERVICE}`, '--print-value-only')).trim()}`,
  );

  step('the host n2 loses its power');
  await lab.killHost(2);
  const killed = performance.now();
  let lastLostMs = killed;
  let inARow = 0;
  await until('requests move on', 60_000, async () => {
    const answer = await curl(lab, client, `http://${NAME}/`, 1);
    if (answer === 'cart-1' || answer === 'cart-2') return ++inARow >= MOVED_ON_AFTER ? true : undefined;
    inARow = 0;
    lastLostMs = performance.now();
    return undefined;
  });
  const failoverMs = lastLostMs - killed;
  const moved: (string | undefined)[] = [];
  for (let i = 0; i < 20; i++) moved.push(await curl(lab, client, `http://${NAME}/`, 5));
  const after = tally(moved);
  detail(`requests moved on after ${(failoverMs / 1000).toFixed(1)} s\n${bars(after)}`);

  return {
    runtime: lab.runtime,
    versions: await versions(lab),
    answers: counts,
    fixed,
    resolve_ms: Math.round(resolveMs),
    first_request_ms: Math.round(firstRequestMs),
    failover_ms: Math.round(failoverMs),
    after_failover: after,
    total_s: Math.round((performance.now() - started) / 100) / 10,
  };
}

/** Prefix of a command of ours on a host. */
function inNode(lab: Lab, index: number): string[] {
  return ['ip', 'netns', 'exec', lab.node(index).netns, ...lab.command()];
}

function lookAround(lab: Lab): void {
  const socket = (index: number): string => `unix:${lab.node(index).apiSocket}`;
  say(`
The lab "${lab.lab}" is still running, but for n2, which lost its power. Look around:
  ip netns exec ${lab.lab}-web1 curl http://${NAME}/
  ip netns exec ${lab.lab}-web1 getent hosts ${SERVICE}.any.closest.local
  scripts/edgeway get services --api ${socket(1)}
  scripts/edgeway resolve ${NAME} --api ${socket(3)}
  ip netns exec ${lab.switch} etcdctl get --prefix /edgeway/v1/
  ip netns exec ${lab.node(1).netns} tcpdump -ni eth0 udp port 4790
  tail -f ${lab.node(1).log}
End it with: ./scripts/demo --down`);
}

async function main(): Promise<void> {
  if (options.down) {
    say((await Lab.sweep(KEPT)) ? 'the lab is gone' : 'no lab was left');
    return;
  }
  if (options.runtime !== 'node' && options.runtime !== 'deno')
    throw new Error(`--runtime ${options.runtime}: must be node or deno`);
  const runtime: Runtime = options.runtime;
  const name = options.keep ? KEPT : `ewd${process.pid}`;
  // Opened now: what cannot be written is said before the work, not after it.
  const report = options.json === undefined ? undefined : openSync(options.json, 'w');
  let lab: Lab | undefined;
  const end = async (): Promise<void> => await lab?.down();
  const signals = endOnSignals(end);
  try {
    step(`build: three hosts, etcd (${runtime})`);
    lab = await Lab.create({
      lab: name,
      nodes: 3,
      runtime,
      agentFlags: ['--presence-ttl', String(PRESENCE_TTL_S), '--docker', Lab.dockerSocket(name)],
      progress: detail,
    });
    await lab.build();
    const seen = await demo(lab);
    if (report !== undefined) writeFileSync(report, `${JSON.stringify(seen, undefined, 2)}\n`);
    if (options.keep) {
      lab.leave();
      lookAround(lab);
    } else {
      step('clean up');
      await end();
      step('done: nothing is left behind');
    }
  } catch (thrown) {
    const left = await end().catch((cause: Error) => `\n${cause.message}`);
    // A signal also ends the programs that we wait for; then its handler has the last word.
    if (signals.interrupted) await new Promise(() => {});
    throw new Error(`${(thrown as Error).message}${left ?? ''}`, { cause: thrown });
  }
}

try {
  await main();
} catch (thrown) {
  process.stderr.write(`demo failed: ${(thrown as Error).message}\n`);
  process.exit(1);
}
if (options.keep) process.exit(0); // the lab's processes live on; nothing else holds us
