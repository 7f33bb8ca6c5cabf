import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { ProxyCommand } from '../../../edge/proxy/command.ts';
import { newBytes } from '../../../src/wire/bytes.ts';
import { finish, pseudoSum, sum } from '../../../src/wire/checksum.ts';
import { ICMP } from '../../../src/wire/icmp.ts';
import { checkIpv4, finishIpv4, headerLength, IPV4, IPV4_FAULT, PROTOCOL } from '../../../src/wire/ipv4.ts';
import { printPacket } from '../../../src/wire/print.ts';
import { TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN } from '../../../src/wire/tcp.ts';
import {
  a,
  CART,
  CART_1,
  CART_2,
  CART_CLOSEST,
  CART_RR,
  CLIENT,
  cartCommand,
  DB,
  DB_RR,
  echo,
  icmpError,
  NodeUnderTest,
  OTHER,
  tcp,
  udp,
  WEB,
} from './world.ts';

/** Every checksum of a packet, from scratch. */
function sound(packet: Uint8Array): boolean {
  const bytes = newBytes(packet.length);
  bytes.u8.set(packet);
  if (checkIpv4(bytes, 0, packet.length) !== IPV4_FAULT.none) return false;
  const at = headerLength(bytes, 0);
  const length = packet.length - at;
  const protocol = bytes.u8[IPV4.protocol]!;
  const pseudo =
    protocol === PROTOCOL.icmp
      ? 0
      : pseudoSum(bytes.view.getUint32(IPV4.source), bytes.view.getUint32(IPV4.target), protocol, length);
  return finish(pseudo + sum(bytes, at, length)) === 0;
}

/** Which cart a line went to: node 2 has number 1, node 3 number 2. */
const cartOf = (line: string): number => Number(/^node (\d)/.exec(line)?.[1]) - 1;

test('leaving a ServiceIP: source InstanceIP, target namespace IP; arriving back: source the ServiceIP', () => {
  const one = new NodeUnderTest(1);
  const two = new NodeUnderTest(2);
  const syn = one.leave(tcp({ source: CLIENT, target: DB_RR }, TCP_SYN));
  assert.is(syn, 'node 2: 172.30.1.1.40000 > 172.16.0.131.80: TCP [S] seq 1000 ack 0 length 0 (ttl 63)');
  assert.ok(sound(one.packet));
  assert.is(
    two.arrive(one.packet, 1),
    'tun: 172.30.1.1.40000 > 172.16.0.131.80: TCP [S] seq 1000 ack 0 length 0 (ttl 63)',
  );
  const back = tcp(
    { source: a('172.16.0.131'), target: a('172.30.1.1'), sourcePort: 80, targetPort: 40_000 },
    TCP_SYN | TCP_ACK,
  );
  assert.is(
    two.leave(back),
    'node 1: 172.30.3.1.80 > 172.16.0.66.40000: TCP [S.] seq 1000 ack 5000 length 0 (ttl 63)',
  );
  assert.is(
    one.arrive(two.packet, 2),
    'tun: 172.30.0.20.80 > 172.16.0.66.40000: TCP [S.] seq 1000 ack 5000 length 0 (ttl 63)',
  );
  assert.ok(sound(one.packet));
  assert.is(one.proxy.flows.size, 1);
  assert.is(two.proxy.flows.size, 0, 'the server keeps nothing');
});

test('leaving an InstanceIP: no flow, and its answer keeps the InstanceIP', () => {
  const one = new NodeUnderTest(1);
  assert.match(
    one.leave(udp({ source: CLIENT, target: CART_1 })),
    'node 2: 172.30.1.1.40000 > 172.16.0.130.80',
  );
  assert.is(one.proxy.flows.size, 0);
  const back = udp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 });
  assert.match(one.arrive(back, 2), 'tun: 172.30.2.1.80 > 172.16.0.66.40000');
});

test('a flow keeps its instance; flows spread evenly; TCP and UDP of one port pair are two flows', () => {
  const one = new NodeUnderTest(1);
  const counts = [0, 0, 0];
  for (let port = 1; port <= 400; port++) {
    const first = cartOf(one.leave(udp({ source: CLIENT, target: CART_RR, sourcePort: port })));
    for (let i = 0; i < 3; i++)
      assert.is(cartOf(one.leave(udp({ source: CLIENT, target: CART_RR, sourcePort: port }))), first);
    counts[first]!++;
  }
  assert.ok(counts[1]! >= 195 && counts[2]! >= 195, `${counts}`);
  one.leave(tcp({ source: CLIENT, target: CART_RR, sourcePort: 1 }, TCP_SYN));
  assert.is(one.proxy.flows.size, 401);
});

test('two clients with one source port, and port 65535, do not meet (oakestra.md §10, 1 and 3)', () => {
  const one = new NodeUnderTest(1);
  for (const port of [65_535, 1, 0]) {
    const tuple = { target: CART_RR, sourcePort: port, targetPort: 65_535 };
    const first = one.leave(udp({ source: CLIENT, ...tuple }));
    const second = one.leave(udp({ source: OTHER, ...tuple }));
    assert.match(first, `172.30.1.1.${port} >`);
    assert.match(second, `172.30.1.2.${port} >`);
    for (const [line, local] of [
      [first, CLIENT],
      [second, OTHER],
    ] as const) {
      const cart = cartOf(line);
      const back = udp({
        source: a(`172.30.2.${cart}`),
        target: local,
        sourcePort: 65_535,
        targetPort: port,
      });
      assert.match(
        one.arrive(back, cart + 1),
        `tun: 172.30.0.10.65535 > 172.16.0.${local === CLIENT ? 66 : 67}.${port}`,
      );
    }
  }
});

test('a ServiceIP and the InstanceIP it chose, same ports: the second gets another port on the wire only', () => {
  for (const order of ['service first', 'instance first']) {
    const one = new NodeUnderTest(1);
    one.apply(cartCommand(1, [1]));
    const dial = (target: number): string => one.leave(udp({ source: CLIENT, target, sourcePort: 5000 }));
    const targets = order === 'service first' ? [CART_RR, CART_1] : [CART_1, CART_RR];
    const first = dial(targets[0]!);
    const second = dial(targets[1]!);
    assert.match(first, '172.30.1.1.5000 > 172.16.0.130.80');
    const port = Number(/172\.30\.1\.1\.(\d+) >/.exec(second)?.[1]);
    assert.is.not(port, 5000, order);
    const answer = (to: number): string =>
      one.arrive(udp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: to }), 2);
    const text = (ip: number): string => (ip === CART_RR ? '172.30.0.10' : '172.30.2.1');
    assert.match(answer(5000), `tun: ${text(targets[0]!)}.80 > 172.16.0.66.5000`);
    assert.match(answer(port), `tun: ${text(targets[1]!)}.80 > 172.16.0.66.5000`);
    assert.ok(sound(one.packet));
    assert.is(dial(targets[1]!), second, 'and it stays so');
  }
});

test('two policies that choose one instance: both answer from the address that was dialled', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  const first = one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN));
  const second = one.leave(tcp({ source: CLIENT, target: CART_CLOSEST }, TCP_SYN));
  const ports = [first, second].map((line) => Number(/172\.30\.1\.1\.(\d+) >/.exec(line)?.[1]));
  assert.is.not(ports[0], ports[1]);
  for (const [i, dialled] of ['172.30.0.10', '172.30.0.11'].entries()) {
    const back = tcp(
      { source: CART_1, target: CLIENT, sourcePort: 80, targetPort: ports[i]! },
      TCP_SYN | TCP_ACK,
    );
    assert.match(one.arrive(back, 2), `tun: ${dialled}.80 > 172.16.0.66.40000`);
    assert.ok(sound(one.packet));
  }
});

test('on one node both halves happen at once', () => {
  const one = new NodeUnderTest(1);
  const toWeb2 = one.leave(udp({ source: CLIENT, target: a('172.30.1.2'), sourcePort: 7 }));
  assert.match(toWeb2, 'tun: 172.30.1.1.7 > 172.16.0.67.80');
  assert.ok(sound(one.packet));
  one.apply({
    kind: 'service',
    service: WEB,
    addresses: { roundrobin: a('172.30.0.30') },
    instances: [
      {
        instance: 2,
        instanceIp: a('172.30.1.2'),
        namespaceIp: OTHER,
        nodeIp: a('10.0.0.1'),
        ewp: 4790,
        local: true,
      },
    ],
  });
  one.leave(udp({ source: CLIENT, target: a('172.30.0.30'), sourcePort: 8 }));
  one.apply({
    kind: 'service',
    service: WEB,
    addresses: { roundrobin: a('172.30.0.30') },
    instances: [
      {
        instance: 2,
        instanceIp: a('172.30.1.2'),
        namespaceIp: OTHER,
        nodeIp: a('10.0.0.1'),
        ewp: 4790,
        local: true,
      },
      {
        instance: 1,
        instanceIp: a('172.30.1.1'),
        namespaceIp: CLIENT,
        nodeIp: a('10.0.0.1'),
        ewp: 4790,
        local: true,
      },
    ],
  });
  const back = one.leave(udp({ source: OTHER, target: a('172.30.1.1'), sourcePort: 80, targetPort: 8 }));
  assert.match(back, 'tun: 172.30.0.30.80 > 172.16.0.66.8');
});

test('a connection by InstanceIP is reset when its instance goes, or falls out of the needs', () => {
  for (const end of ['gone', 'not needed']) {
    const one = new NodeUnderTest(1);
    one.leave(tcp({ source: CLIENT, target: CART_1 }, TCP_SYN));
    one.leave(tcp({ source: CLIENT, target: CART_1 }, TCP_SYN));
    assert.is(one.proxy.flows.size, 1, 'a SYN that is repeated makes no second flow');
    one.arrive(
      tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 }, TCP_SYN | TCP_ACK),
      2,
    );
    assert.equal(one.answers(), []);
    if (end === 'gone') one.apply(cartCommand(1, [2]));
    else
      one.apply({
        kind: 'local',
        namespaceIp: CLIENT,
        instanceIp: a('172.30.1.1'),
        service: WEB,
        needs: [DB],
      });
    assert.match(one.answers()[0]!, '172.30.2.1.80 > 172.16.0.66.40000: TCP [R.]', end);
  }
});

test('two flows with one face on the wire: the second packet of the second keeps its port', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN));
  const first = one.leave(tcp({ source: CLIENT, target: CART_1 }, TCP_SYN));
  assert.is(
    one
      .leave(tcp({ source: CLIENT, target: CART_1 }, TCP_ACK))
      .split(':')[1]!
      .split(' >')[0],
    first.split(':')[1]!.split(' >')[0],
  );
  assert.is(one.proxy.flows.size, 2);
});

test('needs that are told again unchanged, or grow, forget nobody who asked', () => {
  const one = new NodeUnderTest(1);
  const local = (needs: readonly (typeof DB)[]): void =>
    one.apply({ kind: 'local', namespaceIp: CLIENT, instanceIp: a('172.30.1.1'), service: WEB, needs });
  local([DB]);
  one.arrive(udp({ source: CART_1, target: CLIENT, sourcePort: 9, targetPort: 53 }), 2);
  const answer = udp({ source: CLIENT, target: CART_1, sourcePort: 53, targetPort: 9 });
  local([DB]);
  assert.match(one.leave(answer), 'node 2');
  local([DB, WEB]);
  assert.match(one.leave(answer), 'node 2');
  local([WEB]);
  assert.is(one.leave(answer), 'not_needed');
});

test('ICMP echo by InstanceIP, beside one by ServiceIP with the same identifier: each gets its own back', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  one.leave(echo({ source: CLIENT, target: CART_RR }, 8));
  const second = one.leave(echo({ source: CLIENT, target: CART_1 }, 8));
  const id = Number(/id (\d+)/.exec(second)?.[1]);
  assert.is.not(id, 77, second);
  assert.match(one.arrive(echo({ source: CART_1, target: CLIENT }, 0), 2), 'tun: 172.30.0.10 >');
  assert.match(
    one.arrive(echo({ source: CART_1, target: CLIENT }, 0, id), 2),
    'tun: 172.30.2.1 > 172.16.0.66: ICMP type 0 code 0 id 77',
  );
  assert.ok(sound(one.packet));
});

test('ICMP echo to a ServiceIP and back', () => {
  const one = new NodeUnderTest(1);
  assert.match(
    one.leave(echo({ source: CLIENT, target: DB_RR }, 8)),
    'node 2: 172.30.1.1 > 172.16.0.131: ICMP type 8',
  );
  assert.match(
    one.arrive(echo({ source: a('172.30.3.1'), target: CLIENT }, 0), 2),
    'tun: 172.30.0.20 > 172.16.0.66: ICMP type 0 code 0 id 77',
  );
  assert.ok(sound(one.packet));
});

test('spoofing is dropped by name, from both sides', () => {
  const one = new NodeUnderTest(1);
  assert.is(one.leave(udp({ source: a('172.16.0.99'), target: CART_RR })), 'spoofed_source');
  assert.is(one.leave(udp({ source: a('172.16.0.130'), target: CART_RR })), 'spoofed_source');
  assert.is(one.leave(udp({ source: a('172.30.1.1'), target: CART_RR })), 'spoofed_source');
  assert.is(one.leave(udp({ source: CLIENT, target: a('172.16.0.130') })), 'not_service_address');
  assert.is(one.leave(udp({ source: CLIENT, target: a('8.8.8.8') })), 'not_service_address');
  // Cart 1 lives on node 2: not on node 3, not here, and nobody knows 172.30.9.9.
  assert.is(one.arrive(udp({ source: CART_1, target: CLIENT }), 3), 'spoofed_sender');
  assert.is(one.arrive(udp({ source: a('172.30.1.2'), target: CLIENT }), 2), 'spoofed_sender');
  assert.is(one.arrive(udp({ source: a('172.16.0.130'), target: CLIENT }), 2), 'unknown_sender');
  assert.is(one.arrive(udp({ source: a('172.30.9.9'), target: CLIENT }), 2), 'held');
  one.now += 5_000;
  one.proxy.tick(0, one.now);
  assert.is(one.counter('drop_unknown_sender'), 2, 'once for the one whose source is no InstanceIP');
  assert.is(one.arrive(udp({ source: CART_1, target: a('172.16.0.100') }), 2), 'unknown_receiver');
  assert.is(one.arrive(udp({ source: CART_1, target: a('10.0.0.1') }), 2), 'unknown_receiver');
});

test('needs: undefined allows any, a list allows only its services, and answers to askers always pass', () => {
  const one = new NodeUnderTest(1);
  const local = (needs?: readonly (typeof DB)[]): void =>
    one.apply({
      kind: 'local',
      namespaceIp: CLIENT,
      instanceIp: a('172.30.1.1'),
      service: WEB,
      ...(needs === undefined ? {} : { needs }),
    });
  local([DB]);
  assert.match(one.leave(tcp({ source: CLIENT, target: DB_RR }, TCP_SYN)), 'node 2');
  assert.is(one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN)), 'not_needed');
  assert.match(one.answers()[0]!, '172.30.0.10 > 172.16.0.66: ICMP type 3 code 13');
  assert.is(one.leave(udp({ source: CLIENT, target: CART_1 })), 'not_needed');
  assert.is(one.leave(echo({ source: CLIENT, target: CART_1 }, 8)), 'not_needed');
  // Cart 1 asks; the answer is none of the client's needs.
  one.arrive(udp({ source: CART_1, target: CLIENT, sourcePort: 9, targetPort: 53 }), 2);
  assert.match(one.leave(udp({ source: CLIENT, target: CART_1, sourcePort: 53, targetPort: 9 })), 'node 2');
  assert.is(one.leave(udp({ source: CLIENT, target: CART_1, sourcePort: 54, targetPort: 9 })), 'not_needed');
  one.arrive(echo({ source: CART_1, target: CLIENT }, 8), 2);
  assert.match(one.leave(echo({ source: CLIENT, target: CART_1 }, 0)), 'node 2');
  const answer = tcp({ source: CLIENT, target: CART_1, sourcePort: 53, targetPort: 9 }, TCP_SYN | TCP_ACK);
  assert.match(one.leave(answer), 'node 2');
  // Needs that shrink end the flows outside them.
  one.answers();
  one.arrive(
    tcp({ source: a('172.30.3.1'), target: CLIENT, sourcePort: 80, targetPort: 40_000 }, TCP_SYN | TCP_ACK),
    2,
  );
  local([]);
  assert.match(one.answers()[0]!, '172.30.0.20.80 > 172.16.0.66.40000: TCP [R.]');
  local();
  assert.match(one.leave(udp({ source: CLIENT, target: CART_RR })), 'node');
});

test('an instance that goes: its TCP clients get a reset that they accept, UDP is chosen anew', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN));
  one.arrive(
    tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 }, TCP_SYN | TCP_ACK),
    2,
  );
  one.leave(
    tcp({ source: CLIENT, target: CART_RR }, TCP_ACK, new Uint8Array(10), {
      sequence: 1001,
      acknowledgment: 777,
    }),
  );
  one.leave(udp({ source: CLIENT, target: CART_RR }));
  one.apply(cartCommand(1, [2]));
  assert.equal(one.answers(), [
    '172.30.0.10.80 > 172.16.0.66.40000: TCP [R.] seq 1001 ack 1011 length 0 (ttl 64)',
  ]);
  assert.match(one.leave(udp({ source: CLIENT, target: CART_RR })), 'node 3');
  // What was on its way meets a reset of its own; the same ports may be dialled again.
  const straggler = tcp({ source: CLIENT, target: CART_RR }, TCP_ACK, new Uint8Array(1), {
    acknowledgment: 778,
  });
  assert.is(one.leave(straggler), 'flow_reset');
  assert.equal(one.answers(), [
    '172.30.0.10.80 > 172.16.0.66.40000: TCP [R] seq 778 ack 0 length 0 (ttl 64)',
  ]);
  assert.match(one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN)), 'node 3');
});

test('late answers of an instance that went and came back never arrive from an address nobody dialled', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  one.leave(udp({ source: CLIENT, target: CART_RR }));
  one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN));
  const late = { source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 };
  one.arrive(tcp(late, TCP_SYN | TCP_ACK), 2);
  one.apply(cartCommand(1, [2]));
  one.apply(cartCommand(1, [1, 2]));
  assert.is(one.arrive(udp(late), 2), 'flow_reset');
  assert.is(one.arrive(tcp(late, TCP_ACK), 2), 'flow_reset');
  // Who dials that InstanceIP itself from the same port gets its answers.
  one.leave(udp({ source: CLIENT, target: CART_1 }));
  assert.match(one.arrive(udp(late), 2), 'tun: 172.30.2.1.80 > 172.16.0.66.40000');
  const other = { ...late, targetPort: 40_001 };
  assert.match(one.arrive(udp(other), 2), 'tun: 172.30.2.1.80 > 172.16.0.66.40001');
});

test('the reset lies inside the window of a client that missed the last data', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN));
  const back = { source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 };
  one.arrive(tcp(back, TCP_SYN | TCP_ACK, undefined, { sequence: 0xfffffff0 }), 2);
  one.arrive(tcp(back, TCP_ACK, new Uint8Array(100), { sequence: 0xfffffff1 }), 2);
  one.arrive(tcp(back, TCP_ACK, new Uint8Array(10), { sequence: 0xfffffff1 }), 2); // a retransmission
  one.apply(cartCommand(1, []));
  assert.match(one.answers()[0]!, 'TCP [R.] seq 85 ');
});

test('a node that is dead: as if its instances had gone, and a node that is not keeps its flows', () => {
  const one = new NodeUnderTest(1);
  const open = (port: number): number => {
    const cart = cartOf(one.leave(tcp({ source: CLIENT, target: CART_RR, sourcePort: port }, TCP_SYN)));
    const back = { source: a(`172.30.2.${cart}`), target: CLIENT, sourcePort: 80, targetPort: port };
    one.arrive(tcp(back, TCP_SYN | TCP_ACK), cart + 1);
    return cart;
  };
  const carts = [1, 2, 3, 4, 5, 6].map((port) => open(port));
  one.apply({ kind: 'nodeDead', nodeIp: a('10.0.0.2'), ewp: 4790 });
  assert.is(one.answers().length, carts.filter((cart) => cart === 1).length);
  assert.ok(carts.includes(1) && carts.includes(2));
});

test('the sweep marks the services and nodes that flows lead to, until their last flow has ended', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  const peer = one.proxy.routes.peers.get(a('172.16.0.128'))!;
  const out = (flags: number): string => one.leave(tcp({ source: CLIENT, target: CART_RR }, flags));
  const used = (sinceMs: number): unknown => one.proxy.routes.used(sinceMs);
  one.proxy.tick(100, one.now);
  assert.is(peer.flowMs, Number.NEGATIVE_INFINITY);
  assert.equal(used(Number.NEGATIVE_INFINITY), { services: [], subnets: [] });
  out(TCP_SYN);
  one.now += 3_600;
  one.proxy.tick(100, one.now);
  assert.is(peer.flowMs, one.now);
  assert.equal(used(one.now - 1), { services: [CART], subnets: [a('172.16.0.128')] });
  out(TCP_RST);
  one.proxy.tick(100, one.now + 1);
  assert.is(peer.flowMs, one.now);
  assert.equal(used(one.now), { services: [], subnets: [] });
});

test('a node that is suspect: what opens there is chosen anew, what is established stays', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  const out = (port: number, flags: number): string =>
    one.leave(tcp({ source: CLIENT, target: CART_RR, sourcePort: port }, flags));
  out(1, TCP_SYN);
  out(2, TCP_SYN);
  one.arrive(tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 2 }, TCP_SYN | TCP_ACK), 2);
  one.apply(cartCommand(1, [1, 2]));
  one.apply({
    kind: 'weights',
    service: CART,
    instances: [1, 2],
    weights: { roundrobin: [0, 1], closest: [0, 1], fastest: [0, 1] },
  });
  one.apply({ kind: 'nodeSuspect', nodeIp: a('10.0.0.2'), ewp: 4790 });
  assert.equal(one.answers(), []);
  assert.match(out(1, TCP_SYN), 'node 3');
  assert.match(out(2, TCP_ACK), 'node 2');
});

test('an instance that its node calls dead: its flows are reset although a route names it', () => {
  const one = new NodeUnderTest(1);
  const open = (port: number): number => {
    const cart = cartOf(one.leave(tcp({ source: CLIENT, target: CART_RR, sourcePort: port }, TCP_SYN)));
    const back = { source: a(`172.30.2.${cart}`), target: CLIENT, sourcePort: 80, targetPort: port };
    one.arrive(tcp(back, TCP_SYN | TCP_ACK), cart + 1);
    return cart;
  };
  const carts = [1, 2, 3, 4, 5, 6].map((port) => open(port));
  one.apply({ kind: 'instanceDead', service: CART, instance: 2 });
  const answers = one.answers();
  assert.is(answers.length, carts.filter((cart) => cart === 2).length);
  assert.ok(answers.length > 0 && answers.every((answer) => answer.includes('[R')));
});

test('choices beyond those of one report are counted by instance and policy, none is lost', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1, 2]));
  for (let port = 1; port <= 300; port++)
    one.leave(tcp({ source: CLIENT, target: CART_RR, sourcePort: port }, TCP_SYN));
  const { choices, unlisted } = one.proxy;
  assert.is(choices.length, 64);
  const counts = [1, 2].map(
    (n) =>
      choices.filter(({ instance }) => instance === n).length +
      [...unlisted.values()].reduce((sum, c) => sum + (c.instance === n ? c.count : 0), 0),
  );
  assert.is(counts[0]! + counts[1]!, 300);
  assert.ok(Math.abs(counts[0]! - 150) <= 1, String(counts));
});

test('an instance without a weight gets flows only while none that is named has one', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  const told = (weight: number): ProxyCommand => ({
    kind: 'weights',
    service: CART,
    instances: [1],
    weights: { roundrobin: [weight], closest: [weight], fastest: [weight] },
  });
  const carts = (from: number): number[] =>
    [0, 1, 2, 3].map((i) =>
      cartOf(one.leave(tcp({ source: CLIENT, target: CART_CLOSEST, sourcePort: from + i }, TCP_SYN))),
    );
  one.apply(told(1));
  one.apply(cartCommand(1, [1, 2]));
  assert.equal(carts(10), [1, 1, 1, 1]);
  one.apply(told(0));
  assert.equal(carts(20), [2, 2, 2, 2]);
});

test('a flow that opens while its instance goes is chosen anew, not reset', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN));
  one.apply(cartCommand(1, [2]));
  assert.equal(one.answers(), []);
  assert.match(one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN)), 'node 3');
});

test('TCP that opens nothing and belongs to nothing is refused with a reset (RFC 9293 §3.10.7.1)', () => {
  const one = new NodeUnderTest(1);
  const ack = tcp({ source: CLIENT, target: CART_RR }, TCP_ACK, new Uint8Array(3), { acknowledgment: 42 });
  assert.is(one.leave(ack), 'no_flow');
  assert.equal(one.answers(), ['172.30.0.10.80 > 172.16.0.66.40000: TCP [R] seq 42 ack 0 length 0 (ttl 64)']);
  assert.is(one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_RST)), 'no_flow');
  assert.equal(one.answers(), [], 'a reset is never answered');
});

test('TCP states: both FINs close, a new SYN on the same ports then chooses anew, expiry asks with the time', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  const out = (flags: number): string => one.leave(tcp({ source: CLIENT, target: CART_RR }, flags));
  const back = (flags: number): string =>
    one.arrive(tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 }, flags), 2);
  out(TCP_SYN);
  back(TCP_SYN | TCP_ACK);
  one.now += 3 * 3_600_000;
  assert.match(out(TCP_ACK), 'node 2', 'an idle connection lives for hours');
  out(TCP_FIN | TCP_ACK);
  assert.match(back(TCP_FIN | TCP_ACK), 'tun: 172.30.0.10');
  assert.match(out(TCP_ACK), 'node 2', 'the last acknowledgment still passes');
  one.apply(cartCommand(1, [1, 2]));
  one.apply({
    kind: 'weights',
    service: CART,
    instances: [1, 2],
    weights: { roundrobin: [0, 1], closest: [0, 1], fastest: [0, 1] },
  });
  assert.match(out(TCP_SYN), 'node 3');
  one.now += 131_000;
  one.proxy.tick(100_000, one.now);
  assert.is(one.proxy.flows.size, 0);
});

test('weights: 0 is not chosen, and all 0 answers at once that there is none', () => {
  const one = new NodeUnderTest(1);
  const weigh = (weights: readonly number[]): void =>
    one.apply({
      kind: 'weights',
      service: CART,
      instances: [1, 2],
      weights: { roundrobin: weights, closest: weights, fastest: weights },
    });
  weigh([0, 1]);
  for (let port = 1; port < 50; port++)
    assert.is(cartOf(one.leave(udp({ source: CLIENT, target: CART_RR, sourcePort: port }))), 2);
  weigh([0, 0]);
  assert.is(one.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN)), 'no_instance');
  assert.match(one.answers()[0]!, '172.30.0.10.80 > 172.16.0.66.40000: TCP [R.] seq 0 ack 1001');
  assert.is(one.leave(udp({ source: CLIENT, target: CART_RR, sourcePort: 99 })), 'no_instance');
  assert.match(one.answers()[0]!, 'ICMP type 3 code 1');
});

test('ICMP port unreachable from the server reaches the client about what it had sent', () => {
  const one = new NodeUnderTest(1);
  const two = new NodeUnderTest(2);
  one.apply(cartCommand(1, [1]));
  const sent = udp({ source: CLIENT, target: CART_RR, sourcePort: 5000 });
  one.leave(sent);
  two.arrive(one.packet, 1);
  const complaint = icmpError(a('172.16.0.130'), a('172.30.1.1'), 3, 3, two.packet);
  assert.match(two.leave(complaint), 'node 1: 172.30.2.1 > 172.16.0.66: ICMP type 3 code 3');
  assert.ok(sound(two.packet));
  assert.match(one.arrive(two.packet, 2), 'tun: 172.30.0.10 > 172.16.0.66: ICMP type 3 code 3');
  const packet = one.packet;
  assert.ok(sound(packet));
  const quoted = packet.subarray(IPV4.size + ICMP.quote);
  assert.is(printPacket(quoted), printPacket(sent).replace('ttl 64', 'ttl 63'));
  assert.ok(sound(quoted), 'even the quoted checksums are those of the translated packet');
});

test('ICMP errors travel the other way too: the client complains of an answer', () => {
  const one = new NodeUnderTest(1);
  const two = new NodeUnderTest(2);
  one.apply(cartCommand(1, [1]));
  one.leave(udp({ source: CLIENT, target: CART_RR, sourcePort: 5000 }));
  two.arrive(one.packet, 1);
  const answer = udp({
    source: a('172.16.0.130'),
    target: a('172.30.1.1'),
    sourcePort: 80,
    targetPort: 5000,
  });
  two.leave(answer);
  one.arrive(two.packet, 2);
  const complaint = icmpError(CLIENT, CART_RR, 3, 3, one.packet);
  assert.match(one.leave(complaint), 'node 2: 172.30.1.1 > 172.16.0.130: ICMP type 3 code 3');
  assert.match(two.arrive(one.packet, 1), 'tun: 172.30.1.1 > 172.16.0.130: ICMP type 3 code 3');
  const quoted = two.packet.subarray(IPV4.size + ICMP.quote);
  assert.is(printPacket(quoted), printPacket(answer).replace('ttl 64', 'ttl 63'));
});

test('the host that cannot deliver speaks in the name of its instance', () => {
  const two = new NodeUnderTest(2);
  const came = udp({ source: a('172.30.1.1'), target: a('172.16.0.130'), sourcePort: 5000 });
  two.arrive(came, 1);
  assert.match(
    two.leave(icmpError(a('172.16.0.129'), a('172.30.1.1'), 3, 1, came)),
    'node 1: 172.30.2.1 > 172.16.0.66: ICMP type 3 code 1',
  );
  assert.is(two.leave(udp({ source: a('172.16.0.129'), target: CART_RR })), 'spoofed_source');
});

test('ICMP errors about strangers, cut short or about errors are dropped as bad_quote', () => {
  const one = new NodeUnderTest(1);
  const strange = udp({ source: CART_RR, target: OTHER });
  assert.is(one.leave(icmpError(CLIENT, CART_RR, 3, 3, strange)), 'bad_quote');
  assert.is(one.leave(icmpError(CLIENT, CART_RR, 3, 3, strange.subarray(0, 20))), 'bad_quote');
  assert.is(one.leave(icmpError(CLIENT, CART_RR, 3, 3, new Uint8Array(0))), 'bad_quote');
  assert.is(one.arrive(icmpError(CART_1, CLIENT, 3, 3, strange), 2), 'bad_quote');
  // Cart 1 speaks about what was sent to cart 2.
  const toCart2 = udp({ source: a('172.30.1.1'), target: a('172.16.0.194') });
  assert.is(one.arrive(icmpError(CART_1, CLIENT, 3, 3, toCart2), 2), 'bad_quote');
  assert.match(one.arrive(icmpError(CART_2, CLIENT, 3, 3, toCart2), 3), 'tun: 172.30.2.2 >');
  assert.is(one.leave(icmpError(CLIENT, CART_RR, 5, 1, strange)), 'unknown_transport', 'no redirects');
});

test('TTL: 1 ends here with an ICMP error from the address that was dialled', () => {
  const one = new NodeUnderTest(1);
  const packet = udp({ source: CLIENT, target: CART_RR });
  const bytes = newBytes(packet.length);
  bytes.u8.set(packet);
  bytes.u8[IPV4.ttl] = 1;
  finishIpv4(bytes, 0);
  assert.is(one.leave(bytes.u8.slice(0, packet.length)), 'ttl_exceeded');
  assert.match(one.answers()[0]!, '172.30.0.10 > 172.16.0.66: ICMP type 11 code 0');
});

test('path MTU: a packet that must not be cut is answered with the size that fits', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [1]));
  one.leave(udp({ source: CLIENT, target: CART_RR }));
  const { peer } = one.proxy;
  peer!.mtu = 1264;
  peer!.mtuMs = one.now;
  const big = new Uint8Array(1300);
  assert.is(one.leave(udp({ source: CLIENT, target: CART_RR }, big, { fragment: 0x4000 })), 'too_big');
  assert.match(one.answers()[0]!, '172.30.0.10 > 172.16.0.66: ICMP type 3 code 4');
  assert.is(one.proxy.answers.bytes.view.getUint16(one.proxy.answers.at[0]! + IPV4.size + ICMP.mtu), 1264);
  assert.match(one.leave(udp({ source: CLIENT, target: CART_RR }, big)), 'node 2', 'the loop cuts this one');
  one.now += 700_000;
  assert.match(
    one.leave(udp({ source: CLIENT, target: CART_RR }, big, { fragment: 0x4000 })),
    'node 2',
    'forgotten',
  );
});

test('fragments follow their first, also when they come before it', () => {
  const one = new NodeUnderTest(1);
  const body = new Uint8Array(24).fill(5);
  const first = udp({ source: CLIENT, target: CART_RR }, body, { fragment: 0x2000, id: 31 });
  const later = udp({ source: CLIENT, target: CART_RR }, body, { fragment: 0x0004, id: 31 });
  assert.is(one.leave(later), 'held');
  const line = one.leave(first);
  assert.match(line, 'frag 31:32@0+');
  assert.is(one.proxy.hold.due, 1, 'the one that waited may go on');
  const cart = cartOf(line);
  assert.match(
    one.leave(later),
    `node ${cart + 1}: 172.30.1.1 > 172.16.0.${cart === 1 ? 130 : 194}: proto 17 length 32`,
  );
  assert.is(one.leave(udp({ source: OTHER, target: CART_RR }, body, { fragment: 0x0004, id: 31 })), 'held');
  one.now += 31_000;
  one.proxy.tick(0, one.now);
  assert.is(one.counter('drop_fragment_orphan'), 1);
});

test('a miss is reported once a second, and its packet goes on when the route comes', () => {
  const one = new NodeUnderTest(1);
  const unknown = a('172.30.7.7');
  assert.is(one.leave(udp({ source: CLIENT, target: unknown })), 'held');
  assert.is(one.leave(udp({ source: CLIENT, target: unknown })), 'held');
  assert.equal(one.proxy.misses.splice(0), [unknown]);
  one.now += 1_001;
  one.leave(udp({ source: CLIENT, target: unknown }));
  assert.equal(one.proxy.misses.splice(0), [unknown]);
  one.apply({ kind: 'service', service: DB, addresses: { roundrobin: unknown }, instances: [] });
  assert.is(one.proxy.hold.due, 3);
  for (let i = 0; i < 5_000; i++) one.leave(udp({ source: CLIENT, target: a('172.30.8.0') + (i % 4_000) }));
  assert.ok(one.proxy.hold.waiting <= 256 + 128);
  const held = one.counter('packets_held') - 3;
  assert.is(one.counter('drop_unknown_destination'), 5_000 - held, 'those that found no room');
  one.now += 5_000;
  one.proxy.tick(0, one.now);
  assert.ok(one.proxy.hold.waiting <= 3);
  assert.is(one.counter('packets_given_up'), held);
  assert.is(
    one.counter('drop_unknown_destination'),
    5_000,
    'each was held or dropped, and in the end dropped',
  );
});

test('an address that nobody has: who waits for it is told, by the address that it dialled', () => {
  const one = new NodeUnderTest(1);
  const nobody = a('172.30.7.7');
  one.leave(tcp({ source: CLIENT, target: nobody }, TCP_SYN));
  one.leave(udp({ source: CLIENT, target: nobody }));
  one.arrive(udp({ source: nobody, target: CLIENT }), 2);
  assert.is(one.proxy.misses.splice(0).length, 1);
  one.apply({ kind: 'unowned', address: a('172.30.7.8') });
  assert.is(one.proxy.hold.waiting, 3);
  one.apply({ kind: 'unowned', address: nobody });
  assert.is(one.proxy.hold.waiting, 1, 'what came from a stranger waits for its route');
  assert.is(one.counter('packets_given_up'), 2);
  assert.is(one.counter('drop_unknown_destination'), 2);
  assert.is(one.counter('drop_unknown_sender'), 0);
  assert.equal(one.answers(), [
    '172.30.7.7.80 > 172.16.0.66.40000: TCP [R.] seq 0 ack 1001 length 0 (ttl 64)',
    '172.30.7.7 > 172.16.0.66: ICMP type 3 code 1 id 0 length 41 (ttl 64)',
  ]);
  one.leave(tcp({ source: CLIENT, target: nobody }, TCP_SYN));
  assert.equal(one.proxy.misses, [nobody], 'the next one asks at once');
});

test('fragments without a first: one instance keeps its share, and the oldest makes room', () => {
  const one = new NodeUnderTest(1, { mtu: 8_900 });
  const orphan = (source: number, id: number, size = 24): string =>
    one.leave(udp({ source, target: CART_RR }, new Uint8Array(size), { fragment: 0x0004, id }));
  for (let id = 0; id < 200; id++) orphan(CLIENT, id);
  assert.is(one.proxy.hold.waiting, 32);
  assert.is(one.counter('drop_fragments_full'), 168);
  assert.is(orphan(OTHER, 1, 8_800), 'held', 'as large as the MTU lets them be');
  one.leave(udp({ source: OTHER, target: CART_RR }, new Uint8Array(8_800), { fragment: 0x2000, id: 1 }));
  assert.is(one.proxy.hold.due, 1);
});

test('ICMP errors are rationed to each instance by itself', () => {
  const one = new NodeUnderTest(1);
  for (const namespaceIp of [CLIENT, OTHER])
    one.apply({ kind: 'local', namespaceIp, instanceIp: a('172.30.1.1'), service: WEB, needs: [] });
  const ask = (source: number): number => {
    one.leave(udp({ source, target: CART_RR }));
    return one.answers().length;
  };
  let told = 0;
  for (let i = 0; i < 1_000; i++) told += ask(CLIENT);
  assert.is(told, 100);
  assert.is(ask(OTHER), 1);
  one.now += 1_000;
  assert.is(ask(CLIENT), 1);
});

test('misses of one tick are bounded, and those that the underlay makes leave half for the bridge', () => {
  const one = new NodeUnderTest(1);
  for (let i = 0; i < 1_000; i++) one.arrive(udp({ source: a('172.30.9.0') + i, target: CLIENT }), 2);
  assert.is(one.proxy.misses.length, 32);
  for (let i = 0; i < 1_000; i++) one.leave(udp({ source: CLIENT, target: a('172.30.8.0') + i }));
  assert.is(one.proxy.misses.splice(0).length, 64);
  one.leave(udp({ source: CLIENT, target: a('172.30.8.99') }));
  assert.equal(one.proxy.misses, [a('172.30.8.99')], 'what did not fit is reported the next time');
});

test('a data packet from a port that its node has not proved is doubted, and teaches nothing', () => {
  const two = new NodeUnderTest(2);
  const packet = udp({ source: a('172.30.1.1'), target: a('172.16.0.130') });
  for (const port of [61_000, 0]) {
    assert.is(two.arrive(packet, 1, port), 'spoofed_sender');
    assert.is(two.proxy.doubted?.subnet, a('172.16.0.64'));
  }
  two.leave(udp({ source: a('172.16.0.130'), target: a('172.30.1.1') }));
  assert.is(two.proxy.peer!.targetPort(two.now), 4790);
  // Proved (control.test.ts), it is where answers go, until it has been silent for long or its record has moved.
  two.proxy.peer!.learn(a('10.0.0.1'), 61_000, two.now);
  assert.match(two.arrive(packet, 1, 61_000), 'tun');
  assert.is(two.proxy.peer!.targetPort(two.now), 61_000);
  assert.match(two.arrive(packet, 1), 'tun', 'the endpoint of the keyspace stays good');
  assert.is(two.proxy.peer!.targetPort(two.now), 61_000, 'and does not win over the proved one');
  assert.is(two.proxy.peer!.targetPort(two.now + 80_000), 4790, 'what was seen ages');
  two.proxy.peer!.place(a('10.0.0.9'), 4790);
  assert.is(two.proxy.peer!.targetIp(two.now), a('10.0.0.9'));
});

test('a node keeps where it was seen while its only instance is restarted', () => {
  const one = new NodeUnderTest(1);
  one.apply(cartCommand(1, [2]));
  one.leave(udp({ source: CLIENT, target: CART_RR }));
  const { peer } = one.proxy;
  peer!.learn(a('10.0.0.3'), 61_000, one.now);
  one.apply(cartCommand(1, []));
  one.now += 60_000;
  one.proxy.tick(0, one.now);
  one.apply(cartCommand(1, [2]));
  one.leave(udp({ source: CLIENT, target: CART_RR, sourcePort: 2 }));
  assert.is(one.proxy.peer, peer);
  assert.is(peer!.targetPort(one.now), 61_000);
  one.apply(cartCommand(1, []));
  one.proxy.tick(0, one.now);
  one.now += 400_000;
  one.proxy.tick(0, one.now);
  assert.not(one.proxy.routes.peers.has(peer!.subnet));
});

test('a local instance that is gone may not send, and its flows go with it', () => {
  const one = new NodeUnderTest(1);
  one.leave(udp({ source: CLIENT, target: CART_RR }));
  one.apply({ kind: 'localGone', namespaceIp: CLIENT });
  assert.is(one.proxy.flows.size, 0);
  assert.is(one.leave(udp({ source: CLIENT, target: CART_RR })), 'spoofed_source');
});

test('serviceGone: its addresses are unknown from then on', () => {
  const one = new NodeUnderTest(1);
  one.apply({ kind: 'serviceGone', service: CART });
  assert.is(one.leave(udp({ source: CLIENT, target: CART_RR })), 'held');
  assert.is(one.leave(udp({ source: CLIENT, target: CART_1 })), 'held');
});

test.run();
