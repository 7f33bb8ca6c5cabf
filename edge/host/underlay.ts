// Where this node is reached: the address and MTU of the interface that its tunnel uses. Reads the host, changes
// nothing.
import * as v from 'valibot';
import { formatIpv4, type Ipv4, parseIpv4 } from '../../src/addr.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import type { Runner } from '../ports.ts';

export interface Underlay {
  readonly address: Ipv4;
  readonly interface: string;
  readonly mtu: number;
  /** True when the address is none of this host's. */
  readonly nat: boolean;
}

const routesSchema = v.array(v.object({ dev: v.string(), prefsrc: v.optional(v.string()) }));
const linksSchema = v.array(
  v.object({
    ifname: v.string(),
    mtu: v.number(),
    addr_info: v.optional(v.array(v.object({ family: v.string(), local: v.optional(v.string()) })), []),
  }),
);

async function ipJson<Schema extends v.GenericSchema>(
  runner: Runner,
  schema: Schema,
  ...args: readonly string[]
): Promise<v.InferOutput<Schema> | undefined> {
  const { status, stdout } = await runner.run(['ip', '-j', '-4', ...args]);
  if (status !== 0) return undefined;
  const result = v.safeParse(schema, JSON.parse(stdout.trim() || '[]'));
  return result.success ? result.output : undefined;
}

/** The interface that holds `wanted`, or without it the source of the route to the world. */
export async function findUnderlay(runner: Runner, wanted: Ipv4 | undefined): Promise<Underlay> {
  const links = (await ipJson(runner, linksSchema, 'address', 'show')) ?? [];
  const holderOf = (address: string) =>
    links.find((link) => link.addr_info.some((info) => info.family === 'inet' && info.local === address));
  if (wanted !== undefined) {
    const text = formatIpv4(wanted);
    const link = holderOf(text);
    // Behind NAT the advertised address is the router's; the tunnel then leaves by the default route.
    const out = link ?? links.find((one) => one.ifname !== 'lo');
    return {
      address: wanted,
      interface: out?.ifname ?? 'lo',
      mtu: out?.mtu ?? 1500,
      nat: link === undefined,
    };
  }
  // 192.0.2.1 belongs to documentation (RFC 5737): asking for its route sends nothing.
  const [route] = (await ipJson(runner, routesSchema, 'route', 'get', '192.0.2.1')) ?? [];
  const address = route?.prefsrc;
  const link = address === undefined ? undefined : holderOf(address);
  if (route !== undefined && address !== undefined && link !== undefined)
    return { address: unwrap(parseIpv4(address)), interface: route.dev, mtu: link.mtu, nat: false };
  // A host without a route to the world still works alone.
  const alone =
    links.find((one) => one.ifname !== 'lo' && one.addr_info.length > 0) ??
    links.find((one) => one.ifname === 'lo');
  const local = alone?.addr_info.find((info) => info.family === 'inet')?.local;
  if (alone === undefined || local === undefined)
    throw new EdgewayError('host_unsupported', 'this host has no IPv4 address: give one with --node-ip');
  return {
    address: unwrap(parseIpv4(local)),
    interface: alone.ifname,
    mtu: Math.min(alone.mtu, 1500),
    nat: false,
  };
}
