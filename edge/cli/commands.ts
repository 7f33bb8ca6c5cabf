// The operator's commands: each asks the agent on this host. They hold no state and decide nothing.
import { readFile } from 'node:fs/promises';
import process from 'node:process';
import { text as readStream } from 'node:stream/consumers';
import { type ArgsDef, defineCommand } from 'citty';
import { EdgewayError } from '../../src/error.ts';
import { API_PORT_DEFAULT } from '../../src/limits.ts';
import { INSTANCE_NUMBER_MAX, parseInstanceNumber } from '../../src/name.ts';
import type {
  Change,
  ExplainView,
  InstanceView,
  Listing,
  NodeView,
  Problem,
  ServiceView,
} from '../api/app.ts';
import { environmentName } from '../config.ts';
import { ApiClient } from './client.ts';
import { guarded, note, print, printJson, type Row, table } from './print.ts';

const common = {
  api: {
    type: 'string',
    description: 'the agent: HOST:PORT or unix:/path',
    default: process.env[environmentName('api')] ?? `127.0.0.1:${API_PORT_DEFAULT}`,
  },
  output: { type: 'string', alias: 'o', description: 'table or json', default: 'table' },
} as const satisfies ArgsDef;

function wantsJson(output: string): boolean {
  if (output !== 'json' && output !== 'table')
    throw new EdgewayError('invalid_request', `--output "${output}": must be table or json`);
  return output === 'json';
}

const instanceRow = (i: InstanceView): Row => [
  i.service,
  String(i.instance),
  i.instanceIp,
  i.namespaceIp,
  i.node,
  `${i.nodeIp}:${i.ewp}`,
];
const INSTANCE_HEADER: Row = ['SERVICE', 'INSTANCE', 'INSTANCE-IP', 'NAMESPACE-IP', 'NODE', 'TUNNEL'];

/** One `get` command: its listing, its table, and below it what could not be read. */
function get<Item>(kind: string, header: Row, key: (item: Item) => string, row: (item: Item) => Row) {
  return defineCommand({
    meta: { name: kind, description: `list ${kind}` },
    args: { ...common, name: { type: 'positional', description: 'only this one', required: false } },
    run: ({ args }) =>
      guarded(async () => {
        const asJson = wantsJson(args.output);
        const { items, problems } = await new ApiClient(args.api).call<Listing<Item>>(
          'GET',
          `/api/v1/${kind}`,
        );
        const wanted = args.name === undefined ? items : items.filter((item) => key(item) === args.name);
        const broken = problems.filter(
          (problem) => args.name === undefined || problem.key.includes(args.name),
        );
        if (args.name !== undefined && wanted.length + broken.length === 0)
          throw new EdgewayError('not_found', `no ${kind} "${args.name}"`);
        if (asJson) printJson({ items: wanted, problems: broken });
        else {
          print(table(header, wanted.map(row)));
          printProblems(broken);
        }
      }),
  });
}

function printProblems(problems: readonly Problem[]): void {
  if (problems.length === 0) return;
  print(`\nproblems:\n${problems.map(({ key, reason }) => `  ${key}\n    ${reason}`).join('\n')}`);
}

export const getCommand = defineCommand({
  meta: { name: 'get', description: 'list nodes, services or instances' },
  subCommands: {
    nodes: get<NodeView>(
      'nodes',
      ['NODE', 'CLUSTER', 'TUNNEL', 'NAT', 'SUBNET', 'EPOCH'],
      (n) => n.node,
      (n) => [n.node, n.cluster, `${n.nodeIp}:${n.ewp}`, n.nat ? 'yes' : 'no', n.subnet, String(n.epoch)],
    ),
    services: get<ServiceView>(
      'services',
      ['SERVICE', 'INSTANCES', 'ROUNDROBIN', 'CLOSEST', 'FASTEST', 'NEEDS'],
      (s) => s.service,
      (s) => [
        s.service,
        String(s.instances),
        s.addresses['roundrobin'] ?? '-',
        s.addresses['closest'] ?? '-',
        s.addresses['fastest'] ?? '-',
        s.needs === undefined ? 'any' : s.needs.join(',') || 'none',
      ],
    ),
    instances: get<InstanceView>('instances', INSTANCE_HEADER, (i) => i.service, instanceRow),
  },
});

async function readInput(file: string): Promise<unknown> {
  const text =
    file === '-' ? await readStream(process.stdin) : await readFile(file, 'utf8').catch(cannotRead(file));
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new EdgewayError('invalid_request', `${file}: is not JSON: ${(cause as Error).message}`, { cause });
  }
}

const cannotRead =
  (file: string) =>
  (cause: Error): never => {
    throw new EdgewayError('not_found', `${file}: ${cause.message}`, { cause });
  };

export const applyCommand = defineCommand({
  meta: { name: 'apply', description: 'create or change services from descriptors' },
  args: {
    ...common,
    file: {
      type: 'string',
      alias: 'f',
      required: true,
      description: 'JSON file with one descriptor or an array; - for standard input',
    },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const input = await readInput(args.file);
      const client = new ApiClient(args.api);
      const applied: ServiceView[] = [];
      for (const descriptor of Array.isArray(input) ? input : [input])
        applied.push(await client.call<ServiceView>('POST', '/api/v1/services', descriptor));
      if (asJson) printJson(applied);
      else for (const service of applied) print(`service ${service.service} applied`);
    }),
});

export const deleteCommand = defineCommand({
  meta: { name: 'delete', description: 'delete a service and free its addresses' },
  args: {
    ...common,
    service: { type: 'positional', description: 'appname.appns.servicename.servicens', required: true },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      await new ApiClient(args.api).call('DELETE', `/api/v1/services/${encodeURIComponent(args.service)}`);
      if (asJson) printJson({ deleted: args.service });
      else print(`service ${args.service} deleted`);
    }),
});

export const registerCommand = defineCommand({
  meta: { name: 'register', description: 'claim a subnet for this node' },
  args: {
    ...common,
    subnet: { type: 'positional', description: 'this one; default: any free one', required: false },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const body = args.subnet === undefined ? {} : { subnetwork: args.subnet };
      const answer = await new ApiClient(args.api).call<{ subnetwork: string }>('POST', '/register', body);
      if (asJson) printJson(answer);
      else print(`registered with ${answer.subnetwork}`);
    }),
});

function instanceNumber(text: string): number {
  const number = parseInstanceNumber(text);
  if (number === undefined)
    throw new EdgewayError(
      'invalid_request',
      `instance "${text}": must be a number, 1…${INSTANCE_NUMBER_MAX}`,
    );
  return number;
}

function pidNumber(text: string): number {
  if (!/^[1-9][0-9]*$/.test(text))
    throw new EdgewayError('invalid_request', `--pid "${text}": must be the number of a process`);
  return Number(text);
}

export const attachCommand = defineCommand({
  meta: { name: 'attach', description: 'attach a namespace, a process or a container as an instance' },
  args: {
    ...common,
    service: { type: 'positional', description: 'appname.appns.servicename.servicens', required: true },
    instance: { type: 'positional', description: 'its number: 1, 2, 3, …', required: true },
    netns: { type: 'string', description: 'network namespace, by its `ip netns` name' },
    pid: { type: 'string', description: 'process whose network namespace it is' },
    container: { type: 'string', description: 'container, by name or id' },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const instance = await new ApiClient(args.api).call<InstanceView>('POST', '/api/v1/instances', {
        service: args.service,
        instance: instanceNumber(args.instance),
        ...(args.netns === undefined ? {} : { netns: args.netns }),
        ...(args.pid === undefined ? {} : { pid: pidNumber(args.pid) }),
        ...(args.container === undefined ? {} : { container: args.container }),
      });
      if (asJson) printJson(instance);
      else print(table(INSTANCE_HEADER, [instanceRow(instance)]));
    }),
});

export const detachCommand = defineCommand({
  meta: { name: 'detach', description: 'detach an instance of this node' },
  args: {
    ...common,
    service: { type: 'positional', description: 'appname.appns.servicename.servicens', required: true },
    instance: { type: 'positional', description: 'its number', required: true },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const instance = instanceNumber(args.instance);
      const path = `/api/v1/instances/${encodeURIComponent(args.service)}/${instance}`;
      await new ApiClient(args.api).call('DELETE', path);
      if (asJson) printJson({ detached: args.service, instance });
      else print(`instance ${instance} of ${args.service} detached`);
    }),
});

export const resolveCommand = defineCommand({
  meta: { name: 'resolve', description: 'what a name means on this node now' },
  args: {
    ...common,
    name: {
      type: 'positional',
      description: 'appname.appns.servicename.servicens.instance.policy.local',
      required: true,
    },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const answer = await new ApiClient(args.api).call<{
        name: string;
        address: string;
        instances: InstanceView[];
      }>('GET', `/api/v1/resolve?name=${encodeURIComponent(args.name)}`);
      if (asJson) printJson(answer);
      else {
        print(`${answer.name}  ${answer.address}\n`);
        print(table(INSTANCE_HEADER, answer.instances.map(instanceRow)));
      }
    }),
});

export const explainCommand = defineCommand({
  meta: { name: 'explain', description: 'which instance a name or address would reach now, and why' },
  args: {
    ...common,
    of: { type: 'positional', description: 'a name, a ServiceIP or an InstanceIP', required: true },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const path = `/api/v1/explain?of=${encodeURIComponent(args.of)}`;
      const answer = await new ApiClient(args.api).call<ExplainView>('GET', path);
      if (asJson) return printJson(answer);
      print(`${answer.name}  ${answer.address ?? '-'}`);
      print(`${answer.policy}: ${answer.why}\n`);
      print(table(EXPLAIN_HEADER, answer.candidates.map(explainRow)));
      if (answer.choices.length === 0) return;
      const choices = answer.choices.map((c): Row => [c.at, c.client, c.policy, String(c.instance), c.why]);
      print(`\nlast choices:\n${table(['AT', 'CLIENT', 'POLICY', 'INSTANCE', 'WHY'], choices)}`);
    }),
});

const EXPLAIN_HEADER: Row = ['INSTANCE', 'NODE', 'SHARE', 'RTT-MS', 'BY', 'LOAD', 'COST-MS', 'HEALTH', 'WHY'];
const explainRow = (c: ExplainView['candidates'][number]): Row => [
  String(c.instance),
  c.local ? `${c.node} (here)` : c.node,
  `${(c.share * 100).toFixed(0)} %`,
  c.rttMs?.toFixed(2) ?? '-',
  c.rttBy ?? '-',
  c.load?.toFixed(2) ?? '-',
  c.costMs?.toFixed(1) ?? '-',
  c.health,
  c.reason,
];

export const statusCommand = defineCommand({
  meta: { name: 'status', description: 'this node' },
  args: common,
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const status = await new ApiClient(args.api).call<Record<string, unknown>>('GET', '/api/v1/status');
      if (asJson) printJson(status);
      else
        print(
          table(
            ['FIELD', 'VALUE'],
            Object.entries(status).map(([field, value]) => [field, String(value ?? '-')]),
          ),
        );
    }),
});

export const watchCommand = defineCommand({
  meta: { name: 'watch', description: 'services, instances and nodes as they change; ends with Ctrl-C' },
  args: common,
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      await new ApiClient(args.api).events('/api/v1/watch', (event, data) => {
        if (event === 'ready') note('watching; Ctrl-C ends it');
        else if (asJson) print(data);
        else print(describeChange(JSON.parse(data) as Change));
      });
    }),
});

function describeChange(change: Change): string {
  if (change.kind === 'node')
    return change.node === null
      ? `node ${change.name} is gone`
      : `node ${change.name} at ${change.node.nodeIp}:${change.node.ewp} with ${change.node.subnet}`;
  const instances = change.instances.map((one) => `${one.instance}@${one.node}`).join(' ') || 'none';
  return `service ${change.name}${change.service === null ? ' is gone' : ''}, instances: ${instances}`;
}

export const describeCommand = defineCommand({
  meta: { name: 'describe', description: 'a service with its names, addresses, instances and problems' },
  args: {
    ...common,
    service: { type: 'positional', description: 'appname.appns.servicename.servicens', required: true },
  },
  run: ({ args }) =>
    guarded(async () => {
      const asJson = wantsJson(args.output);
      const client = new ApiClient(args.api);
      const services = await client.call<Listing<ServiceView>>('GET', '/api/v1/services');
      const instances = await client.call<Listing<InstanceView>>('GET', '/api/v1/instances');
      const service = services.items.find((one) => one.service === args.service);
      const own = instances.items.filter((one) => one.service === args.service);
      const problems = [...services.problems, ...instances.problems].filter((one) =>
        one.key.includes(args.service),
      );
      if (service === undefined && own.length + problems.length === 0)
        throw new EdgewayError('not_found', `no service "${args.service}"`);
      if (asJson) return printJson({ service: service ?? null, instances: own, problems });
      if (service !== undefined) {
        const names = Object.entries(service.addresses).map(
          ([policy, address]): Row => [`${service.service}.any.${policy}.local`, address],
        );
        const fixed = own.map((one): Row => [`${one.service}.${one.instance}.fixed.local`, one.instanceIp]);
        print(table(['NAME', 'ADDRESS'], [...names, ...fixed]));
        print(`\nneeds: ${service.needs === undefined ? 'any' : service.needs.join(', ') || 'none'}`);
        print(
          `ports: ${service.ports.map((port) => (typeof port === 'number' ? port : JSON.stringify(port))).join(', ') || 'none declared'}`,
        );
        print(`exposed: ${service.exposed ? `on every node, by ${service.policy ?? 'roundrobin'}` : 'no'}\n`);
      }
      print(table(INSTANCE_HEADER, own.map(instanceRow)));
      printProblems(problems);
    }),
});
