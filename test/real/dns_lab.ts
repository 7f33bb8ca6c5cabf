// A host and its clients for the resolver's real tests, out of network namespaces; everything is removed by exact name
// or pid, also after a failure.
//
//   host namespace                               client namespace (own /run, own resolv.conf)
//   br0 172.16.0.65/26 ─ veth ─────────────────── eth0 172.16.0.66/26
//   the resolver (dns_host.ts), upstream on lo     dig, getent, avahi, …
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import process from 'node:process';
import { createInterface, type Interface } from 'node:readline';

export interface Ran {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
  readonly ms: number;
}

/** Runs a program to its end, at most `limitMs`. */
export function run(
  argv: readonly string[],
  options: { limitMs?: number; input?: string } = {},
): Promise<Ran> {
  const started = performance.now();
  return new Promise((resolve) => {
    const child = spawn(argv[0]!, argv.slice(1), { stdio: ['pipe', 'pipe', 'pipe'] });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (chunk: Buffer) => {
      stdout += chunk.toString();
    });
    child.stderr.on('data', (chunk: Buffer) => {
      stderr += chunk.toString();
    });
    const timer = setTimeout(() => child.kill('SIGKILL'), options.limitMs ?? 30_000);
    child.on('error', (error) => {
      clearTimeout(timer);
      resolve({ status: 127, stdout, stderr: error.message, ms: performance.now() - started });
    });
    child.on('close', (status) => {
      clearTimeout(timer);
      resolve({ status: status ?? 128, stdout, stderr, ms: performance.now() - started });
    });
    child.stdin.on('error', () => {});
    child.stdin.end(options.input ?? '');
  });
}

export async function must(argv: readonly string[]): Promise<string> {
  const ran = await run(argv);
  if (ran.status !== 0)
    throw new Error(`${argv.join(' ')}: status ${ran.status}: ${ran.stderr}${ran.stdout}`);
  return ran.stdout;
}

/** Polls until the condition holds; the error names what was waited for. */
export async function until(
  what: string,
  condition: () => Promise<boolean> | boolean,
  limitMs = 10_000,
): Promise<void> {
  const deadline = performance.now() + limitMs;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`waited ${limitMs} ms for: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
}

/** How this test's own runtime starts a TypeScript file. */
export function runtimeArgv(file: string): readonly string[] {
  const isDeno = 'Deno' in globalThis;
  return isDeno
    ? [process.execPath, 'run', '-A', '--quiet', file]
    : [process.execPath, '--disable-warning=ExperimentalWarning', file];
}

/** A long-running child with one JSON line per message each way. */
export class Talker {
  readonly child: ChildProcess;
  readonly #lines: Interface;
  readonly #waiting: ((line: string) => void)[] = [];
  readonly #early: string[] = [];
  stderr = '';
  exited = false;
  isDaemon = false;

  constructor(argv: readonly string[]) {
    this.child = spawn(argv[0]!, argv.slice(1), { stdio: ['pipe', 'pipe', 'pipe'] });
    this.child.stderr!.on('data', (chunk: Buffer) => {
      this.stderr += chunk.toString();
    });
    this.child.stdin!.on('error', () => {});
    this.#lines = createInterface({ input: this.child.stdout! });
    this.#lines.on('line', (line) => {
      const next = this.#waiting.shift();
      if (next === undefined) this.#early.push(line);
      else next(line);
    });
    this.child.on('close', () => {
      this.exited = true;
      for (const next of this.#waiting.splice(0)) next(JSON.stringify({ error: `ended: ${this.stderr}` }));
    });
  }
  async next(): Promise<Record<string, unknown>> {
    const line =
      this.#early.shift() ??
      (await new Promise<string>((resolve, reject) => {
        const timer = setTimeout(() => reject(new Error(`no answer in 20 s: ${this.stderr}`)), 20_000);
        const take = (text: string): void => {
          clearTimeout(timer);
          resolve(text);
        };
        if (this.exited) take(JSON.stringify({ error: `ended: ${this.stderr}` }));
        else this.#waiting.push(take);
      }));
    const message = JSON.parse(line) as Record<string, unknown>;
    if (message['error'] !== undefined) throw new Error(String(message['error']));
    return message;
  }
  ask(message: object): Promise<Record<string, unknown>> {
    this.child.stdin!.write(`${JSON.stringify(message)}\n`);
    return this.next();
  }
  async end(): Promise<void> {
    if (this.exited) return;
    const closed = new Promise<void>((resolve) => this.child.on('close', () => resolve()));
    this.child.stdin!.end();
    // A daemon does not look at its input.
    if (this.isDaemon) this.child.kill('SIGTERM');
    const timer = setTimeout(() => this.child.kill('SIGKILL'), 5_000);
    await closed;
    clearTimeout(timer);
  }
}

export class DnsLab {
  static #count = 0;
  readonly tag = `ewB${process.pid}${'abcdefghij'[DnsLab.#count++ % 10]}`;
  readonly directory = mkdtempSync(join(tmpdir(), 'edgeway-dns-'));
  readonly host = `${this.tag}-h`;
  readonly bridge = '172.16.0.65';
  readonly #namespaces: string[] = [];
  readonly #talkers: Talker[] = [];
  readonly #holders: ChildProcess[] = [];

  async up(): Promise<this> {
    await this.#namespace(this.host);
    await this.inHost(['ip', 'link', 'add', 'br0', 'type', 'bridge']);
    await this.inHost(['ip', 'addr', 'add', `${this.bridge}/26`, 'dev', 'br0']);
    await this.inHost(['ip', 'link', 'set', 'br0', 'up']);
    return this;
  }
  async #namespace(name: string): Promise<void> {
    await must(['ip', 'netns', 'add', name]);
    this.#namespaces.push(name);
    await must(['ip', '-n', name, 'link', 'set', 'lo', 'up']);
  }
  inHost(argv: readonly string[]): Promise<string> {
    return must(['ip', 'netns', 'exec', this.host, ...argv]);
  }

  /** A client on the bridge; `files` replace those of the same name in its /etc. */
  async client(number: number, files: Readonly<Record<string, string>> = {}): Promise<Client> {
    const name = `${this.tag}-c${number}`;
    const etc = join(this.directory, `etc${number}`);
    mkdirSync(etc, { recursive: true });
    const all = { 'resolv.conf': `nameserver ${this.bridge}\noptions ndots:1\n`, ...files };
    for (const [file, content] of Object.entries(all)) writeFileSync(join(etc, file), content);
    await this.#namespace(name);
    await must([
      'ip',
      '-n',
      this.host,
      'link',
      'add',
      `v${number}`,
      'type',
      'veth',
      'peer',
      'name',
      'eth0',
      'netns',
      name,
    ]);
    await must(['ip', '-n', this.host, 'link', 'set', `v${number}`, 'master', 'br0', 'up']);
    await must(['ip', '-n', name, 'addr', 'add', `172.16.0.${65 + number}/26`, 'dev', 'eth0']);
    await must(['ip', '-n', name, 'link', 'set', 'eth0', 'up']);
    await must(['ip', '-n', name, 'route', 'add', 'default', 'via', this.bridge]);
    return this.#space(name, etc);
  }
  /** The host itself as a place to run programs, with its own /etc and /run. */
  hostSpace(files: Readonly<Record<string, string>>): Promise<Client> {
    const etc = join(this.directory, 'etc-host');
    mkdirSync(etc, { recursive: true });
    for (const [file, content] of Object.entries(files)) {
      mkdirSync(dirname(join(etc, file)), { recursive: true });
      writeFileSync(join(etc, file), content);
    }
    return this.#space(this.host, etc);
  }
  /** Holds a mount namespace in which /run is empty and /etc has these files; nothing written there gets out. */
  async #space(name: string, etc: string): Promise<Client> {
    const script = `mount -t tmpfs tmpfs /run && cp -a /etc /run/etc && cp -a ${etc}/. /run/etc/ && mount --bind /run/etc /etc && echo up && exec sleep infinity`;
    const holder = spawn('ip', ['netns', 'exec', name, 'sh', '-c', script], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    this.#holders.push(holder);
    await new Promise<void>((resolve, reject) => {
      holder.stdout.once('data', () => resolve());
      holder.once('close', () => reject(new Error(`${name}: its namespace ended`)));
    });
    return new Client(this, name, holder.pid!);
  }

  /** The resolver in the host's namespace, on the runtime of this test. */
  async resolver(options: object = {}): Promise<Talker> {
    const file = join(import.meta.dirname, 'dns_host.ts');
    const talker = this.talk([
      'ip',
      'netns',
      'exec',
      this.host,
      ...runtimeArgv(file),
      JSON.stringify(options),
    ]);
    await talker.next();
    return talker;
  }
  talk(argv: readonly string[]): Talker {
    const talker = new Talker(argv);
    this.#talkers.push(talker);
    return talker;
  }

  async down(): Promise<void> {
    for (const talker of this.#talkers) await talker.end();
    for (const holder of this.#holders) holder.kill('SIGKILL');
    for (const name of this.#namespaces) {
      // Daemons that a test started inside end with their namespace, each by its pid.
      const pids = await run(['ip', 'netns', 'pids', name]);
      for (const pid of pids.stdout.split('\n').filter((text) => /^\d+$/.test(text))) {
        try {
          process.kill(Number(pid), 'SIGKILL');
        } catch {
          // it has ended by itself
        }
      }
      await run(['ip', 'netns', 'del', name]);
    }
    rmSync(this.directory, { recursive: true, force: true });
  }
}

export class Client {
  readonly lab: DnsLab;
  readonly name: string;
  readonly pid: number;
  constructor(lab: DnsLab, name: string, pid: number) {
    this.lab = lab;
    this.name = name;
    this.pid = pid;
  }
  enter(argv: readonly string[]): readonly string[] {
    return ['nsenter', '-t', String(this.pid), '-m', '-n', '--', ...argv];
  }
  run(argv: readonly string[], options: { limitMs?: number; input?: string } = {}): Promise<Ran> {
    return run(this.enter(argv), options);
  }
  /** A daemon that stays in the foreground; it ends with the lab. */
  start(argv: readonly string[]): Talker {
    const talker = this.lab.talk(this.enter(argv));
    talker.isDaemon = true;
    return talker;
  }
  /** A system bus and avahi-daemon of this client alone. */
  async avahi(): Promise<void> {
    await must(this.enter(['mkdir', '-p', '/run/dbus', '/run/avahi-daemon']));
    this.start(['dbus-daemon', '--system', '--nofork', '--nopidfile']);
    await until(
      'the system bus',
      async () => (await this.run(['test', '-S', '/run/dbus/system_bus_socket'])).status === 0,
    );
    this.start(['avahi-daemon', '--no-drop-root', '--no-chroot', '--no-rlimits']);
    await until(
      'avahi-daemon',
      async () =>
        (await this.run(['avahi-resolve', '-V'])).status === 0 &&
        (await this.run(['test', '-S', '/run/avahi-daemon/socket'])).status === 0,
    );
  }
}
