// The ProxyTUN's decisions: what a packet from the bridge or from the tunnel becomes, and where it goes. Packets are
// rewritten in place; time comes in as an argument; nothing here sends, waits or throws for what a packet holds.
//
//   leaving   (bridge → TUN → here)     source: namespace IP → InstanceIP of the sender
//                                       target: ServiceIP or InstanceIP → namespace IP of the chosen instance
//   arriving  (tunnel → here → bridge)  source: InstanceIP → ServiceIP that the app had dialled, if a flow says so
//
// Only the client's node keeps flows. A packet whose target lives on this node is left and arrived in one step.
import { type Ipv4, ipv4 } from '../../src/addr.ts';
import {
  CHOICES_PER_REPORT_MAX,
  FLOW_AGE_S,
  MISS_REPORT_MS,
  MISSES_MAX,
  MISSES_PER_TICK_MAX,
  PATH_MTU_MS,
  STRAGGLER_MS,
  STRAGGLERS_MAX,
} from '../../src/limits.ts';
import type { ServiceId } from '../../src/name.ts';
import { Rng } from '../../src/rng.ts';
import type { Bytes } from '../../src/wire/bytes.ts';
import { adjust, difference, sum32 } from '../../src/wire/checksum.ts';
import { finishIcmp, ICMP, ICMP_TYPE, isIcmpError, UNREACHABLE } from '../../src/wire/icmp.ts';
import {
  checkIpv4,
  FLAG_DF,
  FLAG_MF,
  FRAGMENT_MASK,
  headerLength,
  IPV4,
  IPV4_FAULT,
  PROTOCOL,
} from '../../src/wire/ipv4.ts';
import { checkTcp, TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, tcpHeaderLength } from '../../src/wire/tcp.ts';
import { UDP } from '../../src/wire/udp.ts';
import { Answers } from './answer.ts';
import type { Choice, ChoiceCount, ProxyCommand, ProxyConfig } from './command.ts';
import { Contacts } from './contacts.ts';
import { FLOW_STATE, type FlowRecord, FlowTable, idleLimit } from './flows.ts';
import { Tracks } from './fragments.ts';
import { type Held, Hold } from './hold.ts';
import type { Peer } from './peers.ts';
import { type Rewrite, rewrite, TRANSPORT, type Transport } from './rewrite.ts';
import { type InstanceEntry, type LocalEntry, Routes, type Target } from './routes.ts';
import { COUNT, COUNTER_COUNT, DROP, VERDICT, type Verdict } from './verdict.ts';

/** Source ports that a flow gets when its own would be ambiguous: Linux's own ephemeral range. */
const WIRE_PORT_FIRST = 32_768;
const WIRE_PORTS = 28_232;
const WIRE_PORT_TRIES = 64;

export interface ProxyMemory {
  readonly counters?: Float64Array;
  readonly answers?: Bytes;
  readonly hold?: Bytes;
}

export class ProxyTun {
  readonly routes: Routes;
  readonly flows: FlowTable;
  readonly answers: Answers;
  readonly hold: Hold;
  /** By COUNT and DROP. */
  readonly counters: Float64Array;
  /** Where the last VERDICT.tunnel goes. */
  peer: Peer | undefined;
  /** Counter of the last drop. */
  dropped = 0;
  /** Whom the last packet that arrived spoke for, from an endpoint that this node has not proved. */
  doubted: Peer | undefined;
  /** Addresses missed since they were last taken. */
  readonly misses: Ipv4[] = [];
  readonly choices: Choice[] = [];
  /** Choices beyond CHOICES_PER_REPORT_MAX, counted. */
  readonly unlisted = new Map<string, ChoiceCount>();
  readonly #config: ProxyConfig;
  readonly #bridge: number;
  readonly #contacts: Contacts;
  /** Flows that were ended, on the wire: their stragglers are dropped. */
  readonly #ended: Contacts;
  #lastEndedMs = Number.NEGATIVE_INFINITY;
  readonly #tracks: Tracks;
  readonly #rng: Rng;
  /** Flows of an earlier life: by InstanceIP, and the tuples that were dialled. */
  readonly #remembered = new Map<number, FlowRecord[]>();
  readonly #rememberedTuples = new Set<string>();
  readonly #missedMs = new Map<number, number>();
  readonly #to: Rewrite = { source: 0, target: 0, sourcePort: 0, targetPort: 0, ttl: 0 };
  // The packet at hand, as #parse found it.
  #at = 0;
  #total = 0;
  #protocol = 0;
  #source = 0;
  #target = 0;
  #sourcePort = 0;
  #targetPort = 0;
  #flags = 0;
  #kind: Transport = TRANSPORT.none;
  #fragment = 0;

  constructor(config: ProxyConfig, memory: ProxyMemory = {}) {
    this.#config = config;
    this.#bridge = config.subnetBase + 1;
    this.routes = new Routes(config);
    this.#rng = new Rng(config.seed, 7);
    this.flows = new FlowTable(config.flowsMax, this.#rng.u32());
    this.#contacts = new Contacts(Math.max(1024, config.flowsMax >> 2), this.#rng.u32());
    this.#ended = new Contacts(STRAGGLERS_MAX, this.#rng.u32());
    this.#tracks = new Tracks(this.#rng.u32());
    this.counters = memory.counters ?? new Float64Array(COUNTER_COUNT);
    this.answers = new Answers(memory.answers);
    this.hold = new Hold(config.mtu, memory.hold);
  }

  // ——— the packet path ———

  /**
   * A packet that the TUN device gave. `partial`: its transport checksum is the pseudo-header's sum only. `segment`:
   * payload bytes per segment of a super-packet, 0 for a plain packet.
   */
  leaving(
    bytes: Bytes,
    offset: number,
    length: number,
    partial: boolean,
    segment: number,
    now: number,
  ): Verdict {
    const { u8 } = bytes;
    if (length === 0 || u8[offset]! >> 4 !== 4 || checkIpv4(bytes, offset, length) !== IPV4_FAULT.none)
      return this.#drop(DROP.malformed_ipv4);
    const fault = this.#parse(bytes, offset, partial);
    if (fault !== 0) return this.#drop(fault);
    const local = this.routes.local(this.#source);
    if (local === undefined)
      return this.#isHostError(bytes)
        ? this.#leavingError(bytes, offset, this.routes.local(this.#quoted(bytes)), now)
        : this.#drop(DROP.spoofed_source);
    if (!this.routes.inServices(this.#target)) return this.#drop(DROP.not_service_address);
    if (u8[offset + IPV4.ttl]! <= 1) {
      this.#error(bytes, offset, ICMP_TYPE.timeExceeded, 0, 0, now);
      return this.#drop(DROP.ttl_exceeded);
    }
    if (this.#kind === TRANSPORT.none) return this.#later(bytes, offset, length, true, 0, 0, now);
    if (this.#protocol === PROTOCOL.icmp && isIcmpError(u8[this.#at + ICMP.type]!))
      return this.#leavingError(bytes, offset, local, now);

    const target = this.routes.target(this.#target);
    if (target === undefined) return this.#miss(bytes, offset, length, this.#target, true, 0, 0, now);
    let instance = target.instance;
    let wirePort = this.#sourcePort;
    let known = false;
    if (instance === undefined || instance.dialled > 0) {
      const { flows } = this;
      let flow = flows.byDialled(
        this.#protocol,
        this.#source,
        this.#sourcePort,
        this.#target,
        this.#targetPort,
      );
      if (flow >= 0 && this.#hasEnded(flow, now)) {
        this.#removeFlow(flow);
        flow = -1;
      }
      if (flow < 0 && instance === undefined) {
        flow = this.#open(bytes, offset, local, target, now);
        if (flow < 0) return this.#drop(-flow);
      }
      if (flow >= 0) {
        if (flows.state[flow] === FLOW_STATE.reset) {
          if (this.#protocol === PROTOCOL.tcp && this.answers.refuse(bytes, offset))
            this.counters[COUNT.resets_made]!++;
          return this.#drop(DROP.flow_reset);
        }
        if (this.#protocol === PROTOCOL.tcp) this.#trackOut(bytes, flow);
        flows.use(flow, now);
        instance = flows.instance(flow);
        wirePort = flows.wirePort[flow]!;
        known = true;
      }
    }
    if (instance === undefined) return this.#drop(DROP.no_instance);
    if (!known) {
      const changed = this.#byInstanceIp(bytes, offset, local, target, instance, now);
      if (changed < 0) return this.#drop(-changed);
      wirePort = changed;
    }

    const to = this.#to;
    to.source = local.instanceIp;
    to.target = instance.namespaceIp;
    to.sourcePort = wirePort;
    to.targetPort = this.#targetPort;
    to.ttl = 1;
    const peer = instance.peer;
    this.peer = peer;
    if (peer === undefined) {
      const receiver = this.routes.local(instance.namespaceIp);
      if (receiver === undefined) {
        this.#error(bytes, offset, ICMP_TYPE.unreachable, UNREACHABLE.host, 0, now);
        return this.#drop(DROP.unknown_receiver);
      }
      if (!this.#deliver(bytes, receiver, local.instanceIp, now)) return this.#drop(DROP.flow_reset);
      this.counters[COUNT.same_node_packets]!++;
    } else if (peer.mtu < this.#config.mtu && !this.#fits(bytes, offset, peer, segment, now)) {
      return this.#drop(DROP.too_big);
    }
    if ((this.#fragment & FLAG_MF) !== 0) this.#note(bytes, offset, peer, now);
    rewrite(bytes, offset, this.#at, this.#kind, to);
    return peer === undefined ? VERDICT.tun : VERDICT.tunnel;
  }

  /**
   * An inner packet from the tunnel, from that outer source. `partial` when segments were joined into it. Its header
   * was checked by whoever cut it out of the frame.
   */
  arriving(
    bytes: Bytes,
    offset: number,
    length: number,
    partial: boolean,
    outerIp: number,
    outerPort: number,
    now: number,
  ): Verdict {
    if (checkIpv4(bytes, offset, length) !== IPV4_FAULT.none) return this.#drop(DROP.malformed_ipv4);
    const fault = this.#parse(bytes, offset, partial);
    if (fault !== 0) return this.#drop(fault);
    const sender = this.routes.instance(this.#source);
    if (sender === undefined) {
      if (this.routes.inServices(this.#source) && this.routes.local(this.#target) !== undefined)
        return this.#miss(bytes, offset, length, this.#source, false, outerIp, outerPort, now);
      return this.#drop(DROP.unknown_sender);
    }
    const peer = sender.peer;
    if (peer === undefined || !peer.accepts(outerIp, outerPort, now)) {
      this.doubted = peer;
      return this.#drop(DROP.spoofed_sender);
    }
    const receiver = this.routes.local(this.#target);
    if (receiver === undefined) return this.#drop(DROP.unknown_receiver);
    if (this.#kind === TRANSPORT.none)
      return this.#later(bytes, offset, length, false, outerIp, outerPort, now);
    if (this.#protocol === PROTOCOL.icmp && isIcmpError(bytes.u8[this.#at + ICMP.type]!))
      return this.#arrivingError(bytes, offset, receiver, sender);

    const to = this.#to;
    to.source = this.#source;
    to.target = this.#target;
    to.sourcePort = this.#sourcePort;
    to.targetPort = this.#targetPort;
    to.ttl = 0;
    if (!this.#deliver(bytes, receiver, this.#source, now)) return this.#drop(DROP.flow_reset);
    if ((this.#fragment & FLAG_MF) !== 0) this.#note(bytes, offset, undefined, now);
    // The identifier of an echo is its source port.
    if (
      to.source !== this.#source ||
      to.targetPort !== this.#targetPort ||
      to.sourcePort !== this.#sourcePort
    )
      rewrite(bytes, offset, this.#at, this.#kind, to);
    return VERDICT.tun;
  }

  /** The receiving half: if a flow of the receiver chose this sender, the packet seems to come from what it dialled.
   *  Works on #to, whose addresses and ports are those of the wire. False: it belongs to a flow that was ended. */
  #deliver(bytes: Bytes, receiver: LocalEntry, senderIp: number, now: number): boolean {
    const to = this.#to;
    const protocol = this.#protocol;
    const local = receiver.namespaceIp;
    let port = to.targetPort;
    let remotePort = to.sourcePort;
    if (protocol === PROTOCOL.icmp) {
      if (bytes.u8[this.#at + ICMP.type] === ICMP_TYPE.echo) {
        this.#contacts.note(protocol, local, to.sourcePort, senderIp, 0, false, now);
        return true;
      }
      // The identifier is the asker's port.
      port = to.sourcePort;
      remotePort = 0;
    }
    const { flows } = this;
    const flow = flows.byWire(protocol, local, port, senderIp, remotePort);
    if (flow >= 0) {
      if (flows.state[flow] === FLOW_STATE.reset) return false;
      this.#trackIn(bytes, flow, now);
      to.source = flows.dialled[flow]!;
      const own = flows.port[flow]!;
      if (protocol === PROTOCOL.icmp) to.sourcePort = own;
      else to.targetPort = own;
      return true;
    }
    const contact =
      protocol === PROTOCOL.tcp ? -1 : this.#contacts.find(protocol, local, port, senderIp, remotePort, now);
    if (contact >= 0 && this.#contacts.isDialled(contact)) return true;
    if (
      now - this.#lastEndedMs <= STRAGGLER_MS &&
      this.#ended.has(protocol, local, port, senderIp, remotePort, STRAGGLER_MS, now)
    )
      return false;
    if (contact < 0 && protocol === PROTOCOL.udp)
      this.#contacts.note(protocol, local, port, senderIp, remotePort, false, now);
    return true;
  }

  // ——— flows ———

  /** A new flow to a ServiceIP, or minus the counter of the reason why not. */
  #open(bytes: Bytes, offset: number, local: LocalEntry, target: Target, now: number): number {
    const protocol = this.#protocol;
    if (protocol === PROTOCOL.tcp && (this.#flags & (TCP_SYN | TCP_ACK | TCP_RST)) !== TCP_SYN) {
      // A flow of an earlier life may come back with its route: the client will repeat itself.
      if (this.#remembers(local, target)) return -DROP.no_flow;
      if (this.answers.refuse(bytes, offset)) this.counters[COUNT.resets_made]!++;
      return -DROP.no_flow;
    }
    if (protocol === PROTOCOL.icmp && bytes.u8[this.#at + ICMP.type] !== ICMP_TYPE.echo) return -DROP.no_flow;
    if (local.needs !== undefined && !local.needs.has(target.service.id)) {
      this.#error(bytes, offset, ICMP_TYPE.unreachable, UNREACHABLE.prohibited, 0, now);
      return -DROP.not_needed;
    }
    const instance = this.routes.choose(target);
    if (instance === undefined) {
      if (protocol === PROTOCOL.tcp && this.answers.refuse(bytes, offset))
        this.counters[COUNT.resets_made]!++;
      else this.#error(bytes, offset, ICMP_TYPE.unreachable, UNREACHABLE.host, 0, now);
      return -DROP.no_instance;
    }
    return this.#makeFlow(local, target, instance, now);
  }

  #makeFlow(local: LocalEntry, target: Target, instance: InstanceEntry, now: number): number {
    const wirePort = this.#freeWirePort(local, instance, now);
    if (wirePort < 0) return -DROP.ports_exhausted;
    const evicted = this.flows.evicted;
    const flow = this.flows.open(
      this.#protocol,
      local.namespaceIp,
      this.#sourcePort,
      target.address,
      this.#targetPort,
      wirePort,
      instance,
      now,
    );
    this.counters[COUNT.flows_made]!++;
    this.counters[COUNT.flows_evicted]! += this.flows.evicted - evicted;
    this.counters[COUNT.flows] = this.flows.size;
    this.#chose(target, instance, local);
    return flow;
  }

  /** The sender's own port, or another one when that would look like another flow of its on the wire. -1: none. */
  #freeWirePort(local: LocalEntry, instance: InstanceEntry, now: number): number {
    let port = this.#sourcePort;
    for (let tries = 0; tries < WIRE_PORT_TRIES; tries++) {
      const other = this.flows.byWire(
        this.#protocol,
        local.namespaceIp,
        port,
        instance.instanceIp,
        this.#targetPort,
      );
      const ended =
        other >= 0 && (this.flows.isStale(other, now) || this.flows.state[other] === FLOW_STATE.reset);
      if (ended) this.#removeFlow(other);
      if (other < 0 || ended) {
        const contact = this.#contacts.find(
          this.#protocol,
          local.namespaceIp,
          port,
          instance.instanceIp,
          this.#targetPort,
          now,
        );
        if (contact < 0 || !this.#contacts.isDialled(contact)) return port;
      }
      port = WIRE_PORT_FIRST + this.#rng.below(WIRE_PORTS);
      if (tries === 0) this.counters[COUNT.wire_ports_changed]!++;
    }
    return -1;
  }

  /** A packet to an InstanceIP that no flow knows: its port on the wire, or minus the counter of a drop. */
  #byInstanceIp(
    bytes: Bytes,
    offset: number,
    local: LocalEntry,
    target: Target,
    instance: InstanceEntry,
    now: number,
  ): number {
    const protocol = this.#protocol;
    if (protocol === PROTOCOL.tcp) {
      // Only what opens a connection is checked: the rest opens nothing, and a server must be able to go on
      // answering after its agent was restarted.
      if ((this.#flags & (TCP_SYN | TCP_ACK)) !== TCP_SYN) return this.#sourcePort;
    } else {
      if (protocol === PROTOCOL.icmp && bytes.u8[this.#at + ICMP.type] === ICMP_TYPE.echoReply) {
        if (local.needs === undefined || local.needs.has(target.service.id)) return this.#sourcePort;
        const asked = this.#contacts.find(
          protocol,
          local.namespaceIp,
          this.#sourcePort,
          instance.instanceIp,
          0,
          now,
        );
        return asked >= 0 ? this.#sourcePort : -DROP.not_needed;
      }
      const contact = this.#contacts.find(
        protocol,
        local.namespaceIp,
        this.#sourcePort,
        instance.instanceIp,
        this.#targetPort,
        now,
      );
      if (contact >= 0) return this.#sourcePort;
    }
    if (local.needs !== undefined && !local.needs.has(target.service.id)) {
      this.#error(bytes, offset, ICMP_TYPE.unreachable, UNREACHABLE.prohibited, 0, now);
      return -DROP.not_needed;
    }
    // A connection needs a flow, so that it can be reset when its instance goes. The rest needs one only where it would
    // look like another flow on the wire.
    if (
      protocol !== PROTOCOL.tcp &&
      this.flows.byWire(
        protocol,
        local.namespaceIp,
        this.#sourcePort,
        instance.instanceIp,
        this.#targetPort,
      ) < 0
    ) {
      this.#contacts.note(
        protocol,
        local.namespaceIp,
        this.#sourcePort,
        instance.instanceIp,
        this.#targetPort,
        true,
        now,
      );
      return this.#sourcePort;
    }
    const made = this.#makeFlow(local, target, instance, now);
    if (made < 0) return made;
    if (protocol === PROTOCOL.tcp) this.#trackOut(bytes, made);
    return this.flows.wirePort[made]!;
  }

  /** True when the packet at hand cannot belong to that flow any more. */
  #hasEnded(flow: number, now: number): boolean {
    if (this.flows.isStale(flow, now)) {
      this.counters[COUNT.flows_expired]!++;
      return true;
    }
    return (
      this.flows.protocol[flow] === PROTOCOL.tcp &&
      this.flows.state[flow]! >= FLOW_STATE.closed &&
      (this.#flags & (TCP_SYN | TCP_ACK)) === TCP_SYN
    );
  }

  #trackOut(bytes: Bytes, flow: number): void {
    const { view } = bytes;
    const { serverNext, clientNext } = this.flows;
    const flags = this.#flags;
    const data = this.#total - (this.#at - this.#start) - tcpHeaderLength(bytes, this.#at);
    const extra = (flags & (TCP_SYN | TCP_FIN)) !== 0 ? 1 : 0;
    clientNext[flow] = view.getUint32(this.#at + TCP.sequence) + data + extra;
    // Before the server has spoken through this loop (after a restart) its next number is the one that is expected.
    if (serverNext[flow] === 0 && (flags & TCP_ACK) !== 0)
      serverNext[flow] = view.getUint32(this.#at + TCP.acknowledgment);
    this.#close(flow, true);
  }

  #trackIn(bytes: Bytes, flow: number, now: number): void {
    const { flows } = this;
    if (flows.state[flow] === FLOW_STATE.opening) flows.setState(flow, FLOW_STATE.established);
    flows.use(flow, now);
    if (this.#protocol !== PROTOCOL.tcp) return;
    const data = this.#total - (this.#at - this.#start) - tcpHeaderLength(bytes, this.#at);
    const extra = (this.#flags & (TCP_SYN | TCP_FIN)) !== 0 ? 1 : 0;
    const next = bytes.view.getUint32(this.#at + TCP.sequence) + data + extra;
    // A retransmission does not take it back (sequence numbers compare modulo 2^32).
    const known = flows.serverNext[flow]!;
    if (known === 0 || ((next - known) | 0) > 0) flows.serverNext[flow] = next;
    this.#close(flow, false);
  }

  #close(flow: number, out: boolean): void {
    const flags = this.#flags;
    if ((flags & (TCP_FIN | TCP_RST)) !== 0)
      this.flows.close(flow, out, (flags & TCP_FIN) !== 0, (flags & TCP_RST) !== 0);
  }

  #removeFlow(flow: number): void {
    this.flows.remove(flow);
    this.counters[COUNT.flows] = this.flows.size;
  }

  /** Ends the flows that point at an instance which is gone: TCP by a reset, the rest by forgetting the choice. */
  #endFlows(ended: (flow: number) => boolean, now: number): void {
    const { flows } = this;
    for (const flow of flows) {
      if (!ended(flow)) continue;
      const state = flows.state[flow]!;
      const protocol = flows.protocol[flow]!;
      const local = flows.local[flow]!;
      const remotePort = flows.remotePort[flow]!;
      if (protocol !== PROTOCOL.tcp || state === FLOW_STATE.opening || state >= FLOW_STATE.closed) {
        // An answer that is still on its way must not reach the client from an address that it never dialled.
        const { instanceIp } = flows.instance(flow);
        this.#ended.note(protocol, local, flows.wirePort[flow]!, instanceIp, remotePort, false, now);
        this.#lastEndedMs = now;
        this.#removeFlow(flow);
        continue;
      }
      flows.reset(flow, now);
      this.counters[COUNT.flows_reset]!++;
      const serverNext = flows.serverNext[flow]!;
      // Nothing was seen of it yet: its next packet is answered with a reset.
      if (serverNext === 0) continue;
      if (this.answers.full) this.onAnswersFull();
      const { dialled, port, clientNext } = flows;
      if (
        this.answers.reset(
          dialled[flow]!,
          remotePort,
          local,
          port[flow]!,
          serverNext,
          clientNext[flow]!,
          true,
        )
      )
        this.counters[COUNT.resets_made]!++;
    }
  }

  /** Called when many flows end at once and answers must leave before more fit; the packet loop sets it. */
  onAnswersFull: () => void = () => this.answers.clear();

  // ——— ICMP errors ———

  /** The quoted packet's target, when the packet at hand is an ICMP error long enough to have one. */
  #quoted(bytes: Bytes): number {
    return bytes.view.getUint32(this.#at + ICMP.quote + IPV4.target);
  }

  /** This host itself speaks only of packets that it could not deliver to an instance. */
  #isHostError(bytes: Bytes): boolean {
    return (
      this.#source === this.#bridge &&
      this.#protocol === PROTOCOL.icmp &&
      this.#kind !== TRANSPORT.none &&
      isIcmpError(bytes.u8[this.#at + ICMP.type]!) &&
      this.#quoteLength(this.#start) >= IPV4.size
    );
  }

  /** Bytes of the quoted packet that are there. */
  #quoteLength(start: number): number {
    return this.#total - (this.#at - start) - ICMP.size;
  }

  /** An instance complains of a packet that it got: the quote becomes what was on the wire. */
  #leavingError(bytes: Bytes, offset: number, local: LocalEntry | undefined, now: number): Verdict {
    const quote = this.#at + ICMP.quote;
    const ports = this.#quotePorts(bytes, quote, this.#quoteLength(offset));
    if (local === undefined || ports === undefined) return this.#drop(DROP.bad_quote);
    const { view, u8 } = bytes;
    const saidBy = view.getUint32(quote + IPV4.source);
    if (view.getUint32(quote + IPV4.target) !== local.namespaceIp) return this.#drop(DROP.bad_quote);
    const flow = this.flows.byDialled(
      u8[quote + IPV4.protocol]!,
      local.namespaceIp,
      ports.target,
      saidBy,
      ports.source,
    );
    const instance = flow < 0 ? this.routes.instance(saidBy) : this.flows.instance(flow);
    if (instance === undefined) return this.#drop(DROP.bad_quote);
    this.#rewriteQuote(
      bytes,
      offset,
      quote,
      instance.instanceIp,
      local.namespaceIp,
      ports.source,
      flow < 0 ? ports.target : this.flows.wirePort[flow]!,
    );
    const to = this.#to;
    to.source = local.instanceIp;
    to.target = instance.namespaceIp;
    to.sourcePort = view.getUint16(this.#at + ICMP.id);
    to.ttl = 1;
    this.peer = instance.peer;
    if (instance.peer === undefined) {
      const receiver = this.routes.local(instance.namespaceIp);
      if (receiver === undefined) return this.#drop(DROP.unknown_receiver);
      rewrite(bytes, offset, this.#at, TRANSPORT.none, to);
      this.counters[COUNT.same_node_packets]!++;
      this.#parse(bytes, offset, false);
      const sender = this.routes.instance(local.instanceIp);
      return sender === undefined
        ? this.#drop(DROP.unknown_sender)
        : this.#arrivingError(bytes, offset, receiver, sender);
    }
    rewrite(bytes, offset, this.#at, TRANSPORT.none, to);
    void now;
    return VERDICT.tunnel;
  }

  /** Somebody complains of a packet that an instance here sent: the quote becomes what the instance had sent. */
  #arrivingError(bytes: Bytes, offset: number, receiver: LocalEntry, sender: InstanceEntry): Verdict {
    const quote = this.#at + ICMP.quote;
    const ports = this.#quotePorts(bytes, quote, this.#quoteLength(offset));
    if (ports === undefined) return this.#drop(DROP.bad_quote);
    const { view, u8 } = bytes;
    if (view.getUint32(quote + IPV4.source) !== receiver.instanceIp) return this.#drop(DROP.bad_quote);
    const about = this.routes.instanceAt(view.getUint32(quote + IPV4.target));
    // Nobody speaks about packets to somebody else: no router lies between two instances.
    if (about !== sender) return this.#drop(DROP.bad_quote);
    const flow = this.flows.byWire(
      u8[quote + IPV4.protocol]!,
      receiver.namespaceIp,
      ports.source,
      about.instanceIp,
      ports.target,
    );
    this.#rewriteQuote(
      bytes,
      offset,
      quote,
      receiver.namespaceIp,
      flow < 0 ? about.instanceIp : this.flows.dialled[flow]!,
      flow < 0 ? ports.source : this.flows.port[flow]!,
      ports.target,
    );
    const to = this.#to;
    to.source = flow < 0 ? sender.instanceIp : this.flows.dialled[flow]!;
    to.target = receiver.namespaceIp;
    to.ttl = 0;
    rewrite(bytes, offset, this.#at, TRANSPORT.none, to);
    return VERDICT.tun;
  }

  /** Ports of a quoted packet; of an echo its identifier as the source. Undefined when the quote is no packet. */
  #quotePorts(bytes: Bytes, quote: number, length: number): { source: number; target: number } | undefined {
    const { u8, view } = bytes;
    if (length < IPV4.size || u8[quote]! >> 4 !== 4) return undefined;
    const header = headerLength(bytes, quote);
    if (header < IPV4.size || length < header + 8) return undefined;
    if ((view.getUint16(quote + IPV4.fragment) & FRAGMENT_MASK) !== 0) return undefined;
    const at = quote + header;
    const protocol = u8[quote + IPV4.protocol];
    if (protocol === PROTOCOL.icmp) {
      const type = u8[at + ICMP.type];
      const id = view.getUint16(at + ICMP.id);
      if (type === ICMP_TYPE.echo) return { source: id, target: 0 };
      return type === ICMP_TYPE.echoReply ? { source: 0, target: id } : undefined;
    }
    if (protocol !== PROTOCOL.tcp && protocol !== PROTOCOL.udp) return undefined;
    return { source: view.getUint16(at), target: view.getUint16(at + 2) };
  }

  #rewriteQuote(
    bytes: Bytes,
    offset: number,
    quote: number,
    source: number,
    target: number,
    sourcePort: number,
    targetPort: number,
  ): void {
    const { view, u8 } = bytes;
    const length = this.#quoteLength(offset);
    const at = quote + headerLength(bytes, quote);
    const protocol = u8[quote + IPV4.protocol];
    const delta = difference(
      sum32(view.getUint32(quote + IPV4.source)) + sum32(view.getUint32(quote + IPV4.target)),
      sum32(source) + sum32(target),
    );
    view.setUint32(quote + IPV4.source, source);
    view.setUint32(quote + IPV4.target, target);
    view.setUint16(quote + IPV4.checksum, adjust(view.getUint16(quote + IPV4.checksum), delta));
    if (protocol === PROTOCOL.icmp) {
      const id = u8[at + ICMP.type] === ICMP_TYPE.echo ? sourcePort : targetPort;
      const was = view.getUint16(at + ICMP.id);
      view.setUint16(at + ICMP.id, id);
      view.setUint16(at + ICMP.checksum, adjust(view.getUint16(at + ICMP.checksum), difference(was, id)));
    } else {
      const was = view.getUint16(at) + view.getUint16(at + 2);
      view.setUint16(at, sourcePort);
      view.setUint16(at + 2, targetPort);
      const field = at + (protocol === PROTOCOL.tcp ? TCP.checksum : UDP.checksum);
      if (field + 2 <= quote + length && !(protocol === PROTOCOL.udp && view.getUint16(field) === 0))
        view.setUint16(
          field,
          adjust(view.getUint16(field), delta + difference(was, sourcePort + targetPort)),
        );
    }
    finishIcmp(bytes, this.#at, this.#total - (this.#at - offset));
  }

  #error(bytes: Bytes, offset: number, type: number, code: number, mtu: number, now: number): void {
    if (this.answers.error(bytes, offset, type, code, mtu, now)) this.counters[COUNT.icmp_made]!++;
  }

  // ——— fragments, path MTU, misses ———

  /** Remembers what the first fragment at hand met, and lets its later ones go on. */
  #note(bytes: Bytes, offset: number, peer: Peer | undefined, now: number): void {
    const id = bytes.view.getUint16(offset + IPV4.id);
    this.#tracks.note(
      this.#source,
      this.#target,
      id,
      this.#protocol,
      this.#to.source,
      this.#to.target,
      peer,
      now,
    );
    this.hold.firstCame(this.#source, this.#target, id, this.#protocol);
  }

  /** A later fragment. */
  #later(
    bytes: Bytes,
    offset: number,
    length: number,
    leaving: boolean,
    outerIp: number,
    outerPort: number,
    now: number,
  ): Verdict {
    const id = bytes.view.getUint16(offset + IPV4.id);
    const track = this.#tracks.find(this.#source, this.#target, id, this.#protocol, now);
    if (track === undefined) {
      const { displaced } = this.hold;
      const held = this.hold.take(bytes, offset, length, 'fragment', now);
      this.counters[DROP.fragments_full]! += this.hold.displaced - displaced;
      if (held === undefined) return this.#drop(DROP.fragments_full);
      held.leaving = leaving;
      held.outerIp = outerIp;
      held.outerPort = outerPort;
      held.source = this.#source;
      held.target = this.#target;
      held.id = id;
      held.protocol = this.#protocol;
      this.counters[COUNT.fragments_held]!++;
      return VERDICT.held;
    }
    const to = this.#to;
    to.source = track.newSource;
    to.target = track.newTarget;
    to.ttl = leaving ? 1 : 0;
    this.peer = track.peer;
    if (leaving && track.peer !== undefined && track.peer.mtu < this.#config.mtu)
      if (!this.#fits(bytes, offset, track.peer, 0, now)) return this.#drop(DROP.too_big);
    rewrite(bytes, offset, this.#at, TRANSPORT.none, to);
    return track.peer === undefined ? VERDICT.tun : VERDICT.tunnel;
  }

  /** False, and the sender is told, when a packet that must not be cut is larger than its path. */
  #fits(bytes: Bytes, offset: number, peer: Peer, segment: number, now: number): boolean {
    if (now - peer.mtuMs > PATH_MTU_MS) {
      peer.mtu = this.#config.mtu;
      return true;
    }
    const headers =
      this.#at -
      offset +
      (this.#protocol === PROTOCOL.tcp && segment > 0 ? tcpHeaderLength(bytes, this.#at) : UDP.size);
    const size = segment > 0 ? headers + segment : this.#total;
    if (size <= peer.mtu) return true;
    if (segment === 0 && (bytes.view.getUint16(offset + IPV4.fragment) & FLAG_DF) === 0) return true;
    this.#error(bytes, offset, ICMP_TYPE.unreachable, UNREACHABLE.tooBig, peer.mtu, now);
    return false;
  }

  /** No route knows `address`: says so once a second, and keeps a copy of the packet for when one does. */
  #miss(
    bytes: Bytes,
    offset: number,
    length: number,
    address: number,
    leaving: boolean,
    outerIp: number,
    outerPort: number,
    now: number,
  ): Verdict {
    const last = this.#missedMs.get(address);
    const most = leaving ? MISSES_PER_TICK_MAX : MISSES_PER_TICK_MAX / 2;
    if (this.misses.length < most && (last === undefined || now - last >= MISS_REPORT_MS)) {
      if (last === undefined && this.#missedMs.size >= MISSES_MAX) {
        const oldest = this.#missedMs.keys().next().value;
        if (oldest !== undefined) this.#missedMs.delete(oldest);
      }
      this.#missedMs.delete(address);
      this.#missedMs.set(address, now);
      this.misses.push(ipv4(address));
      this.counters[COUNT.misses_reported]!++;
    }
    const held =
      this.#kind === TRANSPORT.partial ? undefined : this.hold.take(bytes, offset, length, 'route', now);
    if (held === undefined) return this.#drop(leaving ? DROP.unknown_destination : DROP.unknown_sender);
    held.leaving = leaving;
    held.address = address;
    held.outerIp = outerIp;
    held.outerPort = outerPort;
    this.counters[COUNT.packets_held]!++;
    return VERDICT.held;
  }

  #giveUp(held: Held): void {
    this.counters[COUNT.packets_given_up]!++;
    this.#drop(held.leaving ? DROP.unknown_destination : DROP.unknown_sender);
  }

  /** Tells the sender of a held packet that nobody has the address it dialled. */
  #refuse(at: number, now: number): void {
    const { bytes } = this.hold;
    if (this.#parse(bytes, at, false) !== 0) return;
    if (this.#protocol !== PROTOCOL.tcp || this.#kind === TRANSPORT.none)
      this.#error(bytes, at, ICMP_TYPE.unreachable, UNREACHABLE.host, 0, now);
    else if (this.answers.refuse(bytes, at)) this.counters[COUNT.resets_made]!++;
  }

  // ——— the control plane's side ———

  apply(command: Exclude<ProxyCommand, { kind: 'probe' | 'probeStatus' | 'stop' }>, now: number): void {
    switch (command.kind) {
      case 'service': {
        const gone = this.routes.putService(command);
        this.#endGone(gone, now);
        if (this.#remembered.size > 0)
          for (const route of command.instances) this.#restore(route.instanceIp, now);
        for (const route of command.instances) this.#routeCame(route.instanceIp);
        for (const address of Object.values(command.addresses)) this.#routeCame(address);
        return;
      }
      case 'serviceGone':
        this.#endGone(this.routes.deleteService(command.service), now);
        return;
      case 'unowned':
        this.#missedMs.delete(command.address);
        this.hold.giveUp(command.address, (held) => {
          this.#giveUp(held);
          this.#refuse(held.at, now);
        });
        return;
      case 'weights':
        this.routes.weigh(command.service, command);
        return;
      case 'nodeSuspect':
      case 'nodeDead':
        this.#endFlows((flow) => {
          const { peer } = this.flows.instance(flow);
          return (
            peer !== undefined &&
            peer.ip === command.nodeIp &&
            peer.port === command.ewp &&
            (command.kind === 'nodeDead' || this.flows.state[flow] === FLOW_STATE.opening)
          );
        }, now);
        return;
      case 'instanceDead':
        this.#endFlows((flow) => {
          const { service, instance } = this.flows.instance(flow);
          return service.id === command.service && instance === command.instance;
        }, now);
        return;
      case 'callers':
        this.routes.putCallers(command.nodes);
        return;
      case 'local': {
        const was = this.routes.local(command.namespaceIp);
        if (!this.routes.putLocal(command)) return;
        const is = this.routes.local(command.namespaceIp)!;
        if (was !== undefined && was.instanceIp !== is.instanceIp) this.#forgetLocal(command.namespaceIp);
        else if (is.needs !== undefined && !within(was?.needs, is.needs)) {
          const needs = is.needs;
          this.#contacts.forget(command.namespaceIp);
          this.#endFlows(
            (flow) =>
              this.flows.local[flow] === is.namespaceIp && !needs.has(this.flows.instance(flow).service.id),
            now,
          );
        }
        return;
      }
      case 'localGone':
        this.routes.deleteLocal(command.namespaceIp);
        this.#forgetLocal(command.namespaceIp);
        return;
    }
  }

  /**
   * Flows of an earlier life, after a crash. Each comes back when the route of its instance does; those that no route
   * claims are forgotten when `forgetRemembered` is called.
   */
  remember(records: readonly FlowRecord[]): void {
    for (const record of records) {
      if (record.state >= FLOW_STATE.closed) continue;
      const idle = idleLimit(record.protocol, record.state);
      if ((record.ageS - FLOW_AGE_S) * 1000 > idle) continue;
      this.#rememberedTuples.add(
        tupleKey(record.protocol, record.local, record.port, record.dialled, record.remotePort),
      );
      const list = this.#remembered.get(record.instanceIp);
      if (list === undefined) this.#remembered.set(record.instanceIp, [record]);
      else list.push(record);
    }
  }

  forgetRemembered(): void {
    this.#remembered.clear();
    this.#rememberedTuples.clear();
  }

  #remembers(local: LocalEntry, target: Target): boolean {
    return (
      this.#rememberedTuples.size > 0 &&
      this.#rememberedTuples.has(
        tupleKey(this.#protocol, local.namespaceIp, this.#sourcePort, target.address, this.#targetPort),
      )
    );
  }

  #restore(instanceIp: number, now: number): void {
    const instance = this.routes.instance(instanceIp);
    const records = this.#remembered.get(instanceIp);
    if (instance === undefined || records === undefined) return;
    this.#remembered.delete(instanceIp);
    for (const { protocol, local, port, dialled, remotePort, wirePort, state } of records) {
      if (this.flows.size >= this.flows.max) return;
      if (this.flows.byDialled(protocol, local, port, dialled, remotePort) >= 0) continue;
      if (this.flows.byWire(protocol, local, wirePort, instanceIp, remotePort) >= 0) continue;
      this.flows.open(protocol, local, port, dialled, remotePort, wirePort, instance, now, state);
      this.counters[COUNT.flows_restored]!++;
    }
    this.counters[COUNT.flows] = this.flows.size;
  }

  /** Housekeeping, a few times a second. */
  tick(sweep: number, now: number): void {
    this.counters[COUNT.flows_expired]! += this.flows.sweep(sweep, now);
    this.counters[COUNT.flows] = this.flows.size;
    this.routes.prunePeers(now);
    this.hold.expire(now, (held) => {
      if (held.state === 'fragment') this.#drop(DROP.fragment_orphan);
      else this.#giveUp(held);
    });
    for (const [address, last] of this.#missedMs) {
      if (now - last < MISS_REPORT_MS) break;
      this.#missedMs.delete(address);
    }
  }

  #routeCame(address: number): void {
    this.#missedMs.delete(address);
    this.hold.routeCame(address);
  }

  #endGone(gone: readonly InstanceEntry[], now: number): void {
    if (gone.some((entry) => entry.flows > 0)) this.#endFlows((flow) => !this.flows.instance(flow).live, now);
  }

  #forgetLocal(namespaceIp: number): void {
    this.#contacts.forget(namespaceIp);
    for (const flow of this.flows) if (this.flows.local[flow] === namespaceIp) this.#removeFlow(flow);
  }

  #chose(target: Target, instance: InstanceEntry, local: LocalEntry): void {
    const choice = {
      service: target.service.id,
      policy: target.policy ?? ('fixed' as const),
      instance: instance.instance,
    };
    if (this.choices.length < CHOICES_PER_REPORT_MAX) {
      this.choices.push({ ...choice, client: ipv4(local.namespaceIp) });
      return;
    }
    const key = `${choice.service}/${choice.instance} ${choice.policy}`;
    this.unlisted.set(key, { ...choice, count: (this.unlisted.get(key)?.count ?? 0) + 1 });
  }

  // ——— parsing ———

  #start = 0;

  /** Fills the fields of the packet at hand; the counter of a drop, or 0. The IPv4 header is known to be good. */
  #parse(bytes: Bytes, offset: number, partial: boolean): number {
    const { view, u8 } = bytes;
    const header = (u8[offset]! & 15) << 2;
    const at = offset + header;
    const total = view.getUint16(offset + IPV4.total);
    const rest = total - header;
    const protocol = u8[offset + IPV4.protocol]!;
    this.#start = offset;
    this.#at = at;
    this.#total = total;
    this.#protocol = protocol;
    this.#source = view.getUint32(offset + IPV4.source);
    this.#target = view.getUint32(offset + IPV4.target);
    this.#fragment = view.getUint16(offset + IPV4.fragment);
    this.#flags = 0;
    if ((this.#fragment & FRAGMENT_MASK) !== 0) {
      this.#kind = TRANSPORT.none;
      return protocol === PROTOCOL.tcp || protocol === PROTOCOL.udp || protocol === PROTOCOL.icmp
        ? 0
        : DROP.unknown_transport;
    }
    this.#kind = partial ? TRANSPORT.partial : TRANSPORT.full;
    if (protocol === PROTOCOL.tcp) {
      if (!checkTcp(bytes, at, rest)) return DROP.malformed_transport;
      this.#flags = u8[at + TCP.flags]!;
    } else if (protocol === PROTOCOL.udp) {
      if (rest < UDP.size) return DROP.malformed_transport;
      const own = view.getUint16(at + UDP.length);
      const first = (this.#fragment & FLAG_MF) !== 0;
      if (own < UDP.size || (own > rest && !first)) return DROP.malformed_transport;
    } else if (protocol === PROTOCOL.icmp) {
      if (rest < ICMP.size) return DROP.malformed_transport;
      const type = u8[at + ICMP.type]!;
      if (type === ICMP_TYPE.echo || type === ICMP_TYPE.echoReply) {
        this.#sourcePort = view.getUint16(at + ICMP.id);
        this.#targetPort = 0;
        return 0;
      }
      if (!isIcmpError(type)) return DROP.unknown_transport;
      this.#sourcePort = 0;
      this.#targetPort = 0;
      return 0;
    } else return DROP.unknown_transport;
    this.#sourcePort = view.getUint16(at);
    this.#targetPort = view.getUint16(at + 2);
    return 0;
  }

  #drop(counter: number): Verdict {
    this.counters[counter]!++;
    this.dropped = counter;
    return VERDICT.drop;
  }
}

/** Of a dialled tuple; text, because it is asked for only in the minute after a restart. */
function tupleKey(
  protocol: number,
  local: number,
  port: number,
  dialled: number,
  remotePort: number,
): string {
  return `${protocol} ${local}:${port} ${dialled}:${remotePort}`;
}

/** True when whoever had these needs loses nothing by having those; undefined is any. */
function within(was: ReadonlySet<ServiceId> | undefined, is: ReadonlySet<ServiceId>): boolean {
  if (was === undefined) return false;
  for (const service of was) if (!is.has(service)) return false;
  return true;
}
