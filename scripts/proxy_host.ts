// One packet loop and nothing else: the data plane of a host, for tests and measurements that want no control plane.
// Reads JSON lines from standard input, writes JSON lines to standard output. Runs in the network namespace that it
// was started in.
//   in    {"config":{…}} first, then {"command":{…}} · {"ask":"counters"|"memory"} · {"stop":true}
//   out   {"report":{…}} · {"counters":{…}} · {"memory":{rssKb,cpuMs}}
import { readFileSync } from 'node:fs';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { boundHeap } from '../coordinator/io/heap.ts';
import { startPacketLoop } from '../edge/io/packet_loop.ts';
import type { PacketLoop } from '../edge/ports.ts';
import type { ProxyCommand, ProxyConfig } from '../edge/proxy/command.ts';

type Line =
  | { readonly config: ProxyConfig }
  | { readonly command: ProxyCommand }
  | { readonly commands: readonly ProxyCommand[] }
  | { readonly ask: 'counters' | 'memory' }
  | { readonly stop: true };

/** Octets travel as {"octets":[…]}. */
function revive(_key: string, value: unknown): unknown {
  if (typeof value !== 'object' || value === null || !('octets' in value)) return value;
  return Uint8Array.from(value.octets as number[]);
}

function say(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

function memory(): { rssKb: number; cpuMs: number } {
  const status = readFileSync('/proc/self/status', 'utf8');
  const { user, system } = process.cpuUsage();
  return { rssKb: Number(/VmRSS:\s+(\d+)/.exec(status)?.[1] ?? 0), cpuMs: (user + system) / 1000 };
}

boundHeap();

let loop: PacketLoop | undefined;
for await (const text of createInterface({ input: process.stdin })) {
  const line = JSON.parse(text, revive) as Line;
  if ('config' in line) {
    try {
      loop = await startPacketLoop(line.config, (report) => say({ report }));
    } catch (error) {
      say({ report: { kind: 'stopped', error: error instanceof Error ? error.message : String(error) } });
      break;
    }
  } else if ('command' in line) loop?.send(line.command);
  else if ('commands' in line) for (const command of line.commands) loop?.send(command);
  else if ('ask' in line)
    say(line.ask === 'counters' ? { counters: loop?.counters() } : { memory: memory() });
  else break;
}
await loop?.stop();
process.exit(0);
