// A holder of the roles that is stopped in the middle of its work (SIGSTOP: a paused machine), against a real etcd:
// a standby takes over within the lease, and what the holder does when it wakes up changes nothing.
import { type ChildProcess, spawn } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import process from 'node:process';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { connectEtcd } from '../../coordinator/etcd/client.ts';
import type { Kv } from '../../coordinator/kv.ts';
import { unwrap } from '../../src/error.ts';
import { Keys } from '../../src/keys.ts';
import { SILENT } from '../../src/log.ts';
import { decodeAddress, decodeLeader, decodeService, encodeService } from '../../src/records.ts';
import { startTestEtcd, type TestEtcd } from '../support/etcd.ts';
import { eventually } from '../support/eventually.ts';
import { descriptor, sid } from '../support/sample.ts';

const test = suite('a paused holder');
const keys = new Keys();
const ROLE_TTL_S = 3;
const SERVICES = Array.from({ length: 600 }, (_, i) => sid(`app.prod.s${i}.v1`));

let etcd: TestEtcd;
let kv: Kv;
const coordinators = new Map<string, ChildProcess>();

const logOf = (holder: string): string => join(etcd.dataDir, `${holder}.log`);
async function start(holder: string): Promise<void> {
  await writeFile(logOf(holder), '');
  const main = join(import.meta.dirname!, '../../coordinator/main.ts');
  const runtime =
    process.versions['deno'] === undefined
      ? [process.execPath, '--disable-warning=ExperimentalWarning', main]
      : [process.execPath, 'run', '-A', '--quiet', main];
  const flags = ['--etcd', etcd.endpoint, '--holder', holder, '--role-ttl', String(ROLE_TTL_S)];
  // The shell opens the log and execs, so the child is the coordinator itself.
  const child = spawn('sh', ['-c', 'exec "$@" >>"$0" 2>&1', logOf(holder), ...runtime, ...flags], {
    stdio: 'ignore',
  });
  coordinators.set(holder, child);
}
const holders = async (): Promise<(string | undefined)[]> =>
  Promise.all(
    [keys.build({ kind: 'rootLeader' }), keys.build({ kind: 'clusterLeader', cluster: 'default' })].map(
      async (key) => {
        const entry = await kv.get(key);
        return entry === undefined ? undefined : unwrap(decodeLeader(entry.value)).holder;
      },
    ),
  );
const complete = async (): Promise<number> =>
  (await kv.range(keys.prefix('services'))).entries.filter(({ key, value }) => {
    const parsed = unwrap(keys.parse(key));
    if (parsed.kind !== 'service') return false;
    return Object.keys(unwrap(decodeService(value, parsed.service)).addresses).length === 3;
  }).length;

test.before(async () => {
  etcd = await startTestEtcd();
  kv = connectEtcd({ endpoints: [etcd.endpoint], log: SILENT });
});
test.after(async () => {
  for (const child of coordinators.values()) {
    const ended = new Promise((resolve) => child.once('exit', resolve));
    process.kill(child.pid!, 'SIGKILL');
    await ended;
  }
  await kv.close();
  await etcd.remove();
});

test('the standby takes over and finishes; the holder wakes up, writes nothing and gives way', async () => {
  await start('first');
  await eventually(async () => (await holders()).every((holder) => holder === 'first'), 'first', 30_000);
  await start('second');
  for (let i = 0; i < SERVICES.length; i += 100)
    await kv.txn(
      [],
      SERVICES.slice(i, i + 100).map((id) => ({
        kind: 'put',
        key: keys.build({ kind: 'service', service: id }),
        value: encodeService({ id, descriptor: descriptor(id), addresses: {} }),
      })),
    );
  await eventually(async () => (await complete()) > 20, 'the chores to be under way', 30_000);
  process.kill(coordinators.get('first')!.pid!, 'SIGSTOP');
  const since = performance.now();
  assert.ok((await complete()) < SERVICES.length, 'stopped in the middle');
  await eventually(async () => (await holders()).every((holder) => holder === 'second'), 'second', 60_000);
  console.log(`      taken over after ${Math.round(performance.now() - since)} ms (lease ${ROLE_TTL_S} s)`);
  await eventually(async () => (await complete()) === SERVICES.length, 'the chores to be done', 60_000);

  const { revision } = await kv.range(keys.prefix('services'));
  process.kill(coordinators.get('first')!.pid!, 'SIGCONT');
  await eventually(
    async () => (await readFile(logOf('first'), 'utf8')).includes('no longer acting in the role'),
    'first to give way',
    30_000,
  );
  const { entries } = await kv.range(keys.prefix('addresses'));
  assert.is((await kv.range(keys.prefix('services'))).revision, revision, 'it wrote nothing');
  assert.is(entries.length, 3 * SERVICES.length);
  const owners = new Set(entries.map(({ value }) => JSON.stringify(unwrap(decodeAddress(value)))));
  assert.is(owners.size, entries.length, 'each policy has one address');
});

test.run();
