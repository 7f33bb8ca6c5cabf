// A lock that ends with its process, however that ends: a listening socket in the abstract namespace (unix(7)), which
// the kernel takes away with its holder. It is seen within one network namespace, which is where two agents of a host
// would get in each other's way.
import { createServer } from 'node:net';
import { EdgewayError } from '../../src/error.ts';

/** `what`: for the refusal, "conflict", when another process holds it. The answer gives it up. */
export function takeLock(name: string, what: string): Promise<() => Promise<void>> {
  const server = createServer((socket) => socket.destroy());
  return new Promise((resolve, reject) => {
    server.once('error', (cause: NodeJS.ErrnoException) =>
      reject(
        cause.code === 'EADDRINUSE'
          ? new EdgewayError('conflict', `${what} is in use by another agent of this host`, { cause })
          : new EdgewayError('host_unsupported', `${what} cannot be locked: ${cause.message}`, { cause }),
      ),
    );
    server.listen({ path: `\0edgeway/${name}` }, () => {
      // Does not keep the process alive.
      server.unref();
      resolve(() => new Promise((done) => server.close(() => done())));
    });
  });
}
