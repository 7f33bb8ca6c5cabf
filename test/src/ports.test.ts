import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unwrap } from '../../src/error.ts';
import { portNumbers, publishedPorts } from '../../src/model.ts';
import { decodeService, encodeService, parseDescriptor } from '../../src/records.ts';

const base = { appname: 'shop', appnamespace: 'prod', servicename: 'cart', servicenamespace: 'v1' };
const parse = (more: object) => parseDescriptor({ ...base, ...more });

test('parseDescriptor takes mappings beside plain ports, tcp unless they say otherwise, and they survive the keyspace', () => {
  const { id, descriptor } = unwrap(
    parse({
      exposed: true,
      ports: [80, { source: 8080, destination: 80 }, { source: 5353, destination: 53, protocol: 'udp' }],
    }),
  );
  assert.equal(portNumbers(descriptor.ports), [80, 53]);
  assert.equal(publishedPorts(descriptor), [
    { source: 8080, destination: 80, protocol: 'tcp' },
    { source: 5353, destination: 53, protocol: 'udp' },
  ]);
  const service = { id, descriptor, addresses: {} };
  assert.equal(unwrap(decodeService(encodeService(service), id)), service);
});

test('publishedPorts is empty for a service that is not exposed', () => {
  const { descriptor } = unwrap(parse({ ports: [{ source: 8080, destination: 80 }] }));
  assert.equal(publishedPorts(descriptor), []);
});

test('parseDescriptor refuses ports and mappings outside the rules', () => {
  const same = { source: 80, destination: 1 };
  for (const ports of [
    [0],
    ['80'],
    [{ source: 80 }],
    [{ source: 70_000, destination: 80 }],
    [{ source: 80, destination: 80, protocol: 'sctp' }],
    [same, { ...same, destination: 2 }],
  ]) {
    const result = parse({ ports });
    assert.not(result.ok, JSON.stringify(ports));
    if (!result.ok) assert.match(result.error.message, 'ports');
  }
  assert.ok(parse({ ports: [same, { ...same, protocol: 'udp' }] }).ok);
});

test.run();
