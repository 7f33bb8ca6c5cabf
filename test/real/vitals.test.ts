// The host's pulse for real: processes that end, namespaces that go, ports that answer, programs inside a namespace.
//
//   ewE<pid>  network namespace, lo only: a listener on 127.0.0.1, checked from inside
import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { createServer as createHttpServer } from 'node:http';
import { type AddressInfo, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { hostRunner } from '../../edge/io/exec.ts';
import { hostVitals } from '../../edge/io/vitals.ts';
import type { Home } from '../../edge/ports.ts';
import { ipv4 } from '../../src/addr.ts';

const LOOPBACK = ipv4(0x7f000001);
const netns = `ewE${process.pid}`;
const vitals = hostVitals({ runner: hostRunner, commands: true });
const me: Home = { kind: 'pid', pid: process.pid };

function readNs(pid: number): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/ns/net`);
  } catch {
    return undefined;
  }
}

async function until(what: string, holds: () => boolean): Promise<void> {
  const end = performance.now() + 20_000;
  while (!holds()) {
    if (performance.now() > end) throw new Error(`not within 20 s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

test('Vitals.identify: the start time of a process, nothing once it is dead, zombies included', async () => {
  assert.match(vitals.identify(me) ?? '', /^\d+$/);
  const child = spawn('sleep', ['60'], { stdio: 'ignore' });
  const home: Home = { kind: 'pid', pid: child.pid! };
  await until('the child is there', () => vitals.identify(home) !== undefined);
  // Its parent is a shell that never waits for it, so it stays a zombie.
  const parent = spawn('sh', ['-c', 'sleep 60 & echo $!; exec sleep 60'], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  const zombie = await new Promise<number>((resolve) =>
    parent.stdout.once('data', (chunk) => resolve(Number(String(chunk)))),
  );
  process.kill(zombie, 'SIGKILL');
  await until('a zombie is no life', () => vitals.identify({ kind: 'pid', pid: zombie }) === undefined);
  child.kill('SIGKILL');
  parent.kill('SIGKILL');
  await until('the child is gone', () => vitals.identify(home) === undefined);
});

test('Vitals.identify: a namespace made anew under the same name is another', async () => {
  const home: Home = { kind: 'netns', name: netns };
  assert.is(vitals.identify(home), undefined);
  try {
    assert.is((await hostRunner.run(['ip', 'netns', 'add', netns])).status, 0);
    const first = vitals.identify(home);
    assert.match(first ?? '', /^\d+:\d+$/);
    // Kept alive by a process, so that its inode cannot be given again.
    const keeper = spawn('ip', ['netns', 'exec', netns, 'sleep', '60'], { stdio: 'ignore' });
    const inode = first!.split(':')[1]!;
    await until('the keeper is inside', () => readNs(keeper.pid!) === `net:[${inode}]`);
    await hostRunner.run(['ip', 'netns', 'del', netns]);
    assert.is(vitals.identify(home), undefined);
    await hostRunner.run(['ip', 'netns', 'add', netns]);
    const second = vitals.identify(home);
    keeper.kill('SIGKILL');
    assert.ok(second !== undefined && second !== first, `${first} ${second}`);
  } finally {
    await hostRunner.run(['ip', 'netns', 'del', netns]);
  }
});

test('Vitals.check tcp and http: accepted, refused, wrong status, silent', async () => {
  const silent = createServer(() => {}).listen(0, '127.0.0.1');
  const web = createHttpServer((request, response) => {
    response.statusCode = request.url === '/ok' ? 204 : 503;
    response.end();
  }).listen(0, '127.0.0.1');
  await until('both listen', () => silent.listening && web.listening);
  const portOf = (server: { address(): unknown }): number => (server.address() as AddressInfo).port;
  const quiet = portOf(silent);
  const port = portOf(web);
  try {
    assert.ok((await vitals.check({ kind: 'tcp', port: quiet }, LOOPBACK, me, 20_000)).ok);
    assert.ok((await vitals.check({ kind: 'http', port, path: '/ok' }, LOOPBACK, me, 20_000)).ok);
    const bad = await vitals.check({ kind: 'http', port, path: '/' }, LOOPBACK, me, 20_000);
    assert.equal(bad, { ok: false, detail: `GET / on port ${port}: status 503` });
    const slow = await vitals.check({ kind: 'http', port: quiet, path: '/' }, LOOPBACK, me, 200);
    assert.match(slow.detail, 'no answer within 200 ms');
  } finally {
    silent.close();
    web.closeAllConnections();
    web.close();
  }
  const refused = await vitals.check({ kind: 'tcp', port: quiet }, LOOPBACK, me, 20_000);
  assert.not(refused.ok);
  assert.match(refused.detail, /ECONNREFUSED|refused/);
});

test('Vitals.check command: runs inside the namespace, tells status and time-out, and is refused unless allowed', async () => {
  try {
    await hostRunner.run(['ip', 'netns', 'add', netns]);
    const home: Home = { kind: 'netns', name: netns };
    const links = await vitals.check(
      {
        kind: 'command',
        command: [
          'sh',
          '-c',
          `readlink /proc/self/ns/net | grep -qv "$(readlink /proc/${process.pid}/ns/net)"`,
        ],
      },
      LOOPBACK,
      home,
      20_000,
    );
    assert.ok(links.ok, links.detail);
    const status = await vitals.check(
      { kind: 'command', command: ['sh', '-c', 'echo no luck >&2; exit 7'] },
      LOOPBACK,
      home,
      20_000,
    );
    assert.equal(status, { ok: false, detail: 'sh exits 7: no luck' });
    const slow = await vitals.check({ kind: 'command', command: ['sleep', '30'] }, LOOPBACK, home, 300);
    assert.equal(slow, { ok: false, detail: 'sleep: not done within 300 ms' });
    const inside = await vitals.check({ kind: 'command', command: ['true'] }, LOOPBACK, me, 20_000);
    assert.ok(inside.ok, inside.detail);
    const strict = hostVitals({ runner: hostRunner, commands: false });
    assert.match(
      (await strict.check({ kind: 'command', command: ['true'] }, LOOPBACK, home, 100)).detail,
      '--health-commands on',
    );
  } finally {
    await hostRunner.run(['ip', 'netns', 'del', netns]);
  }
});

test('Vitals.check command: what it leaves behind is not waited for and does not stay; a late one ends with its children', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'edgeway-check-'));
  const file = join(dir, 'pid');
  const child = async (): Promise<Home> => {
    await until('it wrote its pid', () => existsSync(file) && readFileSync(file, 'utf8').endsWith('\n'));
    return { kind: 'pid', pid: Number(readFileSync(file, 'utf8')) };
  };
  const check = (script: string, timeoutMs: number): Promise<{ ok: boolean; detail: string }> =>
    vitals.check({ kind: 'command', command: ['sh', '-c', script] }, LOOPBACK, me, timeoutMs);
  try {
    const left = await check(`sleep 300 & echo $! > ${file}; exit 0`, 60_000);
    assert.equal(left, { ok: true, detail: 'sh exits 0' });
    const first = await child();
    await until('it does not stay', () => vitals.identify(first) === undefined);
    rmSync(file);
    const late = check(`sleep 300 & echo $! > ${file}; wait`, 3_000);
    const second = await child();
    assert.equal(await late, { ok: false, detail: 'sh: not done within 3000 ms' });
    await until('the child ends too', () => vitals.identify(second) === undefined);
    const bad = await vitals.check({ kind: 'http', port: 1, path: '/a b' }, LOOPBACK, me, 20_000);
    assert.not(bad.ok);
  } finally {
    rmSync(dir, { recursive: true });
  }
});

test('Vitals.load: the host`s own, or what a file says', async () => {
  vitals.load();
  await until('two samples', () => vitals.load() !== undefined);
  assert.ok(vitals.load()! >= 0);
  const dir = mkdtempSync(join(tmpdir(), 'edgeway-load-'));
  try {
    const loadFile = join(dir, 'load');
    const given = hostVitals({ runner: hostRunner, commands: false, loadFile });
    writeFileSync(loadFile, '3.5\n');
    assert.is(given.load(), 3.5);
    writeFileSync(loadFile, '0.25');
    assert.is(given.load(), 0.25);
  } finally {
    rmSync(dir, { recursive: true });
  }
});

test.run();
