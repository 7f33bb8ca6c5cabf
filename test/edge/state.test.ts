import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { decodeState, encodeState, type SavedState } from '../../edge/state.ts';
import { ipv4, parseCidr } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import { parseServiceId } from '../../src/name.ts';

const STATE: SavedState = {
  subnet: unwrap(parseCidr('172.16.0.64/26')),
  hosted: [
    {
      service: unwrap(parseServiceId('a.b.c.d')),
      instance: 2,
      target: { kind: 'container', container: 'cart' },
      namespaceIp: ipv4(0xac100042),
      instanceIp: ipv4(0xac1e0001),
    },
    {
      service: unwrap(parseServiceId('a.b.c.d')),
      instance: 3,
      target: { kind: 'netns', name: 'ns' },
      namespaceIp: ipv4(0xac100043),
      instanceIp: ipv4(0xac1e0002),
    },
    {
      service: unwrap(parseServiceId('a.b.c.d')),
      instance: 4,
      target: { kind: 'pid', pid: 77 },
      identity: '123456',
      namespaceIp: ipv4(0xac100044),
      instanceIp: ipv4(0xac1e0003),
    },
  ],
};

test('encodeState and decodeState are inverses, and a person can read the addresses', () => {
  const text = encodeState(STATE);
  assert.match(text, '"172.16.0.66"');
  assert.equal(unwrap(decodeState(text)), STATE);
});

test('decodeState: every cut and every broken field is an error that says what, never an exception', () => {
  const text = encodeState(STATE);
  for (let length = 0; length < text.trimEnd().length; length++)
    assert.not(decodeState(text.slice(0, length)).ok);
  const broken = (from: string, to: string): string => {
    const result = decodeState(text.replace(from, to));
    return result.ok ? 'accepted' : result.error.message;
  };
  assert.match(broken('"v": 1', '"v": 2'), 'v:');
  assert.match(broken('172.16.0.64/26', '172.16.0.65/26'), 'host bits');
  assert.match(broken('"instance": 2', '"instance": 0'), 'hosted.0.instance');
  assert.match(broken('"container",', '"unikernel",'), 'hosted.0.target');
});

test.run();
