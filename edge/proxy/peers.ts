// Where the other nodes are: what the keyspace says, and what control frames have proved since. It refuses to send.
//
// A node is named by its subnet. The endpoint that it proved last wins over the keyspace, because a NAT in between may
// have changed both address and port; it is forgotten when nothing came from there for a while. A data packet proves
// nothing: whoever shares a node's address, an unprivileged process of it among them, can send one.
import { Budget } from '../../src/budget.ts';
import {
  PEER_ANSWERS_BURST,
  PEER_ANSWERS_PER_S,
  PEER_HELLO_FIRST_MS,
  PEER_KEEPALIVE_MS,
  PEER_LEARNED_MS,
} from '../../src/limits.ts';

export class Peer {
  readonly subnet: number;
  /** As the keyspace has it; port 0 while no route has named it. */
  ip: number;
  port: number;
  /** As last proved, port 0 when nothing was. */
  seenIp = 0;
  seenPort = 0;
  seenMs = Number.NEGATIVE_INFINITY;
  /** When it was last proved and sent to, milliseconds. */
  heardMs = Number.NEGATIVE_INFINITY;
  sentMs = Number.NEGATIVE_INFINITY;
  /** When it was last greeted, and how long until the next time. */
  helloMs = Number.NEGATIVE_INFINITY;
  helloPauseMs = 0;
  /** Token of the latest greeting: its answer is fresh whatever its stamp. -1: answered. */
  helloToken = -1;
  challengedMs = Number.NEGATIVE_INFINITY;
  /** Of answers to its greetings and probes. */
  readonly answers = new Budget({ burst: PEER_ANSWERS_BURST, perS: PEER_ANSWERS_PER_S });
  /** Stamp of its latest control frame: an older one is a replay. */
  stampUs = 0;
  /** Largest inner packet that reaches it, bytes. */
  mtu: number;
  mtuMs = 0;
  /** When the sweep last found a flow to it that has not ended. */
  flowMs = Number.NEGATIVE_INFINITY;
  /** False where the way to it takes no joined datagrams: its device refused UDP_SEGMENT. */
  joined = true;
  /** Routes that name it and calls of its own, and since when none does. */
  routes = 0;
  spareMs = Number.NEGATIVE_INFINITY;
  /** Run of a batch that still takes packets for it, -1 for none; belongs to the sender of the packet loop. */
  run = -1;

  constructor(subnet: number, ip: number, port: number, mtu: number) {
    this.subnet = subnet;
    this.ip = ip;
    this.port = port;
    this.mtu = mtu;
  }

  /** The keyspace names it there; where it was seen before says nothing about a record that has moved. */
  place(ip: number, port: number): void {
    if (this.port !== 0 && (this.ip !== ip || this.port !== port)) {
      this.seenPort = 0;
      this.seenMs = Number.NEGATIVE_INFINITY;
      this.helloPauseMs = 0;
      this.joined = true;
    }
    this.ip = ip;
    this.port = port;
  }

  /** Where to send; port 0 when nothing is known. */
  targetIp(now: number): number {
    return now - this.seenMs < PEER_LEARNED_MS ? this.seenIp : this.ip;
  }
  targetPort(now: number): number {
    return now - this.seenMs < PEER_LEARNED_MS ? this.seenPort : this.port;
  }

  /** True when a data packet from that endpoint may be this node's: one that it proved, or the keyspace's. */
  accepts(ip: number, port: number, now: number): boolean {
    if (port === this.seenPort && ip === this.seenIp && now - this.seenMs < PEER_LEARNED_MS) {
      this.seenMs = now;
      return true;
    }
    return ip === this.ip && port === this.port;
  }

  /**
   * True when a greeting is due: often at first, until the node answers (it may not know us yet), then as often as a
   * NAT needs it.
   */
  greet(now: number): boolean {
    if (now - this.helloMs < this.helloPauseMs) return false;
    const heard = this.heardMs > this.helloMs;
    this.helloPauseMs = heard
      ? PEER_KEEPALIVE_MS
      : Math.min(PEER_KEEPALIVE_MS, Math.max(PEER_HELLO_FIRST_MS, this.helloPauseMs * 2));
    this.helloMs = now;
    return true;
  }

  /** A control frame from there was proved. True when that is news. */
  learn(ip: number, port: number, now: number): boolean {
    const news = this.seenIp !== ip || this.seenPort !== port;
    this.seenIp = ip;
    this.seenPort = port;
    this.seenMs = now;
    this.heardMs = now;
    return news;
  }
}
