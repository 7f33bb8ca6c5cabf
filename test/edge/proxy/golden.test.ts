// Captured packets in, byte-exact packets out: what tcpdump saw on both sides of two real hosts is what two ProxyTuns
// make of the same packets in the same order. The files below test/golden/packets hold one packet a line: node,
// direction, the packet as it came and as it went, in hex.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import type { InstanceRoute } from '../../../edge/proxy/command.ts';
import { ProxyTun } from '../../../edge/proxy/proxy.ts';
import { VERDICT } from '../../../edge/proxy/verdict.ts';
import type { ServiceId } from '../../../src/name.ts';
import { newBytes } from '../../../src/wire/bytes.ts';
import { printPacket } from '../../../src/wire/print.ts';
import { type ApplyCommand, AT, a, config } from './world.ts';

const HELD = join(import.meta.dirname!, '../../golden/packets');
const WEB = 'shop.prod.web.v1' as ServiceId;
const CART = 'shop.prod.cart.v1' as ServiceId;

/** The addresses of scripts/proxy_lab.ts: web 1 on host 1, cart 1 on host 2, services numbered as they were made. */
function node(n: number): ProxyTun {
  const proxy = new ProxyTun(config(n, { nodeIp: a(`10.78.0.${n}`) }));
  const apply = (command: ApplyCommand): void => proxy.apply(command, 0);
  for (const [i, service] of [WEB, CART].entries()) {
    const index = i + 1;
    const route: InstanceRoute = {
      instance: 1,
      instanceIp: a(`172.30.128.${index * 64 + 1}`),
      namespaceIp: a(`172.16.0.${index * 64 + 2}`),
      nodeIp: a(`10.78.0.${index}`),
      ewp: 4790,
      local: index === n,
    };
    const addresses = { roundrobin: a(`172.30.0.${index * 4}`) };
    apply({ kind: 'service', service, addresses, instances: [route] });
    if (route.local)
      apply({ kind: 'local', namespaceIp: route.namespaceIp, instanceIp: route.instanceIp, service });
  }
  return proxy;
}

const octets = (hex: string): Uint8Array => new Uint8Array(Buffer.from(hex, 'hex'));

test('two_nodes: TCP, UDP, ICMP and fragments, both directions, octet by octet', () => {
  const [, ...lines] = readFileSync(join(HELD, 'two_nodes.txt'), 'utf8').trimEnd().split('\n');
  const nodes = [node(1), node(2)];
  const bytes = newBytes(4_096);
  const seen = new Set<string>();
  for (const [number, line] of lines.entries()) {
    const [which, direction, before = '', after = ''] = line.split(/ +/);
    const proxy = nodes[Number(which) - 1]!;
    const packet = octets(before);
    bytes.u8.fill(0xee);
    bytes.u8.set(packet, AT);
    const verdict =
      direction === 'leaving'
        ? proxy.leaving(bytes, AT, packet.length, false, 0, number)
        : proxy.arriving(
            bytes,
            AT,
            packet.length,
            false,
            a(`10.78.0.${which === '1' ? 2 : 1}`),
            4790,
            number,
          );
    const what = `line ${number + 2}: ${printPacket(packet)}`;
    assert.is(verdict, direction === 'leaving' ? VERDICT.tunnel : VERDICT.tun, what);
    const is = Buffer.from(bytes.u8.subarray(AT, AT + packet.length)).toString('hex');
    assert.is(is, after, `${what} became ${printPacket(octets(is))}, not ${printPacket(octets(after))}`);
    const fragment = (packet[6]! & 0x3f) !== 0 || packet[7] !== 0 ? ' fragment' : '';
    seen.add(`${which} ${direction} ${packet[9]}${fragment}`);
  }
  for (const which of [1, 2])
    for (const direction of ['leaving', 'arriving'])
      for (const kind of ['6', '17', '17 fragment', '1', '1 fragment'])
        assert.ok(seen.has(`${which} ${direction} ${kind}`), `${which} ${direction} ${kind} is missing`);
});

test.run();
