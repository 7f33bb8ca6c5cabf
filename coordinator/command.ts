// A coordinator without an agent: holds roles, hosts nothing. `edgeway coordinator --etcd HOST:PORT [--roles
// root,cluster] [--cluster ID] …`; every flag also as EDGEWAY_… . Agents can hold the same roles (`--roles`).
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { hostname } from 'node:os';
import process from 'node:process';
import { parseArgs } from 'node:util';
import pino from 'pino';
import { type Ipv4, parseIpv4 } from '../src/addr.ts';
import { EdgewayError, toEdgewayError, unwrap } from '../src/error.ts';
import { checkId, DEFAULT_ROOT, Keys } from '../src/keys.ts';
import { PORT_MAX, ROLE_TTL_S } from '../src/limits.ts';
import { DEFAULT_NETWORK_CONFIG } from '../src/records.ts';
import { connectEtcd } from './etcd/client.ts';
import { parseCredentials } from './etcd/credentials.ts';
import { systemTime } from './etcd/time.ts';
import { boundHeap } from './io/heap.ts';
import { parseZone, type Zone } from './outside.ts';
import { parseRoles, startRoles } from './roles.ts';

const HELP = `edgeway coordinator: holds the root and cluster roles without being a node

  --etcd LIST           etcd endpoints, comma-separated (required)
  --roles LIST          root, cluster or both          (default root,cluster)
  --cluster ID          cluster whose role is held     (default default)
  --holder ID           name in the leader key         (default the host name)
  --root PREFIX         prefix of the keyspace         (default ${DEFAULT_ROOT})
  --etcd-user NAME      user; the password comes from EDGEWAY_ETCD_PASSWORD or --etcd-password-file
  --etcd-password-file FILE
  --etcd-ca FILE        CA certificate: turns TLS on
  --etcd-cert FILE      client certificate
  --etcd-key FILE       its key
  --role-ttl SECONDS    lease of the roles: a standby takes over within it (default ${ROLE_TTL_S})
  --outside-domain DOMAIN    answer DNS for this domain, which is delegated here: service.servicens.app.appns.DOMAIN
  --outside-listen IP:PORT   where it listens            (default 0.0.0.0:53)
  --outside-ns NAME          name of this server in the delegation (default ns.DOMAIN)
  --log-level LEVEL     trace, debug, info, warn, error (default info)
`;

const OPTIONS = {
  etcd: { type: 'string' },
  roles: { type: 'string' },
  cluster: { type: 'string' },
  holder: { type: 'string' },
  root: { type: 'string' },
  'etcd-user': { type: 'string' },
  'etcd-password-file': { type: 'string' },
  'etcd-ca': { type: 'string' },
  'etcd-cert': { type: 'string' },
  'etcd-key': { type: 'string' },
  'role-ttl': { type: 'string' },
  'outside-domain': { type: 'string' },
  'outside-listen': { type: 'string' },
  'outside-ns': { type: 'string' },
  'log-level': { type: 'string' },
  help: { type: 'boolean', short: 'h' },
} as const;

/** Runs until a signal ends it. What is wrong with the flags is said on standard error, with exit status 1. */
export async function runCoordinator(argv: readonly string[]): Promise<void> {
  try {
    await run(argv);
  } catch (thrown) {
    const error = toEdgewayError(thrown);
    process.stderr.write(`edgeway coordinator: ${error.message} (${error.code})\n`);
    process.exitCode = 1;
  }
}

async function run(argv: readonly string[]): Promise<void> {
  const { values } = parseFlags(argv);
  if (values.help === true) {
    process.stdout.write(HELP);
    return;
  }
  const setting = (name: Exclude<keyof typeof OPTIONS, 'help'>): string | undefined =>
    values[name] ?? process.env[`EDGEWAY_${name.toUpperCase().replaceAll('-', '_')}`];
  const endpoints = (setting('etcd') ?? '').split(',').filter((text) => text !== '');
  if (endpoints.length === 0)
    throw new EdgewayError('invalid_request', '--etcd is needed: where the keyspace lives');
  const cluster = unwrap(checkId('cluster', setting('cluster') ?? 'default'));
  const holder = unwrap(checkId('node', setting('holder') ?? hostname().toLowerCase()));
  const roles = unwrap(parseRoles(setting('roles') ?? 'root,cluster'));
  const ttlS = Number(setting('role-ttl') ?? ROLE_TTL_S);
  // etcd raises shorter leases by itself (1.5 × its election timeout).
  if (!Number.isInteger(ttlS) || ttlS < 2)
    throw new EdgewayError(
      'invalid_request',
      `--role-ttl ${setting('role-ttl')}: must be seconds, 2 or more`,
    );
  const credentials = parseCredentials(
    {
      user: setting('etcd-user'),
      password: process.env['EDGEWAY_ETCD_PASSWORD'],
      passwordFile: setting('etcd-password-file'),
      ca: setting('etcd-ca'),
      cert: setting('etcd-cert'),
      key: setting('etcd-key'),
    },
    (path) => readFileSync(path, 'utf8'),
  );
  const outside = outsideSettings(
    setting('outside-domain'),
    setting('outside-listen'),
    setting('outside-ns'),
  );
  const log = pino({ level: setting('log-level') ?? 'info' }, pino.destination({ dest: 2, sync: true }));

  // ---- above: only reading; below: the world ----

  boundHeap();
  const kv = connectEtcd({ endpoints, log, ...(credentials === undefined ? {} : { credentials }) });
  const keys = new Keys(setting('root') ?? DEFAULT_ROOT);
  const ended = new Promise<void>((resolve) => {
    for (const signal of ['SIGINT', 'SIGTERM'] as const) process.on(signal, () => resolve());
  });
  const running = startRoles({
    kv,
    keys,
    time: systemTime,
    random: Math.random,
    log,
    holder,
    roles,
    cluster,
    network: { ...DEFAULT_NETWORK_CONFIG, secret: randomBytes(32).toString('hex') },
    ttlS,
  });
  // Loaded when it is wanted: its socket needs the FFI, the roles do not.
  const names =
    outside === undefined
      ? undefined
      : await (await import('./io/outside_server.ts')).serveOutside({ kv, keys, log, ...outside });
  await ended;
  await running.stop();
  await names?.stop();
  await kv.close();
  process.exit(0);
}

function outsideSettings(
  domain: string | undefined,
  listen: string | undefined,
  nameServer: string | undefined,
): { readonly zone: Zone; readonly address: Ipv4; readonly port: number } | undefined {
  if (domain === undefined) return undefined;
  const [, host = '', portText = ''] = /^([^:]+):(\d{1,5})$/.exec(listen ?? '0.0.0.0:53') ?? [];
  const address = parseIpv4(host);
  const port = Number(portText);
  if (!address.ok || port > PORT_MAX || portText === '')
    throw new EdgewayError('invalid_request', `--outside-listen "${listen}": write ADDRESS:PORT`);
  const zone = parseZone(domain, {
    ...(nameServer === undefined ? {} : { nameServer }),
    ...(address.value === 0 ? {} : { address: address.value }),
  });
  return { zone: unwrap(zone), address: address.value, port };
}

function parseFlags(argv: readonly string[]) {
  try {
    return parseArgs({ args: [...argv], options: OPTIONS });
  } catch (cause) {
    throw new EdgewayError('invalid_request', (cause as Error).message, { cause });
  }
}
