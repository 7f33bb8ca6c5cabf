// Measures the control plane at the size of the plan, against a real etcd on this machine:
//   npm run scale -- [--json FILE] [--only claims|agents|interest|leader_kills] [--agents N] [--kills N]
// Prints what it measures and, with --json, writes it; what had to be reached and was not is named under `missed`, and
// ends the run with status 1. It starts its own etcd and processes and ends them.
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { type PrivateEtcd, startPrivateEtcd } from '../edge/io/etcd_private.ts';
import { SILENT } from '../src/log.ts';
import { readArguments, refuse } from './arguments.ts';
import { measureAgents } from './scale/agents.ts';
import { measureClaims } from './scale/claims.ts';
import { measureInterest } from './scale/interest.ts';
import { measureLeaderKills } from './scale/leaders.ts';
import { residentMb } from './usage.ts';

export interface Bench {
  readonly etcd: PrivateEtcd;
  rssMb(): Promise<number>;
  say(text: string): void;
}

const PARTS = {
  claims: measureClaims,
  agents: (bench: Bench) => measureAgents(bench, Number(values.agents)),
  interest: measureInterest,
  leader_kills: (bench: Bench) => measureLeaderKills(bench, Number(values.kills)),
} as const;
type Part = keyof typeof PARTS;

const { values } = readArguments(import.meta.url, {
  options: {
    json: { type: 'string' },
    only: { type: 'string' },
    agents: { type: 'string', default: '1000' },
    kills: { type: 'string', default: '50' },
  },
});
const parts = values.only === undefined ? (Object.keys(PARTS) as Part[]) : [values.only as Part];
for (const part of parts)
  if (!(part in PARTS))
    refuse(import.meta.url, `--only ${part}: must be one of ${Object.keys(PARTS).join(', ')}`);

const results: Record<string, unknown> = {};
for (const part of parts) {
  const dataDir = await mkdtemp(join(tmpdir(), 'edgeway-scale-'));
  const etcd = await startPrivateEtcd({ dataDir, log: SILENT });
  try {
    console.log(`\n${part}`);
    results[part] = await PARTS[part]({
      etcd,
      rssMb: async () => Math.round(residentMb(etcd.pid)),
      say: (text) => console.log(`  ${text}`),
    });
    for (const [name, value] of Object.entries(results[part] as object)) {
      if (name === 'missed' && value === '') continue;
      console.log(`  ${name}: ${value}`);
      if (name === 'missed') process.exitCode = 1;
    }
  } finally {
    await etcd.stop();
    await rm(dataDir, { recursive: true, force: true });
  }
}
if (values.json !== undefined) await writeFile(values.json, `${JSON.stringify(results, undefined, 2)}\n`);
process.exit();
