// What the agent's thread and the packet thread share: how they find each other and what lies where. No behaviour.
import type { MessagePort } from 'node:worker_threads';
import type { ProxyConfig } from '../proxy/command.ts';

export interface ThreadData {
  readonly config: ProxyConfig;
  readonly port: MessagePort;
  /** Float64 counters in the order of COUNTER_NAMES. */
  readonly counters: SharedArrayBuffer;
  /** Int32: see FLAG. */
  readonly flags: SharedArrayBuffer;
  /** Wakes the thread out of poll. */
  readonly eventfd: number;
}

export const FLAG = {
  /** Messages wait in the port. */
  messages: 0,
  /** The agent's thread is going: end at once. */
  exit: 1,
} as const;
export const FLAGS = 2;
