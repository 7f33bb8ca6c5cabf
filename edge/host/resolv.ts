// Makes the host itself ask the node's resolver, and puts everything back: on a stop, at the next start after a crash,
// or by command. Two kinds of host:
//   systemd-resolved (resolv.conf names its stub): our link gets our server and routing-only domains for our suffixes,
//     so that only `….closest.local` and its sisters come to us and `printer.local` stays what it was;
//   any other: our server becomes the only nameserver, and the ones that stood there become our upstream.
// It refuses to overwrite a resolv.conf that somebody changed after us when it puts the original back; one that a
// crash cut short is not changed, and while it cannot be told, the original is kept.
import { formatIpv4, type Ipv4 } from '../../src/addr.ts';
import { EdgewayError } from '../../src/error.ts';
import type { Logger } from '../../src/log.ts';
import { FIXED_LABEL, TOP_LABEL } from '../../src/name.ts';
import { POLICIES } from '../../src/policy.ts';
import type { CommandResult, Files, Runner } from '../ports.ts';

export const RESOLV_CONF = '/etc/resolv.conf';
/** The servers that systemd-resolved itself asks, in resolv.conf's format (systemd-resolved.service(8)). */
export const RESOLVED_UPSTREAMS = '/run/systemd/resolve/resolv.conf';
/** Addresses of systemd-resolved's stub listener (same page). */
const RESOLVED_STUBS: readonly string[] = ['127.0.0.53', '127.0.0.54'];
const SERVERS_MAX = 8;
/** Times that a resolv.conf which another program keeps rewriting is taken back before it is left alone. */
const RETAKES_MAX = 5;

/** The `nameserver` lines of a resolv.conf(5), and every other line that means something. */
export interface ResolvConf {
  readonly nameservers: readonly string[];
  readonly others: readonly string[];
}

/** Total: lines that resolv.conf(5) does not know are kept as they are. */
export function parseResolvConf(text: string): ResolvConf {
  const nameservers: string[] = [];
  const others: string[] = [];
  for (const line of text.split('\n')) {
    const trimmed = line.trim();
    if (trimmed === '' || trimmed.startsWith('#') || trimmed.startsWith(';')) continue;
    const server = /^nameserver\s+(\S+)/.exec(trimmed)?.[1];
    if (server === undefined) others.push(trimmed);
    else if (nameservers.length < SERVERS_MAX) nameservers.push(server);
  }
  return { nameservers, others };
}

/** Contents that upstream servers can be read from. */
export interface ResolvSources {
  readonly resolvConf: string | undefined;
  readonly resolved: string | undefined;
  /** The saved state of setUpHostResolver. */
  readonly saved: string | undefined;
}

/** Servers to forward to: what the host asks, never ourselves, never a stub that would ask us again. */
export function upstreamsOf(sources: ResolvSources, own: Ipv4): readonly string[] {
  const ours = formatIpv4(own);
  const listed = (text: string | undefined): readonly string[] =>
    parseResolvConf(text ?? '').nameservers.filter((server) => server !== ours);
  const servers = listed(sources.resolvConf);
  const behindStub = listed(sources.resolved);
  const isStub = (server: string): boolean => RESOLVED_STUBS.includes(server);
  if (servers.some(isStub) && behindStub.length > 0)
    return [...new Set([...servers.filter((server) => !isStub(server)), ...behindStub])];
  if (servers.length > 0) return servers;
  const saved = readSaved(sources.saved);
  return listed(saved !== undefined && 'path' in saved ? saved.original : undefined).filter(
    (server) => !isStub(server),
  );
}

/** What must be undone: a file that was replaced, or a link that systemd-resolved was told about. */
type Saved =
  | { readonly path: string; readonly original: string; readonly written: string }
  | { readonly link: string };

function readSaved(text: string | undefined): Saved | undefined {
  if (text === undefined) return undefined;
  try {
    const value = JSON.parse(text) as Record<string, unknown> | null;
    const { path, original, written, link } = value ?? {};
    if (typeof path === 'string' && typeof original === 'string' && typeof written === 'string')
      return { path, original, written };
    if (typeof link === 'string') return { link };
  } catch {
    // written by somebody else, or cut: nothing that could be put back
  }
  return undefined;
}

const print = (saved: Saved): string => `${JSON.stringify(saved, undefined, 1)}\n`;

export interface HostResolverOptions {
  readonly runner: Runner;
  readonly files: Files;
  /** Our link, as systemd-resolved knows it. */
  readonly bridge: string;
  readonly address: Ipv4;
  /** Where the original resolv.conf is kept while ours stands; in the agent's state directory. */
  readonly statePath: string;
  readonly resolvConf?: string;
  readonly log: Logger;
}

export interface HostResolver {
  readonly kind: 'resolved' | 'file';
  /** Sees to it that ours still stands; to be called now and then. A new original becomes the one to restore. */
  check(): Promise<void>;
  /** Puts back what was. */
  restore(): Promise<void>;
}

/** Commands that point systemd-resolved's routing at our link (resolvectl(1)); it forgets them with the link. */
export function resolvedCommands(bridge: string, address: Ipv4): readonly (readonly string[])[] {
  const domains = [...POLICIES, FIXED_LABEL].map((policy) => `~${policy}.${TOP_LABEL}`);
  return [
    ['resolvectl', 'dns', bridge, formatIpv4(address)],
    ['resolvectl', 'domain', bridge, ...domains],
    ['resolvectl', 'default-route', bridge, 'no'],
    // Our responder speaks there; a second one would ask IPv6 multicast for AAAA and wait seconds for it.
    ['resolvectl', 'mdns', bridge, 'no'],
    ['resolvectl', 'llmnr', bridge, 'no'],
  ];
}

/** Content of a resolv.conf with us as the only nameserver; the other lines stay. */
export function hostResolvConf(original: string, address: Ipv4, statePath: string): string {
  return [
    `# Written by edgeway. The original is kept in ${statePath} and comes back when the agent stops;`,
    '# `edgeway restore-resolver` puts it back by hand.',
    `nameserver ${formatIpv4(address)}`,
    ...parseResolvConf(original).others,
    '',
  ].join('\n');
}

/** Idempotent; what a crash left behind is put back first. Rejects with host_command_failed, the host unchanged. */
export async function setUpHostResolver(options: HostResolverOptions): Promise<HostResolver> {
  const { files, runner, bridge, address, log } = options;
  const path = options.resolvConf ?? RESOLV_CONF;
  await restoreHostResolver(options);
  const current = (await files.read(path)) ?? '';
  const stub = parseResolvConf(current).nameservers.some((server) => RESOLVED_STUBS.includes(server));
  if (stub) {
    await files.write(options.statePath, print({ link: bridge }));
    for (const argv of resolvedCommands(bridge, address)) {
      const result = await runner.run(argv);
      if (result.status === 0) continue;
      await restoreHostResolver(options);
      throw commandFailed(argv, result);
    }
    log.info({ interface: bridge }, 'systemd-resolved routes our suffixes to the resolver');
    return {
      kind: 'resolved',
      check: async () => {},
      restore: async () => {
        await restoreHostResolver(options);
      },
    };
  }
  await take(options, path, current);
  log.info({ file: path, address: formatIpv4(address) }, 'the host asks the resolver');
  let retakes = 0;
  let isOver = false;
  async function check(): Promise<void> {
    if (isOver) return;
    const saved = readSaved(await files.read(options.statePath));
    const now = await files.read(path);
    if (now === undefined || saved === undefined || !('path' in saved) || now === saved.written) return;
    // Cut short, by us or by somebody who is at it: no original that is worth keeping.
    if (isPart(now, saved.written)) return await files.writeInPlace(path, saved.written);
    if (retakes >= RETAKES_MAX) return;
    retakes++;
    if (retakes === RETAKES_MAX)
      log.warn({ file: path }, 'another program keeps rewriting resolv.conf; it is left alone from now on');
    else await take(options, path, now);
  }
  // One at a time: a check that read before a restore must not write after it.
  let last: Promise<void> = Promise.resolve();
  const inTurn = (run: () => Promise<void>): Promise<void> => {
    const turn = last.then(run);
    last = turn.catch(() => {});
    return turn;
  };
  return {
    kind: 'file',
    check: () => inTurn(check),
    restore: () =>
      inTurn(async () => {
        isOver = true;
        await restoreHostResolver(options);
      }),
  };
}

/** The original is on disk before the file is touched: a crash at any point can be undone. */
async function take(options: HostResolverOptions, path: string, original: string): Promise<void> {
  const written = hostResolvConf(original, options.address, options.statePath);
  await options.files.write(options.statePath, print({ path, original, written }));
  // In place: resolv.conf may be a symbolic link, or bind-mounted into a namespace.
  await options.files.writeInPlace(path, written);
}

/** Puts back what setUpHostResolver changed, where ours still stands. True when something was. Safe at any time. */
export async function restoreHostResolver(
  options: Pick<HostResolverOptions, 'runner' | 'files' | 'statePath' | 'log'>,
): Promise<boolean> {
  const { runner, files, statePath, log } = options;
  const saved = readSaved(await files.read(statePath));
  if (saved === undefined) return false;
  if ('link' in saved) {
    // Fails when the link is gone already, and then there is nothing to revert.
    const { status } = await runner.run(['resolvectl', 'revert', saved.link]);
    await files.remove(statePath);
    return status === 0;
  }
  const current = (await files.read(saved.path)) ?? '';
  const ours = isPart(current, saved.written) || isCut(current, saved.original);
  if (ours) await files.writeInPlace(saved.path, saved.original);
  else if (current !== saved.original && isPart(current, saved.original)) {
    log.warn({ file: saved.path }, 'resolv.conf may be a part of the original; both are kept');
    return false;
  } else if (current !== saved.original)
    log.info({ file: saved.path }, 'resolv.conf was changed by somebody else and stays as it is');
  await files.remove(statePath);
  return ours;
}

/** Whether a write of `whole` can have ended so: a beginning, and zeros where the disk had none of it yet. */
const isPart = (current: string, whole: string): boolean => whole.startsWith(current.replace(/\0+$/, ''));

/** A beginning that ends within a line: nobody writes that. Where a whole line ends, somebody may have meant it. */
const isCut = (current: string, whole: string): boolean =>
  current !== whole && isPart(current, whole) && !current.endsWith('\n');

function commandFailed(argv: readonly string[], result: CommandResult): EdgewayError {
  return new EdgewayError(
    'host_command_failed',
    `${argv.join(' ')}: status ${result.status}: ${result.stderr.trim()}`,
  );
}
