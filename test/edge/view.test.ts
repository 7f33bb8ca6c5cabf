import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { Explanation } from '../../edge/balance.ts';
import { viewExplanation, viewNode } from '../../edge/view.ts';
import { ipv4 } from '../../src/addr.ts';
import type { Service } from '../../src/model.ts';
import type { ServiceId } from '../../src/name.ts';
import { node } from '../support/sample.ts';

const id = 'shop.prod.cart.v1' as ServiceId;
const service: Service = {
  id,
  addresses: { closest: ipv4(0xac1e0001) },
  descriptor: {
    appname: 'shop',
    appnamespace: 'prod',
    servicename: 'cart',
    servicenamespace: 'v1',
    exposed: false,
    ports: [],
    statefull: false,
  },
};
const explanation: Explanation = {
  policy: 'closest',
  why: 'lowest RTT',
  candidates: [
    {
      instance: 1,
      node: 'n1',
      local: true,
      health: 'down',
      reason: 'r',
      rttMs: 0,
      confirmed: true,
      share: 0,
    },
    {
      instance: 2,
      node: 'n2',
      local: false,
      health: 'up',
      reason: 'r',
      rttMs: 1.23456,
      confirmed: false,
      load: 0.5,
      costMs: 11.2,
      share: 1,
    },
    { instance: 3, node: 'n3', local: false, health: 'up', reason: 'r', confirmed: false, share: 0 },
  ],
};
const more = {
  healthOf: (instance: number) => (instance === 1 ? 'tcp check: refused' : undefined),
  addressOf: (instance: number) => (instance === 3 ? undefined : ipv4(0xac1e0010 + instance)),
  choices: [
    { service: id, policy: 'closest', instance: 2, client: ipv4(0xac100002), wallMs: 0, why: 'w' },
  ] as const,
};

test('viewExplanation prints addresses, what is known of RTT and load, and null for what is not', () => {
  const view = viewExplanation({ service: id, policy: 'closest' }, service, explanation, more);
  assert.is(view.name, 'shop.prod.cart.v1.any.closest.local');
  assert.is(view.address, '172.30.0.1');
  assert.equal(
    view.candidates.map((c) => [
      c.instance,
      c.instanceIp,
      c.reason,
      c.rttMs,
      c.rttBy,
      c.load,
      c.costMs,
      c.share,
    ]),
    [
      [1, '172.30.0.17', 'tcp check: refused', 0, 'probe', null, null, 0],
      [2, '172.30.0.18', 'r', 1.235, 'coordinate', 0.5, 11.2, 1],
      [3, null, 'r', null, null, null, null, 0],
    ],
  );
  assert.equal(view.choices, [
    { at: '1970-01-01T00:00:00.000Z', policy: 'closest', instance: 2, client: '172.16.0.2', why: 'w' },
  ]);
});

test('viewExplanation of an InstanceIP shows that instance alone', () => {
  const view = viewExplanation({ service: id, instance: 2 }, service, explanation, more);
  assert.is(view.policy, 'fixed');
  assert.is(view.address, '172.30.0.18');
  assert.equal(
    view.candidates.map((c) => [c.instance, c.share]),
    [[2, 1]],
  );
});

test('viewNode says whether a node is behind a NAT', () => {
  assert.is(viewNode(node('n1', 1)).nat, false);
  assert.is(viewNode(node('n1', 1, { nat: true })).nat, true);
});

test.run();
