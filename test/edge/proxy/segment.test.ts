import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { cutIntoFragments } from '../../../edge/proxy/fragments.ts';
import { Cutter, Joiner } from '../../../edge/proxy/segment.ts';
import { Rng } from '../../../src/rng.ts';
import { type Bytes, newBytes } from '../../../src/wire/bytes.ts';
import { vectorBytes } from '../../../src/wire/checksum_simd.ts';
import { finishIpv4, IPV4, PROTOCOL } from '../../../src/wire/ipv4.ts';
import { finishTcp, TCP } from '../../../src/wire/tcp.ts';
import { FRAME, readTunnel, TUNNEL } from '../../../src/wire/tunnel.ts';
import { finishUdp, UDP } from '../../../src/wire/udp.ts';
import { a, tcp, udp } from './world.ts';

const VNI = 0x4557;
const tuple = { source: a('172.30.1.1'), target: a('172.16.0.130') };

function random(rng: Rng, length: number): Uint8Array {
  const out = new Uint8Array(length);
  for (let i = 0; i < length; i++) out[i] = rng.u32();
  return out;
}

/** Segmentation as RFC 9293 and RFC 768 would have sent it from the start: every packet built and summed from scratch. */
function naiveCut(packet: Uint8Array, size: number): Uint8Array[] {
  const whole = newBytes(packet.length);
  whole.u8.set(packet);
  const isTcp = packet[IPV4.protocol] === PROTOCOL.tcp;
  const header = IPV4.size + (isTcp ? (packet[IPV4.size + TCP.offset]! >> 4) * 4 : UDP.size);
  const result: Uint8Array[] = [];
  for (let done = header; done < packet.length; done += size) {
    const body = packet.subarray(done, Math.min(done + size, packet.length));
    const last = done + size >= packet.length;
    const total = header + body.length;
    const out = newBytes(total);
    out.u8.set(packet.subarray(0, header));
    out.u8.set(body, header);
    out.view.setUint16(IPV4.total, total);
    out.view.setUint16(IPV4.id, whole.view.getUint16(IPV4.id) + result.length);
    finishIpv4(out, 0);
    if (isTcp) {
      out.view.setUint32(
        IPV4.size + TCP.sequence,
        whole.view.getUint32(IPV4.size + TCP.sequence) + done - header,
      );
      let flags = packet[IPV4.size + TCP.flags]!;
      if (!last) flags &= ~0x09;
      if (result.length > 0) flags &= ~0x80;
      out.u8[IPV4.size + TCP.flags] = flags;
      finishTcp(out, IPV4.size, total - IPV4.size, tuple.source, tuple.target);
    } else {
      out.view.setUint16(IPV4.size + UDP.length, total - IPV4.size);
      finishUdp(out, IPV4.size, total - IPV4.size, tuple.source, tuple.target);
    }
    result.push(out.u8.slice(0, total));
  }
  return result;
}

/** What the cutter's lists say, gathered. */
function gather(cutter: Cutter, bytes: Bytes): Uint8Array[] {
  return Array.from({ length: cutter.count }, (_, i) => {
    const head = cutter.headers.u8.subarray(cutter.headerAt[i]!, cutter.headerAt[i]! + cutter.headerLength);
    const body = bytes.u8.subarray(cutter.bodyAt[i]!, cutter.bodyAt[i]! + cutter.bodyLength[i]!);
    const out = newBytes(head.length + body.length);
    out.u8.set(head);
    out.u8.set(body, head.length);
    assert.is(readTunnel(out, 0, head.length + body.length, VNI), FRAME.ipv4);
    return out.u8.slice(TUNNEL.size, head.length + body.length);
  });
}

test('Cutter.cut equals the naive twin, byte for byte, for TCP with flags and UDP, with and without vectors', () => {
  const rng = new Rng(21);
  const memories = [newBytes(70_000), vectorBytes(70_000)!];
  const cutter = new Cutter(VNI);
  for (let i = 0; i < 300; i++) {
    const size = rng.below(5) === 0 ? 1 + rng.below(60) + 64 : 500 + rng.below(1000);
    const length = Math.min(65_000, 1 + rng.below(size * 50));
    const payload = random(rng, length);
    const packet =
      rng.below(3) === 0
        ? udp(tuple, payload)
        : tcp(tuple, [0x10, 0x18, 0x19, 0x90, 0x11][rng.below(5)]!, payload, { sequence: rng.u32() });
    const bytes = memories[i % 2]!;
    const at = 64 + rng.below(4);
    bytes.u8.set(packet, at);
    cutter.release();
    assert.is(cutter.segments(bytes, at, size), Math.ceil(length / size));
    assert.ok(cutter.cut(bytes, at, size));
    assert.equal(gather(cutter, bytes), naiveCut(packet, size), `case ${i}`);
  }
});

test('Cutter.cut refuses what it cannot cut: other protocols, no payload, too many pieces', () => {
  const cutter = new Cutter(VNI);
  const bytes = newBytes(70_000);
  bytes.u8.set(tcp(tuple, 0x10), 64);
  assert.not(cutter.cut(bytes, 64, 1000));
  bytes.u8.set(tcp(tuple, 0x10, new Uint8Array(60_000)), 64);
  assert.not(cutter.cut(bytes, 64, 0));
  assert.not(cutter.cut(bytes, 64, 8));
  bytes.u8[64 + IPV4.protocol] = PROTOCOL.icmp;
  assert.not(cutter.cut(bytes, 64, 1000));
});

test('Cutter: headers that are in use are never written over, however small the segments', () => {
  const cutter = new Cutter(VNI);
  const bytes = newBytes(70_000);
  // 273 segments each: eight of them are more than there are slots.
  const packets = Array.from({ length: 8 }, (_, n) => tcp(tuple, 0x10, new Uint8Array(65_400).fill(n)));
  const held: { readonly at: number; readonly was: Uint8Array }[] = [];
  let cuts = 0;
  for (const packet of packets) {
    bytes.u8.set(packet, 64);
    if (cutter.segments(bytes, 64, 240) > cutter.room) assert.not(cutter.cut(bytes, 64, 240));
    else {
      assert.ok(cutter.cut(bytes, 64, 240));
      cuts++;
      for (let i = 0; i < cutter.count; i++) {
        const at = cutter.headerAt[i]!;
        held.push({ at, was: cutter.headers.u8.slice(at, at + cutter.headerLength) });
      }
    }
  }
  assert.is(cuts, 7);
  for (const { at, was } of held) assert.equal(cutter.headers.u8.slice(at, at + was.length), was);
  cutter.release();
  assert.ok(cutter.cut(bytes, 64, 240));
});

/** What the joiner has, as one packet with whole checksums. */
function joined(joiner: Joiner, bytes: Bytes): Uint8Array {
  joiner.finish(bytes);
  const out = newBytes(joiner.total);
  out.u8.set(bytes.u8.subarray(joiner.at, joiner.at + joiner.headerLength));
  let at = joiner.headerLength;
  for (let i = 0; i < joiner.count; i++) {
    const from = joiner.bodyAt[i]!;
    out.u8.set(bytes.u8.subarray(from, from + joiner.bodyLength[i]!), at);
    at += joiner.bodyLength[i]!;
  }
  assert.is(at, joiner.total);
  const length = joiner.total - IPV4.size;
  if (joiner.protocol === PROTOCOL.tcp) finishTcp(out, IPV4.size, length, tuple.source, tuple.target);
  else finishUdp(out, IPV4.size, length, tuple.source, tuple.target);
  return out.u8.slice(0, joiner.total);
}

test('Joiner undoes Cutter: what was cut comes back byte for byte', () => {
  const rng = new Rng(22);
  const source = newBytes(70_000);
  const inbox = newBytes(140_000);
  const cutter = new Cutter(VNI);
  for (let i = 0; i < 300; i++) {
    const size = 100 + rng.below(1300);
    const payload = random(rng, size * 2 + rng.below(Math.min(60_000, size * 60) - size * 2));
    const packet =
      rng.below(2) === 0 ? udp(tuple, payload) : tcp(tuple, 0x18, payload, { sequence: rng.u32() });
    source.u8.set(packet, 64);
    cutter.release();
    assert.ok(cutter.cut(source, 64, size));
    const pieces = gather(cutter, source);
    const joiner = new Joiner();
    let at = 16;
    for (const piece of pieces) {
      inbox.u8.set(piece, at);
      if (joiner.count === 0) joiner.open(inbox, at);
      else assert.ok(joiner.add(inbox, at));
      at += piece.length + 8;
    }
    assert.equal(joined(joiner, inbox), packet, `case ${i}`);
  }
});

test('Joiner joins only what continues: each single difference keeps packets apart', () => {
  const payload = new Uint8Array(100).fill(1);
  const first = { sequence: 1000 };
  const next = (): Uint8Array => tcp(tuple, 0x10, payload, { sequence: 1100 });
  const rebuild = (packet: Uint8Array, change: (bytes: Bytes) => void): Uint8Array => {
    const bytes = newBytes(packet.length);
    bytes.u8.set(packet);
    change(bytes);
    finishIpv4(bytes, 0);
    finishTcp(bytes, 20, packet.length - 20, bytes.view.getUint32(12), bytes.view.getUint32(16));
    return bytes.u8.slice(0, packet.length);
  };
  const joins = (packet: Uint8Array): boolean => {
    const bytes = newBytes(4_000);
    bytes.u8.set(tcp(tuple, 0x10, payload, first), 64);
    bytes.u8.set(packet, 1_000);
    const joiner = new Joiner();
    joiner.open(bytes, 64);
    return joiner.add(bytes, 1_000);
  };
  assert.ok(joins(next()));
  assert.not(joins(tcp(tuple, 0x10, payload, { sequence: 1101 })), 'sequence');
  assert.not(joins(tcp(tuple, 0x14, payload, { sequence: 1100 })), 'RST');
  assert.not(joins(tcp(tuple, 0x12, payload, { sequence: 1100 })), 'SYN');
  assert.not(joins(tcp(tuple, 0x30, payload, { sequence: 1100 })), 'URG');
  assert.not(joins(tcp(tuple, 0x10, payload, { sequence: 1100, acknowledgment: 1 })), 'acknowledgment');
  assert.not(joins(tcp({ ...tuple, sourcePort: 1 }, 0x10, payload, { sequence: 1100 })), 'port');
  assert.not(joins(tcp({ ...tuple, source: 1 }, 0x10, payload, { sequence: 1100 })), 'address');
  assert.not(joins(tcp(tuple, 0x10, new Uint8Array(101), { sequence: 1100 })), 'longer than the first');
  assert.not(joins(tcp(tuple, 0x10, new Uint8Array(0), { sequence: 1100 })), 'empty');
  for (const [what, at, value] of [
    ['TOS', 1, 4],
    ['TTL', 8, 63],
    ['DF', 6, 0],
    ['window', 34, 9],
  ] as const)
    assert.not(joins(rebuild(next(), (bytes) => bytes.u8.fill(value, at, at + 1))), what);
  const bad = next();
  bad[bad.length - 1]! ^= 1;
  assert.not(joins(bad), 'a wrong checksum must stay wrong');
});

test('Joiner leaves alone: fragments, SYN, datagrams without checksum, wrong first checksums', () => {
  const alone = (packet: Uint8Array): boolean => {
    const bytes = newBytes(4_000);
    bytes.u8.set(packet, 64);
    bytes.u8.set(packet, 1_000);
    const joiner = new Joiner();
    joiner.open(bytes, 64);
    return !joiner.add(bytes, 1_000) && joiner.count === 1 && joiner.total === packet.length;
  };
  assert.not(alone(udp(tuple)));
  assert.ok(alone(udp(tuple, undefined, { fragment: 0x2000 })));
  assert.ok(alone(tcp(tuple, 0x02)));
  const noChecksum = udp(tuple);
  noChecksum.fill(0, 26, 28);
  assert.ok(alone(noChecksum));
  const wrong = udp(tuple);
  wrong[27]! ^= 1;
  assert.ok(alone(wrong));
});

test('cutIntoFragments: the pieces put together are the packet, none is larger than the path', () => {
  const rng = new Rng(33);
  for (let i = 0; i < 300; i++) {
    const packet = udp(tuple, random(rng, 1 + rng.below(9_000)), {
      fragment: rng.below(2) === 0 ? 0 : 0x2000 + 185,
    });
    const mtu = 68 + rng.below(1400);
    const bytes = newBytes(packet.length + 64);
    bytes.u8.set(packet, 64);
    const out = newBytes(40_000);
    const again = new Uint8Array(packet.length - 20);
    const base = packet[6]! * 256 + packet[7]!;
    let lastMore = true;
    const done = cutIntoFragments(bytes, 64, mtu, out, 12, (at, length) => {
      assert.ok(length <= mtu && at % 4 === 0);
      const field = out.view.getUint16(at + IPV4.fragment);
      again.set(out.u8.subarray(at + 20, at + length), ((field & 0x1fff) - (base & 0x1fff)) * 8);
      lastMore = (field & 0x2000) !== 0;
    });
    assert.ok(done);
    assert.equal(again, packet.slice(20));
    assert.is(lastMore, (base & 0x2000) !== 0);
  }
  const df = newBytes(100);
  df.u8.set(udp(tuple, undefined, { fragment: 0x4000 }), 0);
  assert.not(cutIntoFragments(df, 0, 68, df, 12, () => assert.unreachable()));
});

test.run();
