// Programmer errors crash here; they are never handled. Bad input is not a programmer error: see error.ts.

/** Throws when an invariant of our own code does not hold. */
export function assert(condition: unknown, invariant: string): asserts condition {
  if (!condition) throw new Error(`invariant broken: ${invariant}`);
}

/** Marks a branch that the types prove unreachable. */
export function unreachable(value: never): never {
  throw new Error(`invariant broken: unexpected ${JSON.stringify(value)}`);
}
