// The measurements, by name; without one, the data plane's.
//   npm run bench -- [proxy|dns|…] [--quick] [--json FILE] [options of that bench] | --help
import { existsSync, readdirSync } from 'node:fs';
import process from 'node:process';
import { help, refuseArguments, usageOf } from './arguments.ts';

const urlOf = (file: string): string => new URL(file, import.meta.url).href;

/** How the measurements are called: those of bench_*.ts that are one. */
function measurements(): string[] {
  return readdirSync(new URL('.', import.meta.url))
    .filter((file) => /^bench_.*\.ts$/.test(file))
    .flatMap((file) => usageOf(urlOf(file)));
}

const [first] = process.argv.slice(2);
if (first === '--help' || first === '-h') {
  console.log(measurements().join('\n'));
  process.exit(0);
}
const named = first !== undefined && !first.startsWith('-');
const name = named ? first : 'proxy';
const script = urlOf(`bench_${name.replaceAll('-', '_')}.ts`);
if (!/^[a-z-]+$/.test(name) || !existsSync(new URL(script))) {
  console.error(`no measurement is called "${name}"; there are:\n${measurements().join('\n')}`);
  process.exit(2);
}
// Each reads its own arguments.
if (named) process.argv.splice(2, 1);
help(script, process.argv.slice(2));
try {
  await import(script);
} catch (error) {
  refuseArguments(script, error);
}
