// Time as an argument: what a machine says about when it wants to be called again.

/** When, in milliseconds of the clock that was passed in, and one word why. */
export interface Deadline {
  readonly at: number;
  readonly why: string;
}

/** The earlier of two; undefined means never. */
export function earliest(a: Deadline | undefined, b: Deadline | undefined): Deadline | undefined {
  if (a === undefined) return b;
  return b === undefined || a.at <= b.at ? a : b;
}
