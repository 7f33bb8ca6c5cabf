// A host, the world outside it and instances, all network namespaces; the environment manager runs against the host's.
//
//   …-o  10.99.0.1 ── veth ── 10.99.0.2  …-h (default route to .1)  edgeway0 172.16.0.65/26 ── …-a, …-b, processes
//
// …-o has no route to 172.16.0.0/12: an answer from it proves the masquerade.
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { type AttachRequest, Environment } from '../../edge/host/environment.ts';
import { hostRunner } from '../../edge/io/exec.ts';
import { hostFiles } from '../../edge/io/files.ts';
import type { CommandResult, Files, Runner } from '../../edge/ports.ts';
import { until } from '../../scripts/lab.ts';
import { parseCidr, parseIpv4 } from '../../src/addr.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';
import type { Logger } from '../../src/log.ts';
import { SILENT } from '../../src/log.ts';

export const SUBNET = unwrap(parseCidr('172.16.0.64/26'));
export const SERVICES = unwrap(parseCidr('172.30.0.0/16'));
export const PLATFORM = unwrap(parseCidr('172.16.0.0/12'));
export const GATEWAY = unwrap(parseIpv4('172.16.0.65'));
export const MTU = 1464;
export const address = (text: string) => unwrap(parseIpv4(text));

export async function must(...argv: readonly string[]): Promise<string> {
  const result = await hostRunner.run(argv);
  if (result.status !== 0) throw new Error(`${argv.join(' ')}: ${result.stderr.trim()}`);
  return result.stdout;
}

/** `ip` commands in a namespace, one program for all of them. */
export async function ipBatch(netns: string, ...lines: readonly string[]): Promise<void> {
  const result = await hostRunner.run(['ip', '-n', netns, '-batch', '-'], `${lines.join('\n')}\n`);
  if (result.status !== 0) throw new Error(`${netns}: ${result.stderr.trim()}`);
}

/** Node for programs in namespaces, whichever runtime runs the test. */
const NODE = process.env['NODE'] ?? 'node';

/** A program in a namespace, once it has said something; rejects when it ends before that, or says nothing. */
export async function start(netns: string, ...argv: readonly string[]): Promise<ChildProcess> {
  const child = spawn('nsenter', [`--net=/run/netns/${netns}`, '--', ...argv], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  await spoken(child, argv.join(' '));
  return child;
}

/** Resolves with the program's next words. */
export function spoken(child: ChildProcess, what: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const limit = setTimeout(() => done(() => reject(new Error(`${what} said nothing for 30 s`))), 30_000);
    const ended = (): void => done(() => reject(new Error(`${what} ended with ${child.exitCode}`)));
    const heard = (chunk: Buffer): void => done(() => resolve(String(chunk)));
    function done(settle: () => void): void {
      clearTimeout(limit);
      child.off('exit', ended).stdout?.off('data', heard);
      settle();
    }
    child.once('exit', ended).stdout?.once('data', heard);
  });
}

/** Answers every TCP client and UDP datagram on the port: `NAME CLIENT`. */
export function whoami(netns: string, port: number, name: string): Promise<ChildProcess> {
  return start(netns, NODE, join(import.meta.dirname!, 'whoami.mjs'), String(port), name);
}

/** Answers as long as a client goes on: `NAME CLIENT TEXT`. */
export async function echo(netns: string, port: number, name: string): Promise<ChildProcess> {
  const script = join(import.meta.dirname!, '../lab/echo.ts');
  const child = spawn('nsenter', [`--net=/run/netns/${netns}`, '--', NODE, script, String(port), name], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  await until(`${name} listens`, 30_000, async () =>
    (await within(netns).run(['ss', '-Hlnt', `sport = :${port}`])).stdout !== '' ? true : undefined,
  );
  return child;
}

/** The program of either end of a transfer. */
export function stream(...args: readonly string[]): readonly string[] {
  return [NODE, join(import.meta.dirname!, 'stream.mjs'), ...args];
}

/** A client that keeps one socket; `say` gives the answer, `error CODE` or `silence`. */
export class Talker {
  readonly child: ChildProcess;
  constructor(netns: string, protocol: 'tcp' | 'udp', host: string, port: number) {
    this.child = spawn(
      'nsenter',
      [
        ...[`--net=/run/netns/${netns}`, '--', NODE, join(import.meta.dirname!, 'talk.mjs')],
        ...[protocol, host, String(port)],
      ],
      { stdio: ['pipe', 'pipe', 'inherit'] },
    );
  }

  async say(text = 'hello'): Promise<string> {
    const answer = spoken(this.child, 'the client');
    this.child.stdin?.write(`${text}\n`);
    return (await answer).trim();
  }

  end(): void {
    this.child.kill('SIGKILL');
  }
}

/** What one new socket hears. */
export async function says(
  netns: string,
  protocol: 'tcp' | 'udp',
  host: string,
  port: number,
  text?: string,
): Promise<string> {
  const talker = new Talker(netns, protocol, host, port);
  try {
    return await talker.say(text);
  } finally {
    talker.end();
  }
}

/** Programs run inside a network namespace; files stay the machine's. */
export function within(netns: string): Runner {
  return {
    run: (argv, stdin) => hostRunner.run(['nsenter', `--net=/run/netns/${netns}`, '--', ...argv], stdin),
  };
}

export class HostLab {
  readonly prefix: string;
  readonly host: string;
  readonly outside: string;
  readonly dir: string;
  readonly runner: Runner;
  readonly #namespaces: string[] = [];

  private constructor(dir: string, label: string) {
    this.dir = dir;
    this.prefix = `ewD${process.pid}${label}`;
    this.host = `${this.prefix}-h`;
    this.outside = `${this.prefix}-o`;
    this.runner = within(this.host);
  }

  /** `label` tells the labs of one process apart. */
  static async up(label = ''): Promise<HostLab> {
    const lab = new HostLab(await mkdtemp(join(tmpdir(), 'edgeway-host-')), label);
    try {
      await lab.netns(lab.outside);
      await lab.netns(lab.host);
      await ipBatch(
        lab.host,
        `link add up0 type veth peer down0 netns ${lab.outside}`,
        'addr add 10.99.0.2/24 dev up0',
        'link set up0 up',
        'route add default via 10.99.0.1',
      );
      await ipBatch(lab.outside, 'addr add 10.99.0.1/24 dev down0', 'link set down0 up');
    } catch (error) {
      await lab.down();
      throw error;
    }
    return lab;
  }

  async netns(name: string): Promise<string> {
    await must('ip', 'netns', 'add', name);
    this.#namespaces.push(name);
    await must('ip', '-n', name, 'link', 'set', 'lo', 'up');
    return name;
  }

  /** A namespace for an instance. */
  instance(label: string): Promise<string> {
    return this.netns(`${this.prefix}-${label}`);
  }

  environment(parts: { runner?: Runner; files?: Files; log?: Logger; stateDir?: string } = {}): Environment {
    return new Environment({
      runner: parts.runner ?? this.runner,
      files: parts.files ?? hostFiles,
      log: parts.log ?? SILENT,
      names: { bridge: 'edgeway0', tun: 'edgeway-tun' },
      stateDir: parts.stateDir ?? join(this.dir, 'state'),
    });
  }

  /** Everything that could leak: of the host, of the namespaces, and files. */
  async snapshot(...namespaces: readonly string[]): Promise<string> {
    const hosts = await Promise.all([this.host, ...namespaces].map(hostSnapshot));
    const resolvConfs = filesBelow('/etc/netns').filter((file) => file.startsWith(this.prefix));
    return [...hosts, ...resolvConfs, ...filesBelow(join(this.dir, 'state'))].join('\n');
  }

  async down(): Promise<void> {
    for (const name of this.#namespaces.splice(0).toReversed()) {
      await hostRunner.run(['ip', 'netns', 'del', name]);
      await rm(`/etc/netns/${name}`, { recursive: true, force: true });
    }
    await rm(this.dir, { recursive: true, force: true });
  }
}

/** Links, addresses, routes, rules and the switch of a namespace. */
export async function hostSnapshot(netns: string): Promise<string> {
  const look = 'printf "link show\\naddr show\\nroute show table all\\n" | ip -4 -o -batch -';
  const script = `${look}; cat /proc/sys/net/ipv4/ip_forward; exec nft list ruleset 2>/dev/null`;
  const { stdout } = await within(netns).run(['sh', '-c', script]);
  // The kernel lists tables in the order in which they were last made.
  const [links = '', ...tables] = settled(stdout).split(/^(?=table )/m);
  return [`${netns}:\n${links}`, ...tables.sort()].join('');
}

/** What is below a directory, which need not be there. */
export function filesBelow(directory: string): readonly string[] {
  if (!existsSync(directory)) return [];
  return readdirSync(directory, { recursive: true, encoding: 'utf8' }).sort();
}

/** Without what changes by itself: carrier, queue, hardware addresses, counters. */
function settled(text: string): string {
  return text
    .replace(/ (?:state [A-Z]+|linkdown|(?:link\/ether|qdisc|link-netns) \S+)/g, '')
    .replace(/<[^>]*>/g, (flags) => (/\bUP\b/.test(flags) ? '<UP>' : '<>'))
    .replace(/@if\d+/g, '')
    .replace(/^\d+: /gm, '')
    .replace(/packets \d+ bytes \d+/g, '')
    .replace(/valid_lft.*$/gm, '')
    .replace(/(?<=\S) +$/gm, '');
}

/** One echo request, answered within two seconds. */
export async function reaches(netns: string, target: string): Promise<boolean> {
  const result = await within(netns).run(['busybox', 'ping', '-c', '1', '-W', '2', target]);
  return result.status === 0;
}

/** Fails or crashes at the nth thing that changes the host; counts them all. */
export class Saboteur {
  changes = 0;
  #failAt: number;
  readonly #crash: boolean;
  #dead = false;
  constructor(failAt: number, crash: boolean) {
    this.#failAt = failAt;
    this.#crash = crash;
  }

  runner(real: Runner): Runner {
    return {
      run: async (argv, stdin): Promise<CommandResult> => {
        if (this.#dead) throw new Error('the process is dead');
        if (!changes(argv)) return await real.run(argv, stdin);
        if (argv.includes('-batch') && stdin !== undefined) {
          const lines = stdin.trimEnd().split('\n');
          const at = lines.findIndex(() => this.#strikes());
          if (at < 0) return await real.run(argv, stdin);
          const cut = [...lines.slice(0, at), 'link set edgeway-nosuch up'];
          const result = await real.run(argv, `${cut.join('\n')}\n`);
          this.#die();
          return result;
        }
        if (!this.#strikes()) return await real.run(argv, stdin);
        this.#die();
        return { status: 1, stdout: '', stderr: 'sabotaged' };
      },
    };
  }

  files(real: Files): Files {
    const guard =
      <Args extends unknown[]>(act: (...args: Args) => Promise<void>) =>
      async (...args: Args): Promise<void> => {
        if (this.#dead) throw new Error('the process is dead');
        if (this.#strikes()) {
          this.#die();
          throw new Error('sabotaged');
        }
        await act(...args);
      };
    return {
      read: (path) => real.read(path),
      write: guard(real.write),
      writeInPlace: guard(real.writeInPlace),
      remove: guard(real.remove),
    };
  }

  #strikes(): boolean {
    this.changes += 1;
    return this.changes === this.#failAt;
  }

  #die(): void {
    if (!this.#crash) return;
    this.#dead = true;
    throw new Error('the process dies here');
  }
}

/** Commands that only look are never sabotaged: their failure changes nothing. */
function changes(argv: readonly string[]): boolean {
  const text = argv.filter((word) => word !== '--' && !word.startsWith('--net=')).join(' ');
  return !/^(?:nsenter )?(?:ip -j|stat|cat|iptables -w 10 (?:-t nat )?-[CS]|nft (?:-j )?list)/.test(text);
}

/** What setupNode is asked for. */
export const node = { subnet: SUBNET, services: SERVICES, platform: PLATFORM, mtu: MTU };
export const toNetns = (id: string, name: string, ip: string): AttachRequest => ({
  id,
  target: { kind: 'netns', name },
  namespaceIp: address(ip),
  subnet: SUBNET,
  mtu: MTU,
  resolvConf: { nameserver: GATEWAY },
});

/** `ok`, or `code: message`. */
export async function codeOf(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
    return 'ok';
  } catch (error) {
    return error instanceof EdgewayError ? `${error.code}: ${error.message}` : String(error);
  }
}

/** As the packet loop leaves it: the device is the loop's, with the MTU that we would give it. */
export async function addTun(netns: string): Promise<void> {
  await must('ip', '-n', netns, 'tuntap', 'add', 'edgeway-tun', 'mode', 'tun');
  await must('ip', '-n', netns, 'link', 'set', 'edgeway-tun', 'mtu', String(MTU));
}
