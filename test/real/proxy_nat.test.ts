// A node behind a real NAT: nftables masquerades its address and its port.
//
//   web ── host 1 (10.78.0.1) ── switch ── 10.78.0.50 NAT 10.80.0.1 ── host 2 (10.80.0.2) ── cart
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import {
  inside,
  type LabInstance,
  ProxyLab,
  type Runtime,
  runtimeArgv,
  shell,
} from '../../scripts/proxy_lab.ts';
import { formatIpv4 } from '../../src/addr.ts';
import { PEER_KEEPALIVE_MS } from '../../src/limits.ts';
import { eventually } from '../support/eventually.ts';

const runtime: Runtime = 'deno' in process.versions ? 'deno' : 'node';
const PEER = join(import.meta.dirname, 'proxy_peer.ts');
const lab = new ProxyLab(`ewAn${process.pid}`);
const children: ChildProcess[] = [];
const secret = new TextEncoder().encode('a secret of this network');
let web: LabInstance;
let cart: LabInstance;

async function echo(instance: LabInstance): Promise<void> {
  const argv = inside(instance.netns, ...runtimeArgv('node'), PEER, 'echo', '7000', instance.service);
  const child = spawn(argv[0]!, argv.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] });
  children.push(child);
  let ready = false;
  createInterface({ input: child.stdout }).once('line', () => {
    ready = true;
  });
  await eventually(() => ready, `${instance.service} to serve`, 30_000);
}

function tcp(from: LabInstance, to: LabInstance): unknown {
  const argv = inside(
    from.netns,
    ...runtimeArgv('node'),
    ...[PEER, 'tcp', formatIpv4(lab.serviceIp(to.service)), '7000', '4', '200000'],
  );
  return JSON.parse(spawnSync(argv[0]!, argv.slice(1), { encoding: 'utf8' }).stdout);
}

const nat = suite('ProxyTUN behind a NAT');

nat.before(async () => {
  lab.up(2);
  const [one, two] = lab.hosts as [(typeof lab.hosts)[0], (typeof lab.hosts)[0]];
  lab.behindNat(two);
  await Promise.all([one.start(runtime, { secret }), two.start(runtime, { secret })]);
  web = lab.instance(one, 'shop.prod.web.v1', 1);
  cart = lab.instance(two, 'shop.prod.cart.v1', 1);
  lab.tellAll();
  await Promise.all([echo(web), echo(cart)]);
  await eventually(
    async () => (await one.counters())['peers_learned']! > 0,
    'the node behind the NAT to be seen',
  );
});

nat.after(async () => {
  for (const child of children) child.kill('SIGKILL');
  await lab.down();
});

nat('it reaches others, and their answers reach it where it was seen', () => {
  assert.equal(tcp(cart, web), { ok: 4, bad: [] });
});

nat('new flows reach it, although the address that the keyspace has leads nowhere', () => {
  assert.equal(tcp(web, cart), { ok: 4, bad: [] });
});

/** The NAT loses its table and its address: the node's next frame comes from elsewhere. */
function forget(last: number): void {
  const inNat = (...argv: string[]): string[] => inside(`${lab.prefix}-n`, ...argv);
  shell(inNat('nft', 'flush', 'ruleset'));
  shell(
    inNat('nft', '-f', '-'),
    'table ip nat {\n chain post {\n type nat hook postrouting priority srcnat\n oifname "out0" masquerade random\n }\n}\n',
  );
  shell(inNat('ip', 'addr', 'add', `10.78.0.${last + 1}/24`, 'dev', 'out0'));
  shell(inNat('ip', 'addr', 'del', `10.78.0.${last}/24`, 'dev', 'out0'));
  shell(inNat('ip', 'addr', 'replace', `10.78.0.${last + 1}/24`, 'dev', 'out0'));
}

nat('a NAT that forgets is found again when the node behind it speaks', async () => {
  const [one] = lab.hosts;
  const before = await one!.counters();
  forget(50);
  assert.equal(tcp(cart, web), { ok: 4, bad: [] });
  const after = await one!.counters();
  assert.ok(after['peers_learned']! > before['peers_learned']!);
  assert.equal(tcp(web, cart), { ok: 4, bad: [] });
});

nat('and by the next keep-alive when it says nothing', async () => {
  const [one] = lab.hosts;
  const before = (await one!.counters())['peers_learned']!;
  forget(51);
  await eventually(
    async () => (await one!.counters())['peers_learned']! > before,
    'the new address to be learned',
    PEER_KEEPALIVE_MS + 20_000,
  );
  assert.equal(tcp(web, cart), { ok: 4, bad: [] });
});

nat('a data packet from the address of a node, and a port that it has not proved, is not taken', async () => {
  const [one, two] = lab.hosts;
  const before = await one!.counters();
  // An unprivileged process behind the same NAT, or on the same node: a whole frame of the cart's, from its own socket.
  const script = `
    const frame = Buffer.from('0c000001004557004500001d000000004011000000000000000000002328232800090000ff', 'hex');
    frame.writeUInt32BE(${cart.instanceIp}, 8 + 12);
    frame.writeUInt32BE(${web.namespaceIp}, 8 + 16);
    let sum = 0;
    for (let i = 8; i < 28; i += 2) sum += frame.readUInt16BE(i);
    sum = (sum & 0xffff) + (sum >>> 16);
    frame.writeUInt16BE(~(sum + (sum >>> 16)) & 0xffff, 8 + 10);
    const s = require('node:dgram').createSocket('udp4');
    s.send(frame, 4790, '10.78.0.1', () => s.close());`;
  shell(inside(two!.netns, ...runtimeArgv('node').slice(0, 1), '-e', script));
  await eventually(
    async () => (await one!.counters())['drop_spoofed_sender']! > before['drop_spoofed_sender']!,
    'the forged packet to be counted',
  );
  assert.is((await one!.counters())['peers_learned'], before['peers_learned']);
  assert.equal(tcp(web, cart), { ok: 4, bad: [] });
});

nat('a narrower hop that answers by ICMP is found out: connections go on in smaller packets', async () => {
  const [one, two] = lab.hosts;
  const before = await one!.counters();
  // The NAT is a router too: what is too large for its inner link it refuses to the sender of the tunnel.
  shell(['ip', '-n', `${lab.prefix}-n`, 'link', 'set', 'in0', 'mtu', '1300']);
  shell(['ip', '-n', two!.netns, 'link', 'set', 'up0', 'mtu', '1300']);
  assert.equal(tcp(web, cart), { ok: 4, bad: [] });
  const after = await one!.counters();
  assert.ok(after['drop_too_big']! > before['drop_too_big']!, 'the kernel learned it from the hop');
  assert.ok(after['icmp_made']! > before['icmp_made']!, 'and the client was told');
});

nat('without the secret nobody can claim to be that node', async () => {
  const [one] = lab.hosts;
  const before = await one!.counters();
  // A hello of the right form from the switch's own namespace, proved with another secret.
  const script = `
    const { createHmac } = require('node:crypto');
    const frame = Buffer.alloc(48);
    frame.set([12, 0, 0, 254, 0, 69, 87, 0, 1]);
    frame.writeUInt32BE(${lab.hosts[1]!.subnet}, 16);
    frame.writeUInt32BE(${one!.subnet}, 20);
    frame.writeBigUInt64BE(BigInt(Date.now()) * 1000n + 10n ** 15n, 24);
    createHmac('sha256', 'edgeway 17751').update(frame.subarray(0, 32)).digest().copy(frame, 32, 0, 16);
    const s = require('node:dgram').createSocket('udp4');
    s.send(frame, 4790, '10.78.0.1', () => s.close());`;
  shell(['ip', '-n', `${lab.prefix}-w`, 'addr', 'add', '10.78.0.77/24', 'dev', 'sw']);
  shell(inside(`${lab.prefix}-w`, ...runtimeArgv('node').slice(0, 1), '-e', script));
  await eventually(
    async () => (await one!.counters())['drop_bad_control']! > before['drop_bad_control']!,
    'the forged greeting to be counted',
  );
  assert.is((await one!.counters())['peers_learned'], before['peers_learned']);
  assert.equal(tcp(web, cart), { ok: 4, bad: [] });
});

nat.run();
