// Composition root of `edgeway kudo`: Kudo's gRPC service on this host, without an agent and without etcd. What it
// sets up stays when it ends; `CreateContainerNetworkInterface` and the rest find it again in the state directory.
import type { Logger } from '../../src/log.ts';
import { hostRunner } from '../io/exec.ts';
import { hostFiles } from '../io/files.ts';
import { type GrpcServer, serveGrpc } from '../io/grpc_server.ts';
import { createKudo } from './kudo.ts';
import { networkService } from './service.ts';

export interface KudoSettings {
  /** `unix:/path` or a loopback HOST:PORT. */
  readonly listen: string;
  readonly stateDir: string;
}

export const KUDO_DEFAULTS: KudoSettings = {
  listen: 'unix:/run/edgeway/kudo.sock',
  stateDir: '/var/lib/edgeway/kudo',
};

export async function runKudo(settings: KudoSettings, log: Logger): Promise<GrpcServer> {
  const { listen, stateDir } = settings;
  const kudo = createKudo({ runner: hostRunner, files: hostFiles, log, stateDir });
  const server = await serveGrpc(networkService(kudo), listen, log);
  log.info({ address: server.address }, 'Kudo network service is up');
  return server;
}
