// Load of a host as policies weigh it: demand per core. Pure: texts of /proc come in, a number comes out.
//   below saturation   the share of time that the cores were busy since the last sample, 0…1 (proc_stat(5))
//   at saturation      runnable tasks per core, which goes on growing where the busy share stands at 1

/** One look at /proc/stat. */
export interface CpuSample {
  /** Clock ticks of all cores. */
  readonly busy: number;
  readonly total: number;
  readonly cores: number;
  /** Tasks that run or wait for a core. */
  readonly runnable: number;
}

/** Busy above this counts as saturated: below it a queue is only a burst. */
const SATURATED = 0.95;
/** Weight of a new sample; a second's samples make 94 % of the value. */
const SMOOTHING = 0.5;

/** Undefined when the text is not /proc/stat's. */
export function parseProcStat(text: string): CpuSample | undefined {
  let cores = 0;
  let ticks: number[] | undefined;
  let runnable: number | undefined;
  for (const line of text.split('\n')) {
    const [name = '', ...fields] = line.trim().split(/\s+/);
    if (name === 'cpu') ticks = fields.map(Number);
    else if (/^cpu\d+$/.test(name)) cores++;
    else if (name === 'procs_running') runnable = Number(fields[0]);
  }
  if (ticks === undefined || ticks.length < 5 || !ticks.every(Number.isFinite) || cores === 0)
    return undefined;
  if (runnable === undefined || !Number.isFinite(runnable)) return undefined;
  // user nice system idle iowait irq softirq steal; guest times are part of user and nice.
  const total = ticks.slice(0, 8).reduce((a, b) => a + b, 0);
  return { busy: total - ticks[3]! - ticks[4]!, total, cores, runnable };
}

/** A load that somebody else measures: the first number of a file; undefined when there is none. */
export function parseLoadFile(text: string): number | undefined {
  const number = Number(text.trim().split(/\s/)[0] || Number.NaN);
  return number >= 0 && number <= 1_000_000 ? number : undefined;
}

export class LoadMeter {
  #last: CpuSample | undefined;
  #value: number | undefined;

  /** The smoothed load; undefined until there are two samples. */
  get value(): number | undefined {
    return this.#value;
  }

  add(sample: CpuSample): void {
    const last = this.#last;
    this.#last = sample;
    if (last === undefined || sample.total <= last.total) return;
    const busy = Math.min(1, Math.max(0, (sample.busy - last.busy) / (sample.total - last.total)));
    // One of the runnable is whoever reads this.
    const waiting = Math.max(0, sample.runnable - 1) / sample.cores;
    const now = busy < SATURATED ? busy : Math.max(busy, waiting);
    this.#value = this.#value === undefined ? now : this.#value + (now - this.#value) * SMOOTHING;
  }
}
