// The environment manager with a host that refuses, and with a process that dies, at each thing that it changes in
// turn; see host_lab.ts for the topology.
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { hostFiles } from '../../edge/io/files.ts';
import { addTun, codeOf, HostLab, node, Saboteur, SERVICES, toNetns } from './host_lab.ts';

const test = suite<{ lab: HostLab }>('environment under fault');
test.before.each(async (context) => {
  context.lab = await HostLab.up();
});
test.after.each(async ({ lab }) => {
  await lab.down();
});

for (const crash of [false, true])
  test(`${crash ? 'a crash' : 'a refusal'} at every command of setupNode, attachTun and attach leaves nothing`, async ({
    lab,
  }) => {
    const a = await lab.instance('a');
    await addTun(lab.host);
    await mkdir(join(lab.dir, 'state'));
    const before = await lab.snapshot(a);
    const tun = { tun: 'edgeway-tun', services: SERVICES };
    let at = 0;
    for (let finished = false; !finished; ) {
      at += 1;
      assert.ok(at < 200, 'bounded');
      const saboteur = new Saboteur(at, crash);
      const environment = lab.environment({
        runner: saboteur.runner(lab.runner),
        files: saboteur.files(hostFiles),
      });
      const steps: [string, () => Promise<unknown>][] = [
        ['setupNode', () => environment.setupNode(node)],
        ['attachTun', () => environment.attachTun(tun)],
        ['attach', () => environment.attach(toNetns('a', a, '172.16.0.66'))],
      ];
      finished = true;
      for (const [name, act] of steps) {
        const held = crash ? '' : await lab.snapshot(a);
        const outcome = await codeOf(act());
        if (outcome === 'ok') continue;
        finished = false;
        if (!crash) assert.is(await lab.snapshot(a), held, `${name}, change ${at}: ${outcome}`);
        break;
      }
      await lab.environment().cleanNode();
      await addTun(lab.host);
      assert.is(await lab.snapshot(a), before, `cleaned after change ${at}`);
    }
    assert.ok(at > 30, `only ${at} changes were tried`);
  });

test.run();
