// The key schema. Each key is built and parsed here and spelled nowhere else; build and parse are inverses.
import { type Cidr, formatCidr, formatIpv4, type Ipv4, parseCidr, parseIpv4 } from './addr.ts';
import { assert } from './assert.ts';
import { fail, ok, type Result } from './error.ts';
import { PORT_MAX } from './limits.ts';
import type { Protocol } from './model.ts';
import { parseInstanceNumber, parseServiceId, type ServiceId } from './name.ts';

export const DEFAULT_ROOT = '/edgeway/v1';

/** A key of ours, understood. */
export type Key =
  | { readonly kind: 'config' }
  | { readonly kind: 'rootLeader' }
  | { readonly kind: 'block'; readonly block: Cidr }
  | { readonly kind: 'cluster'; readonly cluster: string }
  | { readonly kind: 'clusterLeader'; readonly cluster: string }
  | { readonly kind: 'subnet'; readonly subnet: Cidr }
  | { readonly kind: 'node'; readonly cluster: string; readonly node: string }
  /** Says which host has a node id: there is one name space of them for all clusters. */
  | { readonly kind: 'host'; readonly node: string }
  /** Asks a node that a NAT hides to greet the caller: only what it sends itself opens the NAT. */
  | { readonly kind: 'call'; readonly node: string; readonly caller: string }
  | { readonly kind: 'service'; readonly service: ServiceId }
  /** Says that a service is exposed, so that every node can publish its ports without following all services. */
  | { readonly kind: 'exposed'; readonly service: ServiceId }
  | { readonly kind: 'address'; readonly address: Ipv4 }
  | { readonly kind: 'instance'; readonly service: ServiceId; readonly instance: number }
  /** A port that every node publishes. */
  | { readonly kind: 'port'; readonly protocol: Protocol; readonly port: number };

/** Ids of nodes and clusters: one path segment, 1…63 of [a-z0-9._-], led by a letter or digit. */
export const ID_PATTERN = /^[a-z0-9][a-z0-9._-]{0,62}$/;

export function checkId(what: 'node' | 'cluster', id: string): Result<string> {
  if (ID_PATTERN.test(id)) return ok(id);
  return fail(
    'invalid_request',
    `${what} id "${id}" must be 1…63 of a-z 0-9 . _ -, beginning with a letter or digit`,
  );
}

/** Subtrees that are watched as a whole. */
export type Subtree =
  | 'config'
  | 'root'
  | 'clusters'
  | 'subnets'
  | 'nodes'
  | 'hosts'
  | 'calls'
  | 'services'
  | 'exposed'
  | 'addresses'
  | 'instances'
  | 'ports';

export class Keys {
  readonly root: string;
  constructor(root: string = DEFAULT_ROOT) {
    assert(
      root.startsWith('/') && !root.endsWith('/'),
      'the root begins with a slash and does not end in one',
    );
    this.root = root;
  }

  prefix(subtree: Subtree): string {
    return `${this.root}/${subtree}/`;
  }
  /** Prefix of the instances of one service. */
  instancesOf(service: ServiceId): string {
    return `${this.root}/instances/${service}/`;
  }
  /** Prefix of the calls to one node. */
  callsTo(node: string): string {
    return `${this.root}/calls/${node}/`;
  }

  /** A CIDR keeps its slash, so `/subnets/172.16.0.64/26` reads as an operator would write it. */
  build(key: Key): string {
    switch (key.kind) {
      case 'config':
        return `${this.root}/config/network`;
      case 'rootLeader':
        return `${this.root}/root/leader`;
      case 'block':
        return `${this.root}/root/blocks/${formatCidr(key.block)}`;
      case 'cluster':
        return `${this.root}/clusters/${key.cluster}`;
      case 'clusterLeader':
        return `${this.root}/clusters/${key.cluster}/leader`;
      case 'subnet':
        return `${this.root}/subnets/${formatCidr(key.subnet)}`;
      case 'node':
        return `${this.root}/nodes/${key.cluster}/${key.node}`;
      case 'host':
        return `${this.root}/hosts/${key.node}`;
      case 'call':
        return `${this.root}/calls/${key.node}/${key.caller}`;
      case 'service':
        return `${this.root}/services/${key.service}`;
      case 'exposed':
        return `${this.root}/exposed/${key.service}`;
      case 'address':
        return `${this.root}/addresses/${formatIpv4(key.address)}`;
      case 'instance':
        return `${this.root}/instances/${key.service}/${key.instance}`;
      case 'port':
        return `${this.root}/ports/${key.protocol}/${key.port}`;
    }
  }

  /** Inverse of build; a foreign key under our root is an ordinary failure that names the rule. */
  parse(text: string): Result<Key> {
    if (!text.startsWith(`${this.root}/`))
      return fail('invalid_record', `key "${text}" lies outside ${this.root}/`);
    const [subtree, ...rest] = text.slice(this.root.length + 1).split('/');
    const [a, b] = rest;
    const foreign = fail('invalid_record', `key "${text}" is none of the keyspace's`);
    if (a === undefined) return foreign;
    if (subtree === 'config') return rest.length === 1 && a === 'network' ? ok({ kind: 'config' }) : foreign;
    if (subtree === 'root') {
      if (rest.length === 1 && a === 'leader') return ok({ kind: 'rootLeader' });
      if (rest.length !== 3 || a !== 'blocks') return foreign;
      const block = parseCidr(rest.slice(1).join('/'));
      return block.ok ? ok({ kind: 'block', block: block.value }) : block;
    }
    if (subtree === 'clusters') {
      if (!ID_PATTERN.test(a)) return foreign;
      if (rest.length === 1) return ok({ kind: 'cluster', cluster: a });
      return rest.length === 2 && b === 'leader' ? ok({ kind: 'clusterLeader', cluster: a }) : foreign;
    }
    if (subtree === 'subnets') {
      if (rest.length !== 2) return foreign;
      const subnet = parseCidr(rest.join('/'));
      return subnet.ok ? ok({ kind: 'subnet', subnet: subnet.value }) : subnet;
    }
    if (subtree === 'nodes') {
      if (rest.length !== 2 || b === undefined || !ID_PATTERN.test(a) || !ID_PATTERN.test(b)) return foreign;
      return ok({ kind: 'node', cluster: a, node: b });
    }
    if (subtree === 'hosts')
      return rest.length === 1 && ID_PATTERN.test(a) ? ok({ kind: 'host', node: a }) : foreign;
    if (subtree === 'calls') {
      if (rest.length !== 2 || b === undefined || !ID_PATTERN.test(a) || !ID_PATTERN.test(b)) return foreign;
      return ok({ kind: 'call', node: a, caller: b });
    }
    if (subtree === 'services' || subtree === 'exposed') {
      if (rest.length !== 1) return foreign;
      const service = parseServiceId(a);
      if (!service.ok || service.value !== a) return foreign;
      return ok({ kind: subtree === 'services' ? 'service' : 'exposed', service: service.value });
    }
    if (subtree === 'addresses') {
      if (rest.length !== 1) return foreign;
      const address = parseIpv4(a);
      return address.ok ? ok({ kind: 'address', address: address.value }) : address;
    }
    if (subtree === 'ports') {
      if (rest.length !== 2 || b === undefined || (a !== 'tcp' && a !== 'udp')) return foreign;
      const port = Number(b);
      if (!/^[1-9]\d{0,4}$/.test(b) || port > PORT_MAX) return foreign;
      return ok({ kind: 'port', protocol: a, port });
    }
    if (subtree === 'instances') {
      if (rest.length !== 2 || b === undefined) return foreign;
      const service = parseServiceId(a);
      const instance = parseInstanceNumber(b);
      if (!service.ok || service.value !== a || instance === undefined) return foreign;
      return ok({ kind: 'instance', service: service.value, instance });
    }
    return foreign;
  }
}
