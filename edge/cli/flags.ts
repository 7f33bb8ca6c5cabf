// What citty lets pass and we do not: flags that a command does not have, flags without their value, arguments too many.
// Only looks; the values are citty's to read.
import { type ParseArgsConfig, parseArgs } from 'node:util';
import type { ArgsDef, CommandDef, Resolvable } from 'citty';
import { distance } from '../../src/explain.ts';

/** Edits that still make a known flag the one that was meant. */
const EDITS_MAX = 2;
const BUILT_IN = ['--help', '-h', '--version', '-v'];

// biome-ignore lint/suspicious/noExplicitAny: citty's own type of a command whose arguments are not known here
type AnyCommand = CommandDef<any>;

/** What is wrong with the command line of `main`, in one sentence; undefined when citty may have it. */
export async function complaint(main: AnyCommand, argv: readonly string[]): Promise<string | undefined> {
  if (argv.some((argument) => BUILT_IN.includes(argument))) return undefined;
  let command = main;
  for (const [index, word] of argv.entries()) {
    const subCommands = await value(command.subCommands);
    if (subCommands === undefined) return judge((await value(command.args)) ?? {}, argv.slice(index));
    const next = subCommands[word];
    if (next === undefined)
      return word.startsWith('-') ? `${word}: no flag comes before the command` : undefined;
    command = await value(next);
  }
  return undefined;
}

function judge(args: ArgsDef, argv: readonly string[]): string | undefined {
  const flags = Object.entries(args).filter(([, { type }]) => type !== 'positional');
  const options: NonNullable<ParseArgsConfig['options']> = Object.fromEntries(
    flags.map(([name, arg]) => {
      const short = 'alias' in arg && typeof arg.alias === 'string' ? { short: arg.alias } : {};
      return [name, { type: 'string', ...short }];
    }),
  );
  const { tokens } = parseArgs({
    args: [...argv],
    options,
    strict: false,
    allowPositionals: true,
    tokens: true,
  });
  let positionals = Object.keys(args).length - flags.length;
  for (const token of tokens) {
    if (token.kind === 'positional' && --positionals < 0) return `${token.value}: one argument too many`;
    if (token.kind !== 'option') continue;
    if (options[token.name] === undefined) {
      const close = Object.keys(options).find((name) => distance(name, token.name) <= EDITS_MAX);
      return `${token.rawName}: there is no such flag${close === undefined ? '' : `; --${close}?`}`;
    }
    // A value that looks like a flag is one that was forgotten; written after "=" it is meant.
    if (token.value === undefined || (!token.inlineValue && /^-./.test(token.value)))
      return `${token.rawName}: its value is missing`;
  }
  return undefined;
}

async function value<T>(resolvable: Resolvable<T>): Promise<T> {
  return typeof resolvable === 'function' ? await (resolvable as () => T | Promise<T>)() : await resolvable;
}
