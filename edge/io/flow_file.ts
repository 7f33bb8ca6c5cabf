// The flow table on disk, for an agent that was killed: one fixed record per slot, kept in memory and written by block
// when `write` is called, never by a packet. It is a hint, not a promise: whatever cannot be read is left out, and what
// cannot be written ends it.
//
//   |"EWFL"| version | 0 | 0 | 0 |            8 octets, then per slot 24:
//   | state+1 | protocol | wire port | port | remote port | local | dialled | instance | seconds since 1970 |
import { closeSync, fstatSync, ftruncateSync, openSync, readSync, writeSync } from 'node:fs';
import { FLOW_AGE_S } from '../../src/limits.ts';
import {
  FLOW_STATE,
  type FlowRecord,
  type FlowState,
  type FlowTable,
  type FlowWatcher,
} from '../proxy/flows.ts';

const HEADER = 8;
const RECORD = 24;
const SECONDS = 20;
const MAGIC = 0x4557464c;
const VERSION = 1;
/** Records of one write: what fits a page. A record never lies in two, so a killed agent leaves it old or new. */
const BLOCK_RECORDS = 170;
const BLOCK = BLOCK_RECORDS * RECORD;

export class FlowFile implements FlowWatcher {
  readonly #fd: number;
  /** The whole file. */
  readonly #image: Buffer;
  /** Blocks that changed since they were written: a list without doubles. */
  readonly #dirty: Int32Array;
  readonly #isDirty: Uint8Array;
  #dirtyCount = 0;
  /** Seconds since 1970, kept up to date by the loop's tick. */
  seconds: number;

  /** Writes the file in full, so that the space is there before it is needed. */
  constructor(fd: number, max: number, seconds: number) {
    this.#fd = fd;
    this.seconds = seconds;
    const size = HEADER + max * RECORD;
    this.#image = Buffer.alloc(size);
    this.#image.writeUInt32BE(MAGIC, 0);
    this.#image[4] = VERSION;
    const blocks = Math.ceil(max / BLOCK_RECORDS);
    this.#dirty = new Int32Array(blocks);
    this.#isDirty = new Uint8Array(blocks);
    this.#writeOut(0, size);
  }

  get dirty(): boolean {
    return this.#dirtyCount > 0;
  }

  put(flows: FlowTable, flow: number): void {
    const at = HEADER + flow * RECORD;
    const image = this.#image;
    image[at] = flows.state[flow]! + 1;
    image[at + 1] = flows.protocol[flow]!;
    image.writeUInt16BE(flows.wirePort[flow]!, at + 2);
    image.writeUInt16BE(flows.port[flow]!, at + 4);
    image.writeUInt16BE(flows.remotePort[flow]!, at + 6);
    image.writeUInt32BE(flows.local[flow]!, at + 8);
    image.writeUInt32BE(flows.dialled[flow]!, at + 12);
    image.writeUInt32BE(flows.instance(flow).instanceIp, at + 16);
    image.writeUInt32BE(this.seconds, at + SECONDS);
    this.#mark(flow);
  }

  use(flow: number): void {
    const at = HEADER + flow * RECORD;
    if (this.seconds - this.#image.readUInt32BE(at + SECONDS) < FLOW_AGE_S) return;
    this.#image.writeUInt32BE(this.seconds, at + SECONDS);
    this.#mark(flow);
  }

  drop(flow: number): void {
    this.#image[HEADER + flow * RECORD] = 0;
    this.#mark(flow);
  }

  /** Writes what has changed. Throws what the host says against it; then `abandon`. */
  write(): void {
    for (let i = 0; i < this.#dirtyCount; i++) {
      const block = this.#dirty[i]!;
      this.#isDirty[block] = 0;
      const at = HEADER + block * BLOCK;
      this.#writeOut(at, Math.min(BLOCK, this.#image.length - at));
    }
    this.#dirtyCount = 0;
  }

  /** Nothing is better than flows that have gone. */
  abandon(): void {
    try {
      ftruncateSync(this.#fd, 0);
    } finally {
      closeSync(this.#fd);
    }
  }

  close(): void {
    try {
      this.write();
    } finally {
      closeSync(this.#fd);
    }
  }

  #mark(flow: number): void {
    const block = Math.floor(flow / BLOCK_RECORDS);
    if (this.#isDirty[block] === 1) return;
    this.#isDirty[block] = 1;
    this.#dirty[this.#dirtyCount++] = block;
  }

  #writeOut(at: number, length: number): void {
    // A disk that fills up takes a part.
    for (let done = 0; done < length; ) {
      const wrote = writeSync(this.#fd, this.#image, at + done, length - done, at + done);
      if (wrote === 0) throw new Error('the disk took nothing');
      done += wrote;
    }
  }
}

export interface OpenedFlows {
  readonly records: readonly FlowRecord[];
  /** Absent when the disk takes no file of that size; `error` says why. */
  readonly file?: FlowFile;
  readonly error?: unknown;
}

/** Opens or makes the file and takes out what is in it: at most `max` flows, with their age in seconds. */
export function openFlowFile(path: string, max: number, seconds: number): OpenedFlows {
  let fd: number;
  try {
    fd = openSync(path, 'r+', 0o600);
  } catch {
    fd = openSync(path, 'w+', 0o600);
  }
  let records: readonly FlowRecord[] = [];
  try {
    records = readRecords(fd, max, seconds);
    // The slots are given anew, so the old records go.
    ftruncateSync(fd, 0);
    return { records, file: new FlowFile(fd, max, seconds) };
  } catch (error) {
    closeSync(fd);
    return { records, error };
  }
}

function readRecords(fd: number, max: number, seconds: number): FlowRecord[] {
  const size = Math.min(fstatSync(fd).size, HEADER + max * RECORD);
  const content = Buffer.alloc(size);
  const read = readSync(fd, content, 0, size, 0);
  const records: FlowRecord[] = [];
  if (read < HEADER || content.readUInt32BE(0) !== MAGIC || content[4] !== VERSION) return records;
  for (let at = HEADER; at + RECORD <= read; at += RECORD) {
    const state = content[at]! - 1;
    if (state < FLOW_STATE.opening || state > FLOW_STATE.reset) continue;
    records.push({
      state: state as FlowState,
      protocol: content[at + 1]!,
      wirePort: content.readUInt16BE(at + 2),
      port: content.readUInt16BE(at + 4),
      remotePort: content.readUInt16BE(at + 6),
      local: content.readUInt32BE(at + 8),
      dialled: content.readUInt32BE(at + 12),
      instanceIp: content.readUInt32BE(at + 16),
      ageS: Math.max(0, seconds - content.readUInt32BE(at + SECONDS)),
    });
  }
  return records;
}
