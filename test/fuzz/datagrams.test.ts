// Everything that the tunnel's socket can give, to a whole packet loop: its thread, a TUN device and the socket, in a
// network namespace that goes with this process. Bursts are sent joined (UDP_SEGMENT), so that they are received joined
// (UDP_GRO), from nodes that are known and from others. Nothing may throw, every datagram has one fate that is counted,
// and right packets pass as before.
import { spawnSync } from 'node:child_process';
import { createHmac } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import process from 'node:process';
import { setImmediate as soon } from 'node:timers/promises';
import fc from 'fast-check';
import {
  CMSG,
  CMSG_SPACE_4,
  errnoName,
  IOVEC_SIZE,
  MSGHDR,
  openTunnelSocket,
  SOCKADDR_IN,
  SOL_UDP,
  system as sys,
  UDP_SEGMENT,
  writeAddress,
  writeSockaddr,
} from 'node-tun';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { startPacketLoop } from '../../edge/io/packet_loop.ts';
import type { PacketLoop } from '../../edge/ports.ts';
import type { ProxyReport } from '../../edge/proxy/command.ts';
import { runtimeArgv, shell } from '../../scripts/proxy_lab.ts';
import { SEGMENTS_MAX } from '../../src/limits.ts';
import { type Bytes, newBytes } from '../../src/wire/bytes.ts';
import { finishIpv4 } from '../../src/wire/ipv4.ts';
import { CONTROL, NEXT_IPV4, TUNNEL, writeControl, writeTunnel } from '../../src/wire/tunnel.ts';
import {
  a,
  CART_1,
  CART_2,
  CLIENT,
  cartCommand,
  config,
  echo,
  icmpError,
  tcp,
  udp,
  WEB,
} from '../edge/proxy/world.ts';
import { eventually } from '../support/eventually.ts';

const VNI = 0x4557;
const SECRET = new TextEncoder().encode('the network of this test');
/** Payload of the largest UDP datagram. */
const BURST_MAX = 65_507;
/** A slower machine tries fewer bursts. fast-check's own limit would end the wait for a burst that is unaccounted. */
const LONG_ENOUGH_MS = 2_500;
const NODE_1 = a('10.0.0.1');

/** Node 2 and node 3 as routes know them, node 2 behind another port, and somebody else. */
const SENDERS = [
  [a('10.0.0.2'), 4790],
  [a('10.0.0.3'), 4790],
  [a('10.0.0.2'), 5_555],
  [a('10.0.0.9'), 65_535],
] as const;

const PACKETS: readonly Uint8Array[] = [
  tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 }, 0x12),
  udp({ source: CART_1, target: CLIENT }, new Uint8Array(300)),
  udp({ source: CART_2, target: CLIENT, sourcePort: 65_535, targetPort: 65_535 }),
  udp({ source: CART_1, target: CLIENT }, new Uint8Array(32), { fragment: 0x2000, id: 1 }),
  udp({ source: CART_1, target: CLIENT }, new Uint8Array(32), { fragment: 0x0005, id: 1 }),
  udp({ source: CART_2, target: CLIENT }, new Uint8Array(32), { fragment: 0x0005, id: 2 }),
  echo({ source: CART_1, target: CLIENT }, 8),
  icmpError(CART_1, CLIENT, 3, 4, udp({ source: a('172.30.1.1'), target: a('172.16.0.130') })),
  udp({ source: a('172.30.9.9'), target: CLIENT }),
  udp({ source: CART_1, target: a('172.16.0.99') }),
];

/** What a burst is made of: the recipe of one datagram, which is then cut or filled up to the burst's size. */
type Frame =
  | { readonly kind: 'noise'; readonly octets: Uint8Array }
  | { readonly kind: 'control'; readonly node: number; readonly type: number; readonly stampUs: number }
  | { readonly kind: 'packet'; readonly which: number }
  /** Continues the frame before it, when that is one too. */
  | { readonly kind: 'stream'; readonly protocol: 'tcp' | 'udp' };

interface Datagram {
  readonly frame: Frame;
  /** Octets written over it, and whether the IPv4 header's checksum is right afterwards. */
  readonly edits: readonly (readonly [number, number])[];
  readonly repaired: boolean;
}

interface Burst {
  readonly sender: number;
  /** Of each datagram but the last, which has at most as many octets. */
  readonly size: number;
  readonly last: number;
  readonly datagrams: readonly Datagram[];
}

const frames: fc.Arbitrary<Frame> = fc.oneof(
  fc.record({ kind: fc.constant('noise' as const), octets: fc.uint8Array({ maxLength: 100 }) }),
  fc.record({
    kind: fc.constant('control' as const),
    node: fc.nat(6),
    type: fc.nat(5),
    stampUs: fc.nat(1_000_000),
  }),
  fc.record({ kind: fc.constant('packet' as const), which: fc.nat(PACKETS.length - 1) }),
  fc.record({
    kind: fc.constant('stream' as const),
    protocol: fc.constantFrom('tcp' as const, 'udp' as const),
  }),
);
const datagrams: fc.Arbitrary<Datagram> = fc.record({
  frame: frames,
  edits: fc.oneof(
    { weight: 2, arbitrary: fc.constant([]) },
    { weight: 1, arbitrary: fc.array(fc.tuple(fc.nat(60), fc.nat(255)), { maxLength: 4 }) },
  ),
  repaired: fc.boolean(),
});
const bursts: fc.Arbitrary<Burst> = fc.record({
  sender: fc.nat(SENDERS.length - 1),
  size: fc.oneof(
    fc.integer({ min: 1, max: 80 }),
    fc.integer({ min: 60, max: 1_400 }),
    fc.constant(CONTROL.size),
  ),
  last: fc.nat(1_400),
  datagrams: fc
    .tuple(fc.array(datagrams, { minLength: 1, maxLength: 12 }), fc.boolean())
    // Long runs of the same: what is joined.
    .map(([list, many]) => (many ? list.flatMap((datagram) => new Array<Datagram>(5).fill(datagram)) : list)),
});

/** One frame of at most `size` octets; a stream's fills it. */
function frameOf(frame: Frame, size: number, place: number): Uint8Array {
  if (frame.kind === 'noise') return frame.octets;
  if (frame.kind === 'control') {
    const bytes = newBytes(CONTROL.size);
    const { node, type: kind, stampUs } = frame;
    const subnet = a('172.16.0.0') + 64 * node;
    writeControl(bytes, 0, VNI, { kind, token: 7, subnet, target: a('172.16.0.64'), stampUs });
    const proof = createHmac('sha256', SECRET).update(bytes.u8.subarray(0, CONTROL.proof)).digest();
    bytes.u8.set(proof.subarray(0, 16), CONTROL.proof);
    return bytes.u8;
  }
  if (frame.kind === 'packet') return wrapped(PACKETS[frame.which]!);
  const header = TUNNEL.size + 20 + (frame.protocol === 'tcp' ? 20 : 8);
  const payload = new Uint8Array(Math.max(0, size - header)).fill(place);
  const tuple = { source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_001 };
  const sequence = 1_000 + place * payload.length;
  return wrapped(frame.protocol === 'tcp' ? tcp(tuple, 0x10, payload, { sequence }) : udp(tuple, payload));
}

function wrapped(packet: Uint8Array): Uint8Array {
  const bytes = newBytes(TUNNEL.size + packet.length);
  writeTunnel(bytes, 0, NEXT_IPV4, VNI);
  bytes.u8.set(packet, TUNNEL.size);
  return bytes.u8;
}

/** Writes the burst's octets; returns how many, and how many datagrams they are. */
function writeBurst(burst: Burst, out: Uint8Array): { length: number; count: number } {
  const { size } = burst;
  const count = Math.min(burst.datagrams.length, SEGMENTS_MAX, Math.floor(BURST_MAX / size));
  let length = 0;
  for (const [i, { frame, edits, repaired }] of burst.datagrams.slice(0, count).entries()) {
    // An empty one can only be alone.
    const own = i < count - 1 ? size : Math.max(count > 1 ? 1 : 0, Math.min(burst.last, size));
    const bytes: Bytes = newBytes(Math.max(own, 100));
    bytes.u8.set(frameOf(frame, own, i).subarray(0, own));
    for (const [at, octet] of edits) if (at < own) bytes.u8[at] = octet;
    const header = (bytes.u8[TUNNEL.size]! & 15) * 4;
    if (repaired && header >= 20 && TUNNEL.size + header <= own) finishIpv4(bytes, TUNNEL.size);
    out.set(bytes.u8.subarray(0, own), length);
    length += own;
  }
  return { length, count };
}

const memory = sys.allocate(BURST_MAX + 1);
const header = sys.allocate(256);
const HEADER = { name: 64, vector: 80, control: 96 } as const;

/** Joined, as far as it is more than one datagram. */
function send(fd: number, length: number, size: number): void {
  const view = new DataView(header.bytes.buffer);
  header.bytes.fill(0);
  writeSockaddr(view, HEADER.name, NODE_1, 4790);
  writeAddress(view, MSGHDR.name, header.address + HEADER.name);
  view.setUint32(MSGHDR.nameLength, SOCKADDR_IN.size, true);
  writeAddress(view, MSGHDR.iov, header.address + HEADER.vector);
  view.setUint32(MSGHDR.iovLength, 1, true);
  writeAddress(view, HEADER.vector, memory.address);
  view.setUint32(HEADER.vector + IOVEC_SIZE / 2, length, true);
  if (length > size) {
    writeAddress(view, MSGHDR.control, header.address + HEADER.control);
    view.setUint32(MSGHDR.controlLength, CMSG_SPACE_4, true);
    view.setUint32(HEADER.control + CMSG.length, CMSG.data + 2, true);
    view.setInt32(HEADER.control + CMSG.level, SOL_UDP, true);
    view.setInt32(HEADER.control + CMSG.type, UDP_SEGMENT, true);
    view.setUint16(HEADER.control + CMSG.data, size, true);
  }
  const sent = sys.sendmsg(fd, header.pointer, 0);
  assert.is(sent, length, `send ${length} octets in pieces of ${size}: ${sent < 0 ? errnoName(sent) : sent}`);
}

/** Drops that are no fate of a datagram at hand: it was counted as held, or as a control frame, before. */
const LATER = ['drop_fragment_orphan', 'drop_fragments_full', 'drop_old_control'];

/** Datagrams that have met their fate; what was joined counts as one here. */
function fates(now: Record<string, number>): number {
  let total = now['to_tun_packets']! - now['icmp_made']! - now['resets_made']!;
  total += now['control_received']! + now['fragments_held']! - now['packets_resumed']!;
  for (const [name, count] of Object.entries(now))
    if (name.startsWith('drop_') && !LATER.includes(name)) total += count;
  return total;
}

/** Why what is counted since `before` does not account for so many datagrams; undefined when it does. */
function unaccounted(
  before: Record<string, number>,
  now: Record<string, number>,
  length: number,
  count: number,
): string | undefined {
  const since = (name: string): number => now[name]! - before[name]!;
  if (since('from_tunnel_packets') !== count) return `${since('from_tunnel_packets')} of ${count} came`;
  if (since('from_tunnel_bytes') !== length) return `${since('from_tunnel_bytes')} octets of ${length} came`;
  // Each packet that left joined is one instead of two or more.
  const joined = since('joined_packets');
  const fewer = count - (fates(now) - fates(before));
  const fine = joined === 0 ? fewer === 0 : joined - fewer >= 1 && joined - fewer <= joined / 2;
  return fine ? undefined : `${count} came, ${fewer} of them are not accounted for (${joined} joined)`;
}

async function accounted(
  loop: PacketLoop,
  before: Record<string, number>,
  length: number,
  count: number,
): Promise<void> {
  const deadline = performance.now() + 5_000;
  for (;;) {
    const why = unaccounted(before, loop.counters(), length, count);
    if (why === undefined) return;
    if (performance.now() > deadline) throw new Error(why);
    await soon();
  }
}

/** Right packets that continue each other, to a socket of this namespace. */
async function passes(loop: PacketLoop, fd: number): Promise<void> {
  const socket = createSocket('udp4');
  socket.bind(40_001, '172.16.0.66');
  await once(socket, 'listening');
  const got: string[] = [];
  socket.on('message', (message, from) =>
    got.push(`${from.address}:${from.port} ${message[0]}×${message.length}`),
  );
  try {
    const before = loop.counters();
    const datagram: Datagram = { frame: { kind: 'stream', protocol: 'udp' }, edits: [], repaired: false };
    const burst: Burst = {
      sender: 0,
      size: 1_000,
      last: 1_000,
      datagrams: new Array<Datagram>(8).fill(datagram),
    };
    const { length } = writeBurst(burst, memory.bytes);
    send(fd, length, burst.size);
    await eventually(() => got.length >= 8, 'eight right packets');
    assert.equal(
      got,
      Array.from({ length: 8 }, (_, i) => `172.30.2.1:80 ${i}×964`),
    );
    await accounted(loop, before, length, 8);
  } finally {
    socket.close();
  }
}

test('the packet loop survives what the tunnel socket gives, and accounts for every datagram', async () => {
  shell(['ip', 'link', 'set', 'lo', 'up']);
  for (const address of ['10.0.0.1', '10.0.0.2', '10.0.0.3', '10.0.0.9'])
    shell(['ip', 'address', 'add', `${address}/32`, 'dev', 'lo']);
  // The namespace answers nothing of what the loop passes on: its own packets would be counted too.
  for (const [name, value] of Object.entries({
    'ipv4/ip_forward': 0,
    'ipv4/conf/all/rp_filter': 0,
    'ipv4/conf/default/rp_filter': 0,
    'ipv6/conf/default/disable_ipv6': 1,
  }))
    writeFileSync(`/proc/sys/net/${name}`, String(value));
  const reports: ProxyReport[] = [];
  const loop = await startPacketLoop(config(1, { secret: SECRET }), (report) => reports.push(report));
  const sockets = SENDERS.map(([address, port]) => openTunnelSocket(sys, { address, port, buffer: 1 << 20 }));
  try {
    loop.send(cartCommand(1));
    loop.send({ kind: 'local', namespaceIp: CLIENT, instanceIp: a('172.30.1.1'), service: WEB });
    const enough = performance.now() + LONG_ENOUGH_MS;
    await fc.assert(
      fc.asyncProperty(bursts, async (burst) => {
        if (performance.now() > enough) return;
        const { length, count } = writeBurst(burst, memory.bytes);
        const before = loop.counters();
        send(sockets[burst.sender]!.fd, length, burst.size);
        await accounted(loop, before, length, count);
      }),
      {
        numRuns: 1_500,
        seed: 20_261_128,
        endOnFailure: true,
        includeErrorInReport: true,
        examples: [
          [
            {
              sender: 3,
              size: 1,
              last: 0,
              datagrams: [
                { frame: { kind: 'noise', octets: new Uint8Array(0) }, edits: [], repaired: false },
              ],
            },
          ],
        ],
      },
    );
    const counted = loop.counters();
    assert.is(counted['from_tun_packets'], 0);
    // What the bursts were for.
    assert.ok(counted['tunnel_reads']! < counted['from_tunnel_packets']! / 2, 'received joined');
    for (const name of [
      'joined_packets',
      'control_received',
      'fragments_held',
      'drop_spoofed_sender',
      'drop_short_frame',
    ])
      assert.ok(counted[name]! > 0, name);
    shell(['ip', 'address', 'add', '172.16.0.66/32', 'dev', 'lo']);
    await passes(loop, sockets[0]!.fd);
  } finally {
    for (const { fd } of sockets) sys.close(fd);
    await loop.stop();
  }
  assert.equal(reports.at(-1), { kind: 'stopped' });
});

/** Set in the process that has a network namespace of its own. */
const OWN = 'EDGEWAY_TEST_NETNS';
if (process.env[OWN] === '1') test.run();
else {
  const runtime = 'deno' in process.versions ? 'deno' : 'node';
  const argv = ['--net', '--fork', '--kill-child', ...runtimeArgv(runtime), import.meta.filename];
  const { status } = spawnSync('unshare', argv, { stdio: 'inherit', env: { ...process.env, [OWN]: '1' } });
  process.exitCode = status ?? 1;
}
