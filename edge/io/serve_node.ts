// HTTP server of the agent on Node; serve_deno.ts is its twin. Chosen by the "#serve" import of package.json.
import { createAdaptorServer } from '@hono/node-server';
import { EdgewayError } from '../../src/error.ts';
import type { ApiAddress } from '../config.ts';
import type { HttpServer } from '../ports.ts';
import { clearSocketPath } from './unix_socket.ts';

export async function serve(
  fetch: (request: Request) => Response | Promise<Response>,
  address: ApiAddress,
): Promise<HttpServer> {
  if (address.kind === 'unix') await clearSocketPath(address.path); // left by an agent that was killed
  const server = createAdaptorServer({ fetch });
  return new Promise((resolve, reject) => {
    server.once('error', (cause: Error) =>
      reject(new EdgewayError('invalid_request', `--api: cannot listen: ${cause.message}`, { cause })),
    );
    const stop = (): Promise<void> =>
      new Promise((stopped) => {
        server.close(() => stopped());
        if ('closeAllConnections' in server) server.closeAllConnections();
      });
    if (address.kind === 'unix') server.listen(address.path, () => resolve({ stop }));
    else server.listen(address.port, address.host, () => resolve({ stop }));
  });
}
