import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { LoadMeter, parseLoadFile, parseProcStat } from '../../src/load.ts';

const stat = (user: number, idle: number, running: number): string =>
  `cpu  ${user} 0 0 ${idle} 0 0 0 0 0 0\ncpu0 1 0 0 1 0 0 0 0 0 0\ncpu1 1 0 0 1 0 0 0 0 0 0\nintr 5\nprocs_running ${running}\nprocs_blocked 0\n`;

test('parseProcStat counts cores, busy and idle ticks and runnable tasks', () => {
  assert.equal(parseProcStat('cpu  10 1 5 80 4 1 2 3 7 0\ncpu0 0 0 0 0 0\nprocs_running 3\n'), {
    busy: 22,
    total: 106,
    cores: 1,
    runnable: 3,
  });
});

test('parseProcStat says undefined for what is no /proc/stat', () => {
  for (const text of [
    '',
    'cpu',
    'cpu a b c d e\ncpu0 1\nprocs_running 1',
    'cpu 1 2 3 4 5\nprocs_running 1',
    'cpu 1 2 3 4 5\ncpu0 1',
  ])
    assert.is(parseProcStat(text), undefined, text);
});

test('LoadMeter is the busy share below saturation and runnable tasks per core at it', () => {
  const meter = new LoadMeter();
  let user = 0;
  let idle = 0;
  const run = (busy: number, running: number, times: number): void => {
    for (let i = 0; i < times; i++) {
      user += busy;
      idle += 100 - busy;
      meter.add(parseProcStat(stat(user, idle, running))!);
    }
  };
  run(30, 9, 1);
  assert.is(meter.value, undefined);
  run(30, 9, 8);
  assert.ok(Math.abs(meter.value! - 0.3) < 0.01, 'a burst of tasks on idle cores is no load');
  run(100, 9, 8);
  assert.ok(Math.abs(meter.value! - 4) < 0.1, `${meter.value}: eight others on two cores`);
  run(0, 1, 8);
  assert.ok(meter.value! < 0.05);
});

test('LoadMeter ignores a sample that goes back or repeats', () => {
  const meter = new LoadMeter();
  meter.add({ busy: 10, total: 100, cores: 1, runnable: 1 });
  meter.add({ busy: 60, total: 200, cores: 1, runnable: 1 });
  const before = meter.value;
  meter.add({ busy: 60, total: 200, cores: 1, runnable: 50 });
  meter.add({ busy: 0, total: 10, cores: 1, runnable: 50 });
  assert.is(meter.value, before);
});

test('parseLoadFile takes the first number and refuses the rest', () => {
  assert.is(parseLoadFile('0.75\n'), 0.75);
  assert.is(parseLoadFile('2 1.5 1.0 3/99'), 2);
  for (const text of ['', 'high', '-1', 'NaN', 'Infinity', '1e9'])
    assert.is(parseLoadFile(text), undefined, text);
});

test.run();
