// Opens a TUN device and sets its MTU, queue and state; opens the tunnel's UDP socket. It gives no address and makes
// no route: the host plan does.
import { release } from 'node:os';
import {
  AF_INET,
  ERRNO,
  errnoName,
  IFF_NO_PI,
  IFF_TUN,
  IFF_UP,
  IFF_VNET_HDR,
  IFNAMSIZ,
  IFREQ_SIZE,
  IFREQ_UNION,
  IP_MTU,
  IP_MTU_DISCOVER,
  IP_PMTUDISC_DO,
  IPPROTO_IP,
  O_CLOEXEC,
  O_NONBLOCK,
  O_RDWR,
  SIOCGIFFLAGS,
  SIOCSIFFLAGS,
  SIOCSIFMTU,
  SIOCSIFTXQLEN,
  SO_RCVBUF,
  SO_RCVBUFFORCE,
  SO_SNDBUF,
  SO_SNDBUFFORCE,
  SOCK_CLOEXEC,
  SOCK_DGRAM,
  SOCK_NONBLOCK,
  SOCKADDR_IN,
  SOL_SOCKET,
  SOL_UDP,
  TUN_F_CSUM,
  TUN_F_TSO4,
  TUN_F_TSO6,
  TUN_F_USO4,
  TUN_F_USO6,
  TUNSETIFF,
  TUNSETOFFLOAD,
  UDP_GRO,
  UDP_SEGMENT,
} from './linux.ts';
import type { System } from './types.ts';

export interface TunOptions {
  readonly name: string;
  /** Bytes. */
  readonly mtu: number;
  /** Packets that wait in the kernel for us. */
  readonly queue: number;
  /** Offloads that are not asked for. */
  readonly without?: readonly string[] | undefined;
}

export interface Tun {
  readonly fd: number;
  /** Every read and write carries a virtio header of VNET.size bytes: always true. */
  readonly name: string;
  /** What the kernel granted, and what it refused in words. */
  readonly checksum: boolean;
  readonly tso: boolean;
  readonly uso: boolean;
  readonly refused: readonly string[];
}

/** Which step failed and with what; `errno` is positive, `code` its name. */
export class TunError extends Error {
  override readonly name = 'TunError';
  readonly errno: number;
  readonly code: string;
  constructor(what: string, result: number) {
    super(`${what}: ${errnoName(result)}`);
    this.errno = Math.abs(result);
    this.code = errnoName(result);
  }
}

/** What a call returned; throws TunError for an errno. */
export function check(what: string, result: number): number {
  if (result < 0) throw new TunError(what, result);
  return result;
}

/** Creates the device (it vanishes when the fd closes), with IFF_VNET_HDR, sets MTU and queue, and brings it up. */
export function openTun(sys: System, options: TunOptions): Tun {
  const { name, mtu } = options;
  if (!/^[^\s/]{1,15}$/.test(name))
    throw new TunError(`TUN name "${name}" must have 1…15 characters`, ERRNO.EINVAL);
  const scratch = sys.allocate(128);
  const view = new DataView(scratch.bytes.buffer);
  scratch.bytes.set(new TextEncoder().encode('/dev/net/tun\0'));
  const fd = check('open /dev/net/tun', sys.open(scratch.pointer, O_RDWR | O_NONBLOCK | O_CLOEXEC, 0));
  let control = -1;
  try {
    const request = (): void => {
      scratch.bytes.fill(0, 0, IFREQ_SIZE);
      scratch.bytes.set(new TextEncoder().encode(name).subarray(0, IFNAMSIZ - 1));
    };
    request();
    view.setUint16(IFREQ_UNION, IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, true);
    check(`create TUN device ${name}`, sys.ioctl(fd, TUNSETIFF, scratch.pointer));
    const refused: string[] = [];
    // From most to least: a kernel refuses a set as a whole.
    const grant = (what: string, name: string, flags: number): boolean => {
      if (options.without?.includes(name)) return false;
      if (sys.ioctlValue(fd, TUNSETOFFLOAD, flags) >= 0) return true;
      refused.push(what);
      return false;
    };
    const base = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
    const wanted = !options.without?.includes('tso');
    const uso =
      wanted && grant('USO (UDP segmentation on the TUN, Linux 6.2)', 'uso', base | TUN_F_USO4 | TUN_F_USO6);
    const tso = uso || grant('TSO (TCP segmentation on the TUN)', 'tso', base);
    const checksum = tso || grant('checksum offload on the TUN', 'checksum', TUN_F_CSUM);
    control = check('open a control socket', sys.socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    request();
    view.setInt32(IFREQ_UNION, mtu, true);
    check(`set the MTU of ${name} to ${mtu}`, sys.ioctl(control, SIOCSIFMTU, scratch.pointer));
    request();
    view.setInt32(IFREQ_UNION, options.queue, true);
    check(`set the queue of ${name} to ${options.queue}`, sys.ioctl(control, SIOCSIFTXQLEN, scratch.pointer));
    request();
    check(`read the flags of ${name}`, sys.ioctl(control, SIOCGIFFLAGS, scratch.pointer));
    view.setUint16(IFREQ_UNION, view.getUint16(IFREQ_UNION, true) | IFF_UP, true);
    check(`bring ${name} up`, sys.ioctl(control, SIOCSIFFLAGS, scratch.pointer));
    return { fd, name, checksum, tso, uso, refused };
  } catch (error) {
    sys.close(fd);
    throw error;
  } finally {
    if (control >= 0) sys.close(control);
  }
}

export interface TunnelSocketOptions {
  /** Address to bind to, 0 for any. */
  readonly address: number;
  readonly port: number;
  /** Bytes asked for in each direction. */
  readonly buffer: number;
  /** Release of the kernel; the running one's when it is left out. */
  readonly kernel?: string;
  /** Offloads that are not asked for. */
  readonly without?: readonly string[] | undefined;
}

export interface TunnelSocket {
  readonly fd: number;
  readonly gso: boolean;
  readonly gro: boolean;
  readonly refused: readonly string[];
}

const GRO_REFUSED = 'UDP_GRO (joined receive, sound since Linux 5.12)';

/** True when a release such as "6.1.0-13-amd64" is that version or a later one. */
export function kernelAtLeast(release: string, major: number, minor: number): boolean {
  const [a = 0, b = 0] = release.split('.').map((part) => Number.parseInt(part, 10));
  return a > major || (a === major && b >= minor);
}

/** A bound, non-blocking UDP socket with big buffers, UDP_GRO where there is, and DF on what it sends. */
export function openTunnelSocket(sys: System, options: TunnelSocketOptions): TunnelSocket {
  const scratch = sys.allocate(128);
  const view = new DataView(scratch.bytes.buffer);
  const fd = check('open a UDP socket', sys.socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  try {
    const set = (level: number, option: number, value: number): number => {
      view.setInt32(0, value, true);
      return sys.setsockopt(fd, level, option, scratch.pointer, 4);
    };
    const refused: string[] = [];
    // The FORCE forms pass net.core.{r,w}mem_max; they need CAP_NET_ADMIN.
    if (set(SOL_SOCKET, SO_SNDBUFFORCE, options.buffer) < 0) set(SOL_SOCKET, SO_SNDBUF, options.buffer);
    if (set(SOL_SOCKET, SO_RCVBUFFORCE, options.buffer) < 0) {
      set(SOL_SOCKET, SO_RCVBUF, options.buffer);
      refused.push(`a socket buffer of ${options.buffer} bytes`);
    }
    check('set DF on the tunnel socket', set(IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO));
    const offer = (what: string, name: string, option: number, value: number): boolean => {
      if (options.without?.includes(name)) return false;
      if (set(SOL_UDP, option, value) >= 0) return true;
      refused.push(what);
      return false;
    };
    const known = kernelAtLeast(options.kernel ?? release(), 5, 12);
    if (!known) refused.push(GRO_REFUSED);
    const gro = known && offer(GRO_REFUSED, 'gro', UDP_GRO, 1);
    // Setting it to 0 changes nothing and fails where the kernel knows no UDP_SEGMENT.
    const gso = offer('UDP_SEGMENT (joined send, Linux 4.18)', 'gso', UDP_SEGMENT, 0);
    writeSockaddr(view, 0, options.address, options.port);
    check(
      `bind UDP port ${options.port} of ${dotted(options.address)}`,
      sys.bind(fd, scratch.pointer, SOCKADDR_IN.size),
    );
    return { fd, gso, gro, refused };
  } catch (error) {
    sys.close(fd);
    throw error;
  }
}

/** Writes a sockaddr_in; 16 bytes. */
export function writeSockaddr(view: DataView, offset: number, address: number, port: number): void {
  view.setUint16(offset + SOCKADDR_IN.family, AF_INET, true);
  view.setUint16(offset + SOCKADDR_IN.port, port);
  view.setUint32(offset + SOCKADDR_IN.address, address);
  view.setUint32(offset + 8, 0);
  view.setUint32(offset + 12, 0);
}

/** Writes what points to memory, 8 bytes, such as a msghdr's fields. */
export function writeAddress(view: DataView, offset: number, address: number): void {
  view.setUint32(offset, address % 2 ** 32, true);
  view.setUint32(offset + 4, Math.floor(address / 2 ** 32), true);
}

/** Path MTU that the kernel holds for a destination, bytes, or the negated errno. Not for every packet. */
export function pathMtu(sys: System, address: number, port: number): number {
  const scratch = sys.allocate(128);
  const view = new DataView(scratch.bytes.buffer);
  const fd = sys.socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return fd;
  writeSockaddr(view, 0, address, port);
  let result = sys.connect(fd, scratch.pointer, SOCKADDR_IN.size);
  if (result >= 0) {
    view.setInt32(32, 4, true);
    result = sys.getsockopt(fd, IPPROTO_IP, IP_MTU, sys.pointerAt(scratch, 16), sys.pointerAt(scratch, 32));
    if (result >= 0) result = view.getInt32(16, true);
  }
  sys.close(fd);
  return result;
}

function dotted(address: number): string {
  return [24, 16, 8, 0].map((shift) => (address >>> shift) & 255).join('.');
}
