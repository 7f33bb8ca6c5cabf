// Golden files: text that a test's subject must produce, below test/golden/. The first line says where it came from.
// With EDGEWAY_GOLDEN=write they are rewritten instead of compared: read the diff, commit only what you can explain.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import * as assert from 'uvu/assert';

export function golden(name: string, text: string): void {
  const file = join(import.meta.dirname!, '../golden', name);
  const held = readFileSync(file, 'utf8');
  const [origin = ''] = held.split('\n', 1);
  if (process.env['EDGEWAY_GOLDEN'] === 'write') writeFileSync(file, `${origin}\n${text}`);
  else assert.is(text, held.slice(origin.length + 1), name);
}
