import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  type AttachState,
  checkLinkName,
  formatAction,
  formatPlan,
  linkName,
  type NodeState,
  type Observed,
  planAttach,
  planClean,
  planDetach,
  planNode,
  planTun,
} from '../../../edge/host/plan.ts';
import { parseCidr, parseIpv4 } from '../../../src/addr.ts';
import { unwrap } from '../../../src/error.ts';

const cidr = (text: string) => unwrap(parseCidr(text));
const ip = (text: string) => unwrap(parseIpv4(text));

const NODE: NodeState = {
  bridge: 'edgeway0',
  tun: 'edgeway-tun',
  table: 'edgeway',
  subnet: cidr('172.16.0.64/26'),
  services: cidr('172.30.0.0/16'),
  platform: cidr('172.16.0.0/12'),
  mtu: 1464,
};
const FRESH: Observed = {
  bridgeExists: false,
  bridgeAddresses: [],
  forward: '0',
  ipv6: true,
  tableExists: false,
  iptables: 'absent',
  foreign: [cidr('172.17.0.0/16'), cidr('172.17.0.1/32'), cidr('10.0.0.0/8')],
};
const ATTACH: AttachState = {
  id: 'shop.prod.cart.v1/1',
  netns: '/run/netns/blue',
  hostInterface: 'ew0123456789abc',
  inner: 'eth0',
  namespaceIp: ip('172.16.0.66'),
  subnet: NODE.subnet,
  platform: NODE.platform,
  bridge: 'edgeway0',
  mtu: 1464,
  hasDefault: false,
  ipv6: true,
  resolv: {
    path: '/etc/netns/blue/resolv.conf',
    nameserver: ip('172.16.0.65'),
    made: ['/etc/netns', '/etc/netns/blue'],
  },
};

/** The first line of a golden file says where it came from. */
function golden(name: string, text: string): void {
  const file = join(import.meta.dirname, '../../golden/host', name);
  assert.is(text, readFileSync(file, 'utf8').replace(/^#.*\n/, ''), name);
}

test('planNode on an untouched host', () => {
  golden('node_fresh.txt', formatPlan(planNode(NODE, FRESH)));
});

test('planNode repeated adds nothing and undoes nothing', () => {
  const observed: Observed = {
    ...FRESH,
    bridgeExists: true,
    bridgeAddresses: ['172.16.0.65/26'],
    forward: '1',
    tableExists: true,
    iptables: 'present',
  };
  const text = formatPlan(planNode(NODE, observed));
  assert.not.match(text, 'link add');
  assert.not.match(text, 'ip addr');
  assert.not.match(text, 'iptables');
  assert.not.match(text, 'ip_forward');
  assert.match(text, /-- undo\n\n$/);
});

test('planNode with another subnet takes the old address away first, and would give it back', () => {
  const text = formatPlan(
    planNode(NODE, { ...FRESH, bridgeExists: true, bridgeAddresses: ['172.16.9.1/26'] }),
  );
  assert.match(text, /addr del 172\.16\.9\.1\/26 dev edgeway0\nip addr replace 172\.16\.0\.65\/26/);
  assert.match(
    text,
    /undo[\s\S]*addr del 172\.16\.0\.65\/26 dev edgeway0\nip addr replace 172\.16\.9\.1\/26/,
  );
});

test('planTun routes the services and can take it back', () => {
  golden('tun.txt', formatPlan(planTun(NODE, 'edgeway-tun', NODE.services, true)));
});

test('planAttach into a namespace without a default route', () => {
  golden('attach.txt', formatPlan(planAttach(ATTACH)));
});

test('planAttach beside another default route sends only the platform through us', () => {
  const text = formatPlan(planAttach({ ...ATTACH, hasDefault: true, inner: 'eth1' }));
  assert.not.match(text, 'default');
  assert.match(text, '[/run/netns/blue] ip route replace 172.16.0.0/12 via 172.16.0.65 dev eth1');
});

test('planDetach restores resolv.conf only while it is ours', () => {
  const resolv = {
    path: '/c/resolv.conf',
    nameserver: ip('172.16.0.65'),
    before: 'nameserver 9.9.9.9\n',
    made: [],
  };
  const text = (ours: boolean) =>
    planDetach({ hostInterface: 'ew1', resolv }, ours).map(formatAction).join('\n');
  assert.is(text(true), 'ip link del ew1\nwrite /c/resolv.conf\n    nameserver 9.9.9.9');
  assert.is(text(false), 'ip link del ew1');
});

test('planClean names everything that planNode makes', () => {
  golden('clean.txt', `${planClean(NODE).map(formatAction).join('\n')}\n`);
});

test('linkName keeps short plain ids and hashes the others, never longer than 15', () => {
  assert.is(linkName('kvo', 'instance'), 'kvoinstance');
  assert.is(linkName('kvo', 'abcdefghijkl'), 'kvoabcdefghijkl');
  const names = ['instance-prod-1', 'instance-prod-2', 'Ünïcode', 'UPPER', ''.padEnd(500, 'x')].map((id) =>
    linkName('kvo', id),
  );
  for (const name of names) assert.match(name, /^kvo[0-9a-f]{12}$/);
  assert.is(new Set(names).size, names.length);
});

test('checkLinkName refuses what the kernel or a rule could not carry', () => {
  for (const bad of ['', 'a b', 'a/b', '-x', 'sixteen-letters-', 'a"b', '..'])
    assert.throws(() => checkLinkName(bad, 'bridge'), /is not a link name/, bad);
  assert.is(checkLinkName('fifteen-letters', 'bridge'), 'fifteen-letters');
});

test.run();
