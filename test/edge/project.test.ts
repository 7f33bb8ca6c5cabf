import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { projectLocal, projectService } from '../../edge/project.ts';
import { RouteTable } from '../../edge/routes/table.ts';
import { type Ipv4, parseIpv4 } from '../../src/addr.ts';
import { unwrap } from '../../src/error.ts';
import type { Instance, Service } from '../../src/model.ts';
import { parseServiceId } from '../../src/name.ts';

const ip = (text: string): Ipv4 => unwrap(parseIpv4(text));
const ID = unwrap(parseServiceId('a.b.c.d'));
const OTHER = unwrap(parseServiceId('a.b.x.d'));

function service(needs?: (typeof ID)[]): Service {
  return {
    id: ID,
    descriptor: {
      appname: 'a',
      appnamespace: 'b',
      servicename: 'c',
      servicenamespace: 'd',
      exposed: false,
      ports: [],
      statefull: false,
      ...(needs === undefined ? {} : { needs }),
    },
    addresses: { roundrobin: ip('172.30.0.9') },
  };
}

function instance(number: number, node: string): Instance {
  return {
    service: ID,
    instance: number,
    node,
    cluster: 'default',
    nodeIp: ip('10.0.0.1'),
    ewp: 4790,
    nsp: 0,
    namespaceIp: ip(`172.16.0.${number}`),
    instanceIp: ip(`172.30.1.${number}`),
    ports: [],
    epoch: 1,
  };
}

test('projectService gives addresses, and every instance in order with whether it is local', () => {
  const table = new RouteTable();
  table.putInstance(instance(2, 'n2'));
  table.putInstance(instance(1, 'n1'));
  table.putService(service());
  const command = projectService(table, ID, 'n1');
  assert.is(command.kind, 'service');
  if (command.kind !== 'service') return;
  assert.equal(command.addresses, { roundrobin: ip('172.30.0.9') });
  assert.equal(
    command.instances.map((one) => [one.instance, one.local]),
    [
      [1, true],
      [2, false],
    ],
  );
});

test('projectService: instances without a record are still routes; without both the service is gone', () => {
  const table = new RouteTable();
  table.putInstance(instance(1, 'n1'));
  assert.is(projectService(table, ID, 'n1').kind, 'service');
  table.deleteInstance(ID, 1);
  assert.equal(projectService(table, ID, 'n1'), { kind: 'serviceGone', service: ID });
});

test('projectLocal: undeclared needs stay undeclared, empty needs mean nobody', () => {
  const table = new RouteTable();
  const local = instance(1, 'n1');
  assert.not('needs' in projectLocal(table, local));
  table.putService(service([]));
  assert.equal((projectLocal(table, local) as { needs?: unknown }).needs, []);
  table.putService(service([OTHER]));
  assert.equal((projectLocal(table, local) as { needs?: unknown }).needs, [OTHER]);
});

test.run();
