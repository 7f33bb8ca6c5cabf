// The few file operations that host set-up needs. It refuses to leave a file half written where it can: `write`
// makes a new file and renames it over the old one.
import { mkdir, open, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import process from 'node:process';
import type { Files } from '../ports.ts';

export const hostFiles: Files = { read, write, writeInPlace, remove };

let serial = 0;

async function read(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if (isGone(error)) return undefined;
    throw error;
  }
}

/** Makes the directory if need be; keeps the mode of the file that it replaces. */
async function write(path: string, content: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const mode = await stat(path).then(
    (old) => old.mode & 0o777,
    () => 0o644,
  );
  serial += 1;
  const fresh = `${path}.${process.pid}-${serial}.new`;
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

async function writeInPlace(path: string, content: string): Promise<void> {
  await writeFile(path, content);
}

async function remove(path: string): Promise<void> {
  await rm(path, { force: true });
}

/** ENOTDIR and ESRCH: a path through /proc/PID of a process that has ended. */
function isGone(error: unknown): boolean {
  const code = (error as NodeJS.ErrnoException).code;
  return code === 'ENOENT' || code === 'ENOTDIR' || code === 'ESRCH';
}
