// Two nodes without a kernel: ProxyTuns that know each other's instances, packets built by hand, and the wire between
// them as function calls. What a packet became is read as a line of text.
//
//   node 1  172.16.0.64/26   client 172.16.0.66  InstanceIP 172.30.1.1      10.0.0.1:4790
//   node 2  172.16.0.128/26  cart 1 172.16.0.130 InstanceIP 172.30.2.1      10.0.0.2:4790
//   node 3  172.16.0.192/26  cart 2 172.16.0.194 InstanceIP 172.30.2.2      10.0.0.3:4790
//   cart: roundrobin 172.30.0.10, closest 172.30.0.11; db: roundrobin 172.30.0.20, one instance on node 2
import type { InstanceRoute, ProxyCommand, ProxyConfig } from '../../../edge/proxy/command.ts';
import { ProxyTun } from '../../../edge/proxy/proxy.ts';
import { COUNTER_NAMES, VERDICT } from '../../../edge/proxy/verdict.ts';
import { type Ipv4, parseIpv4 } from '../../../src/addr.ts';
import { unwrap } from '../../../src/error.ts';
import type { ServiceId } from '../../../src/name.ts';
import { type Bytes, newBytes } from '../../../src/wire/bytes.ts';
import { finishIcmp, ICMP } from '../../../src/wire/icmp.ts';
import { IPV4, PROTOCOL, writeIpv4 } from '../../../src/wire/ipv4.ts';
import { printAt } from '../../../src/wire/print.ts';
import { finishTcp, TCP, writeTcp } from '../../../src/wire/tcp.ts';
import { finishUdp, UDP, writeUdp } from '../../../src/wire/udp.ts';

export const a = (text: string): Ipv4 => unwrap(parseIpv4(text));
export const CLIENT = a('172.16.0.66');
export const OTHER = a('172.16.0.67');
export const CART_RR = a('172.30.0.10');
export const CART_CLOSEST = a('172.30.0.11');
export const DB_RR = a('172.30.0.20');
export const CART_1 = a('172.30.2.1');
export const CART_2 = a('172.30.2.2');
export const CART = 'shop.prod.cart.v1' as ServiceId;
export const DB = 'shop.prod.db.v1' as ServiceId;
export const WEB = 'shop.prod.web.v1' as ServiceId;

/** Where a packet under test lies: room for headers in front, junk around. */
export const AT = 64;

export function config(node: number, changes: Partial<ProxyConfig> = {}): ProxyConfig {
  return {
    tun: 'ewtun',
    mtu: 1464,
    vni: 0x4557,
    nodeIp: a(`10.0.0.${node}`),
    ewp: 4790,
    servicesBase: a('172.30.0.0'),
    servicesBits: 16,
    subnetBase: a(`172.16.0.${64 * node}`),
    subnetBits: 26,
    flowsMax: 1024,
    seed: node,
    ...changes,
  };
}

export function route(node: number, instance: number, place: number, ip: Ipv4, here: number): InstanceRoute {
  return {
    instance,
    instanceIp: ip,
    namespaceIp: a(`172.16.0.${64 * node + place}`),
    nodeIp: a(`10.0.0.${node}`),
    ewp: 4790,
    local: node === here,
  };
}

export function cartCommand(here: number, which: readonly number[] = [1, 2]): ProxyCommand {
  return {
    kind: 'service',
    service: CART,
    addresses: { roundrobin: CART_RR, closest: CART_CLOSEST },
    instances: which.map((n) => route(n + 1, n, 2, n === 1 ? CART_1 : CART_2, here)),
  };
}

export type ApplyCommand = Parameters<ProxyTun['apply']>[0];

export class NodeUnderTest {
  readonly node: number;
  readonly proxy: ProxyTun;
  readonly bytes: Bytes = newBytes(70_000);
  now = 1_000;

  constructor(node: number, changes: Partial<ProxyConfig> = {}) {
    this.node = node;
    this.proxy = new ProxyTun(config(node, changes));
    const say = (command: ProxyCommand): void => this.apply(command);
    say(cartCommand(node));
    say({
      kind: 'service',
      service: DB,
      addresses: { roundrobin: DB_RR },
      instances: [route(2, 1, 3, a('172.30.3.1'), node)],
    });
    say({
      kind: 'service',
      service: WEB,
      addresses: { roundrobin: a('172.30.0.30') },
      instances: [route(1, 1, 2, a('172.30.1.1'), node), route(1, 2, 3, a('172.30.1.2'), node)],
    });
    const local = (place: number, ip: string, service: ServiceId): void =>
      say({ kind: 'local', namespaceIp: a(`172.16.0.${64 * node + place}`), instanceIp: a(ip), service });
    if (node === 1) {
      local(2, '172.30.1.1', WEB);
      local(3, '172.30.1.2', WEB);
    } else if (node === 2) {
      local(2, '172.30.2.1', CART);
      local(3, '172.30.3.1', DB);
    } else local(2, '172.30.2.2', CART);
  }

  apply(command: ProxyCommand): void {
    this.proxy.apply(command as ApplyCommand, this.now);
  }

  #load(packet: Uint8Array): void {
    this.bytes.u8.fill(0xee);
    this.bytes.u8.set(packet, AT);
  }

  /** The packet as an instance sent it; a line that says what became of it. */
  leave(packet: Uint8Array): string {
    this.#load(packet);
    const before = this.#drops();
    const verdict = this.proxy.leaving(this.bytes, AT, packet.length, false, 0, this.now);
    return this.#say(verdict, packet.length, before);
  }

  arrive(packet: Uint8Array, fromNode: number, port = 4790): string {
    this.#load(packet);
    const before = this.#drops();
    const verdict = this.proxy.arriving(
      this.bytes,
      AT,
      packet.length,
      false,
      a(`10.0.0.${fromNode}`),
      port,
      this.now,
    );
    return this.#say(verdict, packet.length, before);
  }

  /** The packet as the last call left it. */
  get packet(): Uint8Array {
    const length = this.bytes.view.getUint16(AT + IPV4.total);
    return this.bytes.u8.slice(AT, AT + length);
  }

  /** What the proxy said itself since the last time. */
  answers(): string[] {
    const { answers } = this.proxy;
    const lines = Array.from({ length: answers.count }, (_, i) =>
      printAt(answers.bytes, answers.at[i]!, answers.length[i]!),
    );
    answers.clear();
    return lines;
  }

  counter(name: string): number {
    return this.proxy.counters[COUNTER_NAMES.indexOf(name)]!;
  }

  #drops(): number[] {
    return [...this.proxy.counters];
  }

  #say(verdict: number, length: number, before: readonly number[]): string {
    if (verdict === VERDICT.drop) {
      const name = COUNTER_NAMES.find(
        (name, i) => name.startsWith('drop_') && this.proxy.counters[i] !== before[i],
      );
      return name?.slice(5) ?? 'dropped in silence';
    }
    if (verdict === VERDICT.held) return 'held';
    const where =
      verdict === VERDICT.tun ? 'tun' : `node ${(this.proxy.peer!.subnet - a('172.16.0.0')) / 64}`;
    return `${where}: ${printAt(this.bytes, AT, length)}`;
  }
}

export interface Tuple {
  readonly source: number;
  readonly target: number;
  readonly sourcePort?: number;
  readonly targetPort?: number;
}

export function tcp(
  tuple: Tuple,
  flags: number,
  payload: Uint8Array = new Uint8Array(0),
  numbers: { readonly sequence?: number; readonly acknowledgment?: number } = {},
): Uint8Array {
  const total = IPV4.size + TCP.size + payload.length;
  const bytes = newBytes(total);
  writeIpv4(bytes, 0, { source: tuple.source, target: tuple.target, protocol: PROTOCOL.tcp, total, id: 7 });
  writeTcp(bytes, IPV4.size, {
    source: tuple.sourcePort ?? 40_000,
    target: tuple.targetPort ?? 80,
    sequence: numbers.sequence ?? 1_000,
    acknowledgment: numbers.acknowledgment ?? ((flags & 0x10) === 0 ? 0 : 5_000),
    flags,
    window: 1024,
  });
  bytes.u8.set(payload, IPV4.size + TCP.size);
  finishTcp(bytes, IPV4.size, total - IPV4.size, tuple.source, tuple.target);
  return bytes.u8.slice(0, total);
}

export function udp(
  tuple: Tuple,
  payload: Uint8Array = new TextEncoder().encode('hello'),
  header: { readonly fragment?: number; readonly id?: number } = {},
): Uint8Array {
  const total = IPV4.size + UDP.size + payload.length;
  const bytes = newBytes(total);
  writeIpv4(bytes, 0, {
    source: tuple.source,
    target: tuple.target,
    protocol: PROTOCOL.udp,
    total,
    id: header.id ?? 9,
    fragment: header.fragment ?? 0,
  });
  writeUdp(bytes, IPV4.size, tuple.sourcePort ?? 40_000, tuple.targetPort ?? 80, total - IPV4.size);
  bytes.u8.set(payload, IPV4.size + UDP.size);
  finishUdp(bytes, IPV4.size, total - IPV4.size, tuple.source, tuple.target);
  return bytes.u8.slice(0, total);
}

export function echo(tuple: Tuple, type: 0 | 8, id = 77): Uint8Array {
  const total = IPV4.size + ICMP.size + 8;
  const bytes = newBytes(total);
  writeIpv4(bytes, 0, { source: tuple.source, target: tuple.target, protocol: PROTOCOL.icmp, total });
  bytes.u8[IPV4.size] = type;
  bytes.view.setUint16(IPV4.size + ICMP.id, id);
  bytes.view.setUint16(IPV4.size + ICMP.sequence, 1);
  finishIcmp(bytes, IPV4.size, total - IPV4.size);
  return bytes.u8.slice(0, total);
}

/** An ICMP error about `quoted`, as the kernel of `source` would make it. */
export function icmpError(
  source: number,
  target: number,
  type: number,
  code: number,
  quoted: Uint8Array,
): Uint8Array {
  const quote = quoted.subarray(0, Math.min(quoted.length, 548));
  const total = IPV4.size + ICMP.size + quote.length;
  const bytes = newBytes(total);
  writeIpv4(bytes, 0, { source, target, protocol: PROTOCOL.icmp, total });
  bytes.u8[IPV4.size] = type;
  bytes.u8[IPV4.size + 1] = code;
  bytes.u8.set(quote, IPV4.size + ICMP.quote);
  finishIcmp(bytes, IPV4.size, total - IPV4.size);
  return bytes.u8.slice(0, total);
}
