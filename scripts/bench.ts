// The measurements, by name; without one, the data plane's.
//   npm run bench -- [proxy|dns|…] [--quick] [--json FILE] [options of that bench]
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { pathToFileURL } from 'node:url';

const [first] = process.argv.slice(2);
const named = first !== undefined && !first.startsWith('-');
const name = named ? first : 'proxy';
const file = join(import.meta.dirname, `bench_${name.replaceAll('-', '_')}.ts`);
if (!/^[a-z-]+$/.test(name) || !existsSync(file)) {
  console.error(`no measurement is called "${name}": see scripts/bench_*.ts`);
  process.exit(2);
}
// Each reads its own arguments.
if (named) process.argv.splice(2, 1);
await import(pathToFileURL(file).href);
