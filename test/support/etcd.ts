// A throwaway etcd for tests: the same starter that the agent uses, in a directory that is removed afterwards.
import { execFile } from 'node:child_process';
import { cp, mkdtemp, rm } from 'node:fs/promises';
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

/** Two that hold the same and bear the ids of one cluster, and know nothing of each other: what only a broken etcd is. */
export async function startTwinEtcds(): Promise<[TestEtcd, TestEtcd]> {
  const dataDir = await newDataDir();
  await (await startPrivateEtcd({ dataDir, log: SILENT })).stop();
  const copy = await newDataDir();
  await cp(dataDir, copy, { recursive: true });
  return [await startTestEtcd(dataDir), await startTestEtcd(copy)];
}

const newDataDir = (): Promise<string> => mkdtemp(join(tmpdir(), 'edgeway-test-etcd-'));

/** `held`: a directory that an etcd has left. */
export async function startTestEtcd(held?: string): Promise<TestEtcd> {
  const dataDir = held ?? (await newDataDir());
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
