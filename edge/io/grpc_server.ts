// Serves Kudo's `Network` on loopback or a unix socket. It refuses to listen where other hosts reach it: the service
// has no authentication, and whoever calls it changes this host's network.
import { chmod, mkdir, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import {
  loadPackageDefinition,
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServiceClientConstructor,
  type sendUnaryData,
} from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { EdgewayError, toEdgewayError } from '../../src/error.ts';
import { BODY_BYTES_MAX } from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import { grpcStatus, type NetworkService } from '../kudo/service.ts';
import { clearSocketPath } from './unix_socket.ts';

export interface GrpcServer {
  /** As a client dials it: `unix:/path` or `127.0.0.1:50051`. */
  readonly address: string;
  stop(): Promise<void>;
}

/** The contract, shipped with the code. */
export const PROTO_PATH = join(import.meta.dirname!, '../kudo/network.proto');

/** `unix:/path`, or HOST:PORT with a loopback host; port 0 picks one. The socket belongs to its owner alone; one that a
 *  killed process left is replaced, anything else at the path is refused. */
export async function serveGrpc(service: NetworkService, address: string, log: Logger): Promise<GrpcServer> {
  const path = /^unix:(?:\/\/)?(\/.+)$/.exec(address)?.[1];
  const loopback = /^(127\.\d{1,3}\.\d{1,3}\.\d{1,3}|localhost|\[::1\]):(\d{1,5})$/.exec(address);
  if (path === undefined && loopback === null)
    throw new EdgewayError(
      'invalid_request',
      `gRPC address "${address}" must be unix:/path or a loopback HOST:PORT`,
    );
  const definition = loadPackageDefinition(loadSync(PROTO_PATH, { keepCase: true, defaults: true }));
  const network = (definition['network'] as Record<string, unknown>)['Network'] as ServiceClientConstructor;
  const server = new Server({
    'grpc.max_receive_message_length': BODY_BYTES_MAX,
    'grpc.max_concurrent_streams': 64,
  });
  const unary =
    <Request, Response>(name: string, handle: (request: Request) => Promise<Response>) =>
    (call: ServerUnaryCall<Request, Response>, answer: sendUnaryData<Response>): void => {
      handle(call.request).then(
        (response) => answer(null, response),
        (thrown: unknown) => {
          const error = toEdgewayError(thrown);
          log.debug({ name, code: error.code, error: error.message }, 'call refused');
          answer({ code: grpcStatus(error.code), details: `${error.code}: ${error.message}` });
        },
      );
    };
  server.addService(network.service, {
    CreateInterface: unary('CreateInterface', service.CreateInterface),
    DeleteInterface: unary('DeleteInterface', service.DeleteInterface),
    CreateContainerNetworkInterface: unary(
      'CreateContainerNetworkInterface',
      service.CreateContainerNetworkInterface,
    ),
  });
  if (path !== undefined) {
    await mkdir(dirname(path), { recursive: true });
    await clearSocketPath(path);
  }
  const target = path === undefined ? address : `unix:${path}`;
  const port = await new Promise<number>((resolve, reject) =>
    server.bindAsync(target, ServerCredentials.createInsecure(), (error, bound) =>
      error === null
        ? resolve(bound)
        : reject(new EdgewayError('host_command_failed', `listen on ${target}: ${error.message}`)),
    ),
  );
  if (path !== undefined) await chmod(path, 0o600);
  return {
    address: path === undefined ? `${loopback?.[1]}:${port}` : target,
    async stop() {
      server.forceShutdown();
      if (path !== undefined) await rm(path, { force: true });
    },
  };
}
