// Everything that comes from a TUN or from the underlay, broken in every way: nothing may throw, loop or touch memory
// outside the packet; what is not understood is a counted, named drop.
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { CONTROL_BYTES, Control } from '../../edge/proxy/control.ts';
import { Cutter, Joiner } from '../../edge/proxy/segment.ts';
import { COUNTER_NAMES } from '../../edge/proxy/verdict.ts';
import { Rng } from '../../src/rng.ts';
import { newBytes } from '../../src/wire/bytes.ts';
import { checkIpv4, finishIpv4 } from '../../src/wire/ipv4.ts';
import { printPacket } from '../../src/wire/print.ts';
import { checkTcp } from '../../src/wire/tcp.ts';
import { readControl, readTunnel, writeControl } from '../../src/wire/tunnel.ts';
import {
  AT,
  a,
  CART_1,
  CART_RR,
  CLIENT,
  config,
  DB_RR,
  echo,
  icmpError,
  NodeUnderTest,
  tcp,
  udp,
} from '../edge/proxy/world.ts';

const SEED = 20_261_121;
const good: readonly Uint8Array[] = [
  tcp({ source: CLIENT, target: CART_RR }, 0x02),
  tcp({ source: CLIENT, target: DB_RR }, 0x18, new Uint8Array(40)),
  tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 }, 0x12),
  udp({ source: CLIENT, target: CART_RR, sourcePort: 65_535, targetPort: 65_535 }),
  udp({ source: CART_1, target: CLIENT }),
  udp({ source: CLIENT, target: CART_RR }, new Uint8Array(32), { fragment: 0x2000 }),
  udp({ source: CLIENT, target: CART_RR }, new Uint8Array(32), { fragment: 0x0005 }),
  echo({ source: CLIENT, target: CART_RR }, 8),
  echo({ source: CART_1, target: CLIENT }, 0),
  icmpError(CLIENT, CART_RR, 3, 3, udp({ source: CART_RR, target: CLIENT })),
  icmpError(CART_1, CLIENT, 3, 4, udp({ source: a('172.30.1.1'), target: a('172.16.0.130') })),
];

/** Inputs that once broke something, with what they broke. */
const KEPT: readonly (readonly [string, Uint8Array])[] = [
  ['an empty datagram stopped the reference proxy (oakestra.md §10, 1)', new Uint8Array(0)],
  [
    'port 65535 stopped it too',
    udp({ source: CART_1, target: CLIENT, targetPort: 65_535, sourcePort: 65_535 }),
  ],
];

function finishIpv4Of(packet: Uint8Array): void {
  if ((packet[0]! & 15) * 4 > packet.length || (packet[0]! & 15) < 5) return;
  const bytes = newBytes(packet.length);
  bytes.u8.set(packet);
  finishIpv4(bytes, 0);
  packet.set(bytes.u8.subarray(0, packet.length));
}

const COUNTED = [...COUNTER_NAMES.keys()].filter((i) => /^drop_|_held$/.test(COUNTER_NAMES[i]!));

function drops(node: NodeUnderTest): number {
  let total = 0;
  for (const i of COUNTED) total += node.proxy.counters[i]!;
  return total;
}

/** Junk lies all around the packet; it must be the same afterwards. */
function feed(
  node: NodeUnderTest,
  packet: Uint8Array,
  arriving: boolean,
  partial: boolean,
  segment: number,
): void {
  const { bytes, proxy } = node;
  const end = AT + packet.length;
  bytes.u8.fill(0xee, 0, end + 64);
  bytes.u8.set(packet, AT);
  const before = drops(node);
  const verdict = arriving
    ? proxy.arriving(bytes, AT, packet.length, partial, a('10.0.0.2'), 4790, node.now)
    : proxy.leaving(bytes, AT, packet.length, partial, segment, node.now);
  assert.ok(verdict >= 0 && verdict <= 3);
  if (verdict === 0) assert.ok(drops(node) > before, `silent: ${printPacket(packet)}`);
  for (let i = 0; i < AT; i++)
    assert.is(bytes.u8[i], 0xee, `wrote before the packet: ${printPacket(packet)}`);
  for (let i = end; i < end + 64; i++)
    assert.is(bytes.u8[i], 0xee, `wrote behind the packet: ${printPacket(packet)}`);
  proxy.answers.clear();
}

test('leaving and arriving survive every truncation of every kind of packet', () => {
  const node = new NodeUnderTest(1);
  for (const packet of [...good, ...KEPT.map(([, packet]) => packet)])
    for (let length = 0; length <= packet.length; length++)
      for (const arriving of [true, false]) feed(node, packet.subarray(0, length), arriving, false, 0);
});

test('leaving and arriving survive 150,000 mutations, with and without a repaired header checksum', () => {
  const rng = new Rng(SEED);
  let node = new NodeUnderTest(1);
  for (let i = 0; i < 150_000; i++) {
    if (i % 10_000 === 0) node = new NodeUnderTest(1, { flowsMax: 64 });
    const packet = good[rng.below(good.length)]!.slice();
    for (let n = rng.below(4); n >= 0; n--) packet[rng.below(packet.length)] = rng.u32();
    if (rng.below(4) === 0) packet[0] = 0x40 | (5 + rng.below(11));
    if (rng.below(3) !== 0) finishIpv4Of(packet);
    node.now += rng.below(200);
    const segment = rng.below(10) === 0 ? rng.below(2_000) : 0;
    feed(node, packet, rng.below(2) === 0, rng.below(5) === 0, segment);
    if (rng.below(500) === 0) node.proxy.tick(64, node.now);
  }
});

test('the tunnel header, control frames, the joiner and the printer survive noise of every length', () => {
  const rng = new Rng(SEED + 1);
  const bytes = newBytes(4_096);
  for (let i = 0; i < 100_000; i++) {
    const length = rng.below(200);
    for (let n = 0; n < length; n++) bytes.u8[n] = rng.u32();
    if (rng.below(2) === 0) bytes.u8.set([0x0c, 0, 0, rng.below(2) === 0 ? 1 : 0xfe, 0, 0x45, 0x57, 0]);
    readTunnel(bytes, 0, length, 0x4557);
    readControl(bytes, 0, length);
    printPacket(bytes.u8.subarray(0, length));
    bytes.u8[8] = 0x45;
    if (length > 28 && checkIpv4(bytes, 8, length - 8) === 0) new Joiner().open(bytes, 8);
  }
});

test('control frames survive 50,000 mutations, and none but the whole ones convince', () => {
  const rng = new Rng(SEED + 3);
  const node = new NodeUnderTest(1);
  const out = newBytes(CONTROL_BYTES);
  // A proof of sums: what is tested is what becomes of a frame, not the HMAC.
  const prove = (head: Uint8Array, tail: Uint8Array): Uint8Array => {
    const proof = new Uint8Array(32);
    for (const piece of [head, tail]) for (const [i, octet] of piece.entries()) proof[i & 15]! += octet ^ i;
    return proof;
  };
  let sent = 0;
  const control = new Control(config(1), node.proxy.routes, node.proxy.counters, out, {
    send: () => ++sent > 0,
    prove,
    token: () => rng.u32(),
    wallUs: () => 1e15 + node.now * 1_000,
    report: () => {},
  });
  const bytes = newBytes(256);
  const counter = (name: string): number => node.counter(name);
  for (let i = 0; i < 50_000; i++) {
    const kind = 1 + rng.below(4);
    const length = CONTROL_BYTES - (kind === 4 ? rng.below(65) : 64);
    const subnet = a('172.16.0.0') + 64 * rng.below(2_000);
    const target = rng.below(8) === 0 ? 0 : a('172.16.0.64');
    writeControl(bytes, 8, 0x4557, { kind, token: rng.u32(), subnet, target, stampUs: rng.below(1e6) });
    const proof = prove(bytes.u8.subarray(8, 40), bytes.u8.subarray(56, 8 + length)).subarray(0, 16);
    bytes.u8.set(proof, 40);
    const whole = rng.below(2) === 0;
    if (!whole) bytes.u8[16 + rng.below(length - 8)]! ^= 1 + rng.below(255);
    const before = [
      counter('control_received'),
      counter('drop_bad_control'),
      counter('drop_misdirected_control'),
    ];
    control.take(
      bytes,
      8,
      rng.below(20) === 0 ? rng.below(length) : length,
      rng.u32(),
      rng.below(3),
      node.now,
    );
    const after = [
      counter('control_received'),
      counter('drop_bad_control'),
      counter('drop_misdirected_control'),
    ];
    assert.is(
      after.reduce((sum, n, j) => sum + n - before[j]!, 0),
      1,
      'taken, or dropped by name',
    );
    if (!whole) assert.is(after[0], before[0], `an altered frame was believed, case ${i}`);
    node.now += rng.below(100);
    if (rng.below(100) === 0) control.tick(node.now);
  }
  assert.ok(sent > 1_000);
  assert.ok(node.proxy.routes.peers.size <= 1_100);
});

test('the cutter survives super-packets of any header and any segment size, and stays within its memory', () => {
  const rng = new Rng(SEED + 4);
  const cutter = new Cutter(0x4557);
  const bytes = newBytes(70_000);
  for (let i = 0; i < 3_000; i++) {
    const tuple = { source: CLIENT, target: CART_RR };
    const body = new Uint8Array(rng.below(rng.below(20) === 0 ? 60_000 : 3_000));
    const packet = rng.below(2) === 0 ? tcp(tuple, 0x18, body) : udp(tuple, body);
    for (let n = rng.below(3); n > 0; n--) packet[rng.below(Math.min(packet.length, 48))] = rng.u32();
    finishIpv4Of(packet);
    bytes.u8.set(packet, 64);
    // As the loop does: what is no packet was dropped before.
    if (checkIpv4(bytes, 64, packet.length) !== 0) continue;
    const at = 64 + (bytes.u8[64]! & 15) * 4;
    const rest = bytes.view.getUint16(66) - (at - 64);
    if (bytes.u8[64 + 9] === 6 ? !checkTcp(bytes, at, rest) : rest < 8) continue;
    const size = rng.below(3) === 0 ? rng.below(80) : rng.below(65_536);
    if (cutter.segments(bytes, 64, size) > cutter.room) cutter.release();
    if (!cutter.cut(bytes, 64, size)) continue;
    let payload = 0;
    for (let n = 0; n < cutter.count; n++) {
      assert.ok(cutter.headerAt[n]! + cutter.headerLength <= cutter.headers.u8.length);
      assert.ok(cutter.bodyAt[n]! >= 64 && cutter.bodyAt[n]! + cutter.bodyLength[n]! <= 64 + packet.length);
      payload += cutter.bodyLength[n]!;
    }
    assert.is(payload + cutter.headerLength - 8, bytes.view.getUint16(66));
  }
});

test('the joiner survives packets that are nearly one flow', () => {
  const rng = new Rng(SEED + 2);
  const bytes = newBytes(8_192);
  const tuple = { source: CART_1, target: CLIENT };
  for (let i = 0; i < 20_000; i++) {
    const joiner = new Joiner();
    let at = 64;
    for (let n = 0; n < 4; n++) {
      const packet = tcp(tuple, 0x10, new Uint8Array(rng.below(60)), { sequence: rng.below(3) * 50 });
      if (rng.below(3) === 0) packet[20 + rng.below(packet.length - 20)] = rng.u32();
      bytes.u8.set(packet, at);
      if (n === 0) joiner.open(bytes, at);
      else joiner.add(bytes, at);
      at += 128;
    }
    if (joiner.count > 1) joiner.finish(bytes);
  }
});

test.run();
