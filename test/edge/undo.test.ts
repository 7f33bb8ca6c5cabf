import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Undo } from '../../edge/undo.ts';
import { SILENT } from '../../src/log.ts';

test('Undo.guard takes steps back newest first, once, and throws what was thrown', async () => {
  const seen: string[] = [];
  const work = Undo.guard(SILENT, async (undo) => {
    undo.push('one', async () => {
      seen.push('one');
    });
    undo.push('two', async () => {
      seen.push('two');
    });
    throw new Error('third step');
  });
  await work.then(
    () => assert.unreachable(),
    (error: Error) => assert.is(error.message, 'third step'),
  );
  assert.equal(seen, ['two', 'one']);
});

test('Undo.guard goes on when a step cannot be taken back, and logs it', async () => {
  const seen: string[] = [];
  const log = {
    ...SILENT,
    warn: ({ name }: { name?: string }) => {
      seen.push(`warned of ${name}`);
    },
  };
  await Undo.guard(log, async (undo) => {
    undo.push('one', async () => {
      seen.push('one');
    });
    undo.push('two', () => Promise.reject(new Error('stuck')));
    throw new Error('x');
  }).catch(() => {});
  assert.equal(seen, ['warned of two', 'one']);
});

test('Undo.guard keeps everything when the work succeeds', async () => {
  const result = await Undo.guard(SILENT, async (undo) => {
    undo.push('one', () => Promise.reject(new Error('must not run')));
    return 7;
  });
  assert.is(result, 7);
});

test.run();
