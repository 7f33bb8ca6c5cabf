// What the command line prints: a table for people, JSON for programs.
import process from 'node:process';
import { toEdgewayError } from '../../src/error.ts';

export type Row = readonly string[];

/** Columns padded to their widest cell; the last one is left as it is. */
export function table(header: Row, rows: readonly Row[]): string {
  const all = [header, ...rows];
  const widths = header.map((_, column) => Math.max(...all.map((row) => row[column]?.length ?? 0)));
  return all
    .map((row) =>
      row
        .map((cell, column) => (column === row.length - 1 ? cell : cell.padEnd(widths[column]!)))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

export function print(text: string): void {
  process.stdout.write(`${text}\n`);
}

/** For the person in front of the screen, not for the program behind a pipe. */
export function note(text: string): void {
  process.stderr.write(`edgeway: ${text}\n`);
}

export function printJson(value: unknown): void {
  print(JSON.stringify(value, undefined, 2));
}

/** Runs a command; what it throws becomes one line on standard error and exit status 1. */
export async function guarded(work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (thrown) {
    const error = toEdgewayError(thrown);
    process.stderr.write(`edgeway: ${error.message} (${error.code})\n`);
    if (error.code === 'internal' && error.cause instanceof Error)
      process.stderr.write(`${error.cause.stack}\n`);
    process.exitCode = 1;
  }
}
