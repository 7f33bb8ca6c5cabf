// A Docker Engine of our own for tests and the demo: its own data, socket and pid file in one directory, inside a
// network namespace so that its iptables rules and its bridge never meet the host's. It refuses to touch another
// engine: everything is addressed by our socket and ended by its own pid.
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { mkdir, readFile, rm, symlink } from 'node:fs/promises';
import { setTimeout as pause } from 'node:timers/promises';
import { hostRunner } from '../edge/io/exec.ts';
import type { CommandResult } from '../edge/ports.ts';

const READY_LIMIT_MS = 60_000;
const STOP_LIMIT_MS = 30_000;

export interface ContainerOptions {
  readonly name: string;
  /** Default `none`: we attach it. */
  readonly network?: string;
  readonly command: readonly string[];
  /** More arguments of `docker run`. */
  readonly options?: readonly string[];
}

export interface Dockerd {
  /** Path of its socket; DOCKER_HOST is `unix://` and this. */
  readonly socket: string;
  /** Process id of the engine that runs now; 0 when none does. */
  readonly pid: number;
  /** Runs `docker -H … ARGS`; rejects when it fails. */
  docker(...args: readonly string[]): Promise<string>;
  /** Starts a container in the background; its id. */
  run(image: string, options: ContainerOptions): Promise<string>;
  /** Ends the engine as an operator's restart would, and starts it again. */
  restart(): Promise<void>;
  /** Removes its containers, ends it and deletes its directory. Succeeds twice. */
  stop(): Promise<void>;
}

/**
 * Without a namespace the engine makes no bridge and no rules, so that the host stays as it is. `started` is told the
 * engine's pid before this returns to the event loop, so that it can be ended also while it comes up.
 */
export async function startDockerd(
  netns: string | undefined,
  dir: string,
  started: (pid: number) => void = () => {},
): Promise<Dockerd> {
  mkdirSync(dir, { recursive: true });
  const socket = `${dir}/docker.sock`;
  const place = netns === undefined ? ['env'] : ['nsenter', `--net=/run/netns/${netns}`, '--'];
  const argv = [
    ...place,
    'dockerd',
    ...['--data-root', `${dir}/data`, '--exec-root', `${dir}/exec`, '--pidfile', `${dir}/dockerd.pid`],
    ...['-H', `unix://${socket}`],
    ...(netns === undefined ? ['--iptables=false', '--bridge=none'] : []),
  ];
  let engine: ChildProcess | undefined;

  async function start(): Promise<void> {
    // The shell opens the log and execs: a descriptor handed to a child is closed twice on one of the runtimes.
    const shell = ['-c', 'exec "$@" >>"$0" 2>&1', `${dir}/dockerd.log`, ...argv];
    const child = spawn('sh', shell, { stdio: 'ignore', detached: true });
    engine = child;
    if (child.pid !== undefined) started(child.pid);
    const until = performance.now() + READY_LIMIT_MS;
    for (;;) {
      if ((await cli(['version'])).status === 0) return;
      if (child.exitCode !== null || child.signalCode !== null || performance.now() > until) {
        const said = await readFile(`${dir}/dockerd.log`, 'utf8');
        throw new Error(`dockerd did not come up:\n${said.split('\n').slice(-20).join('\n')}`);
      }
      await pause(100);
    }
  }

  const cli = (args: readonly string[]): Promise<CommandResult> =>
    hostRunner.run(['docker', '-H', `unix://${socket}`, ...args]);

  async function docker(...args: readonly string[]): Promise<string> {
    const result = await cli(args);
    if (result.status !== 0) throw new Error(`docker ${args.join(' ')}: ${result.stderr.trim()}`);
    return result.stdout.trim();
  }

  async function end(): Promise<void> {
    const child = engine;
    engine = undefined;
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGTERM');
    const waiting = new AbortController();
    const late = pause(STOP_LIMIT_MS, 'late', { signal: waiting.signal }).catch(() => 'in time');
    if ((await Promise.race([gone.then(() => 'in time'), late])) === 'late') child.kill('SIGKILL');
    await gone;
    waiting.abort();
  }

  const dockerd: Dockerd = {
    socket,
    get pid() {
      return engine?.pid ?? 0;
    },
    docker,
    // A container's first program ignores SIGTERM unless it asks for it, and the engine would wait ten seconds.
    run: (image, { name, network = 'none', command, options = [] }) =>
      docker(
        ...['run', '-d', '--name', name, '--network', network, '--stop-signal', 'KILL'],
        ...[...options, image, ...command],
      ),
    async restart() {
      await end();
      await start();
    },
    async stop() {
      if (engine !== undefined) {
        const all = await cli(['ps', '-aq']);
        const ids = all.stdout.split('\n').filter((id) => id !== '');
        if (ids.length > 0) await cli(['rm', '-f', ...ids]);
        await end();
      }
      await rm(dir, { recursive: true, force: true });
    },
  };
  try {
    await start();
  } catch (error) {
    await end();
    throw error;
  }
  return dockerd;
}

/** An image whose only program is Debian's static busybox, with a link for each applet. Returns the image's name. */
export async function importBusybox(dockerd: Dockerd, image = 'edgeway-busybox'): Promise<string> {
  const root = `${dockerd.socket}.rootfs`;
  try {
    for (const directory of ['bin', 'etc', 'proc', 'sys', 'dev', 'tmp', 'root', 'www'])
      await mkdir(`${root}/${directory}`, { recursive: true });
    await must(['cp', '/bin/busybox', `${root}/bin/busybox`]);
    const applets = await must(['/bin/busybox', '--list']);
    for (const applet of applets.split('\n'))
      if (applet !== '' && applet !== 'busybox') await symlink('busybox', `${root}/bin/${applet}`);
    const pipe = 'tar -C "$1" -c . | docker -H "$2" import - "$3"';
    await must(['sh', '-c', pipe, 'sh', root, `unix://${dockerd.socket}`, image]);
  } finally {
    await rm(root, { recursive: true, force: true });
  }
  return image;
}

async function must(argv: readonly string[]): Promise<string> {
  const result = await hostRunner.run(argv);
  if (result.status !== 0) throw new Error(`${argv.join(' ')}: ${result.stderr.trim()}`);
  return result.stdout;
}
