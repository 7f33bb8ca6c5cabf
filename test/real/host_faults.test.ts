// The environment manager with a host that refuses, and with a process that dies, at each thing that it changes in
// turn; see host_lab.ts for the topology.
import { mkdir, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { AttachRequest, Environment } from '../../edge/host/environment.ts';
import type { Publication } from '../../edge/host/rules.ts';
import { hostRunner } from '../../edge/io/exec.ts';
import { hostFiles } from '../../edge/io/files.ts';
import { address, addTun, codeOf, HostLab, node, Saboteur, SERVICES, toNetns } from './host_lab.ts';

const test = suite('environment under fault');

/** Ours if it was not there: hosts that share it would take it from each other. */
let madeNetnsDir: string | undefined;
test.before(async () => {
  madeNetnsDir = await mkdir('/etc/netns', { recursive: true });
});
test.after(async () => {
  if (madeNetnsDir !== undefined) await rmdir('/etc/netns').catch(() => {});
});

/** Several changes are tried at once, each in a host of its own: most of a try is waiting for the kernel. */
const LANES = ['1', '2', '3'];

/**
 * Tries the first change, the second, …, until a try says that there was no such change any more. `prepare` makes what
 * the tries on one host have in common; `before` is what it is to look like in the end. How many changes there were.
 */
async function eachChange<Ready>(
  limit: number,
  prepare: (lab: HostLab) => Promise<Ready>,
  attempt: (lab: HostLab, at: number, ready: Ready) => Promise<'done' | 'more'>,
  finish: (lab: HostLab, ready: Ready) => Promise<void>,
): Promise<number> {
  let next = 0;
  let done = false;
  const outcomes = await Promise.allSettled(
    LANES.map(async (label) => {
      const lab = await HostLab.up(label);
      try {
        await mkdir(join(lab.dir, 'state'));
        const ready = await prepare(lab);
        while (!done) {
          next += 1;
          assert.ok(next < limit, 'bounded');
          if ((await attempt(lab, next, ready)) === 'done') done = true;
        }
        await finish(lab, ready);
      } catch (error) {
        done = true;
        throw error;
      } finally {
        await lab
          .environment()
          .cleanNode()
          .catch(() => {});
        await lab.down();
      }
    }),
  );
  for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason;
  return next;
}

function sabotaged(lab: HostLab, at: number, crash: boolean): Environment {
  const saboteur = new Saboteur(at, crash);
  return lab.environment({ runner: saboteur.runner(lab.runner), files: saboteur.files(hostFiles) });
}

for (const crash of [false, true])
  test(`${crash ? 'a crash' : 'a refusal'} at every command of setupNode, attachTun and attach leaves nothing`, async () => {
    const tun = { tun: 'edgeway-tun', services: SERVICES };
    const changes = await eachChange(
      200,
      async (lab) => {
        const a = await lab.instance('a');
        await addTun(lab.host);
        return { a, before: await lab.snapshot(a), held: new Map<string, string>() };
      },
      async (lab, at, { a, before, held }) => {
        const environment = sabotaged(lab, at, crash);
        const steps: [string, () => Promise<unknown>][] = [
          ['setupNode', () => environment.setupNode(node)],
          ['attachTun', () => environment.attachTun(tun)],
          ['attach', () => environment.attach(toNetns('a', a, '172.16.0.66'))],
        ];
        let finished = true;
        for (const [name, act] of steps) {
          // Whatever was tried before, each begins with the same host.
          if (!crash && !held.has(name)) held.set(name, await lab.snapshot(a));
          const outcome = await codeOf(act());
          if (outcome === 'ok') continue;
          finished = false;
          if (!crash) assert.is(await lab.snapshot(a), held.get(name), `${name}, change ${at}: ${outcome}`);
          break;
        }
        await lab.environment().cleanNode();
        await addTun(lab.host);
        assert.is(await lab.snapshot(a), before, `cleaned after change ${at}`);
        return finished ? 'done' : 'more';
      },
      async () => {},
    );
    assert.ok(changes > 20, `only ${changes} changes were tried`);
  });

for (const crash of [false, true])
  test(`${crash ? 'a crash' : 'a refusal'} at every command of expose: the rules are the old ones or the new ones, and a repetition makes them new`, async () => {
    const target = { address: address('172.16.0.66'), port: 80 };
    const publications: readonly Publication[] = [
      { protocol: 'tcp', source: 8080, targets: [target], hairpin: { ...target, port: 81 }, kept: [target] },
      { protocol: 'udp', source: 53, targets: [target, { ...target, port: 54 }] },
    ];
    const expose = (environment: Environment) => environment.expose(publications, [4_999]);
    const changes = await eachChange(
      20,
      async (lab) => {
        const before = await lab.snapshot();
        const healthy = lab.environment();
        await healthy.setupNode(node);
        await expose(healthy);
        const wanted = await lab.snapshot();
        return { before, healthy, wanted };
      },
      async (lab, at, { healthy, wanted }) => {
        await healthy.expose([]);
        const held = await lab.snapshot();
        const outcome = await codeOf(expose(sabotaged(lab, at, crash)));
        const finished = outcome === 'ok';
        const rules = await lab.snapshot();
        if (finished || crash) assert.ok(rules === wanted || (!finished && rules === held), `change ${at}`);
        else assert.is(rules, held, `change ${at}: ${outcome}`);
        await expose(healthy);
        assert.is(await lab.snapshot(), wanted, `repeated after change ${at}`);
        return finished ? 'done' : 'more';
      },
      async (lab, { before, healthy }) => {
        await healthy.cleanNode();
        assert.is(await lab.snapshot(), before);
      },
    );
    assert.ok(changes > 2, `only ${changes} changes were tried`);
  });

for (const crash of [false, true])
  test(`${crash ? 'a crash' : 'a refusal'} during restore after a reboot loses no instance: repeated, everything is there`, async () => {
    const made = (lab: HostLab): string => `${lab.prefix}-x`;
    const changes = await eachChange(
      100,
      async (lab) => {
        const x = made(lab);
        const { resolvConf: _, ...rest } = toNetns('x', x, '172.16.0.66');
        const request: AttachRequest = {
          ...rest,
          target: { kind: 'netns', name: x, create: true },
          ports: [{ source: 8080, destination: 80, protocol: 'tcp' }],
        };
        const before = await lab.snapshot(x);
        const healthy = lab.environment();
        await healthy.setupNode(node);
        await healthy.attach(request);
        return { before, healthy, wanted: await lab.snapshot(x) };
      },
      async (lab, nth, { healthy, wanted }) => {
        // What a refusal leaves, a crash leaves too, and more of it.
        const at = crash ? nth : 3 * nth - 2;
        const x = made(lab);
        const reboot = 'ip link del edgeway0; nft flush ruleset; echo 0 >/proc/sys/net/ipv4/ip_forward';
        await hostRunner.run(['ip', 'netns', 'del', x]);
        await lab.runner.run(['sh', '-c', reboot]);
        const outcome = await codeOf(sabotaged(lab, at, crash).restore());
        assert.is((await healthy.attachments()).length, 1, `change ${at}: ${outcome}`);
        if (outcome !== 'ok') await healthy.restore();
        assert.is(await lab.snapshot(x), wanted, `change ${at}: ${outcome}`);
        return outcome === 'ok' ? 'done' : 'more';
      },
      async (lab, { before, healthy }) => {
        await healthy.cleanNode();
        assert.is(await lab.snapshot(made(lab)), before);
      },
    );
    assert.ok(changes > (crash ? 15 : 5), `only ${changes} changes were tried`);
  });

test.run();
