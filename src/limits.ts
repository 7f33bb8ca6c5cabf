// Every bound of the system, each with the sum that justifies it. Relations between them are asserted at load.
import { assert } from './assert.ts';

/** Wire overhead of one tunnelled packet: outer IPv4 20 + UDP 8 + VXLAN-GPE 8 (design §6). */
export const TUNNEL_OVERHEAD = 36;
/** Default east-west port: VXLAN-GPE (IANA). */
export const EWP_DEFAULT = 4790;
/** Default port of the agent's REST API, loopback only. */
export const API_PORT_DEFAULT = 10_100;
/** Default VXLAN network identifier: "EW" in ASCII. */
export const VNI_DEFAULT = 0x4557;
/** Overlay MTU for a 1,500-byte underlay. */
export const MTU_DEFAULT = 1500 - TUNNEL_OVERHEAD;
/** Smallest MTU that IPv4 lets a link have (RFC 791 §3.2 "every internet module must be able to forward 68 octets"), and what we accept: 576 plus nothing. */
export const MTU_MIN = 576;
export const MTU_MAX = 65_535 - TUNNEL_OVERHEAD;

/** Presence: losing it stops new flows. Renewed at a third. */
export const PRESENCE_TTL_S = 15;
/** Tenure: losing it frees addresses. A day outlives any outage that an operator sleeps through. */
export const TENURE_TTL_S = 86_400;
/** A node looks this often whether its subnet is still its own: one read a minute. */
export const CLAIM_CHECK_MS = 60_000;
/** Tries of one claim before it reports what stood in the way. */
export const CLAIM_TRIES_MAX = 16;
/** A freed address rests this long, so that no peer still holds a flow to its last owner (TCP idle flows: 2 h tuned down to ours). */
export const QUARANTINE_S = 300;
/** A lease of resting keys lives longer than they must rest by this part of it, so that what is given back within half
 *  of that (30 s) shares one: at most 12 such leases of one process live at a time, however much it gives back. */
export const REST_EXTRA = 0.2;
/** At least so long: one request takes up to REQUEST_TIMEOUT_MS. */
export const REST_EXTRA_MIN_S = 4;
/** Keys on one such lease: etcd deletes all of them in one transaction when it ends. */
export const REST_KEYS_MAX = 1_000;

/** One request to etcd; a loopback put takes 1 ms, a hung member must not hold a deploy for longer than a person waits. */
export const REQUEST_TIMEOUT_MS = 2_000;
/** A watch that etcd has not confirmed within this time is made anew. */
export const WATCH_CREATE_MS = 5_000;
/** Pause before listing again after a cut, spread so that a fleet does not list as one; each listing in vain doubles it
 *  up to the cap, which leaves most of the 10 s after a heal to the listings themselves. */
export const RESYNC_PAUSE_MIN_MS = 100;
export const RESYNC_PAUSE_MAX_MS = 300;
export const RESYNC_PAUSE_CAP_MS = 3_000;
/** Listings of one agent under way: 100 paths take 13 rounds of a millisecond, and 1,000 agents ask 8,000 questions at a
 *  time instead of 100,000. */
export const LISTINGS_MAX = 8;
/** Entries per page of a listing: 1,000 records of at most a few kB stay far below gRPC's message limit. */
export const RANGE_PAGE = 1_000;
/** Comparing what is held with what etcd holds, by count and newest revision. */
export const AUDIT_INTERVAL_MS = 600_000;
/** gRPC keep-alive on the connections to etcd. etcd punishes pings more often than every 5 s; a busy machine may bring
 *  two of them closer together, hence one more second. */
export const PING_INTERVAL_MS = 6_000;
export const PING_TIMEOUT_MS = 2_000;
/** Renewal at a third of the TTL, ±20 % so that a fleet started at once does not renew at once. */
export const RENEW_FRACTION = 1 / 3;
export const RENEW_JITTER = 0.2;
/** … but at least this often: a tenure of a day, renewed every 8 h, would have 16 h left when an outage begins. */
export const RENEW_MAX_MS = 600_000;
/** A role's lease: a standby acts this long after its holder died. Short, because roles only do chores. */
export const ROLE_TTL_S = 5;
/** Changes are gathered this long before a role decides, so that a burst costs one pass. */
export const RECONCILE_PAUSE_MS = 50;
/** A role looks at everything again this often, whatever the watch said. */
export const RECONCILE_INTERVAL_MS = 30_000;
/** What a role failed at is tried again after so long; each failure doubles it up to RECONCILE_INTERVAL_MS. */
export const RECONCILE_RETRY_MS = 1_000;
/** Root looks this often for keys that belong to nobody's subtree: a listing of all keys, without values. */
export const FOREIGN_INTERVAL_MS = 600_000;
/** Actions of one pass: at 1 ms each a pass stays below the pause that a deploy would notice. */
export const RECONCILE_ACTIONS_MAX = 256;
/** Node subnets of the widest plan: 10.0.0.0/8 in /26. Finding a free one near full sorts their keys, 60 octets each:
 *  15 MB. */
export const SUBNETS_MAX = 2 ** 18;
/** Greatest delay of a timer (HTML §8.6, 2^31 − 1 ms, 24.8 days): a greater one fires at once. Whoever waits longer is
 *  woken early and waits again. */
export const TIMER_MS_MAX = 2 ** 31 - 1;
/** A block holds 2^6 = 64 node subnets: 240 blocks in the default plan. */
export const BLOCK_SUBNET_BITS = 6;
/** A cluster with fewer free subnets than this in its blocks is granted another: a quarter of a block. */
export const BLOCK_LOW_SUBNETS = 16;

/** An interest that nothing used for so long ends; a name is asked for again within its DNS TTL as long as it is used. */
export const INTEREST_IDLE_MS = 1_800_000;
/** An interest in a service that does not exist is kept this long: the negative answers' cache, refreshed by the watch. */
export const INTEREST_NEGATIVE_MS = 10_000;
/** Services that one agent follows: beyond it the least recently used that nothing here declares makes room. */
export const INTERESTS_MAX = 4_096;
/** Services and addresses that one asker may make an agent follow or look up anew: each costs etcd two listings and
 *  two watches. An instance that starts asks for its needs at once; made-up names at this pace, kept for
 *  INTEREST_NEGATIVE_MS, are 160 of INTERESTS_MAX. */
export const INTEREST_ASKER_BURST = 128;
export const INTEREST_ASKER_PER_S = 16;
/** Askers whose use of it is remembered: the instances of a node and the host, four times. */
export const INTEREST_ASKERS_MAX = 256;
/** Questions that may bring nodes under watch before the first flow (EXPECTED_MS of balance.ts), of one asker and of
 *  all: at once, and again over that time. At most 64 services are then watched for their names alone. */
export const EXPECTED_ASKER_BURST = 8;
export const EXPECTED_BURST = 32;
/** Addresses whose owner was looked up in vain, remembered for INTEREST_NEGATIVE_MS. */
export const UNOWNED_ADDRESSES_MAX = 1_024;

/** A restart does not wait longer for etcd before it goes on with what the last run held. */
export const AWAY_AFTER_MS = 1_500;
/** Between two snapshots of the routes on disk. */
export const SNAPSHOT_INTERVAL_MS = 2_000;

/** Candidates of a claim that are tried blindly before the list of what is taken is read. */
export const CLAIM_PROBES = 12;

/** Flows that one agent tracks: 57 bytes of columns, 80 of indexes and 24 of the file's image each, 11 MB at the very
 *  most. */
export const FLOWS_MAX = 65_536;
/** Idle times of flows without a state of their own: first packet one-sided, then both ways (design §6, as in conntrack). */
export const UDP_ONEWAY_IDLE_MS = 30_000;
export const UDP_IDLE_MS = 180_000;

/** Status in a probe's answer: version and flags 4, subnet 4, load 4, live bits 8, coordinate 11 × 4 (src/wire/probe.ts). */
export const PROBE_STATUS_BYTES = 64;
/** What is taken of it from a newer version, which may append: four times as much, still one small packet. */
export const PROBE_STATUS_BYTES_MAX = 256;
/** Choices of one report of the packet loop. */
export const CHOICES_PER_REPORT_MAX = 64;
/** TCP flows: a lost SYN is repeated for about 130 s (tcp_syn_retries = 6); established as long as an idle connection
 *  may be kept (twice the usual 2 h keep-alive, and then a day); closing 2 MSL of 60 s; after a RST only stragglers. */
export const TCP_OPENING_IDLE_MS = 130_000;
export const TCP_IDLE_MS = 86_400_000;
export const TCP_HALF_CLOSED_IDLE_MS = 3_600_000;
export const TCP_CLOSED_IDLE_MS = 120_000;
export const TCP_RESET_IDLE_MS = 10_000;
export const ICMP_IDLE_MS = 30_000;
/** Ended flows whose late answers are dropped, and for how long: no packet lives longer on any path of ours. */
export const STRAGGLERS_MAX = 4_096;
export const STRAGGLER_MS = 10_000;
/** A flow's place in the eviction order is renewed at most this often: recency to half a second is enough. */
export const FLOW_TOUCH_MS = 500;
/** A flow that goes on being used is written anew when its time in the file is that old: an active UDP flow must not
 *  look idle (180 s) after a restart. */
export const FLOW_AGE_S = 30;
/** How old the file of flows may be while the loop runs: what a killed agent forgets. 170 flows are one
 *  write of 4 KiB, so a full table, changed everywhere, is 386 of them. */
export const FLOW_WRITE_MS = 10;
/** Flows looked at for expiry per tick of 250 ms; 65,536 are seen within 4 s. */
export const FLOW_SWEEP = 4_096;
/** V8's young generation in the packet loop's thread, MB: three spaces of a third each, also where nobody has bounded the
 *  process's heap (coordinator/io/heap.ts; Deno without flags). Left alone it doubles as long as something lives through
 *  it: 10 minutes of new connections made 150 MB of resident set 290, when flows were objects. */
export const LOOP_YOUNG_MB = 12;
/** How often the packet loop says which services and nodes its flows lead to: every flow is seen twice meanwhile, a node
 *  is watched for three times as long (edge/probe.ts), and no interest ends within a minute (`--interest-idle`). */
export const FLOWS_MS = 10_000;

/** How long a peer's address seen in an authentic packet stands; three keep-alives. */
export const PEER_LEARNED_MS = 75_000;
/** Keep-alive towards peers that routes name: below the 30 s after which common NATs forget a UDP mapping. */
export const PEER_KEEPALIVE_MS = 20_000;
/** Pause after the first greeting that stays unanswered; it doubles up to the keep-alive. */
export const PEER_HELLO_FIRST_MS = 500;
/** Greetings to an endpoint that speaks for a node without having proved it, per node: a NAT that changed its mapping is
 *  found again within a round trip, and a flood of forged packets draws four greetings a second. */
export const PEER_CHALLENGE_MS = 250;
/** A node that no route names any more is kept this long, with where it was seen: its only instance may be restarting
 *  behind a NAT. An address rests as long before it can be another's (QUARANTINE_S). */
export const PEER_KEPT_MS = QUARANTINE_S * 1000;
/** Nodes that no route names, at most: a few hundred bytes each. */
export const PEERS_SPARE_MAX = 1_024;
/** Nodes behind NATs that one node asks to greet it, and nodes that one behind a NAT greets because they ask: as many as
 *  are kept without a route, and 51 greetings a second. */
export const CALLS_MAX = 1_024;
/** Answers to one node's greetings and probes. The fastest prober asks 9 times a second (its first explores 5, a suspect
 *  watched 3.7) and greets 6 times (first greeting, 4 challenges); twice that. All that it sent in the 8 s in which nobody
 *  read the socket is answered as well. More is no prober of ours, or somebody who repeats what one said. */
export const PEER_ANSWERS_PER_S = 32;
export const PEER_ANSWERS_BURST = 128;
/** To all nodes together that are not among the peers: each of the 15,360 of the default plan asks once a second. */
export const STRANGER_ANSWERS_PER_S = 16_384;
/** How long a learned path MTU stands (RFC 1191 §6.3: 10 minutes). */
export const PATH_MTU_MS = 600_000;

/** Datagrams of first fragments remembered, fragments that wait for their first, and how long (Linux ipfrag_time). */
export const FRAGMENT_TRACKS_MAX = 1_024;
export const FRAGMENTS_HELD_MAX = 128;
export const FRAGMENT_MS = 30_000;
/** Packets that wait for a route, and how long: the keyspace answers in milliseconds or not at all. */
export const PACKETS_HELD_MAX = 256;
export const PACKET_HELD_MS = 1_000;
/** Room for one of them, or the MTU where that is more. */
export const PACKET_HELD_BYTES = 2_048;
/** One report per unknown address and second, for at most so many addresses at a time. */
export const MISS_REPORT_MS = 1_000;
export const MISSES_MAX = 1_024;
/** Reports of unknown addresses per tick of 250 ms, each a read of the keyspace; half of them are kept for packets from
 *  the bridge, because anybody on the underlay can make the others. */
export const MISSES_PER_TICK_MAX = 64;
/** ICMP errors of ours per second and instance (RFC 1812 §4.3.2.8 asks for a limit; Linux sends 1,000/s in all). */
export const ICMP_PER_SECOND = 100;

/** Socket buffers: 7 MiB is one bandwidth-delay product of 10 Gbit/s at 5 ms. */
export const SOCKET_BUFFER_BYTES = 7 * 1024 * 1024;
/** Packets that may wait in the TUN device: at 500 (the kernel's own) a burst of small packets is lost. */
export const TUN_QUEUE = 5_000;
/** Segments in one UDP_SEGMENT send (UDP_MAX_SEGMENTS of Linux 4.18), and its bytes: 65,535 − IPv4 − UDP. */
export const SEGMENTS_MAX = 64;
export const SEND_BYTES_MAX = 65_507;
/** Segments of one super-packet that fit in one send, each with its 8 octets of tunnel header. */
export function sendSegments(mtu: number): number {
  return Math.min(SEGMENTS_MAX, Math.floor(SEND_BYTES_MAX / (mtu + 8)));
}
/** How long the packet loop waits awake for the next packet when the last one came as soon, microseconds: about what
 *  a core needs to wake from idle in a virtual machine. It yields meanwhile; without that, on two cores, 50 µs made a
 *  round trip of 90 µs one of 200 µs, and with it one of 42 µs. */
export const SPIN_US_DEFAULT = 50;
/** A turn of more packets than this is a stream, which gains by gathering, not by haste. */
export const SPIN_PACKETS = 4;

/** TTL of our answers, seconds (RFC 6762 §10: 120 s for records tied to an address). */
export const DNS_TTL_S = 120;
/** A classic DNS message without EDNS0 (RFC 1035 §4.2.1). */
export const DNS_UDP_PLAIN_MAX = 512;

/** InstanceIPs live as long as their instance: a short TTL, so that a gone one is forgotten soon. */
export const DNS_INSTANCE_TTL_S = 10;
/** "There is none" is not cached: the resolver answers from memory, and a new service must be seen at once (RFC 2308 §5). */
export const DNS_NEGATIVE_TTL_S = 0;
/** Largest UDP answer, whatever a client offers: fits one IPv6 minimum-MTU packet (DNS flag day 2020: 1,280 − 40 − 8). */
export const DNS_UDP_EDNS_MAX = 1232;
/** Largest question taken from a UDP socket: a name has 255 octets, and with padding to blocks of 128 (RFC 8467 §4.1)
 *  real ones stay far below. */
export const DNS_UDP_QUESTION_MAX = 1_024;
/** Largest answer taken from an upstream server: DNS_UDP_EDNS_MAX is asked for, the rest is for servers that do not
 *  listen. */
export const DNS_UDP_MESSAGE_MAX = 4_096;
/** How long an unknown name waits for the keyspace to say whether it exists; stub resolvers give up after 5 s. */
export const DNS_LOOKUP_WAIT_MS = 1_000;
/** Questions, of all askers, that wait so at once; beyond it SERVFAIL comes at once. */
export const DNS_LOOKUPS_WAITING_MAX = 1_024;
/** The same for multicast questions, whose whole message waits; beyond it they get silence. */
export const MDNS_LOOKUPS_WAITING_MAX = 256;
/** Encoded answers kept for repeated questions: 4,096 × about 300 bytes of key and answer = 1.2 MB. */
export const DNS_FAST_ENTRIES_MAX = 4_096;
/** A query whose bytes exceed this is never remembered: 12 + 255 + 4 + an OPT with a cookie is 322. */
export const DNS_FAST_QUERY_MAX = 384;
/** Upstream questions in flight; each holds a socket. Beyond it the asker gets SERVFAIL at once. */
export const DNS_UPSTREAM_PENDING_MAX = 256;
/** Of one asker: a quarter. */
export const DNS_UPSTREAM_SOURCE_PENDING_MAX = 64;
/** Time for each try, one server after the other; the sum stays below the 5 s of a stub resolver (resolv.conf(5)). */
export const DNS_UPSTREAM_TRIES_MS = [700, 1_000, 1_300, 1_500] as const;
/** A server that failed is asked last for so long. */
export const DNS_UPSTREAM_REST_MS = 10_000;
/** Upstream answers remembered: at most so many, and so many bytes. */
export const DNS_CACHE_ENTRIES_MAX = 4_096;
export const DNS_CACHE_BYTES_MAX = 4 * 1024 * 1024;
/** Nobody's records are kept longer (RFC 8767 §4 allows a cap), and "there is none" less long. */
export const DNS_CACHE_TTL_MAX_S = 3_600;
export const DNS_CACHE_NEGATIVE_MAX_S = 60;
/** TCP clients at once: 61 instances and the host, twice. */
export const DNS_TCP_CLIENTS_MAX = 128;
/** Of one source: no single instance can take all of them. */
export const DNS_TCP_SOURCE_CLIENTS_MAX = 32;
/** A TCP client that says nothing for so long is closed (RFC 7766 §6.2.3: "a few seconds"). */
export const DNS_TCP_IDLE_MS = 10_000;
/** Questions of one TCP client that may wait for an answer (RFC 7766 §6.2.1.1 pipelining). */
export const DNS_TCP_PIPELINE_MAX = 64;
/** Answers, in octets, that one TCP client may leave unread before it is not listened to; 128 of them make 8 MiB. */
export const DNS_TCP_UNREAD_MAX = 64 * 1024;

/** How often the host's resolv.conf is looked at while ours stands there. */
export const HOST_RESOLVER_CHECK_MS = 5_000;

/** Largest multicast message, with its IP and UDP headers (RFC 6762 §17). */
export const MDNS_MESSAGE_MAX = 9_000;
/** Questions of one multicast message that are looked at; real ones carry one to a few. */
export const MDNS_QUESTIONS_MAX = 32;
/** Names whose last multicast is remembered, for rate limits and goodbyes: 1,000 services × 3 policies, four times. */
export const MDNS_NAMES_MAX = 12_000;
/** Answers held back at once (known answers still to come, or sent a moment ago). */
export const MDNS_PENDING_MAX = 1_024;
/** Room for records in one multicast message: an Ethernet frame without IP, UDP and DNS headers (RFC 6762 §17). */
export const MDNS_RECORDS_BYTES_MAX = 1_400;
/** IPv4, UDP and DNS headers in front of them: 20 + 8 + 12. */
export const MDNS_HEADERS_BYTES = 40;
/** Askers that are told apart: by what they know of one answer, and by how much they ask. */
export const MDNS_ASKERS_MAX = 64;
/** Announcements leave at most so many messages at a time, and pause between. */
export const MDNS_BURST_MAX = 20;
export const MDNS_BURST_PAUSE_MS = 100;
/** Unicast replies per second to all askers together: far above need, far below use as an amplifier. */
export const MDNS_UNICAST_PER_S_MAX = 1_000;
/** To one of them: ten leave nothing to others. */
export const MDNS_SOURCE_UNICAST_PER_S_MAX = 100;

/** REST bodies: a descriptor with 1,000 `needs` of 253 octets is about 256 KiB. */
export const BODY_BYTES_MAX = 256 * 1024;
/** Changes that wait for one slow reader of `/api/v1/watch`: a whole platform's worth of instances on one node, 61, many times over. */
export const WATCH_QUEUE_MAX = 4_096;
/** How long deploy waits for its own write to come back through the watch. */
export const READ_YOUR_WRITES_MS = 5_000;

assert(
  PRESENCE_TTL_S * 1000 * RENEW_FRACTION * (1 + RENEW_JITTER) + REQUEST_TIMEOUT_MS < PRESENCE_TTL_S * 1000,
  'a renewal that fails leaves time for another before the lease ends',
);
/** One program of the host (`ip`, `nft`, `iptables -w`): they take milliseconds; 20 s outlives a held xtables lock. */
export const COMMAND_LIMIT_MS = 20_000;
/** After a program's end, until its output must have been read: a pipe holds 64 KiB, which takes a millisecond. */
export const COMMAND_DRAIN_MS = 200;
/** Output kept of one program or one engine answer: `ip -j route` of 15,360 peers is about 2 MiB. */
export const COMMAND_OUTPUT_MAX = 8 * 1024 * 1024;
/** How long a call waits for another process that works on the same state: the longest, a whole node with dozens of
 *  instances brought back, takes seconds. */
export const LOCK_WAIT_S = 60;
/** One answer of the container engine. */
export const ENGINE_LIMIT_MS = 10_000;
/** Pause before ports that could not be published are tried again. */
export const EXPOSE_RETRY_MS = 1_000;
/** Pause before a port that somebody else on the host has is asked for again: looking takes four programs. */
export const PORT_REFUSED_RETRY_MS = 5_000;
/** Outside DNS: an address lives as long as the presence that stands behind it may be wrong about it (RFC 1912 §2.2
 *  allows short ones for names that move). */
export const OUTSIDE_TTL_S = 10;
export const OUTSIDE_NEGATIVE_TTL_S = 5;
/** Addresses of one outside name: eight answers with names of 40 octets fit into 512. */
export const OUTSIDE_ADDRESSES_MAX = 8;
/** Node ports of one service: each costs up to two of a transaction's 128 compares, its addresses' seven beside them. */
export const PORT_MAPPINGS_MAX = 32;
/** Greatest TCP and UDP port: 16 bits (RFC 9293 §3.1, RFC 768). */
export const PORT_MAX = 65_535;
/** Linux IFNAMSIZ 16 with its terminating zero. */
export const INTERFACE_NAME_MAX = 15;

assert(PRESENCE_TTL_S * 4 < TENURE_TTL_S, 'presence ends long before tenure');
assert(MTU_DEFAULT + TUNNEL_OVERHEAD === 1500, 'a full overlay packet fills one Ethernet frame');
assert(PEER_KEEPALIVE_MS * 3 < PEER_LEARNED_MS, 'a learned address survives two lost keep-alives');
assert(UDP_ONEWAY_IDLE_MS < UDP_IDLE_MS, 'a flow seen one way expires first');
assert(
  DNS_UPSTREAM_TRIES_MS.reduce((sum, ms) => sum + ms, 0) < 5_000,
  'all upstream tries end before a stub resolver gives up',
);
assert(DNS_TCP_SOURCE_CLIENTS_MAX < DNS_TCP_CLIENTS_MAX, 'one source leaves TCP clients to others');
assert(DNS_LOOKUP_WAIT_MS < 5_000, 'an unknown name is decided before a stub resolver gives up');
