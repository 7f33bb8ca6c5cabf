import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Budgets } from '../../src/budget.ts';

const taken = (budgets: Budgets, caller: number, nowMs: number): number => {
  let count = 0;
  while (budgets.take(caller, nowMs)) count++;
  return count;
};

test('Budgets gives a burst, then so much a second, and never more than a burst', () => {
  const budgets = new Budgets({ burst: 10, perS: 4, callersMax: 8 });
  assert.is(taken(budgets, 1, 0), 10);
  assert.is(taken(budgets, 1, 249), 0);
  assert.is(taken(budgets, 1, 500), 2, 'looking does not cost');
  assert.is(taken(budgets, 1, 1_500), 4);
  assert.is(taken(budgets, 1, 3_600_000), 10);
});

test('Budgets keeps callers apart and forgets the one heard least lately', () => {
  const budgets = new Budgets({ burst: 3, perS: 1, callersMax: 2 });
  assert.is(taken(budgets, 1, 0), 3);
  assert.is(taken(budgets, 2, 0), 3);
  assert.is(taken(budgets, 1, 0), 0);
  assert.is(taken(budgets, 3, 0), 3, 'caller 2 is forgotten');
  assert.is(taken(budgets, 1, 0), 0);
  assert.is(taken(budgets, 2, 0), 3);
});

test.run();
