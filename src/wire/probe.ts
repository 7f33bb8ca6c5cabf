// What the answer to a probe says about its sender. The packet loop carries these bytes and does not look into them;
// the frame around them (tunnel header, token, proof) is the loop's. All integers and floats big-endian.
//
//    0                   1                   2                   3
//    0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//   +---------------+---------------+-------------------------------+
//   |  version = 1  |     flags     |           reserved            |  flags: 1 coordinate, 2 load
//   +---------------+---------------+-------------------------------+
//   |                 subnet: first address of the node             |
//   +---------------------------------------------------------------+
//   |                 load: binary32, demand per core               |
//   +---------------------------------------------------------------+
//   |           live, hosts 32…63  (bit h-32: host h)               |
//   +---------------------------------------------------------------+
//   |           live, hosts 0…31   (bit h: host h)                  |
//   +---------------------------------------------------------------+
//   |  height, adjustment, error, vec[0…7]: 11 × binary32, ms       |
//   +---------------------------------------------------------------+
import type { Ipv4 } from '../addr.ts';
import { ipv4 } from '../addr.ts';
import { assert } from '../assert.ts';
import { type Coordinate, checkCoordinate, DIMENSIONS } from '../coordinate.ts';
import { fail, ok, type Result } from '../error.ts';
import { PROBE_STATUS_BYTES } from '../limits.ts';

const VERSION = 1;
const FLAG_COORDINATE = 1;
const FLAG_LOAD = 2;
const SUBNET = 4;
const LOAD = SUBNET + 4;
const LIVE_HIGH = LOAD + 4;
const LIVE_LOW = LIVE_HIGH + 4;
const HEIGHT = LIVE_LOW + 4;
const ADJUSTMENT = HEIGHT + 4;
const ERROR = ADJUSTMENT + 4;
const VEC = ERROR + 4;
assert(VEC + DIMENSIONS * 4 === PROBE_STATUS_BYTES, 'the status fills its bytes');

/** A load beyond this says nothing more. */
const LOAD_MAX = 1_000_000;

export interface ProbeStatus {
  readonly subnet: Ipv4;
  readonly coordinate?: Coordinate;
  readonly load?: number;
  readonly liveLow: number;
  readonly liveHigh: number;
}

export function encodeProbeStatus(status: ProbeStatus): Uint8Array {
  const bytes = new Uint8Array(PROBE_STATUS_BYTES);
  const view = new DataView(bytes.buffer);
  const { coordinate, load } = status;
  bytes[0] = VERSION;
  bytes[1] = (coordinate === undefined ? 0 : FLAG_COORDINATE) | (load === undefined ? 0 : FLAG_LOAD);
  view.setUint32(SUBNET, status.subnet);
  view.setFloat32(LOAD, load ?? 0);
  view.setUint32(LIVE_HIGH, status.liveHigh);
  view.setUint32(LIVE_LOW, status.liveLow);
  if (coordinate !== undefined) {
    view.setFloat32(HEIGHT, coordinate.height);
    view.setFloat32(ADJUSTMENT, coordinate.adjustment);
    view.setFloat32(ERROR, coordinate.error);
    for (let i = 0; i < DIMENSIONS; i++) view.setFloat32(VEC + 4 * i, coordinate.vec[i]!);
  }
  return bytes;
}

/** Longer is allowed (a newer minor version may append, up to PROBE_STATUS_BYTES_MAX), shorter is not. A coordinate or
 *  load out of range fails. */
export function decodeProbeStatus(bytes: Uint8Array): Result<ProbeStatus> {
  if (bytes.length < PROBE_STATUS_BYTES)
    return fail('invalid_record', `probe status: ${bytes.length} bytes, ${PROBE_STATUS_BYTES} are needed`);
  if (bytes[0] !== VERSION)
    return fail('invalid_record', `probe status: version ${bytes[0]}, this agent reads ${VERSION}`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const flags = bytes[1]!;
  const load = view.getFloat32(LOAD);
  if ((flags & FLAG_LOAD) !== 0 && !(load >= 0 && load <= LOAD_MAX))
    return fail('invalid_record', `probe status: load ${load} must be 0…${LOAD_MAX}`);
  const coordinate: Coordinate = {
    height: view.getFloat32(HEIGHT),
    adjustment: view.getFloat32(ADJUSTMENT),
    error: view.getFloat32(ERROR),
    vec: Array.from({ length: DIMENSIONS }, (_, i) => view.getFloat32(VEC + 4 * i)),
  };
  if ((flags & FLAG_COORDINATE) !== 0) {
    const checked = checkCoordinate(coordinate);
    if (!checked.ok) return checked;
  }
  return ok({
    subnet: ipv4(view.getUint32(SUBNET)),
    ...((flags & FLAG_COORDINATE) === 0 ? {} : { coordinate }),
    ...((flags & FLAG_LOAD) === 0 ? {} : { load }),
    liveLow: view.getUint32(LIVE_LOW),
    liveHigh: view.getUint32(LIVE_HIGH),
  });
}
