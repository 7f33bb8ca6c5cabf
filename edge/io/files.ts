// The few file operations that host set-up needs. It refuses to leave a file half written where it can: `write`
// makes a new file and renames it over the old one.
import { mkdir, open, readFile, rename, rm, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { Files } from '../ports.ts';

export const hostFiles: Files = { read, write, writeInPlace, remove };

/** The write to each path that is under way: the next one begins after it, since both use the same new file. */
const writing = new Map<string, Promise<void>>();

async function read(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if (isGone(error)) return undefined;
    throw error;
  }
}

/** Makes the directory if need be; keeps the mode of the file that it replaces. The new file always has the same name,
 *  so that what a killed process left is used up by the next write, or goes with the file. */
function write(path: string, content: string): Promise<void> {
  const turn = (writing.get(path) ?? Promise.resolve()).catch(() => {}).then(() => replace(path, content));
  writing.set(path, turn);
  const done = (): void => {
    if (writing.get(path) === turn) writing.delete(path);
  };
  turn.then(done, done);
  return turn;
}

async function replace(path: string, content: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const mode = await stat(path).then(
    (old) => old.mode & 0o777,
    () => 0o644,
  );
  const fresh = freshName(path);
  try {
    const file = await open(fresh, 'w', mode);
    try {
      await file.writeFile(content);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(fresh, path);
  } catch (error) {
    await rm(fresh, { force: true });
    throw error;
  }
}

function freshName(path: string): string {
  return `${path}.new`;
}

async function writeInPlace(path: string, content: string): Promise<void> {
  const file = await open(path, 'w');
  try {
    await file.writeFile(content);
    await file.sync();
  } finally {
    await file.close();
  }
}

async function remove(path: string): Promise<void> {
  await rm(path, { force: true });
  await rm(freshName(path), { force: true });
}

/** ENOTDIR and ESRCH: a path through /proc/PID of a process that has ended. */
function isGone(error: unknown): boolean {
  const code = (error as NodeJS.ErrnoException).code;
  return code === 'ENOENT' || code === 'ENOTDIR' || code === 'ESRCH';
}
