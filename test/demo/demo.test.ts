// The README's first command, as a stranger runs it; then the machine is compared with what it was before.

import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { run, until } from '../../scripts/lab.ts';

const runtime = process.versions['deno'] === undefined ? 'node' : 'deno';
const root = fileURLToPath(new URL('../..', import.meta.url));
const SERVICE = 'shop.prod.cart.v1';

/** What the demo could leave behind: namespaces, links, rules, mounts, files, processes. Ours carry `ewd`. */
async function traces(): Promise<Set<string>> {
  const lines = async (argv: string[]): Promise<string[]> => (await run(argv)).stdout.split('\n');
  const inside = (directory: string): string[] => (existsSync(directory) ? readdirSync(directory) : []);
  const listed = [
    ...(await lines(['ip', 'netns', 'list'])),
    ...(await lines(['ip', '-o', 'link'])),
    ...(await lines(['nft', 'list', 'tables'])),
    ...readFileSync('/proc/self/mounts', 'utf8').split('\n'),
    ...['/tmp', '/run/edgeway-lab', '/etc/netns'].flatMap(inside),
    ...(await lines(['ps', '-eo', 'args'])),
  ];
  return new Set([
    ...listed.filter((line) => /\bewd\d|edgeway-lab-ewd|edgeway0|edgeway-tun/.test(line)),
    ...['/run/edgeway-lab', '/etc/netns'].filter(existsSync),
    // Engines and what they start name no lab. Those that ended and wait for init to collect them do not count.
    ...(await lines(['ps', '-eo', 'pid,comm,stat'])).filter((line) =>
      /(dockerd|containerd).* [^Z]/.test(line),
    ),
  ]);
}

async function assertNothingNew(before: Set<string>): Promise<void> {
  assert.equal(
    [...(await traces())].filter((trace) => !before.has(trace)),
    [],
  );
}

test('the demo: 60 answers over three instances, each by its own name, failover, and nothing left behind', async () => {
  const before = await traces();
  const file = join(tmpdir(), `edgeway-demo-${process.pid}.json`);
  const { status, stdout, stderr } = await run(['./scripts/demo', '--runtime', runtime, '--json', file], {
    timeoutMs: 120_000,
  });
  assert.is(status, 0, `${stdout}\n${stderr}`);
  const seen = JSON.parse(readFileSync(file, 'utf8'));
  rmSync(file);
  assert.equal(
    Object.keys(seen.answers).sort(),
    ['cart-1', 'cart-2', 'cart-3'],
    JSON.stringify(seen.answers),
  );
  assert.is(
    Object.values<number>(seen.answers).reduce((a, b) => a + b),
    60,
  );
  for (const count of Object.values<number>(seen.answers))
    assert.ok(count >= 12, JSON.stringify(seen.answers));
  for (const instance of [1, 2, 3])
    assert.is(seen.fixed[`${SERVICE}.${instance}.fixed.local`], `cart-${instance}`);
  assert.equal(
    Object.keys(seen.after_failover).sort(),
    ['cart-1', 'cart-2'],
    JSON.stringify(seen.after_failover),
  );
  assert.match(seen.runtime, runtime);
  for (const key of ['resolve_ms', 'first_request_ms', 'failover_ms']) assert.type(seen[key], 'number', key);
  // What the issue promises of the demo, once everything is installed.
  assert.ok(seen.total_s < 90, `${seen.total_s} s`);
  assert.ok(seen.versions.etcd && seen.versions.runtime, JSON.stringify(seen.versions));
  await assertNothingNew(before);
});

/** What is on the screen when Ctrl-C comes: each is another part of the lab that is only half there. */
const INTERRUPTED_AT = ['network:', 'etcd\n', 'agent n2', 'Docker Engine', '60 requests'];
for (const screen of INTERRUPTED_AT)
  test(`the demo: Ctrl-C at "${screen.trim()}" leaves nothing behind`, async () => {
    const before = await traces();
    const child = spawn('./scripts/demo', ['--runtime', runtime], {
      cwd: root,
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    });
    try {
      let output = '';
      for (const stream of [child.stdout, child.stderr])
        stream.on('data', (chunk: Buffer) => {
          output += chunk.toString();
        });
      const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
      await until(screen, 60_000, () => (output.includes(screen) ? true : undefined));
      process.kill(-child.pid!, 'SIGINT'); // as a terminal does: to the whole group
      assert.is(await ended, 130, output);
    } finally {
      // A demo that is still there has an end of its own: it cleans up.
      if (child.exitCode === null && child.signalCode === null) process.kill(-child.pid!, 'SIGTERM');
    }
    await assertNothingNew(before);
  });

test('the demo: a failure half-way says what failed and leaves nothing behind', async () => {
  const before = await traces();
  const bin = mkdtempSync(join(tmpdir(), 'edgeway-broken-'));
  try {
    // The client's resolver is broken: everything is built and deployed by then.
    writeFileSync(join(bin, 'getent'), '#!/bin/sh\nexit 2\n', { mode: 0o755 });
    const { status, stderr } = await run(
      ['env', `PATH=${bin}:${process.env['PATH']}`, './scripts/demo', '--runtime', runtime],
      { timeoutMs: 120_000 },
    );
    assert.is(status, 1, stderr);
    assert.match(stderr, /demo failed: getent hosts .* status 2/);
  } finally {
    rmSync(bin, { recursive: true });
  }
  await assertNothingNew(before);
});

test.run();
