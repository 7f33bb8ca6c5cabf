// Debian packages for real tests: installed when a program is missing, or only unpacked beside the system when their
// installation would change it (libnss-mdns edits nsswitch.conf, systemd-resolved takes resolv.conf).
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { must, run } from './dns_lab.ts';

let listed = false;
async function lists(): Promise<void> {
  if (!listed) await must(['apt-get', 'update', '-qq']);
  listed = true;
}

/** `program` is looked up in PATH. */
export async function needProgram(program: string, debianPackage: string): Promise<void> {
  if ((await run(['sh', '-c', `command -v ${program}`])).status === 0) return;
  await lists();
  const argv = ['apt-get', 'install', '-y', '-qq', '--no-install-recommends', debianPackage];
  const ran = await run(['env', 'DEBIAN_FRONTEND=noninteractive', 'RUNLEVEL=1', ...argv], {
    limitMs: 240_000,
  });
  if (ran.status !== 0) throw new Error(`${argv.join(' ')}: ${ran.stderr}`);
}

/** Directory that holds the packages' files, unpacked once per machine. */
export async function unpacked(...packages: readonly string[]): Promise<string> {
  const directory = join(tmpdir(), `edgeway-packages-${packages.join('+')}`);
  if (existsSync(directory)) return directory;
  const work = `${directory}.${process.pid}`;
  mkdirSync(work, { recursive: true });
  try {
    const get = `cd '${work}' && apt-get -qq -o APT::Sandbox::User=root download ${packages.join(' ')}`;
    if ((await run(['sh', '-c', get], { limitMs: 120_000 })).status !== 0) {
      await lists();
      await must(['sh', '-c', get]);
    }
    for (const file of readdirSync(work)) await must(['dpkg', '-x', join(work, file), join(work, 'root')]);
    if (!existsSync(directory)) renameSync(join(work, 'root'), directory);
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  return directory;
}
