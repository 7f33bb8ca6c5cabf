// Which addresses stand behind the endpoints of a store, for rules that know addresses only. Asked once, at the start.
import { lookup } from 'node:dns/promises';
import { parseIpv4 } from '../../src/addr.ts';
import type { Logger } from '../../src/log.ts';
import type { Target } from '../host/rules.ts';

/** IPv4 alone: instances have no other. A name that nobody knows now is left out, with a warning. */
export async function addressesOf(endpoints: readonly string[], log: Logger): Promise<readonly Target[]> {
  const found: Target[] = [];
  for (const endpoint of endpoints) {
    const [, name = '', port = ''] = /^(?:https?:\/\/)?\[?(.+?)\]?:(\d+)$/.exec(endpoint) ?? [];
    const addresses = await lookup(name, { all: true }).catch((error: Error) => {
      log.warn({ name, error: error.message }, 'instances are not kept from this endpoint');
      return [];
    });
    for (const { address } of addresses) {
      const parsed = parseIpv4(address);
      if (parsed.ok) found.push({ address: parsed.value, port: Number(port) });
    }
  }
  return found;
}
