// Where the other nodes are: what the keyspace says, and what authentic packets have shown since. It refuses to send.
//
// A node is named by its subnet. Its address as last seen in an authentic packet wins over the keyspace, because a
// NAT in between may have changed both address and port; it is forgotten when nothing authentic came for a while.
import { PEER_HELLO_FIRST_MS, PEER_KEEPALIVE_MS, PEER_LEARNED_MS } from '../../src/limits.ts';

export class Peer {
  readonly subnet: number;
  /** As the keyspace has it. */
  ip: number;
  port: number;
  /** As last seen, 0 when nothing was. */
  seenIp = 0;
  seenPort = 0;
  seenMs = Number.NEGATIVE_INFINITY;
  /** When it was last heard and sent to, milliseconds. */
  heardMs = Number.NEGATIVE_INFINITY;
  sentMs = Number.NEGATIVE_INFINITY;
  /** When it was last greeted, and how long until the next time. */
  helloMs = Number.NEGATIVE_INFINITY;
  helloPauseMs = 0;
  /** Stamp of its latest control frame: an older one is a replay. */
  stampUs = 0;
  /** Largest inner packet that reaches it, bytes. */
  mtu: number;
  mtuMs = 0;
  /** When the sweep last found a flow to it that has not ended. */
  flowMs = Number.NEGATIVE_INFINITY;
  /** Routes that name it. */
  routes = 0;
  /** Run of a batch that still takes packets for it, -1 for none; belongs to the sender of the packet loop. */
  run = -1;

  constructor(subnet: number, ip: number, port: number, mtu: number) {
    this.subnet = subnet;
    this.ip = ip;
    this.port = port;
    this.mtu = mtu;
  }

  /** Where to send. */
  targetIp(now: number): number {
    return now - this.seenMs < PEER_LEARNED_MS ? this.seenIp : this.ip;
  }
  targetPort(now: number): number {
    return now - this.seenMs < PEER_LEARNED_MS ? this.seenPort : this.port;
  }

  /**
   * True when a data packet from that endpoint may be this node's: it is where an authentic packet last came from, or
   * the address that the keyspace has (then its port is learned too).
   */
  accepts(ip: number, port: number, now: number): boolean {
    if (ip === this.seenIp && port === this.seenPort && now - this.seenMs < PEER_LEARNED_MS) {
      this.seenMs = now;
      this.heardMs = now;
      return true;
    }
    if (ip !== this.ip) return false;
    this.learn(ip, port, now);
    return true;
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

  /** An authentic packet came from there. True when that is news. */
  learn(ip: number, port: number, now: number): boolean {
    const news = this.seenIp !== ip || this.seenPort !== port;
    this.seenIp = ip;
    this.seenPort = port;
    this.seenMs = now;
    this.heardMs = now;
    return news;
  }
}
