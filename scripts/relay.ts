// Delay, loss and cuts between the hosts of a laboratory, in user space (this kernel has no netem). The laboratory's
// switch becomes a router that hands every packet between two hosts to this relay's TUN device and takes it back
// later; addresses and ports stay as they are.
//
//   host i ── eth0 ── under (switch, 10.77.0.254) ── delay0 ── relay: holds it for oneWayMs[i][j] ── delay0 ── under ── host j
//
//   relay.ts FILE     FILE: {"oneWayMs": {"10.77.0.1>10.77.0.2": 5, …}, "loss": 0…1, "cuts": ["10.77.0.1>10.77.0.2", …]}
//                     read again within 100 ms of a change; a pair that it does not name passes at once
//
// It refuses to be fast: some thousands of packets a second are enough to measure latencies, not throughput.
import { readFileSync, renameSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { ERRNO, openTun, type Region, system } from 'node-tun';
import { formatIpv4, ipv4 } from '../src/addr.ts';
import { Rng } from '../src/rng.ts';
import { type Lab, must } from './lab.ts';

/** Virtio header before every packet of a TUN device with IFF_VNET_HDR. */
const VNET_BYTES = 10;
const PACKET_MAX = 65_536 + VNET_BYTES;
const HELD_MAX = 4_096;
const REREAD_MS = 100;
const POLLIN = 1;
const TABLE = 177;

export interface Delays {
  /** One way, ms, by `from>to`. */
  readonly oneWayMs: Readonly<Record<string, number>>;
  readonly loss?: number;
  /** Ways that carry nothing. */
  readonly cuts?: readonly string[];
}

interface Held {
  readonly dueMs: number;
  readonly region: Region;
  readonly length: number;
}

function relay(file: string): never {
  const tun = openTun(system, { name: 'delay0', mtu: 1500, queue: 1000 });
  const rng = new Rng(1);
  const free: Region[] = [];
  const held: Held[] = [];
  const fds = system.allocate(8);
  new DataView(fds.bytes.buffer).setInt32(0, tun.fd, true);
  new DataView(fds.bytes.buffer).setInt16(4, POLLIN, true);
  let delays: Delays = { oneWayMs: {} };
  let cuts = new Set<string>();
  let version = 0;
  let lookedAt = Number.NEGATIVE_INFINITY;

  for (;;) {
    const now = performance.now();
    if (now - lookedAt > REREAD_MS) {
      lookedAt = now;
      const { mtimeMs } = statSync(file);
      if (mtimeMs !== version) {
        version = mtimeMs;
        delays = JSON.parse(readFileSync(file, 'utf8')) as Delays;
        cuts = new Set(delays.cuts ?? []);
      }
    }
    while (held.length > 0 && held[0]!.dueMs <= now) {
      const { region, length } = held.shift()!;
      system.write(tun.fd, region.pointer, length);
      free.push(region);
    }
    const due = held[0]?.dueMs ?? Number.POSITIVE_INFINITY;
    // poll counts in milliseconds: the last one is asked away, so that a delay is right to some microseconds.
    system.poll(fds.pointer, 1, Math.max(0, Math.min(20, Math.floor(due - now))));
    for (;;) {
      const region = free.pop() ?? system.allocate(PACKET_MAX);
      const length = system.read(tun.fd, region.pointer, PACKET_MAX);
      if (length < 0 && length !== -ERRNO.EAGAIN) process.exit(1); // the namespace went away
      if (length < VNET_BYTES + 20) {
        free.push(region);
        break;
      }
      const view = new DataView(region.bytes.buffer);
      const from = formatIpv4(ipv4(view.getUint32(VNET_BYTES + 12)));
      const to = formatIpv4(ipv4(view.getUint32(VNET_BYTES + 16)));
      const way = `${from}>${to}`;
      if (cuts.has(way) || rng.unit() < (delays.loss ?? 0) || held.length >= HELD_MAX) {
        free.push(region);
        continue;
      }
      const entry = { dueMs: performance.now() + (delays.oneWayMs[way] ?? 0), region, length };
      let at = held.length;
      while (at > 0 && held[at - 1]!.dueMs > entry.dueMs) at--;
      held.splice(at, 0, entry);
    }
  }
}

/** A laboratory whose hosts are as far from each other as somebody says. */
export class DelayedLab {
  readonly lab: Lab;
  readonly #file: string;
  #delays: Delays = { oneWayMs: {} };

  private constructor(lab: Lab) {
    this.lab = lab;
    this.#file = join(lab.dir, 'delays.json');
  }

  /** Turns the switch into a router and starts the relay in it. Everything ends with the laboratory. */
  static async over(lab: Lab): Promise<DelayedLab> {
    const delayed = new DelayedLab(lab);
    delayed.#write();
    const inSwitch = ['ip', 'netns', 'exec', lab.switch];
    for (const setting of [
      'net.ipv4.ip_forward=1',
      'net.ipv4.conf.all.rp_filter=0',
      'net.ipv4.conf.default.rp_filter=0',
      'net.ipv4.conf.all.send_redirects=0',
      'net.ipv4.conf.under.send_redirects=0',
      'net.ipv4.conf.under.rp_filter=0',
    ])
      await must([...inSwitch, 'sysctl', '-qw', setting]);
    const node = process.env['NODE'] ?? process.execPath;
    lab.spawn(lab.switch, [node, fileURLToPath(import.meta.url), delayed.#file], join(lab.dir, 'relay.log'));
    await waitForLink(lab.switch, 'delay0');
    await must([
      ...inSwitch,
      'sysctl',
      '-qw',
      'net.ipv4.conf.delay0.rp_filter=0',
      'net.ipv6.conf.delay0.disable_ipv6=1',
    ]);
    await must(
      ['ip', '-n', lab.switch, '-batch', '-'],
      [
        `route add default dev delay0 table ${TABLE}`,
        `rule add iif under to 10.77.0.0/24 table ${TABLE}`,
      ].join('\n'),
    );
    // A host reaches the others only through the switch: its own prefix is no longer on the link.
    for (const { netns, ip } of lab.nodes)
      await must(
        ['ip', '-n', netns, '-batch', '-'],
        [
          `addr add ${ip}/32 dev eth0`,
          `addr del ${ip}/24 dev eth0`,
          'route replace 10.77.0.254 dev eth0 scope link',
          'route replace default via 10.77.0.254 dev eth0',
        ].join('\n'),
      );
    return delayed;
  }

  /** Round trips in ms between hosts, `rttMs[i][j]` from host i+1 to host j+1; half of it each way. */
  setRtts(rttMs: readonly (readonly number[])[]): void {
    const oneWayMs: Record<string, number> = {};
    for (const [i, row] of rttMs.entries())
      for (const [j, rtt] of row.entries())
        if (i !== j) oneWayMs[`${this.lab.node(i + 1).ip}>${this.lab.node(j + 1).ip}`] = rtt / 2;
    this.#delays = { ...this.#delays, oneWayMs };
    this.#write();
  }

  /** Nothing passes from one host to the other; the way back is another way. */
  cut(from: number, to: number): void {
    const way = `${this.lab.node(from).ip}>${this.lab.node(to).ip}`;
    this.#delays = { ...this.#delays, cuts: [...(this.#delays.cuts ?? []), way] };
    this.#write();
  }
  heal(): void {
    this.#delays = { ...this.#delays, cuts: [] };
    this.#write();
  }

  #write(): void {
    writeFileSync(`${this.#file}.new`, JSON.stringify(this.#delays));
    renameSync(`${this.#file}.new`, this.#file);
  }
}

async function waitForLink(netns: string, name: string): Promise<void> {
  const end = performance.now() + 10_000;
  while (performance.now() < end) {
    const links = await must(['ip', '-n', netns, '-o', 'link', 'show', 'up']);
    if (links.includes(` ${name}:`)) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`the relay made no link ${name} in ${netns} within 10 s`);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const file = process.argv[2];
  if (file === undefined) {
    console.error('relay.ts FILE');
    process.exit(2);
  }
  relay(file);
}
