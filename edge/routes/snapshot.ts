// What this node follows, as a file: the records of the routing table under their keys, in the keyspace's own words,
// so that a restart without etcd answers and forwards as before. It is a cache: whatever etcd says later wins, and a
// file that cannot be read is reported and left out.
import * as v from 'valibot';
import { fail, ok, type Result } from '../../src/error.ts';
import type { Key, Keys } from '../../src/keys.ts';
import {
  decodeRecord,
  encodeInstance,
  encodeNode,
  encodeService,
  type KeyRecord,
} from '../../src/records.ts';
import type { RouteTable } from './table.ts';

export interface Snapshot {
  readonly revision: number;
  readonly records: readonly KeyRecord[];
}

const schema = v.object({
  v: v.literal(1),
  revision: v.number(),
  records: v.record(v.string(), v.unknown()),
});

export function encodeSnapshot(table: RouteTable, keys: Keys): string {
  const records: Record<string, unknown> = {};
  const put = (key: Key, text: string): void => {
    records[keys.build(key)] = JSON.parse(text);
  };
  for (const node of table.nodes())
    put({ kind: 'node', cluster: node.cluster, node: node.node }, encodeNode(node));
  for (const service of table.services())
    put({ kind: 'service', service: service.id }, encodeService(service));
  for (const instance of table.instances())
    put(
      { kind: 'instance', service: instance.service, instance: instance.instance },
      encodeInstance(instance),
    );
  return `${JSON.stringify({ v: 1, revision: table.revision, records }, undefined, 1)}\n`;
}

/** Records that cannot be read are left out; the file as a whole must be a snapshot of this keyspace. */
export function decodeSnapshot(text: string, keys: Keys): Result<Snapshot> {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    return fail('invalid_record', `is not JSON: ${(cause as Error).message}`);
  }
  const parsed = v.safeParse(schema, json);
  if (!parsed.success) return fail('invalid_record', 'is no snapshot of version 1');
  const records: KeyRecord[] = [];
  for (const [name, value] of Object.entries(parsed.output.records)) {
    const key = keys.parse(name);
    const record = key.ok ? decodeRecord(key.value, JSON.stringify(value)) : key;
    if (record.ok) records.push(record.value);
  }
  return ok({ revision: parsed.output.revision, records });
}
