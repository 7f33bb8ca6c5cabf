// A process that sets an instance up and cleans it, over and over, until it is killed; bench_north_south.ts kills it.
// Prints `begin` when the work starts and the number of each finished cycle, one a line. Begins, like any caller after a crash, by calling the same functions again.
//   kudo_cycles.ts NETNS STATE_DIR FIRST LAST
import process from 'node:process';
import { hostRunner } from '../edge/io/exec.ts';
import { hostFiles } from '../edge/io/files.ts';
import { createKudo } from '../edge/kudo/kudo.ts';
import { SILENT } from '../src/log.ts';

const [netns = '', stateDir = '', first = '0', last = '0'] = process.argv.slice(2);
const kudo = createKudo({
  runner: {
    run: (argv, stdin) => hostRunner.run(['nsenter', `--net=/run/netns/${netns}`, '--', ...argv], stdin),
  },
  files: hostFiles,
  log: SILENT,
  stateDir,
});
const nodeId = 'cycles';
const peer = { nodeId: 'peer', nodeIp: { clusterIpCidr: '10.0.1.1/24', externalIpAddr: '10.99.0.3' } };

console.log('begin');
for (let cycle = Number(first); cycle < Number(last); cycle++) {
  // Every twentieth cycle the node goes too.
  await kudo.setupNode({ nodeId, nodeIpCidr: '10.0.0.1/24', nodesIps: [peer] });
  const instanceId = `${netns}-${cycle % 7}`;
  await kudo.setupInstance({
    nodeId,
    nodeIpAddr: '10.0.0.1',
    instanceId,
    instanceIpCidr: `10.0.0.${2 + (cycle % 7)}/24`,
    ports: [{ source: 8000 + (cycle % 7), destination: 80 }],
  });
  await kudo.cleanInstance({ instanceId });
  if (cycle % 20 === 19) await kudo.cleanNode({ nodeId });
  console.log(cycle);
}
