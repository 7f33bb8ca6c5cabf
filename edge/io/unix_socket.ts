// Makes room for a listening unix socket: takes away one that a killed process left, and nothing else.
import { lstat, rm } from 'node:fs/promises';
import { connect } from 'node:net';
import { EdgewayError } from '../../src/error.ts';

/** Succeeds when nothing is there. Rejects `invalid_request` for what is no socket, `address_taken` for one that
 *  answers. */
export async function clearSocketPath(path: string): Promise<void> {
  const found = await lstat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined;
    throw new EdgewayError('invalid_request', `cannot listen on ${path}: ${error.message}`, { cause: error });
  });
  if (found === undefined) return;
  if (!found.isSocket())
    throw new EdgewayError('invalid_request', `cannot listen on ${path}: it is there and is no socket`);
  if (await answers(path))
    throw new EdgewayError('address_taken', `cannot listen on ${path}: another program listens there`);
  await rm(path, { force: true });
}

function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect({ path });
    socket.once('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
  });
}
