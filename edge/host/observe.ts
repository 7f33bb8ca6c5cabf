// Reads what the host looks like, through Runner only: links, addresses, routes, namespaces. It changes nothing. The
// JSON of `ip -j` is parsed like any other input: what is not understood is an error that names the command.
import * as v from 'valibot';
import { type Cidr, ipv4, networkOf, parseIpv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import type { Protocol } from '../../src/model.ts';
import type { Runner } from '../ports.ts';
import { enter } from './apply.ts';
import { FORWARDING_WAS_OFF, publishedSet } from './rules.ts';

const linkSchema = v.object({ ifname: v.string(), mtu: v.number(), master: v.optional(v.string()) });
const addressSchema = v.object({
  ifname: v.string(),
  addr_info: v.array(v.object({ local: v.string(), prefixlen: v.number() })),
});
const routeSchema = v.object({ dst: v.string(), dev: v.optional(v.string()), type: v.optional(v.string()) });

/** The far end of a tunnel's route: `ip -j` gives it the name of the route's own prefix, and of two keys of one name a
 *  parser keeps the last. */
const FAR_END = /("encap":"[^"]*"[^{}]*?),"dst":"[^"]*"/g;

export type Link = v.InferOutput<typeof linkSchema>;

/** A prefix that a link of the host has. */
export interface Foreign {
  readonly prefix: Cidr;
  readonly link: string;
  /** The link has an address in it: neighbours are there. */
  readonly connected: boolean;
}

export class Observer {
  readonly #runner: Runner;
  constructor(runner: Runner) {
    this.#runner = runner;
  }

  links(netns?: string): Promise<readonly Link[]> {
    return this.#json(linkSchema, ['ip', '-j', 'link', 'show'], netns);
  }

  /** IPv4 addresses as `a.b.c.d/len`, by link. */
  async addresses(netns?: string): Promise<ReadonlyMap<string, readonly string[]>> {
    const rows = await this.#json(addressSchema, ['ip', '-j', '-4', 'addr', 'show'], netns);
    return new Map(
      rows.map((row) => [row.ifname, row.addr_info.map((one) => `${one.local}/${one.prefixlen}`)]),
    );
  }

  async hasDefaultRoute(netns: string): Promise<boolean> {
    const rows = await this.#json(routeSchema, ['ip', '-j', '-4', 'route', 'show', 'default'], netns);
    return rows.length > 0;
  }

  /** Prefixes of every route and address, except those on the links that `ours` names and the loopback's. */
  async prefixes(ours: (link: string) => boolean): Promise<readonly Foreign[]> {
    const [routes, addresses] = await Promise.all([
      this.#json(routeSchema, ['ip', '-j', '-4', 'route', 'show', 'table', 'all']),
      this.addresses(),
    ]);
    const found: (Foreign | undefined)[] = [];
    for (const { dst, dev, type } of routes)
      if (dst !== 'default' && type !== 'multicast' && dev !== 'lo' && !(dev !== undefined && ours(dev)))
        found.push(foreign(dst, dev ?? type ?? 'a route', false));
    for (const [link, held] of addresses)
      if (link !== 'lo' && !ours(link)) found.push(...held.map((one) => foreign(one, link, true)));
    return found.filter((one) => one !== undefined);
  }

  /** Prefixes that the device has a route to; none when there is no such device. */
  async carried(device: string): Promise<readonly string[]> {
    const rows = await this.#json(routeSchema, ['ip', '-j', '-4', 'route', 'show', 'table', 'main']);
    return rows.filter((row) => row.dev === device).map(({ dst }) => (dst.includes('/') ? dst : `${dst}/32`));
  }

  /** Identity of a file or namespace, `device:inode`; undefined when there is none. */
  async identity(path: string): Promise<string | undefined> {
    const result = await this.#runner.run(['stat', '-L', '-c', '%d:%i', path]);
    return result.status === 0 ? result.stdout.trim() : undefined;
  }

  /** Kind of the directory entry itself, as `stat` says it (`regular file`, `symbolic link`, …). */
  async kind(path: string): Promise<string | undefined> {
    const result = await this.#runner.run(['stat', '-c', '%F', path]);
    return result.status === 0 ? result.stdout.trim() : undefined;
  }

  /** Undefined when the kernel has no such switch. */
  async sysctl(path: string): Promise<string | undefined> {
    const result = await this.#runner.run(['cat', `/proc/sys/${path}`]);
    return result.status === 0 ? result.stdout.trim() : undefined;
  }

  /** False where the kernel runs without IPv6. */
  async hasIpv6(): Promise<boolean> {
    return (await this.sysctl('net/ipv6/conf/all/disable_ipv6')) !== undefined;
  }

  /**
   * Who has a port of this host already, by `tcp/80`: a process that listens on more than loopback; Docker, which with
   * `userland-proxy=false` publishes by rules alone; another network of ours on this host. `table`: our own.
   */
  async holders(table: string): Promise<ReadonlyMap<string, string>> {
    const found = new Map<string, string>();
    // Without Docker there is no such chain.
    const docker = await this.#runner.run('iptables -w 10 -t nat -S DOCKER'.split(' '));
    if (docker.status === 0)
      for (const [, protocol, port] of docker.stdout.matchAll(/-p (tcp|udp) .*--dport (\d+) .*-j DNAT/g))
        found.set(`${protocol}/${port}`, 'a container of Docker');
    for (const other of await this.tables())
      if (other !== table)
        for (const protocol of ['tcp', 'udp'] as const)
          for (const port of await this.#published(other, protocol))
            found.set(
              `${protocol}/${port}`,
              `another Edgeway network of this host (nftables table ${other})`,
            );
    const result = await this.#runner.run(['ss', '-Hlntu']);
    if (result.status !== 0)
      throw new EdgewayError('host_command_failed', `ss -Hlntu: ${result.stderr.trim()}`);
    for (const line of result.stdout.split('\n')) {
      const [protocol, , , , local = ''] = line.split(/\s+/);
      const colon = local.lastIndexOf(':');
      if (colon > 0 && !/^(?:127\.|\[::1\])/.test(local))
        found.set(`${protocol}/${local.slice(colon + 1)}`, 'a process of this host');
    }
    return found;
  }

  /** Tables of ours and of other networks of ours on this host. */
  async tables(): Promise<readonly string[]> {
    const { stdout } = await this.#runner.run(['nft', 'list', 'tables', 'inet']);
    return [...stdout.matchAll(/^table inet (edgeway(?:-\S+)?)$/gm)].map((one) => one[1] ?? '');
  }

  /** Another network of ours on this host says that it was the first to need forwarding. `table`: our own. */
  async forwardingWasOff(table: string): Promise<boolean> {
    for (const other of await this.tables())
      if (
        other !== table &&
        (await this.succeeds(['nft', 'list', 'chain', 'inet', other, FORWARDING_WAS_OFF]))
      )
        return true;
    return false;
  }

  async #published(table: string, protocol: Protocol): Promise<readonly number[]> {
    const listed = await this.#runner.run(['nft', 'list', 'set', 'inet', table, publishedSet(protocol)]);
    return [...listed.stdout.matchAll(/(\d+) \. [\d.]+ \. \d+/g)].map((one) => Number(one[1]));
  }

  async succeeds(argv: readonly string[]): Promise<boolean> {
    return (await this.#runner.run(argv)).status === 0;
  }

  async #json<Schema extends v.GenericSchema>(
    schema: Schema,
    argv: readonly string[],
    netns?: string,
  ): Promise<readonly v.InferOutput<Schema>[]> {
    const result = await this.#runner.run([...enter(netns), ...argv]);
    if (result.status !== 0)
      throw new EdgewayError('host_command_failed', `${argv.join(' ')}: ${result.stderr.trim()}`);
    let json: unknown;
    try {
      json = JSON.parse(result.stdout === '' ? '[]' : result.stdout.replace(FAR_END, '$1'));
    } catch (cause) {
      throw new EdgewayError('host_command_failed', `${argv.join(' ')}: did not answer in JSON`, { cause });
    }
    // iproute2 prints an empty object for a row that a filter left out.
    const rows = Array.isArray(json) ? json.filter((row) => Object.keys(row as object).length > 0) : json;
    const parsed = v.safeParse(v.array(schema), rows);
    if (!parsed.success)
      throw new EdgewayError(
        'host_command_failed',
        `${argv.join(' ')}: answers in a form that we cannot read: ${parsed.issues[0].message}`,
      );
    return parsed.output;
  }
}

/** `text`: `10.0.0.0/8` or `10.0.0.1`; host bits of an address are cut away. */
function foreign(text: string, link: string, connected: boolean): Foreign | undefined {
  const [address = '', length = '32'] = text.split('/');
  const parsed = parseIpv4(address);
  const bits = Number(length);
  if (!parsed.ok || !Number.isInteger(bits)) return undefined;
  return { prefix: { base: ipv4(networkOf(parsed.value, bits)), bits }, link, connected };
}
