// The packet loop: sleeps in poll on the TUN device, the tunnel's socket and an eventfd, and moves packets between
// them as the ProxyTun decides. One thread, one packet memory. It decides nothing about packets itself, and makes
// nothing on the host but the TUN device, which vanishes with it.
//
// Memory: one arena. A TUN read puts its virtio header so that the packet begins 4-aligned with 12 bytes in front, and
// the tunnel header is later written over the virtio header: a packet leaves from where it was read.
//
//   … | 2 | virtio 10 | packet …           read from the TUN
//   …     | tunnel 8  | packet …           sent to a peer
import { createHmac, getRandomValues } from 'node:crypto';
import { receiveMessageOnPort, workerData } from 'node:worker_threads';
import {
  CMSG,
  ERRNO,
  errnoName,
  IOVEC_SIZE,
  MSG_TRUNC,
  MSGHDR,
  openTun,
  openTunnelSocket,
  POLLERR,
  POLLFD,
  POLLHUP,
  POLLIN,
  POLLNVAL,
  pathMtu,
  type Region,
  SOCKADDR_IN,
  SOL_UDP,
  system as sys,
  type Tun,
  TunError,
  type TunnelSocket,
  UDP_GRO,
  VNET,
  VNET_F_NEEDS_CSUM,
  VNET_GSO_NONE,
  VNET_GSO_TCPV4,
  VNET_GSO_UDP_L4,
  writeAddress,
} from 'node-tun';
import { formatIpv4, type Ipv4, ipv4 } from '../../src/addr.ts';
import {
  FLOW_SWEEP,
  FLOW_WRITE_MS,
  FLOWS_MS,
  PROBE_STATUS_BYTES,
  SEGMENTS_MAX,
  SOCKET_BUFFER_BYTES,
  SPIN_PACKETS,
  SPIN_US_DEFAULT,
  TUN_QUEUE,
  TUNNEL_OVERHEAD,
} from '../../src/limits.ts';
import { type Bytes, bytesOf, newBytes } from '../../src/wire/bytes.ts';
import { finish, sum } from '../../src/wire/checksum.ts';
import { vectorBytes } from '../../src/wire/checksum_simd.ts';
import { checkIpv4, IPV4, IPV4_FAULT, PROTOCOL } from '../../src/wire/ipv4.ts';
import { TCP } from '../../src/wire/tcp.ts';
import { FRAME, NEXT_IPV4, readTunnel, TUNNEL, writeTunnel } from '../../src/wire/tunnel.ts';
import { UDP } from '../../src/wire/udp.ts';
import { Answers } from '../proxy/answer.ts';
import type { ProxyCommand, ProxyConfig, ProxyReport } from '../proxy/command.ts';
import { CONTROL_BYTES, Control } from '../proxy/control.ts';
import { cutIntoFragments, cutMemory } from '../proxy/fragments.ts';
import { Hold } from '../proxy/hold.ts';
import type { Peer } from '../proxy/peers.ts';
import { ProxyTun } from '../proxy/proxy.ts';
import { Cutter, Joiner } from '../proxy/segment.ts';
import { COUNT, DROP, VERDICT } from '../proxy/verdict.ts';
import { type FlowFile, openFlowFile } from './flow_file.ts';
import { Batch } from './packet_batch.ts';
import { FLAG, type ThreadData } from './packet_thread.ts';

/** Largest IPv4 packet; a read never needs more after its virtio header. */
const PACKET_MAX = 65_535;
const HEADROOM = 12;
const READ_SLOT = HEADROOM + PACKET_MAX + 1;
/** Packets read before the batch must leave: enough for 64 small ones and a few super-packets. */
const ARENA_BYTES = 8 * READ_SLOT;
/** Reads in a row from one side before the other has its turn. */
const TUN_READS = 64;
const TUNNEL_READS = 16;
const TICK_MS = 250;
const CHOICES_MS = 250;

interface Devices {
  readonly tun: Tun;
  readonly socket: TunnelSocket;
}

/** The TUN device and the tunnel's socket, or neither. */
function openDevices(config: ProxyConfig, notice: (text: string) => void): Devices {
  const { nodeIp, ewp: port, without } = config;
  const tun = openTun(sys, { name: config.tun, mtu: config.mtu, queue: TUN_QUEUE, without });
  try {
    const socket = openSocket(nodeIp, port, without, notice);
    for (const text of [...tun.refused, ...socket.refused]) notice(`this kernel refuses ${text}`);
    return { tun, socket };
  } catch (error) {
    sys.close(tun.fd);
    throw error;
  }
}

/** Bound to the node's own address; behind a NAT that address may be none of this host's, then to any. */
function openSocket(
  nodeIp: Ipv4,
  port: number,
  without: ProxyConfig['without'],
  notice: (text: string) => void,
): TunnelSocket {
  const options = { port, buffer: SOCKET_BUFFER_BYTES, without };
  try {
    return openTunnelSocket(sys, { ...options, address: nodeIp });
  } catch (error) {
    if (!(error instanceof TunError) || error.errno !== ERRNO.EADDRNOTAVAIL) throw error;
    notice(`binding to ${formatIpv4(nodeIp)}, which is no address of this host; bound to all`);
    return openTunnelSocket(sys, { ...options, address: 0 });
  }
}

class Loop {
  readonly #data: ThreadData;
  readonly #proxy: ProxyTun;
  readonly #cutter: Cutter;
  readonly #joiner = new Joiner();
  readonly #batch: Batch;
  readonly #counters: Float64Array;
  readonly #flags: Int32Array;
  readonly #tun: number;
  readonly #socket: number;
  readonly #spinMs: number;

  // Memory, and where each part of it lies for the kernel.
  readonly #arena: Region;
  readonly #arenaBytes: Bytes;
  #arenaAt = 0;
  readonly #inbox: Region;
  readonly #inboxBytes: Bytes;
  readonly #headers: Region;
  readonly #answers: Region;
  readonly #hold: Region;
  readonly #cuts: Region;
  readonly #cutsBytes: Bytes;
  readonly #control: Control;

  readonly #readVector: Region;
  readonly #readVectorView: DataView;
  readonly #writeVectors: Region;
  readonly #writeVectorsView: DataView;
  readonly #receive: Region;
  readonly #receiveView: DataView;
  readonly #sendControl: Region;
  readonly #sendControlView: DataView;
  readonly #polls: Region;
  readonly #pollsView: DataView;
  readonly #drain: Region;

  #running = true;
  #error: string | undefined;
  #now = 0;
  #tickedMs = 0;
  #reportedMs = 0;
  #flowsMs = 0;
  #flowFile: FlowFile | undefined;
  #wroteMs = 0;
  #rememberedUntilMs = performance.now() + REMEMBER_MS;

  constructor(data: ThreadData, devices: Devices) {
    this.#data = data;
    const { config } = data;
    this.#counters = new Float64Array(data.counters);
    this.#flags = new Int32Array(data.flags);
    this.#spinMs = (config.spinUs ?? SPIN_US_DEFAULT) / 1000;

    const { tun, socket } = devices;
    this.#tun = tun.fd;
    this.#socket = socket.fd;
    this.#joiner.tcp = tun.tso;
    this.#joiner.udp = tun.uso;
    this.#batch = new Batch(sys, socket.fd, socket.gso, this.#counters);
    this.#batch.onRefused = (peer) =>
      this.#notice(
        `the device on the way to ${formatIpv4(ipv4(peer.targetIp(this.#now)))} refuses UDP_SEGMENT: sending one by one`,
      );
    this.#batch.onTooBig = (peer) => this.#learnMtu(peer);

    // Payloads are summed here: vectors, where the runtime has them.
    this.#arenaBytes = vectorBytes(ARENA_BYTES) ?? newBytes(ARENA_BYTES);
    this.#arena = sys.regionOf(this.#arenaBytes.u8);
    this.#inboxBytes = vectorBytes(HEADROOM + PACKET_MAX + 1) ?? newBytes(HEADROOM + PACKET_MAX + 1);
    this.#inbox = sys.regionOf(this.#inboxBytes.u8);
    this.#headers = sys.allocate(Cutter.memory);
    this.#cutter = new Cutter(config.vni, bytesOf(this.#headers.bytes));
    this.#answers = sys.allocate(Answers.memory);
    this.#hold = sys.allocate(Hold.memory(config.mtu));
    this.#cuts = sys.allocate((cutMemory(PACKET_MAX, 296) + 3) & ~3);
    this.#cutsBytes = bytesOf(this.#cuts.bytes);
    this.#proxy = new ProxyTun(config, {
      counters: this.#counters,
      answers: bytesOf(this.#answers.bytes),
      hold: bytesOf(this.#hold.bytes),
    });
    if (config.flowsFile !== undefined) this.#openFlows(config.flowsFile, config.flowsMax);
    this.#proxy.onAnswersFull = () => this.#sendAnswers();

    this.#readVector = sys.allocate(IOVEC_SIZE);
    this.#readVectorView = new DataView(this.#readVector.bytes.buffer);
    this.#writeVectors = sys.allocate((SEGMENTS_MAX + 1) * IOVEC_SIZE);
    this.#writeVectorsView = new DataView(this.#writeVectors.bytes.buffer);
    this.#drain = sys.allocate(8);

    // One message for everything received: name, one vector, control.
    this.#receive = sys.allocate(256);
    this.#receiveView = new DataView(this.#receive.bytes.buffer);
    const base = this.#receive.address;
    writeAddress(this.#receiveView, MSGHDR.name, base + RECEIVE.name);
    writeAddress(this.#receiveView, MSGHDR.iov, base + RECEIVE.vector);
    this.#receiveView.setUint32(MSGHDR.iovLength, 1, true);
    writeAddress(this.#receiveView, MSGHDR.control, base + RECEIVE.control);
    writeAddress(this.#receiveView, RECEIVE.vector, this.#inbox.address + INBOX_AT);
    this.#receiveView.setUint32(RECEIVE.vector + 8, PACKET_MAX, true);

    this.#sendControl = sys.allocate(256);
    this.#sendControlView = new DataView(this.#sendControl.bytes.buffer);
    const out = this.#sendControl.address;
    writeAddress(this.#sendControlView, MSGHDR.name, out + RECEIVE.name);
    this.#sendControlView.setUint32(MSGHDR.nameLength, SOCKADDR_IN.size, true);
    writeAddress(this.#sendControlView, MSGHDR.iov, out + RECEIVE.vector);
    this.#sendControlView.setUint32(MSGHDR.iovLength, 1, true);
    const frame = sys.allocate(CONTROL_BYTES);
    writeAddress(this.#sendControlView, RECEIVE.vector, frame.address);
    // Without a secret of the network's own the proof is a checksum that anybody can make.
    const secret = config.secret ?? new TextEncoder().encode(`edgeway ${config.vni}`);
    const random = new Uint32Array(1);
    this.#control = new Control(config, this.#proxy.routes, this.#counters, bytesOf(frame.bytes), {
      send: (length, ip, port) => this.#sendFrame(length, ip, port),
      prove: (head, tail) => createHmac('sha256', secret).update(head).update(tail).digest(),
      token: () => getRandomValues(random)[0]!,
      wallUs: () => Date.now() * 1000,
      report: (report) => this.report(report),
    });

    this.#polls = sys.allocate(3 * POLLFD.size);
    this.#pollsView = new DataView(this.#polls.bytes.buffer);
    for (const [i, fd] of [this.#tun, this.#socket, data.eventfd].entries()) {
      this.#pollsView.setInt32(i * POLLFD.size + POLLFD.fd, fd, true);
      this.#pollsView.setInt16(i * POLLFD.size + POLLFD.events, POLLIN, true);
    }
  }

  /** Flows of an earlier life, and a place for those of this one. Without it they live in memory only. */
  #openFlows(path: string, max: number): void {
    try {
      const { file, records, error } = openFlowFile(path, max, seconds());
      this.#proxy.remember(records);
      if (file === undefined) throw error;
      this.#flowFile = file;
      this.#proxy.flows.watcher = file;
    } catch (error) {
      this.#notice(`the file of flows, ${path}: ${messageOf(error)}`);
    }
  }

  #writeFlows(): void {
    this.#wroteMs = this.#now;
    try {
      this.#flowFile?.write();
    } catch (error) {
      this.#notice(`the file of flows, ${this.#data.config.flowsFile}: ${messageOf(error)}`);
      const file = this.#flowFile;
      this.#flowFile = undefined;
      this.#proxy.flows.watcher = undefined;
      quietly(() => file?.abandon());
    }
  }

  run(): void {
    // When the last turn ended, how many packets it had, and whether the next came soon.
    let idleMs = performance.now();
    let packets = 0;
    let brisk = false;
    while (this.#running) {
      this.#now = performance.now();
      if (Atomics.load(this.#flags, FLAG.exit) === 1) break;
      if (Atomics.exchange(this.#flags, FLAG.messages, 0) === 1) this.#takeMessages();
      if (this.#tunReady || this.#tunnelReady) {
        packets = this.#turn();
        idleMs = performance.now();
      }
      if (this.#now - this.#tickedMs >= TICK_MS) this.#tick();
      const unwritten = this.#flowFile?.dirty === true;
      if (unwritten && this.#now - this.#wroteMs >= FLOW_WRITE_MS) this.#writeFlows();
      if (this.#tunReady || this.#tunnelReady) continue;
      // Single packets that come faster than a sleeper wakes are waited for awake. The core is offered to whoever else
      // must run, before each look: on a small machine that is who has to answer. A turn of many waits asleep, where
      // the next ones gather.
      if (brisk && packets <= SPIN_PACKETS && this.#now - idleMs < this.#spinMs) {
        sys.schedYield();
        this.#look(0);
        continue;
      }
      this.#look(unwritten ? FLOW_WRITE_MS : TICK_MS);
      brisk = performance.now() - idleMs < this.#spinMs;
    }
  }

  /** What both sides have; returns how many packets were read. */
  #turn(): number {
    let packets = 0;
    if (this.#tunReady) {
      const read = this.#fromTun();
      // A side that used up its turn has more; the other one goes first.
      this.#tunReady = read === TUN_READS;
      packets += read;
    }
    if (this.#tunnelReady) {
      const read = this.#fromTunnel();
      this.#tunnelReady = read === TUNNEL_READS;
      packets += read;
    }
    return packets;
  }

  #tunReady = false;
  #tunnelReady = false;

  close(): void {
    quietly(() => this.#flowFile?.close());
  }

  /** Why the loop ended by itself. */
  get error(): string | undefined {
    return this.#error;
  }

  report(report: ProxyReport): void {
    this.#data.port.postMessage(report);
  }

  #notice(text: string): void {
    this.report({ kind: 'notice', text });
  }

  #fail(text: string): void {
    this.#error ??= text;
    this.#running = false;
  }

  /** Asks the kernel what is there, and waits for it for at most that long. */
  #look(timeoutMs: number): void {
    this.#counters[COUNT.polls]!++;
    const ready = sys.poll(this.#polls.pointer, 3, timeoutMs);
    if (ready <= 0) return;
    const view = this.#pollsView;
    this.#tunReady = (view.getInt16(POLLFD.revents, true) & POLLIN) !== 0;
    // POLLERR: an ICMP error waits to be read off.
    this.#tunnelReady = (view.getInt16(POLLFD.size + POLLFD.revents, true) & (POLLIN | POLLERR)) !== 0;
    const bad = POLLERR | POLLHUP | POLLNVAL;
    if ((view.getInt16(POLLFD.revents, true) & bad) !== 0)
      this.#fail(`the TUN device ${this.#data.config.tun} is gone`);
    if ((view.getInt16(2 * POLLFD.size + POLLFD.revents, true) & POLLIN) !== 0)
      sys.read(this.#data.eventfd, this.#drain.pointer, 8);
  }

  // ——— from the bridge ———

  /** Returns how many packets were read. */
  #fromTun(): number {
    const arena = this.#arenaBytes;
    let reads = 0;
    for (; reads < TUN_READS; reads++) {
      if (this.#arenaAt + READ_SLOT > ARENA_BYTES) this.#flush();
      const at = this.#arenaAt + HEADROOM;
      writeAddress(this.#readVectorView, 0, this.#arena.address + at - VNET.size);
      this.#readVectorView.setUint32(8, VNET.size + PACKET_MAX, true);
      const length = sys.readv(this.#tun, this.#readVector.pointer, 1);
      if (length < 0) {
        if (length === -ERRNO.EAGAIN || length === -ERRNO.EINTR) break;
        if (length === -ERRNO.EBADF || length === -ERRNO.EBADFD) {
          this.#fail(`read from the TUN device ${this.#data.config.tun}: ${errnoName(length)}`);
          break;
        }
        // The kernel had no virtio header for this one packet, and has let go of it.
        this.#counters[DROP.unread]!++;
        continue;
      }
      this.#counters[COUNT.tun_reads]!++;
      const packet = length - VNET.size;
      if (packet <= 0) {
        this.#counters[DROP.malformed_ipv4]!++;
        continue;
      }
      this.#leaving(arena, at, packet);
    }
    this.#flush();
    return reads;
  }

  /** One read of the TUN: a packet or a super-packet, with its virtio header in front. */
  #leaving(bytes: Bytes, at: number, length: number): void {
    const { u8, view } = bytes;
    const counters = this.#counters;
    const vnet = at - VNET.size;
    const type = u8[vnet + VNET.gsoType]!;
    const needsChecksum = (u8[vnet + VNET.flags]! & VNET_F_NEEDS_CSUM) !== 0;
    counters[COUNT.from_tun_packets]!++;
    counters[COUNT.from_tun_bytes]! += length;
    let segment = 0;
    if (type === VNET_GSO_TCPV4 || type === VNET_GSO_UDP_L4)
      segment = view.getUint16(vnet + VNET.gsoSize, true);
    else if (type !== VNET_GSO_NONE) {
      counters[DROP.malformed_ipv4]!++;
      return;
    } else if (needsChecksum) {
      // A plain packet whose checksum the device was to finish. The field holds the pseudo-header's sum.
      const start = view.getUint16(vnet + VNET.csumStart, true);
      const field = start + view.getUint16(vnet + VNET.csumOffset, true);
      if (field + 2 > length) {
        counters[DROP.malformed_transport]!++;
        return;
      }
      const checksum = finish(sum(bytes, at + start, length - start));
      view.setUint16(
        at + field,
        checksum === 0 && u8[at + IPV4.protocol] === PROTOCOL.udp ? 0xffff : checksum,
      );
    }
    const proxy = this.#proxy;
    const verdict = proxy.leaving(bytes, at, length, segment > 0, segment, this.#now);
    if (proxy.answers.count > 0) this.#sendAnswers();
    if (verdict === VERDICT.tun) {
      if (segment === 0) view.setUint16(vnet, 0); // flags and type: a whole, plain packet
      this.#writeTun(this.#arena.address + vnet, VNET.size + length);
    } else if (verdict === VERDICT.tunnel) {
      const peer = proxy.peer!;
      if (segment > 0) this.#cut(bytes, at, segment, peer);
      else this.#wrap(this.#arena, bytes, at, length, peer);
      // Memory of a packet that waits in the batch is not read into.
      this.#arenaAt = (at + length + 3) & ~3;
    }
    if (proxy.hold.due > 0) this.#resume();
  }

  #cut(bytes: Bytes, at: number, segment: number, peer: Peer): void {
    const cutter = this.#cutter;
    // Headers that wait in the batch must not be written over.
    if (cutter.segments(bytes, at, segment) > cutter.room) this.#flush();
    if (!cutter.cut(bytes, at, segment)) {
      this.#counters[DROP.malformed_transport]!++;
      return;
    }
    const { count, headerLength, headerAt, bodyAt, bodyLength } = cutter;
    this.#counters[COUNT.segmented_packets]! += count;
    const headers = this.#headers.address;
    const arena = this.#arena.address;
    for (let i = 0; i < count; i++)
      this.#batch.add(peer, headers + headerAt[i]!, headerLength, arena + bodyAt[i]!, bodyLength[i]!);
  }

  /** A plain packet into the batch, from where it lies; cut first where its path is narrower than the overlay. */
  #wrap(region: Region, bytes: Bytes, at: number, length: number, peer: Peer): void {
    const { vni } = this.#data.config;
    if (length > peer.mtu) {
      this.#flush();
      const cut = cutIntoFragments(bytes, at, peer.mtu, this.#cutsBytes, HEADROOM, (from, size) => {
        writeTunnel(this.#cutsBytes, from - TUNNEL.size, NEXT_IPV4, vni);
        this.#batch.add(peer, this.#cuts.address + from - TUNNEL.size, TUNNEL.size + size, 0, 0);
      });
      if (!cut) this.#counters[DROP.too_big]!++;
      this.#flush();
      return;
    }
    writeTunnel(bytes, at - TUNNEL.size, NEXT_IPV4, vni);
    this.#batch.add(peer, region.address + at - TUNNEL.size, TUNNEL.size + length, 0, 0);
  }

  #flush(): void {
    this.#batch.flush(this.#now);
    this.#arenaAt = 0;
    this.#cutter.release();
  }

  // ——— from the tunnel ———

  #fromTunnel(): number {
    let reads = 0;
    const view = this.#receiveView;
    for (; reads < TUNNEL_READS; reads++) {
      view.setUint32(MSGHDR.nameLength, SOCKADDR_IN.size, true);
      view.setUint32(MSGHDR.controlLength, RECEIVE.controlSize, true);
      const length = sys.recvmsg(this.#socket, this.#receive.pointer, 0);
      if (length < 0) {
        if (length === -ERRNO.EAGAIN || length === -ERRNO.EINTR) break;
        if (length === -ERRNO.EBADF) {
          this.#fail('the tunnel socket is gone');
          break;
        }
        // Errors of the network do not surface on a socket that is not connected and did not ask (IP_RECVERR).
        this.#counters[DROP.unread]!++;
        continue;
      }
      this.#counters[COUNT.tunnel_reads]!++;
      if ((view.getInt32(MSGHDR.flags, true) & MSG_TRUNC) !== 0) {
        this.#counters[DROP.short_frame]!++;
        continue;
      }
      let segment = length;
      if (
        view.getUint32(MSGHDR.controlLength, true) >= CMSG.data + 4 &&
        view.getInt32(RECEIVE.control + CMSG.level, true) === SOL_UDP &&
        view.getInt32(RECEIVE.control + CMSG.type, true) === UDP_GRO
      )
        segment = view.getInt32(RECEIVE.control + CMSG.data, true);
      this.#datagrams(
        length,
        segment > 0 ? segment : length,
        view.getUint32(RECEIVE.name + SOCKADDR_IN.address),
        view.getUint16(RECEIVE.name + SOCKADDR_IN.port),
      );
    }
    return reads;
  }

  /** What one receive gave: datagrams of `segment` bytes one behind the other, the last one maybe shorter. */
  #datagrams(length: number, segment: number, ip: number, port: number): void {
    const bytes = this.#inboxBytes;
    const counters = this.#counters;
    const joiner = this.#joiner;
    joiner.count = 0;
    const { vni } = this.#data.config;
    for (let done = 0; done < length || length === 0; done += segment) {
      const size = Math.min(segment, length - done);
      counters[COUNT.from_tunnel_packets]!++;
      counters[COUNT.from_tunnel_bytes]! += size;
      const frame = readTunnel(bytes, INBOX_AT + done, size, vni);
      if (frame === FRAME.ipv4) {
        const at = INBOX_AT + done + TUNNEL.size;
        if (checkIpv4(bytes, at, size - TUNNEL.size) !== IPV4_FAULT.none) counters[DROP.malformed_ipv4]!++;
        else if (joiner.count === 0 || !joiner.add(bytes, at)) {
          if (joiner.count > 0) this.#arriving(ip, port);
          joiner.open(bytes, at);
        }
      } else if (frame === FRAME.control)
        this.#control.take(bytes, INBOX_AT + done, size, ip, port, performance.now());
      else
        counters[
          frame === FRAME.short
            ? DROP.short_frame
            : frame === FRAME.flags
              ? DROP.bad_flags
              : frame === FRAME.vni
                ? DROP.wrong_vni
                : DROP.unknown_protocol
        ]!++;
      if (length === 0) break;
    }
    if (joiner.count > 0) this.#arriving(ip, port);
  }

  /** What the joiner holds: one packet, or several that continue each other. */
  #arriving(ip: number, port: number): void {
    const bytes = this.#inboxBytes;
    const joiner = this.#joiner;
    const proxy = this.#proxy;
    const many = joiner.count > 1;
    const { at } = joiner;
    if (many) joiner.finish(bytes);
    const verdict = proxy.arriving(bytes, at, joiner.total, many, ip, port, this.#now);
    if (verdict === VERDICT.tun) {
      const vnet = at - VNET.size;
      const { view, u8 } = bytes;
      if (!many) {
        u8.fill(0, vnet, at);
        this.#writeTun(this.#inbox.address + vnet, VNET.size + joiner.total);
      } else {
        const tcp = joiner.protocol === PROTOCOL.tcp;
        u8[vnet + VNET.flags] = VNET_F_NEEDS_CSUM;
        u8[vnet + VNET.gsoType] = tcp ? VNET_GSO_TCPV4 : VNET_GSO_UDP_L4;
        view.setUint16(vnet + VNET.hdrLen, joiner.headerLength, true);
        view.setUint16(vnet + VNET.gsoSize, joiner.size, true);
        view.setUint16(vnet + VNET.csumStart, IPV4.size, true);
        view.setUint16(vnet + VNET.csumOffset, tcp ? TCP.checksum : UDP.checksum, true);
        this.#writeJoined();
      }
    } else if (many && verdict === VERDICT.drop) this.#counters[proxy.dropped]! += joiner.count - 1; // one was counted
    joiner.count = 0;
    if (proxy.doubted !== undefined) this.#doubt(ip, port);
    if (proxy.answers.count > 0) this.#sendAnswers();
    if (proxy.hold.due > 0) this.#resume();
  }

  #doubt(ip: number, port: number): void {
    this.#control.challenge(this.#proxy.doubted!, ip, port, this.#now);
    this.#proxy.doubted = undefined;
  }

  #writeJoined(): void {
    const joiner = this.#joiner;
    const { at, count, bodyAt, bodyLength } = joiner;
    const view = this.#writeVectorsView;
    const inbox = this.#inbox.address;
    setVector(view, 0, inbox + at - VNET.size, VNET.size + joiner.headerLength + bodyLength[0]!);
    for (let i = 1; i < count; i++) setVector(view, i * IOVEC_SIZE, inbox + bodyAt[i]!, bodyLength[i]!);
    this.#counters[COUNT.joined_packets]! += count;
    const result = sys.writev(this.#tun, this.#writeVectors.pointer, count);
    if (result === -ERRNO.EINVAL) this.#writeSingly();
    else this.#finishWrite(result, joiner.total);
  }

  /**
   * The device refuses joined packets that it had promised to take (6.10.3 and 6.6.44 did): this one is cut again, and
   * no more are joined.
   */
  #writeSingly(): void {
    const joiner = this.#joiner;
    const { at, count, headerLength, bodyAt, bodyLength } = joiner;
    if (joiner.protocol === PROTOCOL.tcp) joiner.tcp = false;
    else joiner.udp = false;
    this.#notice(`the TUN device ${this.#data.config.tun} refuses joined packets: writing one by one`);
    const whole = newBytes(joiner.total);
    const { u8 } = this.#inboxBytes;
    whole.u8.set(u8.subarray(at, at + headerLength));
    for (let i = 0, to = headerLength; i < count; to += bodyLength[i++]!)
      whole.u8.set(u8.subarray(bodyAt[i]!, bodyAt[i]! + bodyLength[i]!), to);
    const cutter = new Cutter(this.#data.config.vni);
    if (!cutter.cut(whole, 0, joiner.size)) return;
    // What follows in the inbox is not read yet: memory of its own, with an empty virtio header in front.
    const out = sys.allocate(VNET.size + headerLength + joiner.size);
    for (let i = 0; i < cutter.count; i++) {
      const from = cutter.headerAt[i]! + TUNNEL.size;
      const body = cutter.bodyAt[i]!;
      const length = cutter.bodyLength[i]!;
      out.bytes.set(cutter.headers.u8.subarray(from, from + headerLength), VNET.size);
      out.bytes.set(whole.u8.subarray(body, body + length), VNET.size + headerLength);
      this.#writeTun(out.address, VNET.size + headerLength + length);
    }
  }

  #writeTun(address: number, length: number): void {
    setVector(this.#writeVectorsView, 0, address, length);
    this.#finishWrite(sys.writev(this.#tun, this.#writeVectors.pointer, 1), length - VNET.size);
  }

  #finishWrite(result: number, bytes: number): void {
    this.#counters[COUNT.tun_writes]!++;
    if (result < 0) {
      if (result === -ERRNO.EBADFD || result === -ERRNO.EBADF)
        this.#fail(`write to the TUN device ${this.#data.config.tun}: ${errnoName(result)}`);
      this.#counters[DROP.tun_full]!++;
      return;
    }
    this.#counters[COUNT.to_tun_packets]!++;
    this.#counters[COUNT.to_tun_bytes]! += bytes;
  }

  // ——— what the proxy says itself, and what had to wait ———

  #sendAnswers(): void {
    const { answers } = this.#proxy;
    for (let i = 0; i < answers.count; i++) {
      const at = answers.at[i]! - VNET.size;
      answers.bytes.u8.fill(0, at, at + VNET.size);
      this.#writeTun(this.#answers.address + at, VNET.size + answers.length[i]!);
    }
    answers.clear();
  }

  #resume(): void {
    const { hold } = this.#proxy;
    for (let held = hold.next(); held !== undefined; held = hold.next()) {
      const { at, length, leaving, outerIp, outerPort } = held;
      const verdict = leaving
        ? this.#proxy.leaving(hold.bytes, at, length, false, 0, this.#now)
        : this.#proxy.arriving(hold.bytes, at, length, false, outerIp, outerPort, this.#now);
      if (verdict === VERDICT.tun) {
        hold.bytes.u8.fill(0, at - VNET.size, at);
        this.#writeTun(this.#hold.address + at - VNET.size, VNET.size + length);
      } else if (verdict === VERDICT.tunnel) {
        this.#wrap(this.#hold, hold.bytes, at, length, this.#proxy.peer!);
        this.#flush();
      }
      if (this.#proxy.doubted !== undefined) this.#doubt(outerIp, outerPort);
      this.#counters[COUNT.packets_resumed]!++;
      hold.free(held);
      if (this.#proxy.answers.count > 0) this.#sendAnswers();
    }
  }

  /** Asks the kernel for the size of the path; true when it is smaller than what was known. */
  #learnMtu(peer: Peer): boolean {
    const path = pathMtu(sys, peer.targetIp(this.#now), peer.targetPort(this.#now));
    if (path <= 0) return false;
    const mtu = Math.min(this.#data.config.mtu, path - TUNNEL_OVERHEAD);
    if (mtu < 68 || mtu === peer.mtu) return false;
    const smaller = mtu < peer.mtu;
    peer.mtu = mtu;
    peer.mtuMs = this.#now;
    return smaller;
  }

  // ——— control frames ———

  #sendFrame(length: number, ip: number, port: number): boolean {
    const view = this.#sendControlView;
    view.setUint16(RECEIVE.name + SOCKADDR_IN.family, 2, true);
    view.setUint16(RECEIVE.name + SOCKADDR_IN.port, port);
    view.setUint32(RECEIVE.name + SOCKADDR_IN.address, ip);
    view.setUint32(RECEIVE.vector + 8, length, true);
    return sys.sendmsg(this.#socket, this.#sendControl.pointer, 0) >= 0;
  }

  // ——— the control plane ———

  #takeMessages(): void {
    for (;;) {
      const message = receiveMessageOnPort(this.#data.port) as { message: ProxyCommand } | undefined;
      if (message === undefined) return;
      this.#take(message.message);
    }
  }

  #take(command: ProxyCommand): void {
    switch (command.kind) {
      case 'stop':
        this.#running = false;
        return;
      case 'probe':
        this.#control.probe(command.token, command.nodeIp, command.ewp, performance.now());
        return;
      case 'probeStatus':
        this.#control.status = command.status.subarray(0, PROBE_STATUS_BYTES);
        return;
      default:
        this.#proxy.apply(command, this.#now);
        if (this.#proxy.answers.count > 0) this.#sendAnswers();
        if (this.#proxy.hold.due > 0) this.#resume();
    }
  }

  #tick(): void {
    const now = this.#now;
    this.#tickedMs = now;
    const proxy = this.#proxy;
    if (this.#flowFile !== undefined) {
      this.#flowFile.seconds = seconds();
      if (now > this.#rememberedUntilMs) {
        this.#rememberedUntilMs = Number.POSITIVE_INFINITY;
        proxy.forgetRemembered();
      }
    }
    proxy.tick(FLOW_SWEEP, now);
    for (const address of proxy.misses.splice(0)) this.report({ kind: 'miss', address });
    if (proxy.choices.length > 0 && now - this.#reportedMs >= CHOICES_MS) {
      this.#reportedMs = now;
      this.report({
        kind: 'chosen',
        choices: proxy.choices.splice(0),
        unlisted: [...proxy.unlisted.values()],
      });
      proxy.unlisted.clear();
    }
    if (now - this.#flowsMs >= FLOWS_MS) {
      this.#flowsMs = now;
      const { services, subnets } = proxy.routes.used(now - FLOWS_MS);
      if (services.length > 0) this.report({ kind: 'flows', services, subnets });
    }
    this.#control.tick(now);
  }
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

/** For the end of something: there is nobody left to whom an error would matter. */
function quietly(work: () => void): void {
  try {
    work();
  } catch {}
}

/** Wall time, for what outlives the process. */
const seconds = (): number => Math.floor(Date.now() / 1000);
/** How long flows of an earlier life wait for their routes. */
const REMEMBER_MS = 60_000;
/** A received datagram begins here: its inner packet is then 4-aligned, with room for a virtio header before it. */
const INBOX_AT = 4;
/** Places in the region of a message: the msghdr, then what it points to. */
const RECEIVE = { name: 64, vector: 80, control: 96, controlSize: 64 } as const;

function setVector(view: DataView, at: number, address: number, length: number): void {
  writeAddress(view, at, address);
  view.setUint32(at + 8, length, true);
  view.setUint32(at + 12, 0, true);
}

const data = workerData as ThreadData;
const report = (report: ProxyReport): void => data.port.postMessage(report);

function work(): string | undefined {
  const devices = openDevices(data.config, (text) => report({ kind: 'notice', text }));
  try {
    const loop = new Loop(data, devices);
    report({ kind: 'ready' });
    try {
      loop.run();
    } finally {
      loop.close();
    }
    return loop.error;
  } finally {
    sys.close(devices.tun.fd);
    sys.close(devices.socket.fd);
  }
}

try {
  const error = work();
  report(error === undefined ? { kind: 'stopped' } : { kind: 'stopped', error });
} catch (error) {
  const text = error instanceof Error ? (error.stack ?? error.message) : String(error);
  report({ kind: 'stopped', error: text });
}
data.port.close();
