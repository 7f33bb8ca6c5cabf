// Debian packages for real tests that are only unpacked beside the system, because their installation would change it
// (libnss-mdns edits nsswitch.conf, systemd-resolved takes resolv.conf). All others are scripts/setup.sh's.
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { must, run } from './dns_lab.ts';

// A slow mirror; together below the limit of a test file.
const UPDATE_LIMIT_MS = 120_000;
const DOWNLOAD_LIMIT_MS = 60_000;

/** Directory that holds the packages' files, unpacked once per machine. */
export async function unpacked(...packages: readonly string[]): Promise<string> {
  const directory = join(tmpdir(), `edgeway-packages-${packages.join('+')}`);
  if (existsSync(directory)) return directory;
  const work = `${directory}.${process.pid}`;
  mkdirSync(work, { recursive: true });
  try {
    const get = `cd '${work}' && apt-get -qq -o APT::Sandbox::User=root download ${packages.join(' ')}`;
    if ((await run(['sh', '-c', get], { limitMs: DOWNLOAD_LIMIT_MS })).status !== 0) {
      const update = ['apt-get', 'update', '-qq'];
      const updated = await run(update, { limitMs: UPDATE_LIMIT_MS });
      if (updated.status !== 0) throw new Error(`${update.join(' ')}: ${updated.stderr}`);
      const got = await run(['sh', '-c', get], { limitMs: DOWNLOAD_LIMIT_MS });
      if (got.status !== 0) throw new Error(`${get}: ${got.stderr}`);
    }
    for (const file of readdirSync(work)) await must(['dpkg', '-x', join(work, file), join(work, 'root')]);
    if (!existsSync(directory)) renameSync(join(work, 'root'), directory);
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  return directory;
}
