// Composition root of `edgeway kudo`: Kudo's gRPC service on this host, without an agent and without etcd. What it
// sets up stays when it ends: the next start finds it by the state directory.
import process from 'node:process';
import { toEdgewayError } from '../../src/error.ts';
import { hostLock } from '../io/directory_lock.ts';
import { hostRunner } from '../io/exec.ts';
import { hostFiles } from '../io/files.ts';
import { serveGrpc } from '../io/grpc_server.ts';
import { createLogger } from '../io/log.ts';
import { createKudo } from './kudo.ts';
import { networkService } from './service.ts';

/** Serves until a signal ends it. */
export async function runKudo(settings: {
  readonly listen?: string | undefined;
  readonly stateDir?: string | undefined;
  readonly logLevel?: string | undefined;
}): Promise<void> {
  const log = createLogger(settings.logLevel ?? 'info');
  const kudo = createKudo({
    runner: hostRunner,
    files: hostFiles,
    lock: hostLock,
    log,
    stateDir: settings.stateDir ?? '/var/lib/edgeway/kudo',
  });
  try {
    const address = settings.listen ?? 'unix:/run/edgeway/kudo.sock';
    // Before it says that it is up: who reads that may end it at once.
    const ended = new Promise((resolve) => {
      for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, resolve);
    });
    const server = await serveGrpc(networkService(kudo), address, log);
    log.info({ address: server.address }, 'Kudo network service is up');
    await ended;
    await server.stop();
  } catch (thrown) {
    const { code, message } = toEdgewayError(thrown);
    log.error({ code, error: message }, 'the Kudo network service cannot start');
    process.exitCode = 1;
  }
}
