// A throwaway etcd for tests: the same starter that the agent uses, in a directory that is removed afterwards.
import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { type PrivateEtcd, startPrivateEtcd } from '../../edge/io/etcd_private.ts';
import { SILENT } from '../../src/log.ts';

export interface TestEtcd extends PrivateEtcd {
  readonly dataDir: string;
  etcdctl(...args: string[]): Promise<string>;
  /** Stops it and removes its data. */
  remove(): Promise<void>;
}

export async function startTestEtcd(): Promise<TestEtcd> {
  const dataDir = await mkdtemp(join(tmpdir(), 'edgeway-test-etcd-'));
  const etcd = await startPrivateEtcd({ dataDir, log: SILENT });
  return {
    ...etcd,
    dataDir,
    etcdctl: async (...args) => {
      const { stdout } = await promisify(execFile)('etcdctl', args, {
        env: { ...process.env, ETCDCTL_API: '3', ETCDCTL_ENDPOINTS: etcd.endpoint },
      });
      return stdout;
    },
    remove: async () => {
      await etcd.stop();
      await rm(dataDir, { recursive: true, force: true });
    },
  };
}
