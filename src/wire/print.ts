// One line per packet, much as tcpdump prints it, for tests and traces. Never throws, whatever the bytes are.
import { formatIpv4, ipv4 } from '../addr.ts';
import { type Bytes, newBytes } from './bytes.ts';
import { ICMP } from './icmp.ts';
import { checkIpv4, FLAG_MF, FRAGMENT_MASK, headerLength, IPV4, IPV4_FAULT, PROTOCOL } from './ipv4.ts';
import { checkTcp, TCP, tcpHeaderLength } from './tcp.ts';
import { checkUdp, UDP } from './udp.ts';

const FLAG_LETTERS = ['F', 'S', 'R', 'P', '.', 'U', 'E', 'C'] as const;

export function printPacket(packet: Uint8Array): string {
  const bytes = newBytes(Math.max(packet.length, 4));
  bytes.u8.set(packet);
  return printAt(bytes, 0, packet.length);
}

export function printAt(bytes: Bytes, offset: number, length: number): string {
  const fault = checkIpv4(bytes, offset, length);
  if (fault !== IPV4_FAULT.none && fault !== IPV4_FAULT.checksum) return `not IPv4, ${length} bytes`;
  const { view, u8 } = bytes;
  const source = formatIpv4(ipv4(view.getUint32(offset + IPV4.source)));
  const target = formatIpv4(ipv4(view.getUint32(offset + IPV4.target)));
  const header = headerLength(bytes, offset);
  const at = offset + header;
  const rest = view.getUint16(offset + IPV4.total) - header;
  const fragment = view.getUint16(offset + IPV4.fragment);
  const first = (fragment & FRAGMENT_MASK) === 0;
  const more = (fragment & FLAG_MF) !== 0;
  const protocol = u8[offset + IPV4.protocol]!;

  const notes = [`ttl ${u8[offset + IPV4.ttl]}`];
  if (fault === IPV4_FAULT.checksum) notes.push('bad header checksum');
  if (more || !first)
    notes.push(
      `frag ${view.getUint16(offset + IPV4.id)}:${rest}@${(fragment & FRAGMENT_MASK) << 3}${more ? '+' : ''}`,
    );
  const tail = ` (${notes.join(', ')})`;

  if (first && protocol === PROTOCOL.tcp && checkTcp(bytes, at, rest)) {
    const flags = FLAG_LETTERS.filter((_, bit) => (u8[at + TCP.flags]! & (1 << bit)) !== 0).join('');
    const numbers = `seq ${view.getUint32(at + TCP.sequence)} ack ${view.getUint32(at + TCP.acknowledgment)}`;
    return `${source}.${view.getUint16(at + TCP.source)} > ${target}.${view.getUint16(at + TCP.target)}: TCP [${flags}] ${numbers} length ${rest - tcpHeaderLength(bytes, at)}${tail}`;
  }
  if (first && protocol === PROTOCOL.udp && rest >= UDP.size) {
    const good = more || checkUdp(bytes, at, rest);
    return `${source}.${view.getUint16(at + UDP.source)} > ${target}.${view.getUint16(at + UDP.target)}: UDP length ${view.getUint16(at + UDP.length) - UDP.size}${good ? '' : ' [bad length]'}${tail}`;
  }
  if (first && protocol === PROTOCOL.icmp && rest >= ICMP.size)
    return `${source} > ${target}: ICMP type ${u8[at + ICMP.type]} code ${u8[at + ICMP.code]} id ${view.getUint16(at + ICMP.id)} length ${rest}${tail}`;
  return `${source} > ${target}: proto ${protocol} length ${rest}${tail}`;
}
