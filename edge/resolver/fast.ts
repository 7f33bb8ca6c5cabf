// Remembers the encoded answer to a query's exact bytes, so that a repeated local question costs one map look-up and
// a new id. An entry holds the records that it was made of and is used only while the table still returns the very
// same objects: it cannot outlive a change, whoever made it. Only decisions that depend on nothing else belong here;
// what depends on the asker (`needs`) is asked before. Upstream answers live elsewhere.
import type { Buffer } from 'node:buffer';
import { Buffer as Bytes } from 'node:buffer';
import { LRUCache } from 'lru-cache';
import { DNS_FAST_ENTRIES_MAX, DNS_FAST_QUERY_MAX } from '../../src/limits.ts';
import type { Instance, Service } from '../../src/model.ts';
import type { Name } from '../../src/name.ts';
import type { NameTable } from '../routes/table.ts';
import { sourceOf } from './resolver.ts';

export interface FastAnswer {
  readonly name: Name;
  readonly service: Service | undefined;
  readonly instance: Instance | undefined;
  readonly synced: boolean;
  /** Our own copy; the id in it is whatever the last asker's was. */
  readonly reply: Buffer;
  /** Counter to bump. */
  readonly kind: string;
  /** When the service's use was last told; the caller's clock. */
  toldMs: number;
}

export class FastAnswers {
  readonly #table: NameTable;
  readonly #held = new LRUCache<string, FastAnswer>({ max: DNS_FAST_ENTRIES_MAX });

  constructor(table: NameTable) {
    this.#table = table;
  }

  /** The query without its id: flags, counts, question and options decide the answer. */
  key(message: Buffer): string | undefined {
    return message.length > DNS_FAST_QUERY_MAX ? undefined : message.toString('latin1', 2);
  }

  get(key: string): FastAnswer | undefined {
    const held = this.#held.get(key);
    if (held === undefined) return undefined;
    const { name, service, instance, synced } = held;
    const table = this.#table;
    const holds =
      table.synced === synced &&
      table.service(name.service) === service &&
      ('policy' in name || table.instance(name.service, name.instance) === instance);
    if (holds) return held;
    this.#held.delete(key);
    return undefined;
  }

  set(key: string, name: Name, kind: string, reply: Buffer): void {
    // A piece of the pool would hold the whole of it.
    const own = Bytes.allocUnsafeSlow(reply.length);
    own.set(reply);
    this.#held.set(key, {
      name,
      ...sourceOf(name, this.#table),
      synced: this.#table.synced,
      reply: own,
      kind,
      toldMs: Number.NEGATIVE_INFINITY,
    });
  }
}
