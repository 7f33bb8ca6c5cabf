// One process at a time per directory, by the kernel's own lock on it (flock(2), through util-linux's program): it ends
// with whoever holds it, however that dies, and leaves no file behind. It refuses to wait for ever.
import { spawn } from 'node:child_process';
import { mkdir } from 'node:fs/promises';
import { EdgewayError } from '../../src/error.ts';
import { LOCK_WAIT_S } from '../../src/limits.ts';
import type { Lock } from '../ports.ts';

/** Makes the directory if need be. Rejects `timeout` when others hold it for too long. */
export const hostLock: Lock = async (directory, work) => {
  await mkdir(directory, { recursive: true });
  const release = await hold(directory);
  try {
    return await work();
  } finally {
    await release();
  }
};

/** The holder lives until its standard input ends: when we say so, or when we are gone. */
function hold(directory: string): Promise<() => Promise<void>> {
  return new Promise((resolve, reject) => {
    const holder = spawn('flock', ['-w', String(LOCK_WAIT_S), directory, 'sh', '-c', 'echo held; exec cat'], {
      stdio: ['pipe', 'pipe', 'ignore'],
    });
    const ended = new Promise<void>((gone) => holder.once('close', () => gone()));
    holder.once('error', (cause) =>
      reject(new EdgewayError('host_command_failed', `flock: ${cause.message}`, { cause })),
    );
    holder.once('close', () =>
      reject(
        new EdgewayError(
          'timeout',
          `another process works on ${directory}, and has not ended within ${LOCK_WAIT_S} s`,
        ),
      ),
    );
    holder.stdin.on('error', () => {});
    holder.stdout.once('data', () =>
      resolve(() => {
        holder.stdin.end();
        return ended;
      }),
    );
  });
}
