// The parts of the records that policies need: coordinate and load of a node, health check of a descriptor.
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { ipv4 } from '../../src/addr.ts';
import { ORIGIN } from '../../src/coordinate.ts';
import { unwrap } from '../../src/error.ts';
import type { Node } from '../../src/model.ts';
import type { ServiceId } from '../../src/name.ts';
import {
  decodeCoordinate,
  decodeNode,
  decodeService,
  encodeCoordinate,
  encodeNode,
  encodeService,
  parseDescriptor,
} from '../../src/records.ts';

const node: Node = {
  node: 'n1',
  cluster: 'default',
  nodeIp: ipv4(0x0a4d0001),
  ewp: 4790,
  nsp: 0,
  subnet: { base: ipv4(0xac100040), bits: 26 },
  epoch: 7,
};

test('a node record carries coordinate and load to the microsecond, and may lack them', () => {
  assert.equal(unwrap(decodeNode(encodeNode(node))), node);
  const full: Node = {
    ...node,
    load: 0.125,
    coordinate: { ...ORIGIN, vec: [1.5, -2.25, 0, 0, 0, 0, 0, 3], error: 0.25 },
  };
  assert.equal(unwrap(decodeNode(encodeNode(full))), full);
  assert.match(encodeNode({ ...full, load: 1 / 3 }), '"load":0.333');
});

test('decodeNode names a coordinate that breaks a rule', () => {
  const bad = decodeNode(encodeNode({ ...node, coordinate: { ...ORIGIN, vec: [1, 2] } }));
  assert.ok(!bad.ok);
  if (!bad.ok) assert.match(bad.error.message, 'vec has 2 entries, 8 are needed');
  assert.not(decodeNode(encodeNode({ ...node, load: -1 })).ok);
});

const descriptor = (health: unknown): unknown => ({
  appname: 'shop',
  appnamespace: 'prod',
  servicename: 'cart',
  servicenamespace: 'v1',
  health,
});

test('parseDescriptor takes tcp, http and command checks and fills in the timing', () => {
  const probeOf = (health: unknown): unknown => unwrap(parseDescriptor(descriptor(health))).descriptor.health;
  const timing = { intervalMs: 1_000, timeoutMs: 1_000, fall: 2, rise: 2 };
  assert.equal(probeOf({ tcp: { port: 80 } }), { probe: { kind: 'tcp', port: 80 }, ...timing });
  assert.equal(probeOf({ http: { port: 80 }, fall: 5 }), {
    probe: { kind: 'http', port: 80, path: '/' },
    ...timing,
    fall: 5,
  });
  assert.equal(probeOf({ command: ['true'] }), { probe: { kind: 'command', command: ['true'] }, ...timing });
});

test('parseDescriptor refuses other checks and says what would be right', () => {
  for (const health of [
    {},
    { tcp: {} },
    { tcp: { port: 0 } },
    { http: { port: 80, path: 'x' } },
    { http: { port: 80, path: '/a b' } },
    { http: { port: 80, path: '/\n' } },
    { http: { port: 80, path: '/ä' } },
    { command: [] },
    'tcp',
    { tcp: { port: 80 }, fall: 0 },
  ]) {
    const result = parseDescriptor(descriptor(health));
    assert.not(result.ok, JSON.stringify(health));
    if (!result.ok) assert.match(result.error.message, 'health');
  }
});

test('a service record keeps its health check in the descriptor`s spelling', () => {
  for (const health of [
    { tcp: { port: 80 }, fall: 4 },
    { http: { port: 8080, path: '/ok' } },
    { command: ['sh', '-c', 'true'] },
  ]) {
    const { id, descriptor: parsed } = unwrap(parseDescriptor(descriptor(health)));
    const text = encodeService({ id, descriptor: parsed, addresses: {} });
    assert.equal(JSON.parse(text).health, {
      intervalMs: 1_000,
      timeoutMs: 1_000,
      fall: 2,
      rise: 2,
      ...health,
    });
    assert.equal(unwrap(decodeService(text, 'shop.prod.cart.v1' as ServiceId)).descriptor, parsed);
  }
});

test('encodeCoordinate and decodeCoordinate are inverses to the microsecond; anything else is an error', () => {
  const coordinate = { vec: [1.5, -2.25, 0, 0, 0, 0, 0, 3], height: 0.125, adjustment: -1, error: 0.25 };
  assert.equal(unwrap(decodeCoordinate(encodeCoordinate(coordinate))), coordinate);
  for (const text of ['', '{}', '[]', '{"v":1}', '{"v":2}', encodeCoordinate({ ...coordinate, vec: [] })])
    assert.not(decodeCoordinate(text).ok, text);
});

test.run();
