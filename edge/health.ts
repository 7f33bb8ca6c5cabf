// Whether the instances of this node can work: is the process or namespace still there, and does the service's own
// health check pass. Sans-I/O: it says what to check and when, and is told the result. It withdraws nothing itself.
//
//   there, no check declared      up
//   there, check declared         down until `rise` checks in a row pass, down again after `fall` in a row fail; another
//                                 check begins to count where the last one left it
//   its identity changed or went  gone, once and for ever: whoever hosts it takes it away
import type { Ipv4 } from '../src/addr.ts';
import type { HealthCheck, HealthProbe } from '../src/model.ts';
import type { Deadline } from '../src/time.ts';

/** A look at a process or namespace is a stat() of some microseconds. */
export const LOOK_INTERVAL_MS = 250;
/** What was said about a check that passed or failed is kept this short. */
const DETAIL_MAX = 200;

/** An instance on this node. */
export interface Patient {
  /** Unique on this node. */
  readonly id: string;
  readonly namespaceIp: Ipv4;
  /** What identifies its process or namespace while it lives (see Vitals in ports.ts). */
  readonly identity: string;
  readonly check?: HealthCheck;
}

export type HealthOutput =
  | {
      readonly kind: 'check';
      readonly id: string;
      readonly run: number;
      readonly probe: HealthProbe;
      readonly namespaceIp: Ipv4;
      readonly timeoutMs: number;
    }
  | { readonly kind: 'health'; readonly id: string; readonly up: boolean; readonly why: string }
  | { readonly kind: 'gone'; readonly id: string; readonly why: string };

export interface HealthView {
  readonly up: boolean;
  readonly why: string;
}

interface Ward {
  patient: Patient;
  up: boolean;
  why: string;
  /** Results in a row that contradict `up`. */
  against: number;
  nextAt: number;
  /** Number of the check that runs, 0 for none: an answer to an older one is too late to count. */
  run: number;
  gone: boolean;
}

export class HealthMonitor {
  readonly #identify: (id: string) => string | undefined;
  readonly #wards = new Map<string, Ward>();
  readonly #outputs: HealthOutput[] = [];
  #lookAt = Number.NEGATIVE_INFINITY;
  #runs = 0;

  /** `identify` looks at the host: the present identity of an instance's process or namespace; undefined = none. */
  constructor(identify: (id: string) => string | undefined) {
    this.#identify = identify;
  }

  /** Adds an instance, or changes its check. */
  admit(patient: Patient, nowMs: number): void {
    const old = this.#wards.get(patient.id);
    const checked = patient.check !== undefined;
    if (old !== undefined && old.patient.identity === patient.identity) {
      const same = sameCheck(old.patient, patient);
      old.patient = patient;
      if (same || old.gone) return;
      old.against = 0;
      old.run = 0;
      old.nextAt = checked ? nowMs : Number.POSITIVE_INFINITY;
      if (checked || old.up) return;
      old.up = true;
      old.why = 'it has no health check any more';
      this.#outputs.push({ kind: 'health', id: patient.id, up: true, why: old.why });
      return;
    }
    this.#wards.set(patient.id, {
      patient,
      up: !checked,
      why: checked ? 'its health check has not passed yet' : 'its process or namespace exists',
      against: 0,
      nextAt: checked ? nowMs : Number.POSITIVE_INFINITY,
      run: 0,
      gone: false,
    });
  }

  discharge(id: string): void {
    this.#wards.delete(id);
  }

  handleResult(id: string, run: number, ok: boolean, detail: string, nowMs: number): void {
    const ward = this.#wards.get(id);
    const check = ward?.patient.check;
    if (ward === undefined || check === undefined || ward.gone || ward.run !== run) return;
    ward.run = 0;
    ward.nextAt = nowMs + check.intervalMs;
    const said = `${check.probe.kind} check: ${detail.slice(0, DETAIL_MAX)}`;
    if (ok === ward.up) {
      ward.against = 0;
      ward.why = said;
      return;
    }
    ward.against++;
    if (ward.against < (ok ? check.rise : check.fall)) {
      // Until it counts, the next try comes soon: a failure is seen in `fall` short steps, not long ones.
      ward.nextAt = nowMs + Math.min(check.intervalMs, LOOK_INTERVAL_MS);
      return;
    }
    ward.up = ok;
    ward.against = 0;
    ward.why = said;
    this.#outputs.push({ kind: 'health', id, up: ok, why: said });
  }

  handleTimeout(nowMs: number): void {
    if (nowMs >= this.#lookAt) {
      this.#lookAt = nowMs + LOOK_INTERVAL_MS;
      for (const ward of this.#wards.values()) this.#look(ward);
    }
    for (const ward of this.#wards.values()) this.#start(ward, nowMs);
  }

  poll(): HealthOutput | undefined {
    return this.#outputs.shift();
  }

  deadline(): Deadline | undefined {
    if (this.#wards.size === 0) return undefined;
    let at = this.#lookAt;
    let why = 'look';
    for (const ward of this.#wards.values())
      if (!ward.gone && ward.nextAt < at) {
        at = ward.nextAt;
        why = 'check';
      }
    return { at, why };
  }

  view(id: string): HealthView | undefined {
    const ward = this.#wards.get(id);
    return ward === undefined ? undefined : { up: ward.up, why: ward.why };
  }

  /** False also for an instance that is not (or no longer) known here, whatever the keyspace says of it. */
  isUp(namespaceIp: Ipv4): boolean {
    for (const { patient, up } of this.#wards.values()) if (patient.namespaceIp === namespaceIp) return up;
    return false;
  }

  /** Namespace IPs of the instances that are up. */
  *up(): IterableIterator<Ipv4> {
    for (const { patient, up } of this.#wards.values()) if (up) yield patient.namespaceIp;
  }

  #look(ward: Ward): void {
    if (ward.gone) return;
    const identity = this.#identify(ward.patient.id);
    if (identity === ward.patient.identity) return;
    ward.gone = true;
    ward.up = false;
    ward.run = 0;
    ward.why =
      identity === undefined
        ? 'its process or namespace is gone'
        : 'its process or namespace is another one now';
    this.#outputs.push({ kind: 'gone', id: ward.patient.id, why: ward.why });
  }

  #start(ward: Ward, nowMs: number): void {
    const { check, id, namespaceIp } = ward.patient;
    if (check === undefined || ward.gone || nowMs < ward.nextAt) return;
    if (ward.run !== 0) {
      // Its check has not come back although its own time limit is long over: whoever runs it is stuck.
      this.handleResult(id, ward.run, false, 'no result within its time limit', nowMs);
      return;
    }
    ward.run = ++this.#runs;
    ward.nextAt = nowMs + check.timeoutMs * 2 + 1_000;
    this.#outputs.push({
      kind: 'check',
      id,
      run: ward.run,
      probe: check.probe,
      namespaceIp,
      timeoutMs: check.timeoutMs,
    });
  }
}

function sameCheck(a: Patient, b: Patient): boolean {
  return JSON.stringify(a.check) === JSON.stringify(b.check);
}
