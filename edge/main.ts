#!/usr/bin/env node
// The `edgeway` command: the agent, the coordinator, and the operator's commands. Each is loaded when it is asked
// for, so that `edgeway get nodes` does not pay for etcd and FFI.
import process from 'node:process';
import { type ArgsDef, defineCommand, runMain } from 'citty';
import { boundHeap } from '../coordinator/io/heap.ts';
import packageJson from '../package.json' with { type: 'json' };
import { complaint } from './cli/flags.ts';
import { SETTINGS, type SettingName } from './config.ts';

const commands = () => import('./cli/commands.ts');

const agentArgs: ArgsDef = Object.fromEntries(
  Object.entries(SETTINGS).map(([name, setting]) => [
    name,
    // No `default` here: the environment stands between a flag and the default (config.ts).
    {
      type: 'string',
      valueHint: setting.hint,
      description: 'default' in setting ? `${setting.help} [${setting.default}]` : setting.help,
    },
  ]),
);

const agentCommand = defineCommand({
  meta: { name: 'agent', description: 'run the agent of this host; every flag may also be EDGEWAY_<FLAG>' },
  args: agentArgs,
  async run({ args }) {
    boundHeap();
    const { runAgent } = await import('./compose.ts');
    const flags = Object.fromEntries(
      Object.keys(SETTINGS).flatMap((name) => (typeof args[name] === 'string' ? [[name, args[name]]] : [])),
    ) as Partial<Record<SettingName, string>>;
    await runAgent(flags, packageJson.version);
  },
});

/** Only its line in the list of commands: see the end of the file. */
const coordinatorCommand = defineCommand({
  meta: { name: 'coordinator', description: 'hold the root and cluster roles without being a node' },
});

const restoreResolverCommand = defineCommand({
  meta: {
    name: 'restore-resolver',
    description: "put the host's resolver set-up back after an agent with --host-dns was killed",
  },
  args: { 'data-dir': agentArgs['data-dir']! },
  async run({ args }) {
    const { restoreResolver } = await import('./compose_names.ts');
    const { createLogger } = await import('./io/log.ts');
    const text = args['data-dir'];
    const dataDir =
      typeof text === 'string' ? text : (process.env['EDGEWAY_DATA_DIR'] ?? SETTINGS['data-dir'].default);
    const restored = await restoreResolver(dataDir, createLogger('info'));
    const { print } = await import('./cli/print.ts');
    print(restored ? 'put back' : 'there was nothing to put back');
  },
});

const kudoCommand = defineCommand({
  meta: {
    name: 'kudo',
    description: "serve Kudo's gRPC network service on this host; needs neither agent nor etcd",
  },
  args: {
    listen: {
      type: 'string',
      valueHint: 'ADDRESS',
      description: 'unix:/path or a loopback HOST:PORT [unix:/run/edgeway/kudo.sock]',
    },
    'state-dir': {
      type: 'string',
      valueHint: 'DIR',
      description: 'what is set up here [/var/lib/edgeway/kudo]',
    },
    'log-level': {
      type: 'string',
      valueHint: 'LEVEL',
      description: 'trace, debug, info, warn or error [info]',
    },
  },
  async run({ args }) {
    boundHeap();
    const { runKudo } = await import('./kudo/main.ts');
    await runKudo({ listen: args.listen, stateDir: args['state-dir'], logLevel: args['log-level'] });
  },
});

const main = defineCommand({
  meta: { name: 'edgeway', version: packageJson.version, description: packageJson.description },
  subCommands: {
    agent: agentCommand,
    coordinator: coordinatorCommand,
    get: async () => (await commands()).getCommand,
    apply: async () => (await commands()).applyCommand,
    delete: async () => (await commands()).deleteCommand,
    resolve: async () => (await commands()).resolveCommand,
    explain: async () => (await commands()).explainCommand,
    register: async () => (await commands()).registerCommand,
    attach: async () => (await commands()).attachCommand,
    detach: async () => (await commands()).detachCommand,
    describe: async () => (await commands()).describeCommand,
    watch: async () => (await commands()).watchCommand,
    status: async () => (await commands()).statusCommand,
    kudo: kudoCommand,
    'restore-resolver': restoreResolverCommand,
  },
});

// The coordinator has flags and a help of its own, which the command tree would take for itself.
if (process.argv[2] === 'coordinator') {
  const { runCoordinator } = await import('../coordinator/command.ts');
  await runCoordinator(process.argv.slice(3));
} else {
  const wrong = await complaint(main, process.argv.slice(2));
  if (wrong === undefined) await runMain(main);
  else {
    (await import('./cli/print.ts')).note(wrong);
    process.exitCode = 2;
  }
}
