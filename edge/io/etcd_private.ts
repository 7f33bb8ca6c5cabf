// A private etcd for a host that was given no endpoint: the installed binary, on loopback, with a data directory of
// its own, so that one node works without any configuration. It refuses to serve other hosts.
//
// It must not outlive its agent, not even a `kill -9` of it: a second agent would find the data directory locked.
// `setpriv --pdeathsig` (util-linux) has the kernel kill it when the thread that started it dies (prctl(2),
// PR_SET_PDEATHSIG); etcd's log makes that as safe as a power cut. Start it from a thread that lives as long as the
// process, the main one.
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdir } from 'node:fs/promises';
import { createServer } from 'node:net';
import { EdgewayError } from '../../src/error.ts';
import type { Logger } from '../../src/log.ts';

export interface PrivateEtcd {
  /** `127.0.0.1:port`, ready to be used. */
  readonly endpoint: string;
  readonly pid: number;
  /** Ends it and waits until it has gone; succeeds when it is gone already. */
  stop(): Promise<void>;
}

interface Running extends PrivateEtcd {
  /** Resolves with its last words when the process has ended. */
  readonly ended: Promise<string>;
}

export interface PrivateEtcdOptions {
  /** Made when missing; kept between runs. One agent per directory. */
  readonly dataDir: string;
  readonly log: Logger;
}

/** Ports below the ephemeral range (32768…), where no outgoing connection can be sitting. */
const PORT_MIN = 20_000;
const PORT_MAX = 32_000;
const PORT_TRIES_MAX = 50;
const START_TRIES_MAX = 3;
const READY_MS = 15_000;
const STOP_MS = 5_000;
const RESTART_PAUSE_MS = 1_000;
const STDERR_KEPT = 4_000;

/** Rejects with `etcd_not_installed` naming the package, or `host_command_failed` with etcd's own last words. */
export async function startPrivateEtcd(options: PrivateEtcdOptions): Promise<PrivateEtcd> {
  await mkdir(options.dataDir, { recursive: true, mode: 0o700 });
  let last: unknown;
  for (let i = 0; i < START_TRIES_MAX; i++) {
    try {
      const ports = [await freePort(), await freePort()] as const;
      const first = await start(options, ...ports);
      return keep(first, () => start(options, ...ports), options.log);
    } catch (error) {
      // Between looking and listening somebody else may have taken the port; any other failure is final.
      if (!(error instanceof Error && error.message.includes('address already in use'))) throw error;
      last = error;
    }
  }
  throw last;
}

async function start(
  { dataDir, log }: PrivateEtcdOptions,
  clientPort: number,
  peerPort: number,
): Promise<Running> {
  const client = `http://127.0.0.1:${clientPort}`;
  const peer = `http://127.0.0.1:${peerPort}`;
  const argv = [
    ...['--pdeathsig', 'KILL', '--', 'etcd', '--name', 'edgeway', '--data-dir', dataDir],
    ...['--listen-client-urls', client, '--advertise-client-urls', client],
    ...['--listen-peer-urls', peer, '--initial-advertise-peer-urls', peer],
    ...['--initial-cluster', `edgeway=${peer}`],
    // An hour of history lets a follower that was away catch up; the rest would fill the disk.
    ...['--auto-compaction-mode', 'periodic', '--auto-compaction-retention', '1h'],
    ...['--log-level', 'warn'],
  ];
  const child = spawn('setpriv', argv, { stdio: ['ignore', 'ignore', 'pipe'] });
  let stderr = '';
  let exited: string | undefined;
  child.stderr?.on('data', (chunk: Buffer) => {
    stderr = (stderr + chunk.toString()).slice(-STDERR_KEPT);
  });
  const exit = new Promise<void>((resolve) => {
    child.on('error', (error) => {
      exited = error.message;
      resolve();
    });
    child.on('exit', (status, signal) => {
      exited = `status ${status ?? signal}`;
      resolve();
    });
  });
  const deadline = performance.now() + READY_MS;
  while (!(await healthy(client))) {
    if (exited !== undefined) throw startError(exited, stderr);
    if (performance.now() > deadline) {
      await stop(child, exit);
      throw new EdgewayError(
        'host_command_failed',
        `the private etcd in ${dataDir} was not ready within ${READY_MS / 1000} s; is another one using the directory? ${lastLine(stderr)}`,
      );
    }
    await Promise.race([exit, new Promise((resolve) => setTimeout(resolve, 20))]);
  }
  if (exited !== undefined || child.pid === undefined) throw startError(exited ?? 'no process', stderr);
  log.info({ port: clientPort, file: dataDir }, 'private etcd is ready');
  return {
    endpoint: `127.0.0.1:${clientPort}`,
    pid: child.pid,
    ended: exit.then(() => `${exited}: ${lastLine(stderr)}`),
    stop: () => stop(child, exit),
  };
}

/** The agent has no other store: one that ends is started again, on the same ports. */
function keep(first: Running, startAgain: () => Promise<Running>, log: Logger): PrivateEtcd {
  let running: Running | undefined = first;
  let stopped = false;
  let pause: ReturnType<typeof setTimeout> | undefined;
  const watch = (etcd: Running): void => {
    void etcd.ended.then((reason) => {
      if (stopped) return;
      log.error({ reason }, 'private etcd has ended; starting it again');
      again();
    });
  };
  const again = (): void => {
    pause = setTimeout(() => {
      startAgain().then(
        async (etcd) => {
          if (stopped) return etcd.stop();
          running = etcd;
          watch(etcd);
        },
        (error: Error) => {
          log.warn({ error: error.message }, 'private etcd is not back yet');
          if (!stopped) again();
        },
      );
    }, RESTART_PAUSE_MS);
  };
  watch(first);
  return {
    endpoint: first.endpoint,
    get pid() {
      return running?.pid ?? first.pid;
    },
    async stop() {
      stopped = true;
      clearTimeout(pause);
      await running?.stop();
    },
  };
}

/** etcd answers /health with `{"health":"true"}` once it has a leader (itself). */
async function healthy(url: string): Promise<boolean> {
  try {
    const response = await fetch(`${url}/health`, { signal: AbortSignal.timeout(1_000) });
    return response.ok && (await response.text()).includes('true');
  } catch {
    return false;
  }
}

async function stop(child: ChildProcess, exit: Promise<void>): Promise<void> {
  child.kill('SIGTERM');
  const kill = setTimeout(() => child.kill('SIGKILL'), STOP_MS);
  await exit;
  clearTimeout(kill);
}

function startError(exited: string, stderr: string): EdgewayError {
  // setpriv exits 127 when it cannot find the program; spawn itself fails with ENOENT when setpriv is missing.
  if (/ENOENT/.test(exited))
    return new EdgewayError(
      'host_unsupported',
      'setpriv is missing: install the Debian package util-linux, or give etcd endpoints',
    );
  if (/failed to execute etcd|No such file/.test(stderr) || exited === 'status 127')
    return new EdgewayError(
      'etcd_not_installed',
      'no etcd endpoint was given and no etcd is installed here: install the Debian package etcd-server, or give endpoints',
    );
  return new EdgewayError('host_command_failed', `the private etcd ended (${exited}): ${stderr.trim()}`);
}

const lastLine = (text: string): string => text.trim().split('\n').at(-1) ?? '';

async function freePort(): Promise<number> {
  for (let i = 0; i < PORT_TRIES_MAX; i++) {
    const port = PORT_MIN + Math.floor(Math.random() * (PORT_MAX - PORT_MIN));
    if (await isFree(port)) return port;
  }
  throw new EdgewayError(
    'host_unsupported',
    `found no free loopback port between ${PORT_MIN} and ${PORT_MAX}`,
  );
}

function isFree(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer();
    server.once('error', () => resolve(false));
    server.listen({ port, host: '127.0.0.1', exclusive: true }, () => server.close(() => resolve(true)));
  });
}
