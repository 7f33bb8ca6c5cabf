import { encode } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { countsFit, DNS, questionLabels } from '../../../src/wire/dns.ts';

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

test('questionLabels counts labels, not dots, through pointers, and reads no further than it can', () => {
  const header = Buffer.alloc(DNS.size);
  const type = Buffer.from([0, 1, 0, 1]);
  const name = (...labels: string[]): Buffer =>
    Buffer.concat(labels.map((label) => Buffer.concat([Buffer.from([label.length]), Buffer.from(label)])));
  const end = Buffer.from([0]);
  const message = Buffer.concat([
    ...[header, name('cart', 'closest', 'local'), end, type], // at 12
    ...[name('a.cart'), Buffer.from([0xc0, 17]), type], // … closest.local
    ...[end, type, name('cart.closest', 'local'), end, type],
  ]);
  message.writeUInt16BE(4, DNS.questions);
  assert.equal(questionLabels(message), [3, 3, 0, 2]);
  for (let length = 0; length < message.length; length++)
    assert.ok(questionLabels(message.subarray(0, length)).length <= 4);
  const loop = Buffer.concat([header, Buffer.from([0xc0, 12]), type]);
  loop.writeUInt16BE(0xffff, DNS.questions);
  assert.equal(questionLabels(loop), []);
  const decoy = encode({ type: 'query', questions: [{ type: 'A', name: 'a.b' }] });
  decoy[DNS.size] = 3; // the length of "a" swallows the dot's place
  decoy[DNS.size + 2] = 0x2e;
  assert.equal(questionLabels(decoy), [1]);
});

test.run();
