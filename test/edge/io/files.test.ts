import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { hostFiles } from '../../../edge/io/files.ts';

const test = suite<{ dir: string }>('hostFiles');
test.before.each(async (context) => {
  context.dir = await mkdtemp(join(tmpdir(), 'edgeway-files-'));
});
test.after.each(async ({ dir }) => {
  await rm(dir, { recursive: true, force: true });
});

test('write makes the directory, keeps the mode, and is read back; read of nothing is undefined', async ({
  dir,
}) => {
  const path = join(dir, 'a/b/state.json');
  assert.is(await hostFiles.read(path), undefined);
  assert.is(await hostFiles.read('/proc/0/root/etc/resolv.conf'), undefined);
  await hostFiles.write(path, 'one');
  await chmod(path, 0o600);
  await hostFiles.write(path, 'two');
  assert.is(await hostFiles.read(path), 'two');
  assert.is((await stat(path)).mode & 0o777, 0o600);
  assert.equal(await readdir(join(dir, 'a/b')), ['state.json']);
});

test('writes of one path at once all succeed, the last one wins, and no other file stays', async ({
  dir,
}) => {
  const path = join(dir, 'state');
  await Promise.all(Array.from({ length: 50 }, (_, n) => hostFiles.write(path, `${n}`.repeat(5_000))));
  assert.is(await readFile(path, 'utf8'), '49'.repeat(5_000));
  assert.equal(await readdir(dir), ['state']);
});

test('what a killed writer left goes with the next write, and with remove', async ({ dir }) => {
  const path = join(dir, 'state');
  await writeFile(`${path}.new`, 'half');
  await hostFiles.write(path, 'whole');
  assert.equal(await readdir(dir), ['state']);
  await writeFile(`${path}.new`, 'half');
  await hostFiles.remove(path);
  await hostFiles.remove(path);
  assert.equal(await readdir(dir), []);
});

test('writeInPlace keeps the inode', async ({ dir }) => {
  const path = join(dir, 'resolv.conf');
  await writeFile(path, 'a longer content');
  const before = (await stat(path)).ino;
  await hostFiles.writeInPlace(path, 'short');
  assert.is((await stat(path)).ino, before);
  assert.is(await readFile(path, 'utf8'), 'short');
});

test('write that cannot be done leaves the old content and no new file', async ({ dir }) => {
  const path = join(dir, 'state');
  await hostFiles.write(path, 'old');
  try {
    await hostFiles.write(join(path, 'below'), 'x');
    assert.unreachable();
  } catch (error) {
    assert.match((error as NodeJS.ErrnoException).code ?? '', /EEXIST|ENOTDIR/);
  }
  assert.is(await hostFiles.read(path), 'old');
  assert.equal(await readdir(dir), ['state']);
});

test.run();
