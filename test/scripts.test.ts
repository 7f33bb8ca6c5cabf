// The scripts' arguments: --help says how each is called, and a wrong one is a single line, not a stack trace.
import { spawnSync } from 'node:child_process';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { runtimeArgv } from '../scripts/proxy_lab.ts';

const runtime = 'deno' in process.versions ? 'deno' : 'node';

/** What a script prints, and its status. */
function call(
  script: string,
  ...args: readonly string[]
): { status: number | null; out: string; err: string } {
  const file = fileURLToPath(new URL(`../scripts/${script}.ts`, import.meta.url));
  const [command, ...rest] = [...runtimeArgv(runtime), file, ...args];
  const { status, stdout, stderr } = spawnSync(command!, rest, { encoding: 'utf8' });
  return { status, out: stdout, err: stderr };
}

/** Each script as it is called, and an option that it has. */
const SCRIPTS: readonly (readonly [string, readonly string[], string])[] = [
  ['bench', ['agents'], '--runtime'],
  ['bench', ['dns'], '--seconds'],
  ['bench', ['north-south'], '--cycles'],
  ['bench', ['policies'], '--only'],
  ['bench', ['proxy'], '--repeat'],
  ['scale', [], '--agents'],
  ['demo', [], '--keep'],
  ['lab', [], '--nodes'],
  ['test', [], '--jobs'],
  ['check', [], '--runtime'],
];

for (const [script, args, option] of SCRIPTS) {
  const name = [script, ...args].join(' ');

  test(`${name} --help names its options`, () => {
    const { status, out, err } = call(script, ...args, '--help');
    assert.is(status, 0, err);
    assert.match(out, option);
    assert.is(err, '');
  });

  test(`${name}: a wrong option is one line that names it and what there is`, () => {
    const { status, out, err } = call(script, ...args, '--wrong');
    assert.is(status, 2, err);
    assert.is(out, '');
    assert.match(err, /^.*'--wrong'; usage: .*\n$/);
    assert.match(err, option);
  });
}

test('bench --help lists the measurements, and so does a name that is none', () => {
  const { status, out } = call('bench', '--help');
  assert.is(status, 0);
  for (const name of ['dns', 'north-south', 'policies', '--repeat']) assert.match(out, name);
  const unknown = call('bench', 'wrong');
  assert.is(unknown.status, 2);
  assert.match(unknown.err, out.trimEnd());
});

test('an option without its value, and one whose value is none of those that there are', () => {
  const missing = call('bench', 'dns', '--json');
  assert.is(missing.status, 2);
  assert.match(missing.err, /^Option '--json <value>' argument missing; usage: .*\n$/);
  const other = call('test', '--runtime', 'other');
  assert.is(other.status, 2);
  assert.match(other.err, /^--runtime other: must be node or deno; usage: .*\n$/);
});

test.run();
