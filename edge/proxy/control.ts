// Control frames: greetings that hold a NAT open and prove where a node is, probes and their answers. Frames are made
// and judged here; sockets, clocks, randomness and the HMAC are handed in.
//
// A frame convinces when its proof is right, it is meant for this node, and it is fresh: its stamp is newer than the
// sender's last, or it answers a greeting or probe of ours, whose token nobody could know before. The second is how a
// node whose clock was set back is believed again.
import type { Ipv4 } from '../../src/addr.ts';
import { Budget } from '../../src/budget.ts';
import { PEER_CHALLENGE_MS, PROBE_STATUS_BYTES, STRANGER_ANSWERS_PER_S } from '../../src/limits.ts';
import type { Bytes } from '../../src/wire/bytes.ts';
import {
  CONTROL,
  CONTROL_KIND,
  CONTROL_PROOF_BYTES,
  readControl,
  writeControl,
} from '../../src/wire/tunnel.ts';
import type { ProxyConfig, ProxyReport } from './command.ts';
import type { Peer } from './peers.ts';
import type { Routes } from './routes.ts';
import { COUNT, DROP } from './verdict.ts';

/** Probes that wait for an answer; the oldest makes room. */
const PROBES_MAX = 4_096;
const PROBE_WAIT_MS = 10_000;
const NOTHING = new Uint8Array(0);
/** Target of a frame to a node whose subnet is not known. */
const ANYBODY = 0;
/** The longest frame that is sent: one with a status of ours. */
export const CONTROL_BYTES = CONTROL.size + PROBE_STATUS_BYTES;

export interface ControlMeans {
  /** Sends the frame of that length at the start of `bytes`, before it returns. */
  send(length: number, ip: number, port: number): boolean;
  /** HMAC-SHA-256 under the network's secret of both pieces together, at least CONTROL_PROOF_BYTES of it. */
  prove(head: Uint8Array, tail: Uint8Array): Uint8Array;
  /** Unpredictable, unsigned, 32 bits. */
  token(): number;
  /** Wall time, so that stamps grow across restarts. */
  wallUs(): number;
  report(report: Extract<ProxyReport, { kind: 'probed' }>): void;
}

export class Control {
  /** What this node's answers to probes say. */
  status: Uint8Array = NOTHING;
  readonly #bytes: Bytes;
  readonly #vni: number;
  readonly #subnet: number;
  readonly #routes: Routes;
  readonly #counters: Float64Array;
  readonly #means: ControlMeans;
  /** When each probe left, by token. */
  readonly #probes = new Map<number, { readonly sentMs: number; readonly nodeIp: Ipv4 }>();
  /** Of answers to all nodes that are not among the peers. */
  readonly #strangers = new Budget({ burst: STRANGER_ANSWERS_PER_S, perS: STRANGER_ANSWERS_PER_S });
  #stampUs = 0;

  constructor(
    config: ProxyConfig,
    routes: Routes,
    counters: Float64Array,
    bytes: Bytes,
    means: ControlMeans,
  ) {
    this.#vni = config.vni;
    this.#subnet = config.subnetBase;
    this.#routes = routes;
    this.#counters = counters;
    this.#bytes = bytes;
    this.#means = means;
  }

  /** A control frame from the tunnel: `length` bytes at `at`, from that outer source. */
  take(bytes: Bytes, at: number, length: number, ip: number, port: number, now: number): void {
    const frame = readControl(bytes, at, length);
    // Nobody can be answered at port 0 (RFC 768: "no reply").
    if (frame === undefined || port === 0 || !this.#proven(bytes, at, length)) {
      this.#counters[DROP.bad_control]!++;
      return;
    }
    if (frame.target !== this.#subnet && (frame.target !== ANYBODY || frame.kind !== CONTROL_KIND.probe)) {
      this.#counters[DROP.misdirected_control]!++;
      return;
    }
    this.#counters[COUNT.control_received]!++;
    const { kind, token, subnet } = frame;
    const peer = subnet === this.#subnet ? undefined : this.#routes.meet(subnet, now);
    const answer =
      kind === CONTROL_KIND.probeBack
        ? this.#answered(token, bytes.u8.slice(at + CONTROL.size, at + length), now)
        : kind === CONTROL_KIND.helloBack && token === peer?.helloToken;
    if (peer !== undefined && frame.target !== ANYBODY) {
      if (answer || frame.stampUs > peer.stampUs) {
        peer.stampUs = frame.stampUs;
        if (peer.learn(ip, port, now)) this.#counters[COUNT.peers_learned]!++;
        if (kind === CONTROL_KIND.helloBack) peer.helloToken = -1;
      } else {
        this.#counters[DROP.old_control]!++;
        this.challenge(peer, ip, port, now);
        return;
      }
    }
    // A probe to anybody carries no freshness, so who overheard one can repeat it under any outer source.
    const asksPlace = kind === CONTROL_KIND.hello && peer !== undefined;
    if (!asksPlace && kind !== CONTROL_KIND.probe) return;
    if (!(peer?.answers ?? this.#strangers).take(now)) this.#counters[DROP.excess_control]!++;
    else if (asksPlace) this.#say(CONTROL_KIND.helloBack, token, subnet, ip, port, NOTHING);
    else this.#say(CONTROL_KIND.probeBack, token, subnet, ip, port, this.status);
  }

  /** Somebody spoke for that node from an endpoint that it has not proved: if it is the node, it will. */
  challenge(peer: Peer, ip: number, port: number, now: number): void {
    if (port === 0 || now - peer.challengedMs < PEER_CHALLENGE_MS) return;
    peer.challengedMs = now;
    this.#hello(peer, ip, port);
  }

  /** Greets who is due, and lets go of probes that nobody answered. */
  tick(now: number): void {
    for (const peer of this.#routes.peers.values()) {
      const port = peer.targetPort(now);
      if (port !== 0 && peer.greet(now)) this.#hello(peer, peer.targetIp(now), port);
    }
    for (const [token, probe] of this.#probes) {
      if (now - probe.sentMs < PROBE_WAIT_MS) break;
      this.#probes.delete(token);
    }
  }

  /** A probe to a node by its address in the keyspace; to where it was last seen, if it was. */
  probe(token: number, nodeIp: Ipv4, ewp: number, now: number): void {
    if (this.#probes.size >= PROBES_MAX)
      for (const oldest of this.#probes.keys()) {
        this.#probes.delete(oldest);
        break;
      }
    this.#probes.set(token, { sentMs: now, nodeIp });
    for (const peer of this.#routes.peers.values())
      if (peer.ip === nodeIp && peer.port === ewp) {
        this.#say(CONTROL_KIND.probe, token, peer.subnet, peer.targetIp(now), peer.targetPort(now), NOTHING);
        return;
      }
    this.#say(CONTROL_KIND.probe, token, ANYBODY, nodeIp, ewp, NOTHING);
  }

  #hello(peer: Peer, ip: number, port: number): void {
    peer.helloToken = this.#means.token();
    this.#say(CONTROL_KIND.hello, peer.helloToken, peer.subnet, ip, port, NOTHING);
  }

  /** True when a probe of ours had that token. */
  #answered(token: number, status: Uint8Array, now: number): boolean {
    const probe = this.#probes.get(token);
    if (probe === undefined) return false;
    this.#probes.delete(token);
    const rttNs = Math.round((now - probe.sentMs) * 1e6);
    this.#means.report({ kind: 'probed', token, nodeIp: probe.nodeIp, rttNs, status });
    return true;
  }

  #say(kind: number, token: number, target: number, ip: number, port: number, status: Uint8Array): void {
    // Two frames never share a stamp.
    this.#stampUs = Math.max(this.#stampUs + 1, Math.floor(this.#means.wallUs()));
    const { u8 } = this.#bytes;
    const subnet = this.#subnet;
    writeControl(this.#bytes, 0, this.#vni, { kind, token, subnet, target, stampUs: this.#stampUs });
    u8.set(status, CONTROL.size);
    const length = CONTROL.size + status.length;
    u8.set(this.#proof(this.#bytes, 0, length), CONTROL.proof);
    if (this.#means.send(length, ip, port)) this.#counters[COUNT.control_sent]!++;
  }

  #proof(bytes: Bytes, at: number, length: number): Uint8Array {
    const { u8 } = bytes;
    const head = u8.subarray(at, at + CONTROL.proof);
    return this.#means
      .prove(head, u8.subarray(at + CONTROL.size, at + length))
      .subarray(0, CONTROL_PROOF_BYTES);
  }

  /** Compared in constant time: how much of it was right must not show. */
  #proven(bytes: Bytes, at: number, length: number): boolean {
    const proof = this.#proof(bytes, at, length);
    let wrong = 0;
    for (let i = 0; i < CONTROL_PROOF_BYTES; i++) wrong |= proof[i]! ^ bytes.u8[at + CONTROL.proof + i]!;
    return wrong === 0;
  }
}
