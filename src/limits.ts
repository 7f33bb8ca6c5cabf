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
/** Tries of one claim before it reports what stood in the way. */
export const CLAIM_TRIES_MAX = 16;
/** A freed address rests this long, so that no peer still holds a flow to its last owner (TCP idle flows: 2 h tuned down to ours). */
export const QUARANTINE_S = 300;

/** Flows that one agent tracks; 65,536 × about 200 bytes = 13 MB at the very most. */
export const FLOWS_MAX = 65_536;
/** Idle times of flows without a state of their own: first packet one-sided, then both ways (design §6, as in conntrack). */
export const UDP_ONEWAY_IDLE_MS = 30_000;
export const UDP_IDLE_MS = 180_000;

/** Status in a probe's answer: version and flags 4, subnet 4, load 4, live bits 8, coordinate 11 × 4 (src/wire/probe.ts). */
export const PROBE_STATUS_BYTES = 64;
/** Choices of one report of the packet loop. */
export const CHOICES_PER_REPORT_MAX = 64;

/** TTL of our answers, seconds (RFC 6762 §10: 120 s for records tied to an address). */
export const DNS_TTL_S = 120;
/** A classic DNS message without EDNS0 (RFC 1035 §4.2.1). */
export const DNS_UDP_PLAIN_MAX = 512;

/** REST bodies: a descriptor with 1,000 `needs` of 253 octets is about 256 KiB. */
export const BODY_BYTES_MAX = 256 * 1024;
/** How long deploy waits for its own write to come back through the watch. */
export const READ_YOUR_WRITES_MS = 5_000;

assert(PRESENCE_TTL_S * 4 < TENURE_TTL_S, 'presence ends long before tenure');
assert(MTU_DEFAULT + TUNNEL_OVERHEAD === 1500, 'a full overlay packet fills one Ethernet frame');
assert(UDP_ONEWAY_IDLE_MS < UDP_IDLE_MS, 'a flow seen one way expires first');
