import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { printPacket } from '../../src/wire/print.ts';

test('printPacket gives one line for any bytes, and never throws', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 120 }), fc.boolean(), (bytes, looksLikeIpv4) => {
      if (looksLikeIpv4 && bytes.length > 9) {
        bytes[0] = 0x45;
        bytes[9] = [1, 6, 17][bytes[1]! % 3]!;
      }
      const line = printPacket(bytes);
      assert.ok(line.length > 0);
      assert.not.match(line, '\n');
    }),
    { numRuns: 5_000, seed: 3 },
  );
});

test.run();
