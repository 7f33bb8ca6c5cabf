// Starts the packet loop in a thread of its own and speaks with it: commands by a message port and an eventfd that
// wakes it, counters by shared memory. It touches no packet.
import process from 'node:process';
import { MessageChannel, Worker } from 'node:worker_threads';
import { EFD_CLOEXEC, EFD_NONBLOCK, errnoName, system } from 'node-tun';
import { EdgewayError } from '../../src/error.ts';
import { LOOP_YOUNG_MB } from '../../src/limits.ts';
import type { PacketLoop, StartPacketLoop } from '../ports.ts';
import type { ProxyCommand, ProxyReport } from '../proxy/command.ts';
import { COUNT, COUNTER_COUNT, COUNTER_NAMES } from '../proxy/verdict.ts';
import { FLAG, FLAGS, type ThreadData } from './packet_thread.ts';

/** Bound on the wait for the thread to report that it is ready, and to end: it starts in 30–65 ms. */
const START_MS = 10_000;
const STOP_MS = 5_000;
/** How long a message that was sent before the thread ended may take to arrive after it. */
const LAST_WORDS_MS = 100;

export const startPacketLoop: StartPacketLoop = async (config, report) => {
  const eventfd = system.eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (eventfd < 0) throw new EdgewayError('host_unsupported', `make an eventfd: ${errnoName(eventfd)}`);
  const one = system.allocate(8);
  one.bytes[0] = 1;
  const counters = new SharedArrayBuffer(COUNTER_COUNT * 8);
  const flags = new SharedArrayBuffer(FLAGS * 4);
  const flagWords = new Int32Array(flags);
  const counted = new Float64Array(counters);
  const { port1: port, port2 } = new MessageChannel();
  const data: ThreadData = { config, port: port2, counters, flags, eventfd };
  // Beside this file, whether it runs from source or from the bundle (scripts/tsup.config.ts has both as entries).
  const extension = import.meta.url.endsWith('.ts') ? 'ts' : 'js';
  const worker = new Worker(new URL(`./packet_loop_worker.${extension}`, import.meta.url), {
    workerData: data,
    transferList: [port2],
    resourceLimits: { maxYoungGenerationSizeMb: LOOP_YOUNG_MB },
  });

  let ended = false;
  const wake = (): void => {
    if (!ended) system.write(eventfd, one.pointer, 8);
  };
  // The runtime waits for its threads when it exits, and this one sleeps in a system call.
  const onExit = (): void => {
    Atomics.store(flagWords, FLAG.exit, 1);
    wake();
  };
  process.on('exit', onExit);

  const gone = Promise.withResolvers<void>();
  const ready = Promise.withResolvers<void>();
  let stopped: Extract<ProxyReport, { kind: 'stopped' }> | undefined;
  port.on('message', (message: ProxyReport) => {
    if (message.kind === 'ready') ready.resolve();
    if (message.kind === 'stopped') stopped = message;
    else report(message);
  });
  worker.on('error', (error: unknown) => {
    stopped ??= { kind: 'stopped', error: error instanceof Error ? error.message : String(error) };
  });
  worker.on('exit', () => {
    if (ended) return;
    ended = true;
    process.off('exit', onExit);
    system.close(eventfd);
    // Its last words may still be on their way, on either runtime.
    if (stopped === undefined) setTimeout(conclude, LAST_WORDS_MS);
    else conclude();
  });
  const conclude = (): void => {
    port.close();
    const last = stopped ?? { kind: 'stopped', error: 'the packet thread ended without a word' };
    ready.reject(
      new EdgewayError('host_unsupported', last.error ?? 'the packet loop stopped while it started'),
    );
    gone.resolve();
    report(last);
  };

  const limit = setTimeout(() => {
    ready.reject(new EdgewayError('timeout', `the packet loop was not ready within ${START_MS} ms`));
    onExit();
  }, START_MS);
  try {
    await ready.promise;
  } finally {
    clearTimeout(limit);
  }

  const loop: PacketLoop = {
    send(command: ProxyCommand): void {
      if (ended) return;
      port.postMessage(command);
      Atomics.store(flagWords, FLAG.messages, 1);
      wake();
    },
    counters: () => Object.fromEntries(COUNTER_NAMES.map((name, i) => [name, counted[i]!])),
    flows: () => counted[COUNT.flows]!,
    async stop(): Promise<void> {
      if (ended) return;
      loop.send({ kind: 'stop' });
      const late = setTimeout(onExit, STOP_MS);
      await gone.promise;
      clearTimeout(late);
    },
  };
  return loop;
};
