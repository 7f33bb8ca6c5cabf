// Arguments of the scripts: what --help prints, and what is said of an argument that is wrong. A script's usage is in
// the comment at its head, and nowhere else; this reads it there. A script is named by its URL.
import { readFileSync } from 'node:fs';
import process from 'node:process';
import { type ParseArgsConfig, parseArgs } from 'node:util';

/** The comment at the head of a script, without its slashes. */
function headOf(script: string): string[] {
  const lines = readFileSync(new URL(script), 'utf8').split('\n');
  const end = lines.findIndex((line) => !line.startsWith('//'));
  return lines.slice(0, end).map((line) => line.replace(/^\/\/ ?/, ''));
}

/** How the script is called: the lines of its head that name options. */
export function usageOf(script: string): string[] {
  return headOf(script).filter((line) => /^ .*\[--/.test(line));
}

/** Ends the process when help is asked for. */
export function help(script: string, args: readonly string[]): void {
  if (!args.includes('--help') && !args.includes('-h')) return;
  console.log(headOf(script).join('\n'));
  process.exit(0);
}

/** Ends the process with status 2 and one line that says what is wrong and what there is. */
export function refuse(script: string, what: string): never {
  const usage = usageOf(script).map((line) => line.trim());
  console.error(`${what}; usage: ${usage.join(' ')}`);
  process.exit(2);
}

/** The same for what parseArgs threw; anything else is thrown again. */
export function refuseArguments(script: string, error: unknown): never {
  const { code, message } = error as { code?: unknown; message?: string };
  if (!String(code).startsWith('ERR_PARSE_ARGS_')) throw error;
  // Further sentences are advice on positional arguments, which hardly any script takes.
  refuse(script, message!.split(/\.\s/)[0]!);
}

/** parseArgs for a script. */
export function readArguments<T extends ParseArgsConfig>(
  script: string,
  config: T,
): ReturnType<typeof parseArgs<T>> {
  help(script, config.args ?? process.argv.slice(2));
  try {
    return parseArgs(config);
  } catch (error) {
    refuseArguments(script, error);
  }
}
