// How the address of an upstream server is written, in --upstreams as in resolv.conf. Host names are refused: to find
// one, somebody would have to be asked. Pure.
import { isIP } from 'node:net';
import { Address6 } from 'ip-address';
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
  const family = isIP(given.replace(/%.*$/, ''));
  if ((family !== 4 && family !== 6) || port < 1 || port > PORT_MAX) return undefined;
  if (family === 4) return { address: given, port, family };
  const [plain = '', zone] = given.split('%');
  const address = new Address6(plain);
  // An IPv4 server in IPv6 clothes: an IPv4 socket reaches it, also on a host without IPv6.
  if (zone === undefined && address.isMapped4())
    return { address: address.to4().correctForm(), port, family: 4 };
  return { address: address.correctForm() + (zone === undefined ? '' : `%${zone}`), port, family };
}
