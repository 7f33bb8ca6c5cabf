// The agent's settings: flags win over environment, environment over defaults; one frozen value, validated once.
// Every error names the flag, the value and the rule. Nothing here touches the host.
import type { EtcdCredentials } from '../coordinator/etcd/client.ts';
import { parseCredentials } from '../coordinator/etcd/credentials.ts';
import { parseRoles, type Role } from '../coordinator/roles.ts';
import { type Cidr, type Ipv4, parseCidr, parseIpv4 } from '../src/addr.ts';
import { EdgewayError, unwrap } from '../src/error.ts';
import { checkId, DEFAULT_ROOT } from '../src/keys.ts';
import * as limits from '../src/limits.ts';
import { parseServiceId } from '../src/name.ts';
import { type Alias, parseAliasName } from './resolver/mdns_alias.ts';
import { parseUpstream } from './resolver/upstream.ts';

/** When the node claims its subnet: when told by `POST /register`, at start, or at start with this one. */
export type RegisterMode =
  | { readonly kind: 'wait' }
  | { readonly kind: 'auto' }
  | { readonly kind: 'exact'; readonly subnet: Cidr };

/** Where the REST API listens. */
export type ApiAddress =
  | { readonly kind: 'tcp'; readonly host: string; readonly port: number }
  | { readonly kind: 'unix'; readonly path: string };

export interface AgentConfig {
  readonly node: string;
  readonly cluster: string;
  /** Undefined: the source address of the default route. */
  readonly nodeIp?: Ipv4;
  readonly ewp: number;
  readonly nsp: number;
  /** Empty: a private etcd of the agent's own. */
  readonly etcd: readonly string[];
  readonly credentials?: EtcdCredentials;
  /** Roles of the platform that this agent offers to hold. */
  readonly roles: readonly Role[];
  /** Where this node's InstanceIPs lie, when its rights in etcd are limited to a part of the service range. */
  readonly instanceIps?: Cidr;
  /** What the agent follows: all services, or those that its instances are, declare or ask for. */
  readonly follow: 'needed' | 'all';
  /** How long an interest outlives its last use. */
  readonly interestIdleS: number;
  readonly root: string;
  readonly dataDir: string;
  readonly api: ApiAddress;
  readonly register: RegisterMode;
  readonly bridge: string;
  readonly tun: string;
  /** Empty: what the host's resolv.conf says. */
  readonly upstreams: readonly string[];
  readonly mdns: boolean;
  /** Aliases on a LAN; undefined: nothing is said there. */
  readonly lan?: { readonly interface: string; readonly aliases: readonly Alias[] };
  /** The host itself asks the resolver. */
  readonly hostDns: boolean;
  readonly dockerSocket?: string;
  /** Undefined: the underlay interface's MTU − 36. Used only when this node writes the network config. */
  readonly mtu?: number;
  readonly presenceTtlS: number;
  /** A file with one number that stands for this host's load. */
  readonly loadFile?: string;
  /** Health checks of kind `command` may run here. */
  readonly healthCommands: boolean;
  readonly logLevel: string;
}

/** One setting: its flag, what it means, its default. The environment variable is EDGEWAY_ + the flag in capitals. */
export const SETTINGS = {
  node: { hint: 'ID', help: 'id of this node (default: the host name)' },
  cluster: { hint: 'ID', help: 'cluster this node belongs to', default: 'default' },
  'node-ip': {
    hint: 'IP',
    help: 'address where other nodes reach this one (default: source of the default route)',
  },
  ewp: { hint: 'PORT', help: 'east-west port: UDP port of the tunnel', default: String(limits.EWP_DEFAULT) },
  nsp: { hint: 'PORT', help: 'north-south port, 0 for none', default: '0' },
  etcd: { hint: 'LIST', help: 'etcd endpoints, comma-separated (default: a private etcd on loopback)' },
  'etcd-user': {
    hint: 'NAME',
    help: 'etcd user; its password comes from EDGEWAY_ETCD_PASSWORD or --etcd-password-file',
  },
  'etcd-password-file': { hint: 'FILE', help: "file with the etcd user's password" },
  'etcd-ca': { hint: 'FILE', help: 'CA certificate of etcd: turns TLS on' },
  'etcd-cert': { hint: 'FILE', help: 'client certificate for etcd' },
  'etcd-key': { hint: 'FILE', help: 'key of the client certificate' },
  roles: { hint: 'LIST', help: 'roles to hold when nobody does: root, cluster', default: '' },
  'instance-ips': {
    hint: 'CIDR',
    help: "part of the service range for this node's InstanceIPs (default: all of it)",
  },
  follow: {
    hint: 'needed|all',
    help: 'follow the services that instances here are, declare or ask for, or all of them',
    default: 'needed',
  },
  'interest-idle': {
    hint: 'SECONDS',
    help: 'how long a service that was asked for is followed after its last use',
    default: String(limits.INTEREST_IDLE_MS / 1000),
  },
  root: { hint: 'PREFIX', help: 'prefix of the keyspace', default: DEFAULT_ROOT },
  'data-dir': { hint: 'DIR', help: 'state that survives a restart', default: '/var/lib/edgeway' },
  api: {
    hint: 'ADDRESS',
    help: 'REST API: loopback HOST:PORT or unix:/path',
    default: `127.0.0.1:${limits.API_PORT_DEFAULT}`,
  },
  register: {
    hint: 'wait|auto|CIDR',
    help: 'claim a subnet when POST /register says so, at start, or this one at start',
    default: 'wait',
  },
  bridge: { hint: 'NAME', help: 'bridge interface', default: 'edgeway0' },
  tun: { hint: 'NAME', help: 'TUN interface', default: 'edgeway-tun' },
  upstreams: {
    hint: 'LIST',
    help: 'DNS servers for all other names: ADDRESS, ADDRESS:PORT, [IPV6]:PORT, … (default: those of resolv.conf)',
  },
  mdns: { hint: 'on|off', help: 'answer multicast DNS on the bridge', default: 'on' },
  'mdns-lan': { hint: 'NAME', help: 'interface of a LAN where --mdns-alias names are answered' },
  'mdns-alias': {
    hint: 'LIST',
    help: 'two-label names for exposed services on that LAN: cart.local=appname.appns.servicename.servicens,…',
  },
  'host-dns': {
    hint: 'on|off',
    help: 'this host itself asks the resolver (systemd-resolved or resolv.conf; put back at the end)',
    default: 'off',
  },
  docker: { hint: 'SOCKET', help: 'Docker Engine API socket (default: DOCKER_HOST, then the usual places)' },
  mtu: {
    hint: 'BYTES',
    help: `overlay MTU for a new network (default: underlay − ${limits.TUNNEL_OVERHEAD})`,
  },
  'presence-ttl': {
    hint: 'SECONDS',
    help: 'presence lease for a new network',
    default: String(limits.PRESENCE_TTL_S),
  },
  'load-file': {
    hint: 'FILE',
    help: 'file with one number that policy "fastest" takes as this host\'s load (default: demand per core)',
  },
  'health-commands': {
    hint: 'on|off',
    help: 'run health checks of kind "command" that service descriptors name, as root inside the instance',
    default: 'off',
  },
  'log-level': { hint: 'LEVEL', help: 'trace, debug, info, warn or error', default: 'info' },
} as const satisfies Record<
  string,
  { readonly hint: string; readonly help: string; readonly default?: string }
>;

export type SettingName = keyof typeof SETTINGS;
export type SettingValues = Readonly<Partial<Record<SettingName, string>>>;

const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error'];
/** Linux IFNAMSIZ 16 with its final NUL. */
const INTERFACE_NAME_MAX = 15;

function bad(setting: SettingName, value: string, rule: string): EdgewayError {
  return new EdgewayError('invalid_request', `--${setting} "${value}": ${rule}`);
}

/** `--log-level` is EDGEWAY_LOG_LEVEL. */
export function environmentName(setting: SettingName): string {
  return `EDGEWAY_${setting.toUpperCase().replaceAll('-', '_')}`;
}

/** Builds the configuration; throws an EdgewayError `invalid_request` for the first setting that breaks its rule. */
export function parseConfig(
  flags: SettingValues,
  environment: Readonly<Record<string, string | undefined>>,
  hostname: string,
  readFile: (path: string) => string = () => {
    throw new Error('files are not read here');
  },
): AgentConfig {
  const given = (setting: SettingName): string | undefined => {
    const value = flags[setting] ?? environment[environmentName(setting)];
    return value === undefined || value === '' ? undefined : value;
  };
  const value = (
    setting: SettingName &
      (
        | 'cluster'
        | 'ewp'
        | 'nsp'
        | 'roles'
        | 'follow'
        | 'interest-idle'
        | 'root'
        | 'data-dir'
        | 'api'
        | 'register'
        | 'bridge'
        | 'tun'
        | 'mdns'
        | 'host-dns'
        | 'presence-ttl'
        | 'health-commands'
        | 'log-level'
      ),
  ): string => given(setting) ?? SETTINGS[setting].default;
  const integer = (setting: SettingName, text: string, min: number, max: number): number => {
    const number = /^\d{1,9}$/.test(text) ? Number(text) : Number.NaN;
    if (!(number >= min && number <= max))
      throw bad(setting, text, `must be an integer from ${min} to ${max}`);
    return number;
  };
  const id = (setting: 'node' | 'cluster', text: string): string => {
    const result = checkId(setting, text);
    if (!result.ok) throw bad(setting, text, result.error.message);
    return result.value;
  };
  const list = (setting: SettingName): string[] =>
    (given(setting) ?? '')
      .split(',')
      .map((item) => item.trim())
      .filter((item) => item !== '');
  const link = (setting: 'bridge' | 'tun'): string => {
    const name = value(setting);
    if (!/^[A-Za-z0-9_.-]+$/.test(name) || name.length > INTERFACE_NAME_MAX)
      throw bad(setting, name, `must be 1…${INTERFACE_NAME_MAX} of letters, digits, "_", ".", "-"`);
    return name;
  };

  const nodeIp = given('node-ip');
  const upstreams = list('upstreams');
  for (const upstream of upstreams)
    if (parseUpstream(upstream) === undefined)
      throw bad('upstreams', upstream, 'must be ADDRESS or ADDRESS:PORT, with IPv6 [ADDRESS]:PORT');
  const mdns = value('mdns');
  if (mdns !== 'on' && mdns !== 'off') throw bad('mdns', mdns, 'must be on or off');
  const hostDns = value('host-dns');
  if (hostDns !== 'on' && hostDns !== 'off') throw bad('host-dns', hostDns, 'must be on or off');
  const lan = given('mdns-lan');
  const aliases = list('mdns-alias').map(parseAlias);
  if (lan === undefined && aliases.length > 0)
    throw bad('mdns-alias', given('mdns-alias')!, 'needs --mdns-lan: the interface where it is answered');
  const healthCommands = value('health-commands');
  if (healthCommands !== 'on' && healthCommands !== 'off')
    throw bad('health-commands', healthCommands, 'must be on or off');
  const loadFile = given('load-file');
  const logLevel = value('log-level');
  if (!LOG_LEVELS.includes(logLevel))
    throw bad('log-level', logLevel, `must be one of ${LOG_LEVELS.join(', ')}`);
  const root = value('root');
  if (!/^(\/[A-Za-z0-9_.-]+)+$/.test(root))
    throw bad('root', root, 'must be /segments of letters, digits, "_", ".", "-"');
  const docker = given('docker');
  const mtu = given('mtu');
  const bridge = link('bridge');
  const tun = link('tun');
  if (bridge === tun) throw bad('tun', tun, 'must differ from --bridge');

  const slice = given('instance-ips');
  const instanceIps = slice === undefined ? undefined : parseCidr(slice);
  if (instanceIps?.ok === false) throw bad('instance-ips', slice ?? '', instanceIps.error.message);
  const follow = value('follow');
  if (follow !== 'needed' && follow !== 'all') throw bad('follow', follow, 'must be needed or all');
  const roles = parseRoles(value('roles'));
  if (!roles.ok) throw bad('roles', value('roles'), roles.error.message);
  const credentials = parseCredentials(
    {
      user: given('etcd-user'),
      password: environment['EDGEWAY_ETCD_PASSWORD'],
      passwordFile: given('etcd-password-file'),
      ca: given('etcd-ca'),
      cert: given('etcd-cert'),
      key: given('etcd-key'),
    },
    readFile,
  );

  return Object.freeze({
    // A host name may have capitals and dots; ids are lower case.
    node: id('node', given('node') ?? hostname.toLowerCase()),
    cluster: id('cluster', value('cluster')),
    ...(nodeIp === undefined ? {} : { nodeIp: address('node-ip', nodeIp) }),
    ewp: integer('ewp', value('ewp'), 1, 65_535),
    nsp: integer('nsp', value('nsp'), 0, 65_535),
    etcd: list('etcd'),
    ...(credentials === undefined ? {} : { credentials }),
    roles: roles.value,
    ...(instanceIps === undefined ? {} : { instanceIps: unwrap(instanceIps) }),
    follow,
    interestIdleS: integer('interest-idle', value('interest-idle'), 60, 31_536_000),
    root,
    dataDir: value('data-dir'),
    api: parseApiAddress(value('api')),
    register: parseRegister(value('register')),
    bridge,
    tun,
    upstreams,
    mdns: mdns === 'on',
    ...(lan === undefined ? {} : { lan: { interface: lan, aliases } }),
    hostDns: hostDns === 'on',
    ...(docker === undefined ? {} : { dockerSocket: docker.replace(/^unix:\/\//, '') }),
    ...(mtu === undefined ? {} : { mtu: integer('mtu', mtu, limits.MTU_MIN, limits.MTU_MAX) }),
    // etcd raises shorter leases by itself (minimum 1.5 × election timeout, about 2 s).
    presenceTtlS: integer('presence-ttl', value('presence-ttl'), 2, 3_600),
    ...(loadFile === undefined ? {} : { loadFile }),
    healthCommands: healthCommands === 'on',
    logLevel,
  });
}

/** `cart.local=appname.appns.servicename.servicens` */
function parseAlias(text: string): Alias {
  const [left = '', right = ''] = text.split('=');
  const name = parseAliasName(left);
  if (!name.ok) throw bad('mdns-alias', text, name.error.message);
  const service = parseServiceId(right);
  if (!service.ok) throw bad('mdns-alias', text, service.error.message);
  return { name: name.value, service: service.value };
}

function address(setting: SettingName, text: string): Ipv4 {
  const result = parseIpv4(text);
  if (!result.ok) throw bad(setting, text, result.error.message);
  return result.value;
}

function parseRegister(text: string): RegisterMode {
  if (text === 'wait' || text === 'auto') return { kind: text };
  const subnet = parseCidr(text);
  if (!subnet.ok) throw bad('register', text, `must be wait, auto or a subnet: ${subnet.error.message}`);
  return { kind: 'exact', subnet: unwrap(subnet) };
}

/** Loopback only: the API can attach namespaces and has no authentication of its own. */
export function parseApiAddress(text: string): ApiAddress {
  const unix = /^(?:unix:)?(\/.+)$/.exec(text);
  if (unix) return { kind: 'unix', path: unix[1]! };
  const tcp = /^(?:http:\/\/)?(.+):(\d{1,5})\/?$/.exec(text);
  const host = tcp?.[1];
  const port = Number(tcp?.[2]);
  if (host === undefined || !(port >= 0 && port <= 65_535))
    throw bad('api', text, 'must be HOST:PORT or unix:/path');
  const loopback = host === 'localhost' || host === '[::1]' || /^127(\.\d{1,3}){3}$/.test(host);
  if (!loopback)
    throw bad('api', text, 'must be a loopback address: the API has no authentication of its own');
  return { kind: 'tcp', host: host.replace(/^\[|\]$/g, ''), port };
}
