// Small sums that the measurements share.

export function percentile(samples: readonly number[], share: number): number {
  if (samples.length === 0) return Number.NaN;
  const sorted = [...samples].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)] ?? Number.NaN;
}

export const round = (value: number, digits = 1): number => Number(value.toFixed(digits));

/** Runs the jobs with at most `width` under way. */
export async function inParallel<T>(
  width: number,
  jobs: readonly T[],
  run: (job: T, index: number) => Promise<void>,
): Promise<void> {
  let next = 0;
  await Promise.all(
    Array.from({ length: Math.min(width, jobs.length) }, async () => {
      for (let index = next++; index < jobs.length; index = next++) await run(jobs[index]!, index);
    }),
  );
}

/** Monotonic milliseconds that all processes of this machine share (CLOCK_MONOTONIC). */
export const sharedNowMs = (): number => Number(process.hrtime.bigint() / 1_000n) / 1_000;
