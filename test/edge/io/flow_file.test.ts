import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { type FlowFile, openFlowFile } from '../../../edge/io/flow_file.ts';
import { FLOW_STATE, type FlowRecord, FlowTable } from '../../../edge/proxy/flows.ts';
import type { InstanceEntry } from '../../../edge/proxy/routes.ts';
import { Rng } from '../../../src/rng.ts';
import { TCP_ACK, TCP_SYN } from '../../../src/wire/tcp.ts';
import { CART_1, CART_RR, CLIENT, cartCommand, NodeUnderTest, tcp, udp } from '../proxy/world.ts';

const directory = mkdtempSync(join(tmpdir(), 'edgeway-flows-'));
const path = join(directory, 'flows');
test.after(() => rmSync(directory, { recursive: true, force: true }));

function opened(...how: Parameters<typeof openFlowFile>): {
  readonly file: FlowFile;
  readonly records: readonly FlowRecord[];
} {
  const { file, records, error } = openFlowFile(...how);
  if (file === undefined) throw error;
  return { file, records };
}

test('FlowFile gives back the flows that were there, in their last state, and none that had gone', () => {
  rmSync(path, { force: true });
  const { file, records } = opened(path, 100, 1_000);
  assert.equal(records, []);
  const table = new FlowTable(100);
  table.watcher = file;
  const instance = { instanceIp: 0xac1e0201, flows: 0, dialled: 0 } as InstanceEntry;
  const flows = [1, 2, 3].map((n) => table.open(6, 0xac100042, n, 0xac1e000a, 80, n + 100, instance, 0));
  table.setState(flows[0]!, FLOW_STATE.established);
  table.remove(flows[1]!);
  file.close();
  const again = opened(path, 100, 1_060);
  again.file.close();
  assert.equal(
    again.records.map(({ port, wirePort, state, ageS }) => ({ port, wirePort, state, ageS })),
    [
      { port: 1, wirePort: 101, state: FLOW_STATE.established, ageS: 60 },
      { port: 3, wirePort: 103, state: FLOW_STATE.opening, ageS: 60 },
    ],
  );
  assert.is(again.records[0]!.dialled, 0xac1e000a);
  assert.is(opened(path, 100, 2_000).records.length, 0, 'taken out once');
});

test('openFlowFile survives noise of any length', () => {
  const rng = new Rng(3);
  for (let i = 0; i < 300; i++) {
    const noise = Uint8Array.from({ length: rng.below(400) }, () => rng.u32());
    if (i % 2 === 0) noise.set([0x45, 0x57, 0x46, 0x4c, 1].slice(0, noise.length));
    writeFileSync(path, noise);
    const { file, records } = opened(path, 10, 1_000);
    file.close();
    assert.ok(records.length <= 10);
    const node = new NodeUnderTest(1);
    node.proxy.remember(records);
    node.apply(cartCommand(1));
  }
  assert.is(readFileSync(path).length, 8 + 10 * 24, 'the space is there before it is needed');
});

test('remembered flows come back with the route of their instance, and go on as if nothing had been', () => {
  rmSync(path, { force: true });
  const first = new NodeUnderTest(1);
  const { file } = opened(path, 1_024, 1_000);
  first.proxy.flows.watcher = file;
  first.apply(cartCommand(1, [1]));
  first.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_SYN));
  first.arrive(
    tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 }, TCP_SYN | TCP_ACK),
    2,
  );
  file.close();
  const second = new NodeUnderTest(1);
  second.proxy.remember(opened(path, 1_024, 1_002).records);
  // Its instance is not there yet: it waits, and is not told that there is no such connection.
  second.apply(cartCommand(1, [2]));
  assert.is(second.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_ACK)), 'no_flow');
  assert.equal(second.answers(), []);
  assert.is(second.leave(tcp({ source: CLIENT, target: CART_RR, sourcePort: 7 }, TCP_ACK)), 'no_flow');
  assert.match(second.answers()[0]!, 'TCP [R]');
  second.apply(cartCommand(1, [1, 2]));
  assert.match(second.leave(tcp({ source: CLIENT, target: CART_RR }, TCP_ACK)), 'node 2');
  assert.match(
    second.arrive(tcp({ source: CART_1, target: CLIENT, sourcePort: 80, targetPort: 40_000 }, TCP_ACK), 2),
    'tun: 172.30.0.10.80 >',
  );
  assert.is(second.counter('flows_restored'), 1);
});

test('a flow that goes on being used does not look idle, whenever it was made', () => {
  rmSync(path, { force: true });
  const { file } = opened(path, 1_024, 1_000);
  const first = new NodeUnderTest(1);
  first.proxy.flows.watcher = file;
  for (const sourcePort of [1, 2]) first.leave(udp({ source: CLIENT, target: CART_RR, sourcePort }));
  // Port 1 goes on for ten minutes.
  for (let s = 0; s < 600; s++) {
    first.now += 1_000;
    file.seconds++;
    first.leave(udp({ source: CLIENT, target: CART_RR, sourcePort: 1 }));
  }
  file.close();
  const { file: again, records } = opened(path, 1_024, 1_601);
  again.close();
  const age = (port: number): number => records.find((record) => record.port === port)!.ageS;
  assert.ok(age(1) <= 31, `${age(1)}`);
  assert.is(age(2), 601);
});

test('FlowFile writes by block when it is told to, and says what the disk says against it', () => {
  rmSync(path, { force: true });
  const { file } = opened(path, 1_024, 1_000);
  const table = new FlowTable(1_024);
  table.watcher = file;
  const instance = { instanceIp: 0xac1e0201, flows: 0, dialled: 0 } as InstanceEntry;
  for (let n = 0; n < 500; n++) table.open(6, 1, n, 2, 80, n, instance, 0);
  const written = (): number =>
    Array.from({ length: 1_024 }, (_, i) => readFileSync(path)[8 + i * 24]!).filter((state) => state > 0)
      .length;
  assert.is(written(), 0);
  assert.ok(file.dirty);
  file.write();
  assert.is(written(), 500);
  assert.not(file.dirty);
  file.abandon();
  assert.is(readFileSync(path).length, 0, 'what is not kept up to date is not kept');
  // The descriptor is closed: as a disk that has gone.
  table.remove([...table][0]!);
  assert.throws(() => file.write());
  assert.ok(openFlowFile('/dev/full', 10, 0).error instanceof Error);
});

test.run();
