// Everything that a role knows: the records of the paths that it follows, by kind. A plain mirror of batches.
import { Keys } from '../src/keys.ts';
import type { KeyRecord } from '../src/records.ts';
import type { Held, KeyspaceBatch } from './keyspace.ts';

export type HeldOf<Kind extends KeyRecord['kind']> = Extract<Held, { kind: Kind }>;

export class View {
  readonly #byKind = new Map<KeyRecord['kind'], Map<string, Held>>();
  readonly #keys: Keys;

  constructor(keys: Keys = new Keys()) {
    this.#keys = keys;
  }

  apply(batch: KeyspaceBatch): void {
    for (const key of batch.deletes) this.#byKind.get(key.kind)?.delete(this.#keys.build(key));
    for (const put of batch.puts) {
      let held = this.#byKind.get(put.kind);
      if (held === undefined) {
        held = new Map();
        this.#byKind.set(put.kind, held);
      }
      held.set(this.#keys.build(put.key), put);
    }
  }

  all<Kind extends KeyRecord['kind']>(kind: Kind): ReadonlyMap<string, HeldOf<Kind>> {
    return (this.#byKind.get(kind) ?? new Map()) as ReadonlyMap<string, HeldOf<Kind>>;
  }
  /** By the key's text. */
  get<Kind extends KeyRecord['kind']>(kind: Kind, key: string): HeldOf<Kind> | undefined {
    return this.#byKind.get(kind)?.get(key) as HeldOf<Kind> | undefined;
  }
}
