import { encode } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { countsFit, DNS } from '../../../src/wire/dns.ts';

test('countsFit takes every message that dns-packet makes, down to the smallest records', () => {
  const root = { type: 'NULL' as const, name: '.', ttl: 0, data: Buffer.alloc(0) };
  for (const [questions, answers] of [
    [0, 0],
    [1, 0],
    [3, 7],
  ] as const) {
    const message = encode({
      type: 'query',
      questions: Array.from({ length: questions }, () => ({ type: 'A' as const, name: '.' })),
      answers: Array.from({ length: answers }, () => root),
      additionals: [root],
    });
    assert.ok(countsFit(message));
    assert.is(message.length, 12 + 5 * questions + 11 * (answers + 1));
    for (let length = 0; length < message.length; length++)
      assert.not(countsFit(message.subarray(0, length)), `cut at ${length}`);
  }
});

test('countsFit refuses counts that the message cannot hold, in each section', () => {
  for (const at of [DNS.questions, DNS.answers, DNS.authorities, DNS.additionals]) {
    const message = Buffer.alloc(512);
    message.writeUInt16BE(0xffff, at);
    assert.not(countsFit(message));
    message.writeUInt16BE(2, at);
    assert.ok(countsFit(message));
  }
});

test.run();
