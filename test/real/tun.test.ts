// node-tun against the kernel: the device, its offloads, and errors with a name.
import { readFileSync } from 'node:fs';
import process from 'node:process';
import {
  ERRNO,
  errnoName,
  openTun,
  openTunnelSocket,
  pathMtu,
  SOL_UDP,
  type System,
  system,
  TUN_F_CSUM,
  TUN_F_TSO4,
  TUN_F_TSO6,
  TUN_F_USO4,
  TUN_F_USO6,
  TUNSETOFFLOAD,
  TunError,
  type TunnelSocket,
  type TunnelSocketOptions,
  UDP_GRO,
  UDP_SEGMENT,
} from 'node-tun';
import { test } from 'uvu';
import * as assert from 'uvu/assert';

const name = `ewAt${process.pid}`.slice(0, 15);

test('openTun makes the device, sets MTU and queue, brings it up, and it goes with its fd', () => {
  const tun = openTun(system, { name, mtu: 1464, queue: 5_000 });
  try {
    const links = readFileSync('/proc/net/dev', 'utf8');
    assert.match(links, `${name}:`);
    assert.ok(tun.checksum && tun.tso);
    assert.is(readFileSync(`/sys/class/net/${name}/mtu`, 'utf8').trim(), '1464');
    assert.is(readFileSync(`/sys/class/net/${name}/tx_queue_len`, 'utf8').trim(), '5000');
    assert.is(Number(readFileSync(`/sys/class/net/${name}/flags`, 'utf8')) & 1, 1);
    assert.throws(
      () => openTun(system, { name, mtu: 1464, queue: 5_000 }),
      (error: unknown) =>
        error instanceof TunError && error.errno === ERRNO.EBUSY && /create TUN device/.test(error.message),
    );
  } finally {
    system.close(tun.fd);
  }
  assert.not.match(readFileSync('/proc/net/dev', 'utf8'), `${name}:`);
});

test('openTun names the step that failed and leaves no device', () => {
  assert.throws(
    () => openTun(system, { name: 'a name with spaces', mtu: 1464, queue: 1 }),
    /1…15 characters/,
  );
  assert.throws(() => openTun(system, { name, mtu: 20, queue: 1 }), /set the MTU/);
  assert.not.match(readFileSync('/proc/net/dev', 'utf8'), `${name}:`);
});

/** The kernel, but for TUNSETOFFLOAD and socket options that it does not know. */
function older(offloads: number, options: readonly number[] = []): System {
  return {
    ...system,
    ioctlValue: (fd, request, argument) =>
      request === TUNSETOFFLOAD && (argument & ~offloads) !== 0
        ? -ERRNO.EINVAL
        : system.ioctlValue(fd, request, argument),
    setsockopt: (fd, level, option, value, length) =>
      level === SOL_UDP && options.includes(option)
        ? -ERRNO.EPROTONOSUPPORT
        : system.setsockopt(fd, level, option, value, length),
  };
}

test('openTun takes what an older kernel grants, and says what it does not', () => {
  const base = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
  for (const [offloads, checksum, tso, uso] of [
    [base | TUN_F_USO4 | TUN_F_USO6, true, true, true],
    [base, true, true, false],
    [TUN_F_CSUM, true, false, false],
    [0, false, false, false],
  ] as const) {
    const tun = openTun(older(offloads), { name, mtu: 1464, queue: 500 });
    system.close(tun.fd);
    assert.equal([tun.checksum, tun.tso, tun.uso], [checksum, tso, uso]);
    assert.is(tun.refused.length, [checksum, tso, uso].filter((granted) => !granted).length);
  }
  for (const [without, tso, uso] of [
    [['uso'], true, false],
    [['tso'], false, false],
  ] as const) {
    const tun = openTun(system, { name, mtu: 1464, queue: 500, without });
    system.close(tun.fd);
    assert.equal([tun.checksum, tun.tso, tun.uso, tun.refused], [true, tso, uso, []], `${without}`);
  }
});

/** A socket of that kernel on a port that is free, asked for again when another program was first. */
function socketOn(sys: System, more: Partial<TunnelSocketOptions> = {}): TunnelSocket & { port: number } {
  for (let tries = 0; ; tries++) {
    const port = 20_000 + ((process.pid * 7 + tries * 101) % 10_000);
    try {
      return { ...openTunnelSocket(sys, { address: 0x7f000001, port, buffer: 1 << 20, ...more }), port };
    } catch (error) {
      if (!(error instanceof TunError) || error.errno !== ERRNO.EADDRINUSE || tries >= 50) throw error;
    }
  }
}

test('openTunnelSocket does without what an older kernel has not, or has broken', () => {
  for (const [sys, more, gso, gro, refused] of [
    [older(0, [UDP_GRO]), {}, true, false, 1],
    [older(0, [UDP_GRO, UDP_SEGMENT]), {}, false, false, 2],
    [system, { kernel: '5.11.0-generic' }, true, false, 1],
    [system, { kernel: '5.12.0' }, true, true, 0],
    [system, { kernel: '10.0' }, true, true, 0],
    [system, { without: ['gso', 'gro'] }, false, false, 0],
  ] as const) {
    const socket = socketOn(sys, more);
    system.close(socket.fd);
    assert.equal([socket.gso, socket.gro, socket.refused.length], [gso, gro, refused], JSON.stringify(more));
  }
});

test('openTunnelSocket binds with offloads; a second one on its port is an error that says so', () => {
  const socket = socketOn(system);
  const { port } = socket;
  try {
    assert.ok(socket.gso && socket.gro);
    assert.throws(
      () => openTunnelSocket(system, { address: 0x7f000001, port, buffer: 1 << 20 }),
      (error: unknown) =>
        error instanceof TunError && error.errno === ERRNO.EADDRINUSE && error.message.includes(`${port}`),
    );
    assert.is(pathMtu(system, 0x7f000001, port), 65_535);
  } finally {
    system.close(socket.fd);
  }
});

test('calls answer with the negated errno, and the system says which it is', () => {
  assert.is(system.close(-1), -ERRNO.EBADF);
  const region = system.allocate(64);
  assert.is(system.read(-1, region.pointer, 8), -ERRNO.EBADF);
  const event = system.eventfd(3, 0o4000);
  assert.is(system.read(event, region.pointer, 8), 8);
  assert.is(new DataView(region.bytes.buffer).getUint32(0, true), 3);
  assert.is(system.read(event, region.pointer, 8), -ERRNO.EAGAIN);
  assert.is(errnoName(-ERRNO.EAGAIN), 'EAGAIN');
  assert.is(errnoName(-4_000), 'errno 4000');
  system.close(event);
});

test.run();
