// The one command to remember: types, lint and format, then every test under both runtimes; ends with one line
// that counts all of it.
//   ./scripts/test [--runtime node|deno] [FILTER ...]       with a filter only the tests that match
import { spawnSync } from 'node:child_process';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { runTests } from './test.ts';

const root = fileURLToPath(new URL('..', import.meta.url));
const deno = process.env['DENO'] ?? 'deno';

/** Checks that are programs of their own; each counts as one test. */
const CHECKS: readonly { readonly name: string; readonly argv: readonly string[] }[] = [
  {
    name: 'types (tsc, the Node side)',
    argv: [process.execPath, 'node_modules/typescript/bin/tsc', '--noEmit'],
  },
  {
    name: 'types (deno check, the Deno side)',
    // The entries; the worker is one, because the loop names it by its URL only.
    argv: [
      ...[deno, 'check', '--quiet', 'edge/main.ts', 'edge/io/packet_loop_worker.ts', 'edge/kudo/mod.ts'],
      ...['coordinator/main.ts', 'scripts/demo.ts', 'scripts/check.ts'],
    ],
  },
  {
    name: 'lint and format (biome)',
    argv: [process.execPath, 'node_modules/@biomejs/biome/bin/biome', 'check', '--error-on-warnings', '.'],
  },
  {
    name: 'bundle (tsup)',
    argv: [
      process.execPath,
      'node_modules/tsup/dist/cli-default.js',
      '--config',
      'scripts/tsup.config.ts',
      '--silent',
    ],
  },
];

let passed = 0;
let failed = 0;
const arguments_ = process.argv.slice(2);
if (arguments_.length === 0)
  for (const { name, argv } of CHECKS) {
    const started = performance.now();
    const [command, ...args] = argv;
    const { status, stdout, stderr } = spawnSync(command!, args, { cwd: root, encoding: 'utf8' });
    console.log(
      `${status === 0 ? 'ok  ' : 'FAIL'} ${name}  ${((performance.now() - started) / 1000).toFixed(1)} s`,
    );
    if (status === 0) passed++;
    else {
      failed++;
      console.log(`${stdout}${stderr}`.replace(/^/gm, '     | '));
    }
  }
const tests = await runTests(arguments_, import.meta.url);
passed += tests.passed;
failed += tests.failed;
console.log(`\n${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 ? 0 : 1;
