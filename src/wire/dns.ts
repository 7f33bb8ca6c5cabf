// What a DNS message shows before it is decoded: whether its counts can be true, and how many labels its questions
// have, which a decoder hides when a label holds a dot (RFC 1035 §4.1). It reads no record.
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
/** 255 octets of a name hold no more (§2.3.4). */
const LABELS_MAX = 127;

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

/** Labels of each question's name in turn, as far as the questions can be read. */
export function questionLabels(message: Uint8Array): readonly number[] {
  const found: number[] = [];
  if (message.length < DNS.size) return found;
  let offset: number = DNS.size;
  for (let left = message[DNS.questions]! * 256 + message[DNS.questions + 1]!; left > 0; left--) {
    let labels = 0;
    let end: number | undefined;
    for (let at = offset; ; ) {
      const length = message[at];
      if (length === undefined) return found;
      if (length >= 0xc0) {
        // §4.1.4: a pointer leads backwards, so that a walk ends.
        const to = (length - 0xc0) * 256 + (message[at + 1] ?? 0);
        end ??= at + 2;
        if (to >= at) return found;
        at = to;
        continue;
      }
      if (length === 0) {
        end ??= at + 1;
        break;
      }
      labels++;
      if (labels > LABELS_MAX) return found;
      at += length + 1;
    }
    found.push(labels);
    offset = end + QUESTION_MIN - 1;
  }
  return found;
}
