import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unwrap } from '../../src/error.ts';
import {
  formatName,
  isOurSuffix,
  type Name,
  parseInstanceNumber,
  parseName,
  parseServiceId,
  serviceIdOf,
  splitServiceId,
} from '../../src/name.ts';
import { POLICIES } from '../../src/policy.ts';
import { anyInstanceNumber, anyServiceId } from '../support/sample.ts';

const anyName: fc.Arbitrary<Name> = fc.oneof(
  fc.tuple(anyServiceId, fc.constantFrom(...POLICIES)).map(([service, policy]) => ({ service, policy })),
  fc.tuple(anyServiceId, anyInstanceNumber).map(([service, instance]) => ({ service, instance })),
);

test('formatName and parseName are inverses, case-blind, with or without the last dot', () => {
  fc.assert(
    fc.property(anyName, (name) => {
      const text = formatName(name);
      assert.equal(unwrap(parseName(text)), name);
      assert.equal(unwrap(parseName(`${text.toUpperCase()}.`)), name);
      assert.ok(isOurSuffix(text));
    }),
    { numRuns: 1_000 },
  );
});

test('splitServiceId and serviceIdOf are inverses', () => {
  fc.assert(
    fc.property(anyServiceId, (id) => {
      assert.is(unwrap(serviceIdOf(splitServiceId(id))), id);
    }),
  );
});

test('parseName is total, and what it takes it spells in one way', () => {
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string(),
        fc.domain(),
        fc.array(fc.string(), { maxLength: 9 }).map((l) => l.join('.')),
      ),
      (text) => {
        const name = parseName(text);
        if (name.ok) assert.is(formatName(name.value), text.toLowerCase().replace(/\.$/, ''));
        else assert.is(name.error.code, 'invalid_name');
      },
    ),
    { numRuns: 2_000 },
  );
});

test('parseName says what is wrong and what would be right', () => {
  const says = (text: string): string => {
    const name = parseName(text);
    return name.ok ? 'fine' : name.error.message;
  };
  assert.match(says('cart.local'), 'has 2 label(s), a name has seven');
  assert.match(says('shop.prod.cart.v1.any.closest.test'), 'ends in "test"');
  assert.match(says('shop.prod.cart.v1.any.fixed.local'), 'must be 1…');
  assert.match(says('shop.prod.cart.v1.0.fixed.local'), 'must be 1…');
  assert.match(says('shop.prod.cart.v1.1.closest.local'), 'must be "any"');
  assert.match(
    says('shop.prod.cart.v1.any.nearest.local'),
    'must be one of roundrobin, closest, fastest, fixed',
  );
  assert.match(says('shop..cart.v1.any.closest.local'), 'appns "" is empty');
  assert.match(says(`${'x'.repeat(64)}.prod.cart.v1.any.closest.local`), '64 octets long');
});

test('parseServiceId leaves room for the longest name of the service in 253 octets', () => {
  const label = 'x'.repeat(60);
  assert.not.ok(parseServiceId([label, label, label, label].join('.')).ok);
  const shorter = 'x'.repeat(56);
  const id = unwrap(parseServiceId([shorter, shorter, shorter, shorter].join('.')));
  assert.ok(formatName({ service: id, policy: 'roundrobin' }).length <= 253);
});

test('parseInstanceNumber takes 1…999999 without leading zeros', () => {
  assert.is(parseInstanceNumber('1'), 1);
  assert.is(parseInstanceNumber('999999'), 999_999);
  for (const text of ['0', '01', '-1', '1.0', '1e3', '', ' 1', '1000000'])
    assert.is(parseInstanceNumber(text), undefined, text);
});

test.run();
