// Points the host of its namespace at the resolver, with the real commands and files; one word per line on standard
// input: `check`, `restore`, `upstreams`. It answers each with one JSON line.
//   dns_setup.ts set-up|restore STATE
import process from 'node:process';
import { createInterface } from 'node:readline';
import { restoreHostResolver, setUpHostResolver } from '../../edge/host/resolv.ts';
import { followResolvConf } from '../../edge/io/dns_resolvconf.ts';
import { hostRunner } from '../../edge/io/exec.ts';
import { hostFiles } from '../../edge/io/files.ts';
import { SILENT } from '../../src/log.ts';
import { ip } from '../edge/resolver/world.ts';

const [action, statePath] = process.argv.slice(2) as [string, string];
const say = (message: object): void => {
  process.stdout.write(`${JSON.stringify(message)}\n`);
};
const own = ip('172.16.0.65');
const options = { runner: hostRunner, files: hostFiles, bridge: 'br0', address: own, statePath, log: SILENT };
try {
  if (action === 'restore') {
    say({ restored: await restoreHostResolver(options) });
  } else {
    const clock = { monotonicMs: () => performance.now(), wallMs: () => Date.now() };
    const upstreams = followResolvConf({ own, statePath, clock, log: SILENT });
    const resolver = await setUpHostResolver(options);
    say({ kind: resolver.kind });
    for await (const line of createInterface({ input: process.stdin })) {
      if (line === '"check"') await resolver.check();
      if (line === '"restore"') await resolver.restore();
      say({ upstreams: upstreams() });
    }
  }
} catch (error) {
  say({ error: (error as Error).message });
}
