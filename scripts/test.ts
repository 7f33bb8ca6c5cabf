// Runs every uvu file under Node and under Deno, each in a process of its own, and adds up what they counted.
// uvu itself exits 0 on a file without tests and has no time limit; here both are failures.
//   scripts/run scripts/test.ts [--runtime node|deno] [--jobs N] [FILTER ...]    FILTER: part of a file's path
// A test that needs the machine to itself (real/) runs alone, after the others.
import { spawn } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { join, relative } from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { stripVTControlCharacters } from 'node:util';
import { readArguments, refuse } from './arguments.ts';
import { Lab } from './lab.ts';

const root = fileURLToPath(new URL('..', import.meta.url));
const FILE_LIMIT_MS = 300_000;

interface Outcome {
  readonly passed: number;
  readonly failed: number;
  readonly output: string;
  readonly durationMs: number;
}

const RUNTIMES: Record<string, readonly [string, ...string[]]> = {
  node: [process.execPath, '--disable-warning=ExperimentalWarning'],
  deno: [process.env['DENO'] ?? 'deno', 'run', '-A', '--quiet'],
};

const alone = (file: string): boolean => /(^|\/)(real|demo)\//.test(file);

function testFiles(filters: readonly string[]): string[] {
  return readdirSync(join(root, 'test'), { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith('.test.ts'))
    .map((file) => relative(root, join(root, 'test', file)))
    .filter((file) => filters.length === 0 || filters.some((part) => file.includes(part)))
    .sort();
}

function run(runtime: string, file: string): Promise<Outcome> {
  const [command, ...args] = RUNTIMES[runtime]!;
  const started = performance.now();
  return new Promise((resolve) => {
    const child = spawn(command, [...args, file], {
      cwd: root,
      env: { ...process.env, FORCE_COLOR: '0', NO_COLOR: '1' },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let output = '';
    const take = (chunk: Buffer): void => {
      output += chunk.toString();
    };
    child.stdout.on('data', take);
    child.stderr.on('data', take);
    let timedOut = false;
    const limit = setTimeout(() => {
      timedOut = true;
      child.kill('SIGKILL');
    }, FILE_LIMIT_MS);
    child.on('close', (status) => {
      clearTimeout(limit);
      const plain = stripVTControlCharacters(output);
      const count = (word: string): number =>
        Number(new RegExp(`^\\s*${word}:\\s+(\\d+)`, 'm').exec(plain)?.[1] ?? 0);
      const total = count('Total');
      const passed = count('Passed');
      let failed = total - passed;
      if (timedOut) output += `\ntest runner: ended after ${FILE_LIMIT_MS / 1000} s`;
      if (total === 0 && status === 0) output += '\ntest runner: the file ran no test';
      if (failed === 0 && (status !== 0 || total === 0)) failed = 1;
      resolve({ passed, failed, output, durationMs: performance.now() - started });
    });
  });
}

/** Removes the laboratories of test files that were killed, now or in an earlier run. */
async function sweep(): Promise<void> {
  for (const lab of await Lab.sweepAbandoned()) console.log(`     removed lab ${lab}: its owner was killed`);
}

/**
 * Runs what the arguments select; prints one line a file, and the output of those that failed. `script` is whose
 * arguments they are.
 */
export async function runTests(
  args: readonly string[],
  script: string,
): Promise<{ passed: number; failed: number }> {
  const { values, positionals } = readArguments(script, {
    args: [...args],
    allowPositionals: true,
    options: { runtime: { type: 'string' }, jobs: { type: 'string', default: '2' } },
  });
  if (values.runtime !== undefined && !(values.runtime in RUNTIMES))
    refuse(script, `--runtime ${values.runtime}: must be node or deno`);
  const runtimes = values.runtime === undefined ? Object.keys(RUNTIMES) : [values.runtime];
  const work = testFiles(positionals).flatMap((file) => runtimes.map((runtime) => ({ file, runtime })));
  let passed = 0;
  let failed = 0;

  async function drain(queue: { file: string; runtime: string }[]): Promise<void> {
    for (let next = queue.shift(); next !== undefined; next = queue.shift()) {
      const outcome = await run(next.runtime, next.file);
      passed += outcome.passed;
      failed += outcome.failed;
      const mark = outcome.failed === 0 ? 'ok  ' : 'FAIL';
      console.log(
        `${mark} ${next.runtime.padEnd(4)} ${next.file}  ${outcome.passed} passed, ${outcome.failed} failed, ${(outcome.durationMs / 1000).toFixed(1)} s`,
      );
      if (outcome.failed > 0) {
        console.log(outcome.output.replace(/^/gm, '     | '));
        await sweep();
      }
    }
  }

  await sweep();
  const together = work.filter(({ file }) => !alone(file));
  await Promise.all(Array.from({ length: Number(values.jobs) }, () => drain(together)));
  await drain(work.filter(({ file }) => alone(file)));
  if (work.length === 0) {
    console.log('no test file matches');
    failed++;
  }
  return { passed, failed };
}

if (process.argv[1] === import.meta.filename) {
  const { passed, failed } = await runTests(process.argv.slice(2), import.meta.url);
  console.log(`\n${passed} passed, ${failed} failed`);
  process.exitCode = failed === 0 ? 0 : 1;
}
