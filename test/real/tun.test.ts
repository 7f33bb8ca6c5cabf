// node-tun against the kernel: the device, its offloads, and errors with a name.
import { readFileSync } from 'node:fs';
import process from 'node:process';
import { ERRNO, errnoName, openTun, openTunnelSocket, pathMtu, system, TunError } from 'node-tun';
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

test('openTunnelSocket binds with offloads; a second one on its port is an error that says so', () => {
  const port = 20_000 + (process.pid % 10_000);
  const socket = openTunnelSocket(system, { address: 0x7f000001, port, buffer: 1 << 20 });
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
