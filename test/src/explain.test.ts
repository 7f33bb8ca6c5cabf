import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unwrap } from '../../src/error.ts';
import { explainInWords, explainName } from '../../src/explain.ts';
import { parseName, parseServiceId, type ServiceId } from '../../src/name.ts';

const id = (text: string): ServiceId => unwrap(parseServiceId(text));
const KNOWN = [id('shop.prod.cart.v1'), id('shop.prod.catalog.v1'), id('video.test.transcode.v2')];
const wrong = (text: string): string[] =>
  explainName(text, KNOWN).faults.map(({ label, rule }) => `${label}: ${rule}`);

test('explainName has nothing to say about a known name', () => {
  assert.equal(explainName('Shop.prod.cart.v1.any.closest.local.', KNOWN), {
    valid: true,
    faults: [],
    suggestions: [],
  });
  assert.equal(explainName('shop.prod.new.v1.any.closest.local'), {
    valid: true,
    faults: [],
    suggestions: [],
  });
});

test('explainName names the label at fault and the rule', () => {
  assert.equal(wrong('shop.prod.cart.v1.any.nearest.local'), [
    'nearest: the policy is one of roundrobin, closest, fastest, fixed',
  ]);
  assert.equal(wrong('shop.prod.cart.v1.2.closest.local'), [
    '2: with a policy other than "fixed" stands "any"',
  ]);
  assert.equal(wrong('shop.prod.cart.v1.any.fixed.local'), ['any: with "fixed" stands a number from 1']);
  assert.equal(wrong('sh_op.prod.cart.v1.any.closest.lan'), [
    'sh_op: appname is letters, digits and inner hyphens',
    'lan: a name ends in "local"',
  ]);
  assert.equal(wrong('cart.v1.any.closest.local'), [
    ': 2 label(s) are missing: appname.appns.servicename.servicens.instance.policy.local',
  ]);
  assert.equal(wrong('x.shop.prod.cart.v1.any.closest.local'), [
    'x: there is no eighth label: a name has seven',
  ]);
  assert.match(wrong(`${'a'.repeat(64)}.prod.cart.v1.any.closest.local`)[0]!, '64 octets');
});

test('explainName suggests what was probably meant', () => {
  const best = (text: string): string | undefined => explainName(text, KNOWN).suggestions[0];
  assert.is(best('shop.prod.cart.v1'), 'shop.prod.cart.v1.any.closest.local');
  assert.is(best('shop.prod.cart.v1.local'), 'shop.prod.cart.v1.any.closest.local');
  assert.is(best('shop.prod.crat.v1.any.fastest.local'), 'shop.prod.cart.v1.any.fastest.local');
  assert.is(best('shop.prod.cart.v1.any.fastes.local'), 'shop.prod.cart.v1.any.fastest.local');
  assert.is(best('shop.prod.cart.v1.2.closest.local'), 'shop.prod.cart.v1.2.fixed.local');
  assert.is(best('shop.prod.cart.v1.any.closest.lcal'), 'shop.prod.cart.v1.any.closest.local');
});

test('explainInWords says it in one paragraph', () => {
  assert.is(explainInWords('shop.prod.cart.v1.any.closest.local', KNOWN), undefined);
  assert.is(
    explainInWords('shop.prod.cart.v1.2.closest.local', KNOWN),
    '"shop.prod.cart.v1.2.closest.local" is not a name: label "2": with a policy other than "fixed" stands "any"; perhaps shop.prod.cart.v1.2.fixed.local or shop.prod.cart.v1.any.closest.local was meant',
  );
  assert.is(
    explainInWords('shop.prod.crat.v1.any.closest.local', KNOWN),
    'the name is well-formed, but this node knows no service shop.prod.crat.v1; perhaps shop.prod.cart.v1.any.closest.local or shop.prod.catalog.v1.any.closest.local was meant',
  );
});

test('explainName suggests only valid names, whatever it is asked', () => {
  fc.assert(
    fc.property(
      fc.array(
        fc.oneof(
          fc.constantFrom('shop', 'prod', 'cart', 'v1', 'any', 'closest', 'fixed', 'local', '7', ''),
          fc.string({ maxLength: 8 }),
        ),
        { maxLength: 9 },
      ),
      (labels) => {
        const { suggestions, valid, faults, problem } = explainName(labels.join('.'), KNOWN);
        for (const name of suggestions) assert.ok(parseName(name).ok, name);
        assert.ok(suggestions.length <= 5);
        if (!valid) assert.ok(faults.length > 0 || problem !== undefined);
      },
    ),
    { numRuns: 3000 },
  );
});

test.run();
