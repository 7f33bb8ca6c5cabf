import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  checkLinkName,
  formatAction,
  formatPlan,
  linkName,
  type Observed,
  planAttach,
  planClean,
  planDetach,
  planNode,
  planPeers,
  planTun,
} from '../../../edge/host/plan.ts';
import { rulesOf } from '../../../edge/host/rules.ts';
import { type Attachment, EMPTY_STATE, type HostState, type NodeState } from '../../../edge/host/state.ts';
import { parseCidr, parseIpv4 } from '../../../src/addr.ts';
import { unwrap } from '../../../src/error.ts';
import { golden } from '../../support/golden.ts';

const cidr = (text: string) => unwrap(parseCidr(text));
const ip = (text: string) => unwrap(parseIpv4(text));

const NODE: NodeState = {
  bridge: 'edgeway0',
  tun: 'edgeway-tun',
  table: 'edgeway',
  subnet: cidr('172.16.0.64/26'),
  gateway: ip('172.16.0.65'),
  services: cidr('172.30.0.0/16'),
  platform: cidr('172.16.0.0/12'),
  mtu: 1464,
  isolated: true,
  foreign: [cidr('172.17.0.0/16'), cidr('172.17.0.1/32'), cidr('10.0.0.0/8')],
};
const STATE: HostState = { ...EMPTY_STATE, node: NODE };
const FRESH: Observed = {
  links: new Map([
    ['lo', 65_536],
    ['docker0', 1_500],
  ]),
  carried: [],
  bridgeAddresses: [],
  forward: '0',
  ipv6: true,
  tableExists: false,
  iptables: 'absent',
};
/** Kudo's: no ProxyTUN, the kernel carries between nodes. */
const CARRIER = { device: 'kvxnode', vni: 0x4557, port: 4790 };
const KUDO: NodeState = {
  bridge: 'kbrnode',
  tun: 'kunode',
  table: 'edgeway-kbrnode',
  subnet: cidr('10.0.0.0/24'),
  gateway: ip('10.0.0.1'),
  mtu: 1464,
  isolated: false,
  carrier: CARRIER,
  foreign: [],
};
const PEER = { prefix: cidr('10.0.1.0/24'), endpoint: ip('192.0.2.22') };
const BLUE: Attachment = {
  target: 'netns blue',
  netns: '/run/netns/blue',
  netnsId: '4:4026532000',
  hostInterface: 'ew0123456789abc',
  inner: 'eth0',
  namespaceIp: ip('172.16.0.66'),
  subnet: NODE.subnet,
  mtu: 1464,
  madeNetns: false,
  ports: [],
  resolv: {
    path: '/etc/netns/blue/resolv.conf',
    nameserver: ip('172.16.0.65'),
    made: ['/etc/netns', '/etc/netns/blue'],
  },
};
const SEEN = { hasDefault: false, ipv6: true };
const attach = (one: Attachment, seen = SEEN) =>
  formatPlan(planAttach(NODE, 'shop.prod.cart.v1/1', one, seen, STATE, STATE));

test('planNode on an untouched host', () => {
  golden('host/node_fresh.txt', formatPlan(planNode(EMPTY_STATE, STATE, NODE, FRESH)));
});

test('planNode repeated adds nothing and undoes nothing', () => {
  const observed: Observed = {
    ...FRESH,
    links: new Map([['edgeway0', 1_464]]),
    bridgeAddresses: ['172.16.0.65/26'],
    forward: '1',
    tableExists: true,
    iptables: 'present',
  };
  const text = formatPlan(planNode(EMPTY_STATE, STATE, NODE, observed));
  assert.not.match(text, 'link add');
  assert.not.match(text, 'ip addr');
  assert.not.match(text, 'iptables');
  assert.not.match(text, 'ip_forward');
  assert.match(text, /-- undo\n\n$/);
});

test('planNode with another subnet takes the old address away first, and would give it back', () => {
  const text = formatPlan(
    planNode(EMPTY_STATE, STATE, NODE, {
      ...FRESH,
      links: new Map([['edgeway0', 1_500]]),
      bridgeAddresses: ['172.16.9.1/26'],
    }),
  );
  assert.match(text, /addr del 172\.16\.9\.1\/26 dev edgeway0\nip addr replace 172\.16\.0\.65\/26/);
  assert.match(
    text,
    /undo[\s\S]*addr del 172\.16\.0\.65\/26 dev edgeway0\nip addr replace 172\.16\.9\.1\/26/,
  );
});

test('planNode with a carrier reaches its peers', () => {
  const state = { ...STATE, node: KUDO, peers: { b: PEER } };
  golden('host/node_carrier.txt', formatPlan(planNode(EMPTY_STATE, state, KUDO, FRESH)));
});

test('planPeers moves, adds and removes, and takes each back', () => {
  const before = { ...STATE, node: KUDO, peers: { b: PEER, c: { ...PEER, prefix: cidr('10.0.2.0/24') } } };
  const after = {
    ...before,
    peers: { b: { ...PEER, endpoint: ip('192.0.2.33') }, d: { ...PEER, prefix: cidr('10.0.3.0/24') } },
  };
  const lines = formatPlan(planPeers(KUDO, CARRIER, before, after, ['10.0.1.0/24', '10.0.2.0/24']))
    .split('\n')
    .filter((line) => line.startsWith('ip ') || line.startsWith('--'));
  const via = (prefix: string, node: string) =>
    `ip route replace ${prefix} encap ip id 17751 dst ${node} dev kvxnode src 10.0.0.1`;
  assert.equal(lines, [
    'ip route del 10.0.2.0/24 dev kvxnode',
    via('10.0.1.0/24', '192.0.2.33'),
    via('10.0.3.0/24', '192.0.2.22'),
    '-- undo',
    'ip route del 10.0.3.0/24 dev kvxnode',
    via('10.0.1.0/24', '192.0.2.22'),
    via('10.0.2.0/24', '192.0.2.22'),
  ]);
});

test('rulesOf notes that forwarding was off, for other networks of ours on the host', () => {
  assert.not.match(rulesOf(NODE, STATE), 'forwarding_was_off');
  const turned = rulesOf(NODE, { ...STATE, sysctls: { 'net/ipv4/ip_forward': '0' } });
  assert.match(turned, /^ {2}chain forwarding_was_off \{\n {2}\}$/m);
});

test('rulesOf publishes one map per protocol, turns for several instances, and a service through the TUN', () => {
  const green = {
    ...BLUE,
    ports: [
      { protocol: 'tcp' as const, source: 8080, destination: 80 },
      { protocol: 'udp' as const, source: 53, destination: 5353 },
    ],
  };
  const exposed = [
    { protocol: 'tcp' as const, source: 443, targets: [{ address: ip('172.30.0.9'), port: 8443 }] },
    {
      protocol: 'tcp' as const,
      source: 81,
      targets: [
        { address: ip('172.16.0.70'), port: 80 },
        { address: ip('172.16.0.71'), port: 80 },
      ],
    },
  ];
  const text = rulesOf(NODE, { ...STATE, attachments: { green }, exposed });
  const chain = /chain ports \{\n([\s\S]*?)\n {2}\}/
    .exec(text)?.[1]
    ?.split('\n')
    .map((line) => line.trim());
  assert.equal(chain, [
    'tcp dport 81 dnat ip to numgen inc mod 2 map { 0 : 172.16.0.70 . 80, 1 : 172.16.0.71 . 80 }',
    'dnat ip to tcp dport map { 8080 : 172.16.0.66 . 80, 443 : 172.30.0.9 . 8443 }',
    'dnat ip to udp dport map { 53 : 172.16.0.66 . 5353 }',
  ]);
});

test('planTun routes the services and can take it back', () => {
  golden('host/tun.txt', formatPlan(planTun(NODE, 'edgeway-tun', cidr('172.30.0.0/16'), true)));
});

test('planAttach into a namespace without a default route', () => {
  // The rules are the node's, which other goldens show.
  golden('host/attach.txt', attach(BLUE).replace(/^nft\n(?: {4}.*\n)+/gm, 'nft …\n'));
});

test('planAttach beside another default route sends only the platform through us', () => {
  const text = attach({ ...BLUE, inner: 'eth1' }, { ...SEEN, hasDefault: true });
  assert.not.match(text, 'default');
  assert.match(text, '[/run/netns/blue] ip route replace 172.16.0.0/12 via 172.16.0.65 dev eth1');
});

test('planAttach makes the namespace where it is ours; rules come first and go back last', () => {
  const { resolv: _none, ...plain } = BLUE;
  const text = attach({
    ...plain,
    madeNetns: true,
    ports: [{ protocol: 'tcp', source: 8080, destination: 80 }],
  });
  assert.match(text, /^nft\n[\s\S]*\nip netns add blue\nip link add /);
  assert.match(text, /-- undo\n[\s\S]*ip link del ew0123456789abc\nip netns del blue\nnft\n/);
});

test('planDetach restores resolv.conf only while it is ours', () => {
  const resolv = {
    path: '/c/resolv.conf',
    nameserver: ip('172.16.0.65'),
    before: 'nameserver 9.9.9.9\n',
    made: [],
  };
  const text = (ours: boolean) =>
    planDetach(NODE, { ...BLUE, hostInterface: 'ew1', resolv }, ours, STATE)
      .filter((action) => action.kind !== 'nft')
      .map(formatAction)
      .join('\n');
  assert.is(text(true), 'ip link del ew1\nwrite /c/resolv.conf\n    nameserver 9.9.9.9');
  assert.is(text(false), 'ip link del ew1');
});

test('planClean names everything that planNode makes', () => {
  golden('host/clean.txt', `${planClean(KUDO).map(formatAction).join('\n')}\n`);
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
