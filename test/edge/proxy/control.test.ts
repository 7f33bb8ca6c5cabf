// Control frames between nodes without sockets: a frame is delivered by hand, as often and wherever the test likes.
import { createHmac } from 'node:crypto';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Prober } from '../../../edge/probe.ts';
import { Control } from '../../../edge/proxy/control.ts';
import type { Peer } from '../../../edge/proxy/peers.ts';
import { ipv4 } from '../../../src/addr.ts';
import {
  PEER_ANSWERS_BURST,
  PEER_ANSWERS_PER_S,
  PROBE_STATUS_BYTES,
  PROBE_STATUS_BYTES_MAX,
  STRANGER_ANSWERS_PER_S,
} from '../../../src/limits.ts';
import { Rng } from '../../../src/rng.ts';
import { newBytes } from '../../../src/wire/bytes.ts';
import { decodeProbeStatus, encodeProbeStatus } from '../../../src/wire/probe.ts';
import { CONTROL, CONTROL_KIND, CONTROL_PROOF_BYTES, writeControl } from '../../../src/wire/tunnel.ts';
import { a, NodeUnderTest } from './world.ts';

interface Sent {
  readonly frame: Uint8Array;
  readonly ip: number;
  readonly port: number;
}

/** A node that speaks: node n of the world, at 10.0.0.n:4790. */
class Speaker {
  readonly node: NodeUnderTest;
  readonly control: Control;
  readonly sent: Sent[] = [];
  readonly probed: number[] = [];
  readonly statuses: Uint8Array[] = [];
  wallUs = 1e15;
  #token = 1_000;

  constructor(n: number, secret = 'secret', node = new NodeUnderTest(n), statusBytes = PROBE_STATUS_BYTES) {
    this.node = node;
    const bytes = newBytes(CONTROL.size + statusBytes);
    const config = { vni: 0x4557, subnetBase: a(`172.16.0.${64 * n}`) } as ConstructorParameters<
      typeof Control
    >[0];
    this.control = new Control(config, node.proxy.routes, node.proxy.counters, bytes, {
      send: (length, ip, port) => this.sent.push({ frame: bytes.u8.slice(0, length), ip, port }) > 0,
      prove: (head, tail) => createHmac('sha256', secret).update(head).update(tail).digest(),
      token: () => this.#token++,
      wallUs: () => this.wallUs,
      report: ({ token, status }) => {
        this.probed.push(token);
        this.statuses.push(status);
      },
    });
  }

  peer(n: number): Peer | undefined {
    return this.node.proxy.routes.peers.get(a(`172.16.0.${64 * n}`));
  }

  hear(frame: Uint8Array, ip: string, port = 4790): void {
    const bytes = newBytes(400);
    bytes.u8.set(frame, 8);
    this.control.take(bytes, 8, frame.length, a(ip), port, this.node.now);
  }

  /** What it said last, for all to hear. */
  take(): Uint8Array {
    return this.sent.pop()!.frame;
  }

  greet(n: number): Uint8Array {
    const before = this.sent.length;
    this.control.challenge(this.peer(n)!, a(`10.0.0.${n}`), 4790, this.node.now);
    assert.is(this.sent.length, before + 1);
    return this.take();
  }

  counter(name: string): number {
    return this.node.counter(name);
  }
}

test('a greeting is answered, and both know where the other is', () => {
  const [one, two] = [new Speaker(1), new Speaker(2)];
  two.hear(one.greet(2), '10.78.0.50', 61_000);
  assert.equal([two.peer(1)!.seenIp, two.peer(1)!.seenPort], [a('10.78.0.50'), 61_000]);
  assert.equal([two.sent[0]!.ip, two.sent[0]!.port], [a('10.78.0.50'), 61_000]);
  one.hear(two.take(), '10.0.0.2');
  assert.is(one.peer(2)!.seenPort, 4790);
});

test('who only sends data from another port is asked to prove it, four times a second at most', () => {
  const [one, two] = [new Speaker(1), new Speaker(2)];
  const peer = two.peer(1)!;
  for (let i = 0; i < 100; i++) two.control.challenge(peer, a('10.0.0.1'), 50_000 + i, two.node.now);
  assert.is(two.sent.length, 1);
  two.control.challenge(peer, a('10.0.0.1'), 0, two.node.now + 1_000);
  assert.is(two.sent.length, 1, 'nobody is at port 0');
  // The node is there: its answer proves it.
  one.hear(two.take(), '10.0.0.2');
  two.hear(one.take(), '10.0.0.1', 50_000);
  assert.is(peer.targetPort(two.node.now), 50_000);
});

test('what was said to one node convinces no other, and what was said once convinces nobody again', () => {
  const [one, two, three] = [new Speaker(1), new Speaker(2), new Speaker(3)];
  const toTwo = one.greet(2);
  three.hear(toTwo, '203.0.113.9', 6_666);
  assert.is(three.counter('drop_misdirected_control'), 1);
  assert.is(three.peer(1)!.seenPort, 0);
  two.hear(toTwo, '10.0.0.1');
  two.sent.length = 0;
  two.hear(toTwo, '203.0.113.9', 6_666);
  assert.is(two.counter('drop_old_control'), 1);
  assert.is(two.peer(1)!.targetIp(two.node.now), a('10.0.0.1'));
  assert.is(two.sent.length, 1, 'it is asked to prove itself, and cannot');
});

test('a node whose clock was set back is believed again within a round trip', () => {
  const two = new Speaker(2);
  two.hear(new Speaker(1).greet(2), '10.0.0.1');
  const restarted = new Speaker(1);
  restarted.wallUs = 1e15 - 3_600e6;
  two.sent.length = 0;
  two.hear(restarted.greet(2), '10.0.0.1', 7_000);
  assert.is(two.peer(1)!.seenPort, 4790, 'not at once');
  restarted.hear(two.take(), '10.0.0.2');
  two.hear(restarted.take(), '10.0.0.1', 7_000);
  assert.is(two.peer(1)!.seenPort, 7_000);
  restarted.node.now += 1_000;
  two.hear(restarted.greet(2), '10.0.0.1', 7_001);
  assert.is(two.peer(1)!.seenPort, 7_001, 'and its own greetings count again');
});

test('a proof under another secret, a frame from port 0 and every altered octet are bad_control', () => {
  const [one, two] = [new Speaker(1), new Speaker(2)];
  two.hear(new Speaker(1, 'another').greet(2), '10.0.0.1');
  const frame = one.greet(2);
  two.hear(frame, '10.0.0.1', 0);
  assert.is(two.counter('drop_bad_control'), 2);
  // Flags, next protocol and VNI are looked at before (readTunnel), reserved octets are proved like the rest.
  for (let i = 0; i < frame.length; i++) {
    const altered = frame.slice();
    altered[i]! ^= 0x40;
    two.hear(altered, '10.0.0.1');
  }
  for (let length = 0; length < frame.length; length++) two.hear(frame.subarray(0, length), '10.0.0.1');
  assert.is(two.counter('drop_bad_control'), 2 + 2 * frame.length);
  assert.is(two.counter('control_received'), 0);
  assert.is(two.sent.length, 0);
});

test('a probe is answered with the status, also one to a node that no route names', () => {
  const [one, two] = [new Speaker(1), new Speaker(2)];
  two.control.status = new Uint8Array([1, 2, 3]);
  one.control.probe(7, a('10.0.0.2'), 4790, one.node.now);
  const probe = one.take();
  assert.is(probe[CONTROL.kind], CONTROL_KIND.probe);
  two.hear(probe, '10.0.0.1');
  const answer = two.take();
  assert.equal([...answer.subarray(CONTROL.size)], [1, 2, 3]);
  one.hear(answer, '10.0.0.2');
  one.hear(answer, '10.0.0.2');
  assert.equal(one.probed, [7], 'once');
  one.control.probe(8, a('10.0.0.77'), 4790, one.node.now);
  const seen = two.peer(1)!.seenMs;
  two.node.now += 5;
  two.hear(one.take(), '10.0.0.200');
  assert.is(two.sent.length, 1);
  assert.is(two.peer(1)!.seenMs, seen, 'what was said to anybody proves no place');
});

test('proved frames are taken at the lengths that are documented: a status of 0…256 octets in an answer, else nothing', () => {
  const two = new Speaker(2);
  const prove = (bytes: Uint8Array): Uint8Array =>
    createHmac('sha256', 'secret')
      .update(bytes.subarray(0, CONTROL.proof))
      .update(bytes.subarray(CONTROL.size))
      .digest()
      .subarray(0, CONTROL_PROOF_BYTES);
  const [subnet, target] = [a('172.16.0.64'), a('172.16.0.128')];
  let stampUs = 1e15;
  for (const kind of [0, ...Object.values(CONTROL_KIND), 5])
    for (let more = 0; more <= PROBE_STATUS_BYTES_MAX + 8; more++) {
      const bytes = newBytes(CONTROL.size + more);
      writeControl(bytes, 0, 0x4557, { kind, token: 1, subnet, target, stampUs: ++stampUs });
      bytes.u8.set(prove(bytes.u8), CONTROL.proof);
      const bad = two.counter('drop_bad_control');
      two.hear(bytes.u8, '10.0.0.1');
      const known = kind >= CONTROL_KIND.hello && kind <= CONTROL_KIND.probeBack;
      const fits = more <= (kind === CONTROL_KIND.probeBack ? PROBE_STATUS_BYTES_MAX : 0);
      assert.is(two.counter('drop_bad_control') === bad, known && fits, `kind ${kind}, ${more} octets more`);
    }
});

test('the status of a newer version arrives whole, what it appended included', () => {
  const [one, two] = [new Speaker(1), new Speaker(2, 'secret', new NodeUnderTest(2), PROBE_STATUS_BYTES_MAX)];
  const status = { subnet: ipv4(a('172.16.0.128')), liveLow: 5, liveHigh: 0 };
  two.control.status = new Uint8Array([...encodeProbeStatus(status), 1, 2, 3]);
  one.control.probe(7, a('10.0.0.2'), 4790, one.node.now);
  two.hear(one.take(), '10.0.0.1');
  one.hear(two.take(), '10.0.0.2');
  assert.is(one.statuses[0]!.length, PROBE_STATUS_BYTES + 3);
  const decoded = decodeProbeStatus(one.statuses[0]!);
  assert.ok(decoded.ok && decoded.value.liveLow === 5);
});

test("a node that asks without end is answered at a bounded rate, which is nobody else's loss", () => {
  const [one, two, three] = [new Speaker(1), new Speaker(2), new Speaker(3)];
  const flood = (count: number): number => {
    two.sent.length = 0;
    for (let token = 0; token < count; token++) {
      one.control.probe(token, a('10.0.0.2'), 4790, one.node.now);
      two.hear(one.take(), '10.0.0.1');
    }
    return two.sent.length;
  };
  assert.is(flood(1_000), PEER_ANSWERS_BURST);
  assert.is(two.counter('drop_excess_control'), 1_000 - PEER_ANSWERS_BURST);
  two.hear(one.greet(2), '10.0.0.1', 5_000);
  assert.is(two.sent.length, PEER_ANSWERS_BURST, 'greetings draw from the same');
  assert.is(two.peer(1)!.seenPort, 5_000, 'what it proves stands');
  three.control.probe(1, a('10.0.0.2'), 4790, three.node.now);
  two.hear(three.take(), '10.0.0.3');
  assert.is(two.sent.length, PEER_ANSWERS_BURST + 1);
  two.node.now += 1_000;
  assert.is(flood(1_000), PEER_ANSWERS_PER_S);
});

test('nodes beyond those that are remembered share a bound of answers', () => {
  const two = new Speaker(2);
  for (let n = 0; n < 3_000; n++) two.node.proxy.routes.meet(0xac110000 + n * 64, two.node.now);
  const stranger = new Speaker(0);
  assert.is(two.peer(0), undefined);
  for (let token = 0; token < STRANGER_ANSWERS_PER_S + 100; token++) {
    stranger.control.probe(token, a('10.0.0.77'), 4790, stranger.node.now);
    two.hear(stranger.take(), '10.0.0.9');
  }
  assert.is(two.sent.length, STRANGER_ANSWERS_PER_S);
  assert.is(two.counter('drop_excess_control'), 100);
});

test('no prober comes near the bound: watched, explored at its fastest, with answers that get lost and come back', () => {
  const [one, two] = [new Speaker(1), new Speaker(2)];
  const rng = new Rng(5);
  const prober = new Prober({ rng, nonce: () => rng.u32(), nowMs: 0 });
  const subnet = a('172.16.0.128');
  prober.setPeers([{ node: 'n2', nodeIp: a('10.0.0.2'), ewp: 4790, subnet }], 0);
  prober.setFollowed(new Map([['service', ['n2']]]));
  const start = two.node.now;
  let perSecond = 0;
  for (let second = 0; second < 600; second++) {
    let asked = 0;
    for (let now = second * 1_000; now < (second + 1) * 1_000; now += 10) {
      one.node.now = two.node.now = start + now;
      if (prober.deadline().at <= now) prober.handleTimeout(now);
      for (let output = prober.poll(); output !== undefined; output = prober.poll()) {
        if (output.kind !== 'send') continue;
        asked++;
        one.control.probe(output.nonce, output.nodeIp, output.ewp, one.node.now);
        two.hear(one.take(), '10.0.0.1');
        const answer = { nonce: output.nonce, rttMs: 1, subnet, liveLow: 0, liveHigh: 0 };
        if (second < 20 || second % 30 > 4) prober.handleAnswer(answer, now);
      }
    }
    perSecond = Math.max(perSecond, asked);
    two.hear(one.greet(2), '10.0.0.1');
    one.node.now += 1_000;
  }
  assert.is(two.counter('drop_excess_control'), 0);
  assert.ok(perSecond >= 5 && perSecond <= 9, `${perSecond}/s`);
});

test('who greets before a route names it is known when one does; such are bounded', () => {
  const two = new Speaker(2);
  two.node.apply({ kind: 'serviceGone', service: 'shop.prod.web.v1' as never });
  two.node.now += 1_000_000;
  two.node.proxy.tick(0, two.node.now);
  two.node.now += 1_000_000;
  two.node.proxy.tick(0, two.node.now);
  assert.is(two.peer(1), undefined);
  two.hear(new Speaker(1).greet(2), '10.78.0.50', 61_000);
  const { routes } = two.node.proxy;
  for (let n = 0; n < 3_000; n++) routes.meet(0xac110000 + n * 64, two.node.now);
  assert.ok(routes.peers.size <= 1_024 + 2);
  const web = new NodeUnderTest(2).proxy.routes.instance(a('172.30.1.1'))!;
  two.node.apply({
    kind: 'service',
    service: web.service.id,
    addresses: {},
    instances: [
      {
        instance: 1,
        instanceIp: a('172.30.1.1'),
        namespaceIp: a('172.16.0.66'),
        nodeIp: a('10.0.0.1'),
        ewp: 4790,
        local: false,
      },
    ],
  });
  assert.is(two.peer(1)!.targetPort(two.node.now), 61_000);
  two.node.now += 1_000_000;
  two.node.proxy.tick(0, two.node.now);
  assert.is(routes.peers.size, 2, 'node 1 and node 3: the others were silent for long');
});

test('a node that calls is greeted without a route, also where a route named it before, until it calls no more', () => {
  const two = new Speaker(2);
  const place = { subnet: a('172.17.0.64'), nodeIp: a('10.0.0.9'), ewp: 4_791 };
  const own = { subnet: a('172.16.0.128'), nodeIp: a('10.0.0.9'), ewp: 4_791 };
  const one = { subnet: a('172.16.0.64'), nodeIp: a('10.0.0.1'), ewp: 4790 };
  const greeted = (): number[] => {
    two.sent.length = 0;
    two.node.now += 60_000;
    two.control.tick(two.node.now);
    return two.sent.map(({ ip }) => ip);
  };
  const { peers } = two.node.proxy.routes;
  two.node.apply({ kind: 'callers', nodes: [place, place, own, one] });
  assert.ok(greeted().includes(place.nodeIp));
  assert.not.ok(peers.has(own.subnet), 'not itself');
  two.node.apply({ kind: 'serviceGone', service: 'shop.prod.web.v1' as never });
  two.node.now += 1_000_000;
  two.node.proxy.tick(0, two.node.now);
  assert.ok(greeted().includes(one.nodeIp));
  two.node.apply({ kind: 'callers', nodes: [{ ...place, nodeIp: a('10.0.0.8') }] });
  assert.ok(greeted().includes(a('10.0.0.8')), 'where its record says now');
  two.node.apply({ kind: 'callers', nodes: [] });
  two.node.proxy.tick(0, two.node.now);
  two.node.now += 1_000_000;
  two.node.proxy.tick(0, two.node.now);
  assert.not.ok(peers.has(place.subnet) || peers.has(one.subnet));
  assert.equal(greeted(), [a('10.0.0.3')], 'whom a route names');
});

test.run();
