import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { HealthMonitor, type HealthOutput, LOOK_INTERVAL_MS } from '../../edge/health.ts';
import { ipv4 } from '../../src/addr.ts';
import type { HealthCheck } from '../../src/model.ts';

const check: HealthCheck = {
  probe: { kind: 'tcp', port: 80 },
  intervalMs: 1_000,
  timeoutMs: 500,
  fall: 3,
  rise: 2,
};
const ip = ipv4(0xac100042);

/** A monitor whose homes are a map, driven to `end` in 10 ms steps; every check gets `answer` after 20 ms. */
function ward(): {
  monitor: HealthMonitor;
  homes: Map<string, string>;
  drive: (from: number, end: number, answer?: (at: number) => boolean | undefined) => HealthOutput[];
} {
  const homes = new Map<string, string>();
  const monitor = new HealthMonitor((id) => homes.get(id));
  const drive = (from: number, end: number, answer: (at: number) => boolean | undefined = () => true) => {
    const seen: HealthOutput[] = [];
    const due: { at: number; id: string; run: number; ok: boolean }[] = [];
    for (let now = from; now <= end; now += 10) {
      for (const d of due.filter((x) => x.at === now))
        monitor.handleResult(d.id, d.run, d.ok, d.ok ? 'accepts' : 'refused', now);
      if ((monitor.deadline()?.at ?? Number.POSITIVE_INFINITY) <= now) monitor.handleTimeout(now);
      for (let o = monitor.poll(); o !== undefined; o = monitor.poll()) {
        seen.push(o);
        const ok = o.kind === 'check' ? answer(now) : undefined;
        if (o.kind === 'check' && ok !== undefined) due.push({ at: now + 20, id: o.id, run: o.run, ok });
      }
    }
    return seen;
  };
  return { monitor, homes, drive };
}
const told = (outputs: readonly HealthOutput[]): string[] =>
  outputs.flatMap((o) => (o.kind === 'check' ? [] : [o.kind === 'gone' ? 'gone' : o.up ? 'up' : 'down']));

test('HealthMonitor: without a check an instance is up while its home exists, and gone within one look when it does not', () => {
  const { monitor, homes, drive } = ward();
  homes.set('a', '1');
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1' }, 0);
  assert.equal(drive(0, 5_000), []);
  assert.is(monitor.isUp(ip), true);
  assert.equal([...monitor.up()], [ip]);
  homes.delete('a');
  assert.equal(told(drive(5_010, 5_010 + LOOK_INTERVAL_MS)), ['gone']);
  assert.is(monitor.isUp(ip), false);
  assert.equal([...monitor.up()], []);
  assert.equal(drive(5_300, 9_000), [], 'once and for ever');
  monitor.discharge('a');
  assert.is(monitor.isUp(ip), false, 'what is not known here is not up');
  assert.is(monitor.deadline(), undefined);
});

test('HealthMonitor: a pid or namespace name that was used again is another home', () => {
  const { monitor, homes, drive } = ward();
  homes.set('a', 'started at 100');
  monitor.admit({ id: 'a', namespaceIp: ip, identity: 'started at 100' }, 0);
  drive(0, 1_000);
  homes.set('a', 'started at 200');
  const [gone] = drive(1_010, 1_300);
  assert.is(gone?.kind, 'gone');
  assert.match(gone?.kind === 'gone' ? gone.why : '', 'another one');
});

test('HealthMonitor: with a check down at first, up after `rise` passes, down after `fall` failures in a row', () => {
  const { monitor, homes, drive } = ward();
  homes.set('a', '1');
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1', check }, 0);
  assert.is(monitor.isUp(ip), false);
  assert.equal(told(drive(0, 600)), ['up']);
  assert.equal(told(drive(610, 20_000)), []);
  assert.equal(told(drive(20_010, 23_000, () => false)), ['down']);
  assert.match(monitor.view('a')!.why, 'tcp check: refused');
  assert.equal(told(drive(23_010, 26_000)), ['up']);
});

test('HealthMonitor: fewer than `fall` failures in a row change nothing', () => {
  const { monitor, homes, drive } = ward();
  homes.set('a', '1');
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1', check }, 0);
  drive(0, 1_000);
  let n = 0;
  assert.equal(told(drive(1_010, 60_000, () => n++ % 3 === 0)), []);
});

test('HealthMonitor: a check that never comes back counts as failed, and its late answer as nothing', () => {
  const { monitor, homes, drive } = ward();
  homes.set('a', '1');
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1', check: { ...check, fall: 1, rise: 1 } }, 0);
  assert.equal(told(drive(0, 500)), ['up']);
  const outputs = drive(510, 6_000, () => undefined);
  assert.equal(told(outputs), ['down']);
  const first = outputs.find((o) => o.kind === 'check');
  assert.ok(first?.kind === 'check');
  if (first?.kind === 'check') monitor.handleResult('a', first.run, true, 'late', 6_000);
  assert.is(monitor.isUp(ip), false);
});

test('HealthMonitor.admit: another check takes the state over and counts anew; without one an instance is up', () => {
  const { monitor, homes, drive } = ward();
  homes.set('a', '1');
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1', check }, 0);
  drive(0, 1_000);
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1', check: { ...check } }, 1_000);
  assert.is(monitor.isUp(ip), true);
  monitor.admit(
    { id: 'a', namespaceIp: ip, identity: '1', check: { ...check, probe: { kind: 'tcp', port: 81 } } },
    1_000,
  );
  assert.is(monitor.isUp(ip), true);
  assert.equal(told(drive(1_010, 3_000, () => false)), ['down']);
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1', check }, 3_000);
  assert.is(monitor.isUp(ip), false);
  assert.equal(told(drive(3_010, 4_000)), ['up']);
  drive(4_010, 9_000, () => false);
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1' }, 9_000);
  assert.is(monitor.isUp(ip), true);
  assert.equal(told(drive(9_010, 9_020)), ['up']);
  homes.delete('a');
  assert.equal(told(drive(9_030, 10_000)), ['gone']);
  monitor.admit({ id: 'a', namespaceIp: ip, identity: '1', check }, 10_000);
  assert.equal(drive(10_010, 12_000), [], 'gone is for ever');
  assert.is(monitor.isUp(ip), false);
});

test.run();
