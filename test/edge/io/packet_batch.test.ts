// The batch against a kernel that answers as told: what is grouped, and what every refusal leads to.
import { ERRNO, type System, system } from 'node-tun';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { Batch } from '../../../edge/io/packet_batch.ts';
import { Peer } from '../../../edge/proxy/peers.ts';
import { COUNT, COUNTER_COUNT, DROP } from '../../../edge/proxy/verdict.ts';

interface Told {
  readonly batch: Batch;
  readonly counters: Float64Array;
  /** Messages per call. */
  readonly calls: number[];
  readonly polls: number[];
}

/** `answers` are the results of sendmmsg in order; after them everything is taken. */
function told(...answers: number[]): Told {
  const calls: number[] = [];
  const polls: number[] = [];
  const sys: System = {
    ...system,
    sendmmsg: (_fd, _messages, count) => {
      calls.push(count);
      return answers.shift() ?? count;
    },
    poll: (_fds, _count, timeoutMs) => {
      polls.push(timeoutMs);
      return 1;
    },
  };
  const counters = new Float64Array(COUNTER_COUNT);
  return { batch: new Batch(sys, 5, true, counters), counters, calls, polls };
}

const peer = (n: number): Peer => new Peer(n, 0x0a000000 + n, 4790, 1464);

test('Batch.add: equal sizes to one peer are one message, a shorter one ends it, a longer one begins another', () => {
  const { batch, counters, calls } = told();
  const one = peer(1);
  for (const size of [100, 100, 60, 60, 60, 100]) batch.add(one, 4096, size, 0, 0);
  assert.is(batch.runs, 3, '100+100+60, 60+60, 100');
  batch.flush(0);
  assert.equal(calls, [3]);
  assert.is(counters[COUNT.to_tunnel_packets], 6);
  assert.is(counters[COUNT.to_tunnel_bytes], 480);
});

test('Batch.add: two peers do not break up each other, 64 datagrams and 65,507 bytes are the end of a message', () => {
  const { batch } = told();
  const [one, two] = [peer(1), peer(2)];
  for (let i = 0; i < 20; i++) {
    batch.add(one, 4096, 100, 0, 0);
    batch.add(two, 4096, 80, 8192, 20);
  }
  assert.is(batch.runs, 2);
  batch.flush(0);
  for (let i = 0; i < 65; i++) batch.add(one, 4096, 64, 0, 0);
  assert.is(batch.runs, 2);
  batch.flush(0);
  for (let i = 0; i < 45; i++) batch.add(one, 4096, 72, 8192, 1400);
  assert.is(batch.runs, 2, '44 × 1,472 = 64,768');
  batch.flush(0);
});

test('Batch.flush goes on after what the kernel did not take, and counts it by name', () => {
  for (const [errno, reason] of [
    [ERRNO.ENETUNREACH, DROP.send_unreachable],
    [ERRNO.EHOSTUNREACH, DROP.send_unreachable],
    [ERRNO.EPERM, DROP.send_failed],
  ] as const) {
    const { batch, counters, calls } = told(1, -errno);
    for (let n = 1; n <= 3; n++) batch.add(peer(n), 4096, 100, 0, 0);
    batch.flush(0);
    assert.equal(calls, [3, 2, 1]);
    assert.is(counters[reason], 1);
    assert.is(counters[COUNT.to_tunnel_packets], 2);
  }
});

test('Batch.flush: a way that refuses UDP_SEGMENT gets single datagrams from then on, the others are not touched', () => {
  for (const errno of [ERRNO.EIO, ERRNO.EINVAL]) {
    const { batch, counters } = told(-errno);
    const said: Peer[] = [];
    batch.onRefused = (peer) => said.push(peer);
    const [one, two] = [peer(1), peer(2)];
    for (let i = 0; i < 4; i++) batch.add(one, 4096, 100, 0, 0);
    batch.flush(0);
    assert.equal(said, [one]);
    assert.is(counters[DROP.send_failed], 4);
    for (let i = 0; i < 4; i++) {
      batch.add(one, 4096, 100, 0, 0);
      batch.add(two, 4096, 100, 0, 0);
    }
    assert.is(batch.runs, 5, 'four single ones and one joined');
    batch.flush(0);
    assert.is(counters[COUNT.to_tunnel_packets], 8);
    assert.equal(said, [one], 'told once');
  }
});

test('Batch.flush: EINVAL about a path that has become narrower is a matter of size, not of UDP_SEGMENT', () => {
  const { batch, counters } = told(-ERRNO.EINVAL);
  const one = peer(1);
  let refused = 0;
  batch.onRefused = () => refused++;
  batch.onTooBig = (peer) => {
    peer.mtu = 1264;
    return true;
  };
  for (let i = 0; i < 3; i++) batch.add(one, 4096, 1472, 0, 0);
  batch.flush(0);
  assert.is(refused, 0);
  assert.ok(one.joined);
  assert.is(counters[DROP.too_big], 3);
});

test('Batch.flush: too big names the peer; a full buffer is waited for once', () => {
  const { batch, counters, calls, polls } = told(-ERRNO.EMSGSIZE, -ERRNO.EAGAIN, -ERRNO.EAGAIN);
  const big: Peer[] = [];
  batch.onTooBig = (peer) => big.push(peer) > 0;
  const one = peer(1);
  batch.add(one, 4096, 1472, 0, 0);
  batch.flush(0);
  assert.equal(big, [one]);
  assert.is(counters[DROP.too_big], 1);
  batch.add(one, 4096, 100, 0, 0);
  batch.flush(0);
  assert.is(polls.length, 1);
  assert.is(counters[DROP.send_full], 1, 'full again after the wait: given up');
  batch.add(one, 4096, 100, 0, 0);
  batch.flush(0);
  assert.is(counters[COUNT.to_tunnel_packets], 1, 'the next one finds room');
  assert.is(calls.length, 4);
});

test('Batch.flush sends to where a peer was last seen, for as long as that stands', () => {
  const one = peer(1);
  one.learn(0x0a4e0032, 61_000, 0);
  assert.equal([one.targetIp(1_000), one.targetPort(1_000)], [0x0a4e0032, 61_000]);
  assert.equal([one.targetIp(80_000), one.targetPort(80_000)], [0x0a000001, 4790]);
});

test.run();
