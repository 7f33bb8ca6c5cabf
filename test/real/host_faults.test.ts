// The environment manager with a host that refuses, and with a process that dies, at each thing that it changes in
// turn; see host_lab.ts for the topology.
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { AttachRequest, Environment } from '../../edge/host/environment.ts';
import type { Publication } from '../../edge/host/rules.ts';
import { hostRunner } from '../../edge/io/exec.ts';
import { hostFiles } from '../../edge/io/files.ts';
import { address, addTun, codeOf, HostLab, node, Saboteur, SERVICES, toNetns } from './host_lab.ts';

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

function sabotaged(lab: HostLab, at: number, crash: boolean): Environment {
  const saboteur = new Saboteur(at, crash);
  return lab.environment({ runner: saboteur.runner(lab.runner), files: saboteur.files(hostFiles) });
}

for (const crash of [false, true])
  test(`${crash ? 'a crash' : 'a refusal'} at every command of expose: the rules are the old ones or the new ones, and a repetition makes them new`, async ({
    lab,
  }) => {
    const healthy = lab.environment();
    await mkdir(join(lab.dir, 'state'));
    const before = await lab.snapshot();
    await healthy.setupNode(node);
    const target = { address: address('172.16.0.66'), port: 80 };
    const publications: readonly Publication[] = [
      { protocol: 'tcp', source: 8080, targets: [target], hairpin: { ...target, port: 81 }, kept: [target] },
      { protocol: 'udp', source: 53, targets: [target, { ...target, port: 54 }] },
    ];
    const expose = (environment: Environment) => environment.expose(publications, [4_999]);
    await expose(healthy);
    const wanted = await lab.snapshot();
    let at = 0;
    for (let finished = false; !finished; ) {
      at += 1;
      assert.ok(at < 20, 'bounded');
      await healthy.expose([]);
      const held = await lab.snapshot();
      const outcome = await codeOf(expose(sabotaged(lab, at, crash)));
      finished = outcome === 'ok';
      const rules = await lab.snapshot();
      if (finished || crash) assert.ok(rules === wanted || (!finished && rules === held), `change ${at}`);
      else assert.is(rules, held, `change ${at}: ${outcome}`);
      await expose(healthy);
      assert.is(await lab.snapshot(), wanted, `repeated after change ${at}`);
    }
    assert.ok(at > 2, `only ${at} changes were tried`);
    await healthy.cleanNode();
    assert.is(await lab.snapshot(), before);
  });

for (const crash of [false, true])
  test(`${crash ? 'a crash' : 'a refusal'} during restore after a reboot loses no instance: repeated, everything is there`, async ({
    lab,
  }) => {
    const x = `${lab.prefix}-x`;
    const healthy = lab.environment();
    const { resolvConf: _, ...rest } = toNetns('x', x, '172.16.0.66');
    const request: AttachRequest = {
      ...rest,
      target: { kind: 'netns', name: x, create: true },
      ports: [{ source: 8080, destination: 80, protocol: 'tcp' }],
    };
    await mkdir(join(lab.dir, 'state'));
    const before = await lab.snapshot(x);
    try {
      await healthy.setupNode(node);
      await healthy.attach(request);
      const wanted = await lab.snapshot(x);
      const reboot = 'ip link del edgeway0; nft flush ruleset; echo 0 >/proc/sys/net/ipv4/ip_forward';
      // What a refusal leaves, a crash leaves too, and more of it.
      let at = crash ? 0 : -2;
      for (let finished = false; !finished; ) {
        at += crash ? 1 : 3;
        assert.ok(at < 100, 'bounded');
        await hostRunner.run(['ip', 'netns', 'del', x]);
        await lab.runner.run(['sh', '-c', reboot]);
        const outcome = await codeOf(sabotaged(lab, at, crash).restore());
        finished = outcome === 'ok';
        assert.is((await healthy.attachments()).length, 1, `change ${at}: ${outcome}`);
        if (!finished) await healthy.restore();
        assert.is(await lab.snapshot(x), wanted, `change ${at}: ${outcome}`);
      }
      assert.ok(at > 20, `only ${at} changes were tried`);
    } finally {
      await healthy.cleanNode();
    }
    assert.is(await lab.snapshot(x), before);
  });

test.run();
