// IPv4 addresses and prefixes as integers with a type. Text is parsed and printed at the edges only, by ip-address;
// the packet path never sees a string. IPv6 will stand beside this file, not inside it.
import { Address4 } from 'ip-address';
import { assert } from './assert.ts';
import { fail, ok, type Result } from './error.ts';

/** An IPv4 address as an unsigned 32-bit integer, most significant octet first. */
export type Ipv4 = number & { readonly __brand: 'Ipv4' };

/** A prefix; `base` has its host bits clear. */
export interface Cidr {
  readonly base: Ipv4;
  readonly bits: number;
}

export function ipv4(value: number): Ipv4 {
  return (value >>> 0) as Ipv4;
}

/** Dotted quad without a prefix length; rejects leading zeros and short forms (RFC 6943 §3.1.1). */
export function parseIpv4(text: string): Result<Ipv4> {
  if (text.includes('/') || !Address4.isValid(text))
    return fail('invalid_request', `"${text}" is not an IPv4 address: four decimal octets are needed`);
  return ok(ipv4(Number(new Address4(text).bigInt())));
}

export function formatIpv4(address: Ipv4): string {
  return `${address >>> 24}.${(address >>> 16) & 255}.${(address >>> 8) & 255}.${address & 255}`;
}

/** `a.b.c.d/len` with no host bit set. */
export function parseCidr(text: string): Result<Cidr> {
  const slash = text.indexOf('/');
  if (slash < 0 || !Address4.isValid(text))
    return fail(
      'invalid_request',
      `"${text}" is not an IPv4 prefix: write address/length, such as 172.16.0.64/26`,
    );
  const base = parseIpv4(text.slice(0, slash));
  if (!base.ok) return base;
  const cidr = { base: base.value, bits: Number(text.slice(slash + 1)) };
  if (networkOf(cidr.base, cidr.bits) !== cidr.base)
    return fail(
      'invalid_request',
      `"${text}" has host bits set: the prefix begins at ${formatCidr({ ...cidr, base: networkOf(cidr.base, cidr.bits) })}`,
    );
  return ok(cidr);
}

export function formatCidr(cidr: Cidr): string {
  return `${formatIpv4(cidr.base)}/${cidr.bits}`;
}

/** Mask of a prefix length, 0…32. */
export function maskOf(bits: number): Ipv4 {
  assert(bits >= 0 && bits <= 32, 'a prefix length is 0…32');
  return ipv4(bits === 0 ? 0 : 0xffffffff << (32 - bits));
}

export function networkOf(address: Ipv4, bits: number): Ipv4 {
  return ipv4(address & maskOf(bits));
}

export function contains(cidr: Cidr, address: Ipv4): boolean {
  return networkOf(address, cidr.bits) === cidr.base;
}

/** True when the two prefixes share an address. */
export function overlaps(a: Cidr, b: Cidr): boolean {
  const bits = Math.min(a.bits, b.bits);
  return networkOf(a.base, bits) === networkOf(b.base, bits);
}

/** Number of addresses in the prefix. */
export function sizeOf(cidr: Cidr): number {
  return 2 ** (32 - cidr.bits);
}
