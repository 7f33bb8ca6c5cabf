// How the address of an upstream server is written, in --upstreams as in resolv.conf. Host names are refused: to find
// one, somebody would have to be asked. Pure.
import { Address6 } from 'ip-address';
import { parseIpv4 } from '../../src/addr.ts';
import { PORT_MAX } from '../../src/limits.ts';

export interface Upstream {
  readonly address: string;
  readonly port: number;
  readonly family: 4 | 6;
}

const DNS_PORT = 53;

/** Undefined when the text is no server address. The address comes out as a socket spells it. */
export function parseUpstream(text: string): Upstream | undefined {
  const match = /^\[([^\]]+)\](?::(\d{1,5}))?$/.exec(text) ?? /^([^:]+):(\d{1,5})$/.exec(text);
  const given = match?.[1] ?? text;
  const port = match?.[2] === undefined ? DNS_PORT : Number(match[2]);
  if (port < 1 || port > PORT_MAX) return undefined;
  if (parseIpv4(given).ok) return { address: given, port, family: 4 };
  const [plain = '', zone] = given.split('%');
  if (!/^[0-9a-f:.]+$/i.test(plain) || !Address6.isValid(plain)) return undefined;
  const address = new Address6(plain);
  // An IPv4 server in IPv6 clothes: an IPv4 socket reaches it, also on a host without IPv6.
  if (zone === undefined && address.isMapped4())
    return { address: address.to4().correctForm(), port, family: 4 };
  return { address: address.correctForm() + (zone === undefined ? '' : `%${zone}`), port, family: 6 };
}
