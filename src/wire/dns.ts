// What can be known of a DNS message from its header alone (RFC 1035 §4.1.1). It reads no names and no records.
//
//    0      2      4        6        8        10       12
//   ├── id ─┼flags─┼qdcount─┼ancount─┼nscount─┼arcount─┤
export const DNS = {
  id: 0,
  flags: 2,
  questions: 4,
  answers: 6,
  authorities: 8,
  additionals: 10,
  size: 12,
} as const;

/** A question is at least the root (1), type and class; a record has TTL and length besides (RFC 1035 §4.1.2, .3). */
const QUESTION_MIN = 5;
const RECORD_MIN = 11;

/**
 * True when a message is long enough for what its counts promise. To be asked before a decoder that makes room by the
 * counts: 12 octets can promise 262,140 records.
 */
export function countsFit(message: Uint8Array): boolean {
  if (message.length < DNS.size) return false;
  const count = (at: number): number => message[at]! * 256 + message[at + 1]!;
  const records = count(DNS.answers) + count(DNS.authorities) + count(DNS.additionals);
  return DNS.size + QUESTION_MIN * count(DNS.questions) + RECORD_MIN * records <= message.length;
}
