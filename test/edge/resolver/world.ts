// A small world for the resolver's tests: one service with all policies and two instances, in a real RouteTable.

import { RouteTable } from '../../../edge/routes/table.ts';
import { type Ipv4, parseIpv4 } from '../../../src/addr.ts';
import { unwrap } from '../../../src/error.ts';
import type { Instance, Service } from '../../../src/model.ts';
import { parseServiceId, type ServiceId, splitServiceId } from '../../../src/name.ts';

export const ip = (text: string): Ipv4 => unwrap(parseIpv4(text));
export const id = (text: string): ServiceId => unwrap(parseServiceId(text));
export const CART = id('shop.prod.cart.v1');
export const CART_ANY = 'shop.prod.cart.v1.any.closest.local';

export function service(text: string, first: string, ports: readonly number[] = []): Service {
  const name = splitServiceId(id(text));
  const base = ip(first);
  return {
    id: id(text),
    descriptor: {
      appname: name.app,
      appnamespace: name.appNs,
      servicename: name.service,
      servicenamespace: name.serviceNs,
      exposed: false,
      ports,
      statefull: false,
    },
    addresses: { roundrobin: base, closest: (base + 1) as Ipv4, fastest: (base + 2) as Ipv4 },
  };
}

export function instance(text: string, number: number, namespaceIp: string, instanceIp: string): Instance {
  return {
    service: id(text),
    instance: number,
    node: 'n1',
    cluster: 'c1',
    nodeIp: ip('10.0.0.1'),
    ewp: 4790,
    nsp: 0,
    namespaceIp: ip(namespaceIp),
    instanceIp: ip(instanceIp),
    ports: [],
    epoch: 7,
  };
}

/** cart: .1 roundrobin, .2 closest, .3 fastest; instances 1 and 2 at 172.30.1.1 and 172.30.1.2. */
export function world(): RouteTable {
  const table = new RouteTable();
  table.synced = true;
  table.putService(service(CART, '172.30.0.1', [80, 443]));
  table.putInstance(instance(CART, 1, '172.16.0.66', '172.30.1.1'));
  table.putInstance(instance(CART, 2, '172.16.0.130', '172.30.1.2'));
  return table;
}
