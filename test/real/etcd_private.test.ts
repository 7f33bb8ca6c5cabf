import { spawn } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import { startPrivateEtcd } from '../../edge/io/etcd_private.ts';
import { SILENT } from '../../src/log.ts';
import { rejectsWith } from '../conformance/kv.ts';
import { eventually } from '../support/eventually.ts';

async function inDirectory(use: (dataDir: string) => Promise<void>): Promise<void> {
  const dataDir = await mkdtemp(join(tmpdir(), 'edgeway-test-private-'));
  try {
    await use(dataDir);
  } finally {
    await rm(dataDir, { recursive: true, force: true });
  }
}

/** Also false for a zombie: it no longer holds anything. */
async function runs(pid: number): Promise<boolean> {
  try {
    const stat = await readFile(`/proc/${pid}/stat`, 'utf8');
    return !/\) Z /.test(stat);
  } catch {
    return false;
  }
}

test('startPrivateEtcd keeps its data between runs and listens on loopback below the ephemeral ports', () =>
  inDirectory(async (dataDir) => {
    const first = await startPrivateEtcd({ dataDir, log: SILENT });
    assert.match(first.endpoint, /^127\.0\.0\.1:[23][0-9]{4}$/);
    assert.ok(Number(first.endpoint.split(':')[1]) < 32_768);
    const kv = connectEtcd({ endpoints: [first.endpoint], log: SILENT });
    await kv.txn([], [{ kind: 'put', key: '/a', value: 'kept' }]);
    await kv.close();
    await first.stop();
    await first.stop();
    assert.not.ok(await runs(first.pid));
    const second = await startPrivateEtcd({ dataDir, log: SILENT });
    const again = connectEtcd({ endpoints: [second.endpoint], log: SILENT });
    assert.is((await again.get('/a'))?.value, 'kept');
    await again.close();
    await second.stop();
  }));

test('startPrivateEtcd: etcd that was killed is back on the same ports, with its data', () =>
  inDirectory(async (dataDir) => {
    const etcd = await startPrivateEtcd({ dataDir, log: SILENT });
    const kv = connectEtcd({ endpoints: [etcd.endpoint], log: SILENT });
    await kv.txn([], [{ kind: 'put', key: '/a', value: 'kept' }]);
    const { pid } = etcd;
    process.kill(pid, 'SIGKILL');
    const value = (): Promise<string | undefined> =>
      kv.get('/a').then(
        (entry) => entry?.value,
        () => undefined,
      );
    await eventually(async () => etcd.pid !== pid && (await value()) === 'kept', 'etcd to come back', 30_000);
    await kv.close();
    await etcd.stop();
    assert.not.ok(await runs(etcd.pid));
  }));

test('startPrivateEtcd: etcd dies with its agent, even when that is killed with SIGKILL', () =>
  inDirectory(async (dataDir) => {
    const program = `
      import { startPrivateEtcd } from '${join(import.meta.dirname, '../../edge/io/etcd_private.ts')}';
      import { SILENT } from '${join(import.meta.dirname, '../../src/log.ts')}';
      const etcd = await startPrivateEtcd({ dataDir: '${dataDir}', log: SILENT });
      console.log('pid ' + etcd.pid);
      setInterval(() => {}, 1000);`;
    const file = join(dataDir, 'agent.ts');
    await import('node:fs/promises').then(({ writeFile }) => writeFile(file, program));
    const deno = 'deno' in process.versions;
    const argv = deno ? ['run', '-A', '--quiet', file] : [file];
    const agent = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'inherit'] });
    let output = '';
    agent.stdout.on('data', (chunk: Buffer) => {
      output += chunk.toString();
    });
    let pid = 0;
    try {
      await eventually(() => /pid \d+\n/.test(output), 'the agent to start its etcd', 20_000);
      pid = Number(/pid (\d+)/.exec(output)?.[1]);
      assert.ok(await runs(pid));
    } finally {
      agent.kill('SIGKILL');
    }
    await eventually(async () => !(await runs(pid)), 'etcd to die');
    const next = await startPrivateEtcd({ dataDir, log: SILENT });
    await next.stop();
  }));

test('startPrivateEtcd says which package is missing, and what etcd itself says', () =>
  inDirectory(async (dataDir) => {
    const path = process.env['PATH'];
    const empty = join(dataDir, 'bin');
    const { mkdir, symlink, writeFile, chmod } = await import('node:fs/promises');
    await mkdir(empty);
    await symlink('/usr/bin/setpriv', join(empty, 'setpriv'));
    try {
      process.env['PATH'] = empty;
      const missing = await rejectsWith('etcd_not_installed', () =>
        startPrivateEtcd({ dataDir, log: SILENT }),
      );
      assert.match(missing.message, 'Debian package etcd-server');
      await writeFile(join(empty, 'etcd'), '#!/bin/sh\necho "cannot do that" >&2\nexit 3\n');
      await chmod(join(empty, 'etcd'), 0o755);
      const says = await rejectsWith('host_command_failed', () => startPrivateEtcd({ dataDir, log: SILENT }));
      assert.match(says.message, 'cannot do that');
    } finally {
      process.env['PATH'] = path;
    }
  }));

test.run();
