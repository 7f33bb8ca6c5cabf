// The flow table on disk, for an agent that was killed: one fixed record per slot, written when a flow comes, changes
// its state or goes, never per packet. It is a hint, not a promise: whatever cannot be read is left out.
//
//   |"EWFL"| version | 0 | 0 | 0 |            8 octets, then per slot 24:
//   | state+1 | protocol | wire port | port | remote port | local | dialled | instance | seconds since 1970 |
import { closeSync, fstatSync, ftruncateSync, openSync, readSync, writeSync } from 'node:fs';
import { FLOW_STATE, type Flow, type FlowRecord, type FlowState, type FlowWatcher } from '../proxy/flows.ts';

const HEADER = 8;
const RECORD = 24;
const MAGIC = 0x4557464c;
const VERSION = 1;

export class FlowFile implements FlowWatcher {
  readonly #fd: number;
  readonly #record = Buffer.alloc(RECORD);
  readonly #empty = Buffer.alloc(1);
  /** Seconds since 1970, kept up to date by the loop's tick. */
  seconds: number;

  constructor(fd: number, seconds: number) {
    this.#fd = fd;
    this.seconds = seconds;
  }

  put(flow: Flow): void {
    const r = this.#record;
    r[0] = flow.state + 1;
    r[1] = flow.protocol;
    r.writeUInt16BE(flow.wirePort, 2);
    r.writeUInt16BE(flow.port, 4);
    r.writeUInt16BE(flow.remotePort, 6);
    r.writeUInt32BE(flow.local, 8);
    r.writeUInt32BE(flow.dialled, 12);
    r.writeUInt32BE(flow.instance.instanceIp, 16);
    r.writeUInt32BE(this.seconds, 20);
    writeSync(this.#fd, r, 0, RECORD, HEADER + flow.slot * RECORD);
  }

  drop(slot: number): void {
    writeSync(this.#fd, this.#empty, 0, 1, HEADER + slot * RECORD);
  }

  close(): void {
    closeSync(this.#fd);
  }
}

/** Opens or makes the file and takes out what is in it: at most `max` flows, with their age in seconds. */
export function openFlowFile(
  path: string,
  max: number,
  seconds: number,
): { readonly file: FlowFile; readonly records: readonly FlowRecord[] } {
  let fd: number;
  try {
    fd = openSync(path, 'r+', 0o600);
  } catch {
    fd = openSync(path, 'w+', 0o600);
  }
  const size = Math.min(fstatSync(fd).size, HEADER + max * RECORD);
  const content = Buffer.alloc(size);
  const read = readSync(fd, content, 0, size, 0);
  const records: FlowRecord[] = [];
  if (read >= HEADER && content.readUInt32BE(0) === MAGIC && content[4] === VERSION)
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
        ageS: Math.max(0, seconds - content.readUInt32BE(at + 20)),
      });
    }
  // The slots are given anew, so the old records go.
  ftruncateSync(fd, 0);
  const header = Buffer.alloc(HEADER);
  header.writeUInt32BE(MAGIC, 0);
  header[4] = VERSION;
  writeSync(fd, header, 0, HEADER, 0);
  return { file: new FlowFile(fd, seconds), records };
}
