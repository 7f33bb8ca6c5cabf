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
async function traces(): Promise<string[]> {
  const lines = async (argv: string[]): Promise<string[]> => (await run(argv)).stdout.split('\n');
  const listed = [
    ...(await lines(['ip', 'netns', 'list'])),
    ...(await lines(['ip', '-o', 'link'])),
    ...(await lines(['nft', 'list', 'tables'])),
    ...readFileSync('/proc/self/mounts', 'utf8').split('\n'),
    ...readdirSync('/tmp'),
    ...(existsSync('/run/edgeway-lab') ? readdirSync('/run/edgeway-lab') : []),
    ...(existsSync('/etc/netns') ? readdirSync('/etc/netns') : []),
    ...(await lines(['ps', '-eo', 'args'])),
  ];
  return listed.filter((line) => /\bewd\d|edgeway-lab-ewd|edgeway0|edgeway-tun/.test(line));
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
  assert.ok(seen.versions.etcd && seen.versions.runtime, JSON.stringify(seen.versions));
  assert.equal(await traces(), before);
});

test('the demo: Ctrl-C in the middle leaves nothing behind', async () => {
  const before = await traces();
  const child = spawn('./scripts/demo', ['--runtime', runtime], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  });
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => {
    output += chunk.toString();
  });
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve));
  await until('agents start', 60_000, () => (output.includes('agent n2') ? true : undefined));
  process.kill(-child.pid!, 'SIGINT'); // as a terminal does: to the whole group
  assert.is(await ended, 130, output);
  assert.equal(await traces(), before);
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
  assert.equal(await traces(), before);
});

test.run();
