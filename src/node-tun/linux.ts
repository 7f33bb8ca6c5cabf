// Numbers and layouts of the Linux user interface that a packet loop needs, for 64-bit little-endian machines
// (x86-64, arm64: the generic ABI). It refuses to call anything: mod.node.ts and mod.deno.ts do.

export const ERRNO = {
  EPERM: 1,
  ENOENT: 2,
  EINTR: 4,
  EIO: 5,
  EBADF: 9,
  EAGAIN: 11,
  ENOMEM: 12,
  EBUSY: 16,
  ENODEV: 19,
  EINVAL: 22,
  EBADFD: 77,
  EMSGSIZE: 90,
  EPROTONOSUPPORT: 93,
  EOPNOTSUPP: 95,
  EADDRINUSE: 98,
  EADDRNOTAVAIL: 99,
  ENETDOWN: 100,
  ENETUNREACH: 101,
  ENOBUFS: 105,
  ECONNREFUSED: 111,
  EHOSTDOWN: 112,
  EHOSTUNREACH: 113,
} as const;

/** Name of an errno for people; takes the negated form that the calls return. */
export function errnoName(result: number): string {
  const number = Math.abs(result);
  return Object.entries(ERRNO).find(([, value]) => value === number)?.[0] ?? `errno ${number}`;
}

// fcntl.h
export const O_RDWR = 2;
export const O_NONBLOCK = 0o4000;
export const O_CLOEXEC = 0o2000000;

// sys/socket.h
export const AF_INET = 2;
export const SOCK_STREAM = 1;
export const SOCK_DGRAM = 2;
export const SOCK_NONBLOCK = O_NONBLOCK;
export const SOCK_CLOEXEC = O_CLOEXEC;
export const SOL_SOCKET = 1;
export const SO_REUSEADDR = 2;
export const SO_SNDBUF = 7;
export const SO_RCVBUF = 8;
export const SO_SNDBUFFORCE = 32;
export const SO_RCVBUFFORCE = 33;
export const MSG_DONTWAIT = 0x40;
export const MSG_TRUNC = 0x20;

// netinet/tcp.h
export const IPPROTO_TCP = 6;
export const TCP_NODELAY = 1;

// netinet/in.h, linux/in.h
export const IPPROTO_IP = 0;
export const IP_MTU_DISCOVER = 10;
export const IP_MTU = 14;
export const IP_PMTUDISC_DO = 2;

// netinet/udp.h: UDP_SEGMENT since 4.18, UDP_GRO since 5.0
export const SOL_UDP = 17;
export const UDP_SEGMENT = 103;
export const UDP_GRO = 104;

// poll.h
export const POLLIN = 1;
export const POLLOUT = 4;
export const POLLERR = 8;
export const POLLHUP = 16;
export const POLLNVAL = 32;

// sys/eventfd.h
export const EFD_NONBLOCK = O_NONBLOCK;
export const EFD_CLOEXEC = O_CLOEXEC;

// linux/if.h and linux/sockios.h; struct ifreq is 40 bytes: 16 of name, then a union
export const IFREQ_SIZE = 40;
export const IFNAMSIZ = 16;
export const IFREQ_UNION = 16;
export const SIOCGIFFLAGS = 0x8913;
export const SIOCSIFFLAGS = 0x8914;
export const SIOCSIFMTU = 0x8922;
export const SIOCSIFTXQLEN = 0x8943;
export const IFF_UP = 1;

// linux/if_tun.h
export const IFF_TUN = 0x0001;
export const IFF_NO_PI = 0x1000;
export const IFF_VNET_HDR = 0x4000;
export const TUNSETIFF = 0x400454ca;
export const TUNSETOFFLOAD = 0x400454d0;
export const TUN_F_CSUM = 0x01;
export const TUN_F_TSO4 = 0x02;
export const TUN_F_TSO6 = 0x04;
/** Since 6.2. */
export const TUN_F_USO4 = 0x20;
export const TUN_F_USO6 = 0x40;

/** struct virtio_net_hdr without the merged-buffer field: what IFF_VNET_HDR puts before every packet. */
export const VNET = {
  flags: 0,
  gsoType: 1,
  hdrLen: 2,
  gsoSize: 4,
  csumStart: 6,
  csumOffset: 8,
  size: 10,
} as const;
export const VNET_F_NEEDS_CSUM = 1;
export const VNET_GSO_NONE = 0;
export const VNET_GSO_TCPV4 = 1;
export const VNET_GSO_UDP_L4 = 5;

// struct iovec { void *base; size_t len; }
export const IOVEC_SIZE = 16;

/** struct msghdr: name, namelen, iov, iovlen, control, controllen, flags. */
export const MSGHDR = {
  name: 0,
  nameLength: 8,
  iov: 16,
  iovLength: 24,
  control: 32,
  controlLength: 40,
  flags: 48,
  size: 56,
} as const;
/** struct mmsghdr: a msghdr and the length that the kernel reports, padded to 8. */
export const MMSGHDR_SIZE = 64;
export const MMSGHDR_LENGTH = 56;

/** struct cmsghdr: length (of header and data), level, type; data follows, padded to 8. */
export const CMSG = { length: 0, level: 8, type: 12, data: 16 } as const;
/** Room for one control message with four bytes of data. */
export const CMSG_SPACE_4 = 24;

/** struct sockaddr_in: family, port and address in network order, padding. */
export const SOCKADDR_IN = { family: 0, port: 2, address: 4, size: 16 } as const;

/** struct pollfd: fd, events, revents. */
export const POLLFD = { fd: 0, events: 4, revents: 6, size: 8 } as const;
