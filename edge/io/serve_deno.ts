// HTTP server of the agent on Deno; serve_node.ts is its twin. Chosen by the "#serve" import of package.json.
import { EdgewayError } from '../../src/error.ts';
import type { ApiAddress } from '../config.ts';
import type { HttpServer } from '../ports.ts';
import { clearSocketPath } from './unix_socket.ts';

/** The part of Deno that this file uses; the tree is type-checked without Deno's own types. */
interface DenoServe {
  serve(
    options: { path?: string; hostname?: string; port?: number; onListen: () => void },
    handler: (request: Request) => Response | Promise<Response>,
  ): { shutdown(): Promise<void> };
}

export async function serve(
  fetch: (request: Request) => Response | Promise<Response>,
  address: ApiAddress,
): Promise<HttpServer> {
  if (address.kind === 'unix') await clearSocketPath(address.path); // left by an agent that was killed
  const { Deno } = globalThis as unknown as { Deno: DenoServe };
  return new Promise((resolve, reject) => {
    try {
      const where =
        address.kind === 'unix' ? { path: address.path } : { hostname: address.host, port: address.port };
      const server = Deno.serve(
        { ...where, onListen: () => resolve({ stop: () => server.shutdown() }) },
        fetch,
      );
    } catch (cause) {
      reject(
        new EdgewayError('invalid_request', `--api: cannot listen: ${(cause as Error).message}`, { cause }),
      );
    }
  });
}
