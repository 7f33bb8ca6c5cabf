// What a process has used, and what a series of it says.
import { readFileSync } from 'node:fs';
import { percentile } from './scale/stats.ts';

/** User and system time so far (proc(5), fields 14 and 15, in ticks of 10 ms). */
export function cpuMs(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

/** Resident set, MB. */
export function residentMb(pid: number): number {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  return Number(/VmRSS:\s+(\d+) kB/.exec(status)?.[1] ?? 0) / 1024;
}

/** From the median of the second fifth to that of the last: in the first one tables fill and code is compiled. */
export function growth(samples: readonly number[]): number {
  const fifth = (nth: number): number =>
    percentile(
      samples.filter((_, i) => Math.floor((i * 5) / samples.length) === nth),
      0.5,
    );
  return fifth(4) - fifth(1);
}
