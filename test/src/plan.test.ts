import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { contains, formatCidr, formatIpv4, parseCidr } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import {
  checkBlock,
  checkPlan,
  DEFAULT_PLAN,
  layoutOf,
  subnetAt,
  subnetCount,
  subnetIndex,
  subnetOf,
} from '../../src/plan.ts';

test('subnetAt and subnetIndex are inverses for all 15,360 nodes, and no subnet touches the services', () => {
  assert.is(subnetCount(DEFAULT_PLAN), 15_360);
  const seen = new Set<number>();
  for (let i = 0; i < 15_360; i++) {
    const subnet = subnetAt(DEFAULT_PLAN, i);
    assert.is(unwrap(subnetIndex(DEFAULT_PLAN, subnet)), i);
    assert.not(contains(DEFAULT_PLAN.services, subnet.base), formatCidr(subnet));
    assert.ok(contains(DEFAULT_PLAN.platform, subnet.base));
    seen.add(subnet.base);
  }
  assert.is(seen.size, 15_360);
});

test('the hole at 172.30 lies between index 14,335 and 14,336', () => {
  assert.is(formatCidr(subnetAt(DEFAULT_PLAN, 14_335)), '172.29.255.192/26');
  assert.is(formatCidr(subnetAt(DEFAULT_PLAN, 14_336)), '172.31.0.0/26');
  assert.is(formatCidr(subnetAt(DEFAULT_PLAN, 15_359)), '172.31.255.192/26');
});

test('subnetIndex says which rule a prefix breaks', () => {
  const why = (text: string): string => {
    const result = subnetIndex(DEFAULT_PLAN, unwrap(parseCidr(text)));
    return result.ok ? 'none' : result.error.message;
  };
  assert.match(why('172.30.1.0/26'), 'belongs to services');
  assert.match(why('10.0.0.0/26'), 'outside the platform');
  assert.match(why('172.16.0.0/24'), 'must be a /26');
});

test('layoutOf gives bridge first, broadcast last, 61 between', () => {
  const layout = layoutOf(subnetAt(DEFAULT_PLAN, 1));
  assert.is(formatIpv4(layout.bridge), '172.16.0.65');
  assert.is(formatIpv4(layout.firstInstance), '172.16.0.66');
  assert.is(formatIpv4(layout.lastInstance), '172.16.0.126');
  assert.is(formatIpv4(layout.broadcast), '172.16.0.127');
  assert.is(layout.instancesMax, layout.lastInstance - layout.firstInstance + 1);
  assert.is(layout.instancesMax, 61);
});

test('subnetOf finds the subnet of an instance and none for a service address', () => {
  const layout = layoutOf(subnetAt(DEFAULT_PLAN, 77));
  assert.equal(subnetOf(DEFAULT_PLAN, layout.lastInstance), subnetAt(DEFAULT_PLAN, 77));
  assert.is(subnetOf(DEFAULT_PLAN, DEFAULT_PLAN.services.base), undefined);
});

test('checkPlan bounds the number of node subnets, and checkBlock keeps blocks inside the platform', () => {
  const plan = (platform: string, services: string, nodeBits: number) => ({
    platform: unwrap(parseCidr(platform)),
    services: unwrap(parseCidr(services)),
    nodeBits,
  });
  assert.ok(checkPlan(plan('10.0.0.0/8', '10.252.0.0/14', 26)).ok);
  for (const wide of [plan('0.0.0.0/0', '10.0.0.0/16', 26), plan('10.0.0.0/8', '10.0.0.0/16', 28)]) {
    const checked = checkPlan(wide);
    assert.match(checked.ok ? '' : checked.error.message, 'at most 262144 are possible');
  }
  const block = (text: string): boolean => checkBlock(DEFAULT_PLAN, unwrap(parseCidr(text))).ok;
  assert.equal(
    ['172.16.0.0/20', '172.16.0.0/26', '172.16.0.0/12', '172.16.0.0/27', '10.0.0.0/20', '0.0.0.0/0'].map(
      block,
    ),
    [true, true, true, false, false, false],
  );
});

test('checkPlan refuses services outside the platform and a node prefix wider than the services', () => {
  const plan = { ...DEFAULT_PLAN, services: unwrap(parseCidr('10.0.0.0/16')) };
  assert.not(checkPlan(plan).ok);
  assert.not(checkPlan({ ...DEFAULT_PLAN, nodeBits: 12 }).ok);
  assert.ok(checkPlan(DEFAULT_PLAN).ok);
});

test.run();
