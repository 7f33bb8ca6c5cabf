// Runs the host's own programs by argument vector, never through a shell's parsing of our data. It refuses to wait
// for ever: a program that outlives the limit is killed with all that it started and reported like one that failed, and
// what a program leaves behind when it ends is not waited for.
import { spawn } from 'node:child_process';
import process from 'node:process';
import { COMMAND_DRAIN_MS, COMMAND_LIMIT_MS, COMMAND_OUTPUT_MAX } from '../../src/limits.ts';
import type { CommandResult, Runner } from '../ports.ts';

/** `ip`, `nft` and `iptables` live in sbin, which an ordinary user's PATH lacks; LC_ALL keeps messages in English. */
const ENVIRONMENT = {
  ...process.env,
  LC_ALL: 'C',
  PATH: `${process.env['PATH'] ?? '/usr/bin:/bin'}:/usr/local/sbin:/usr/sbin:/sbin`,
};

/** Status as a shell reports it: 127 for a program that is not installed, 124 for one that was ended by the limit. */
export const hostRunner: Runner = { run };

function run(
  argv: readonly string[],
  stdin?: string,
  limitMs: number = COMMAND_LIMIT_MS,
): Promise<CommandResult> {
  const [program = '', ...args] = argv;
  return new Promise((resolve) => {
    const child = spawn(program, args, {
      env: ENVIRONMENT,
      // A process group of its own, so that it ends as a whole.
      detached: true,
      stdio: [stdin === undefined ? 'ignore' : 'pipe', 'pipe', 'pipe'],
    });
    let stdout = '';
    let stderr = '';
    let late = false;
    const killGroup = (): void => {
      try {
        if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
      } catch {} // it is gone already
    };
    const limit = setTimeout(() => {
      late = true;
      killGroup();
    }, limitMs);
    let drain: ReturnType<typeof setTimeout> | undefined;
    const done = (status: number, message = ''): void => {
      clearTimeout(limit);
      clearTimeout(drain);
      resolve({ status, stdout, stderr: stderr + message });
    };
    child.stdout?.setEncoding('utf8').on('data', (text: string) => {
      if (stdout.length < COMMAND_OUTPUT_MAX) stdout += text;
    });
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      if (stderr.length < COMMAND_OUTPUT_MAX) stderr += text;
    });
    child.once('error', (error: NodeJS.ErrnoException) =>
      error.code === 'ENOENT'
        ? done(127, `${program} is not installed`)
        : done(126, `${program}: ${error.message}`),
    );
    const ended = (status: number | null, signal: NodeJS.Signals | null): void => {
      if (late) done(124, `${program} did not end within ${limitMs / 1000} s`);
      else done(status ?? 128, signal === null ? '' : `${program} was ended by ${signal}`);
    };
    child.once('close', ended);
    child.once('exit', (status, signal) => {
      clearTimeout(limit);
      // 'close' follows at once, unless somebody who was started by the program still holds its output.
      drain = setTimeout(() => {
        killGroup();
        child.stdout?.destroy();
        child.stderr?.destroy();
        ended(status, signal);
      }, COMMAND_DRAIN_MS);
    });
    // A program that ends before it has read everything closes the pipe; its status says why.
    child.stdin?.on('error', () => {});
    child.stdin?.end(stdin);
  });
}
