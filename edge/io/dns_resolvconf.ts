// Which servers the host asks, read from its files and followed: a change is seen within a second, by looking at most
// once a second and only when somebody asks. Refuses to fail: an unreadable file is an empty one.
import { readFileSync, statSync } from 'node:fs';
import type { Ipv4 } from '../../src/addr.ts';
import type { Logger } from '../../src/log.ts';
import { RESOLV_CONF, RESOLVED_UPSTREAMS, upstreamsOf } from '../host/resolv.ts';
import type { Clock } from '../ports.ts';

const LOOK_EVERY_MS = 1_000;

export interface ResolvConfOptions {
  /** The resolver's own address, which is never an upstream. */
  readonly own: Ipv4;
  readonly resolvConf?: string;
  readonly resolved?: string;
  /** The state path of setUpHostResolver. */
  readonly statePath?: string;
  readonly clock: Clock;
  readonly log: Logger;
}

/** For `upstreams` of the DNS server. */
export function followResolvConf(options: ResolvConfOptions): () => readonly string[] {
  const { own, clock, log } = options;
  const paths = [
    options.resolvConf ?? RESOLV_CONF,
    options.resolved ?? RESOLVED_UPSTREAMS,
    options.statePath,
  ];
  let lookedMs = Number.NEGATIVE_INFINITY;
  let stamp = '';
  let servers: readonly string[] = [];
  return () => {
    const now = clock.monotonicMs();
    if (now - lookedMs < LOOK_EVERY_MS) return servers;
    lookedMs = now;
    const seen = paths.map(stampOf).join(' ');
    if (seen === stamp) return servers;
    stamp = seen;
    const [resolvConf, resolved, saved] = paths.map(read);
    const next = upstreamsOf({ resolvConf, resolved, saved }, own);
    if (next.join() !== servers.join()) log.info({ address: next.join(', ') }, 'upstream DNS servers');
    servers = next;
    return servers;
  };
}

function stampOf(path: string | undefined): string {
  if (path === undefined) return '-';
  try {
    const { ino, mtimeNs, size } = statSync(path, { bigint: true });
    return `${ino}.${mtimeNs}.${size}`;
  } catch {
    return '-';
  }
}

function read(path: string | undefined): string | undefined {
  if (path === undefined) return undefined;
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return undefined;
  }
}
