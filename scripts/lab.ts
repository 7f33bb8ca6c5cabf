// The laboratory: N hosts out of network namespaces, an etcd, one agent in each; shared by the demo and the tests.
//
//   <lab>-net            switch and etcd: bridge "under" 10.77.0.254/24, etcd :2379
//      │ veth per host, MTU 1500
//   <lab>-n1  eth0 10.77.0.1/24   agent   ── edgeway0 ── instance namespaces <lab>-<label>
//   <lab>-n2  eth0 10.77.0.2/24   agent   ── …
//
// Nothing is made outside namespaces and one directory of its own. Every name and process id is written to the
// lab's ledger before it is used, so that `down` (also of another process, also after kill -9) removes exactly these.
//   scripts/run scripts/lab.ts up [--lab NAME] [--nodes N] [--runtime node|deno] [--flag=AGENT_FLAG …] | down [--lab NAME] | list
import { type ChildProcess, spawn } from 'node:child_process';
import {
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { request } from 'node:http';
import { dirname, join } from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { DENO_HEAP_FLAGS } from '../coordinator/io/heap.ts';
import { readArguments, refuse } from './arguments.ts';
import { type Dockerd, startDockerd } from './docker_lab.ts';

const root = fileURLToPath(new URL('..', import.meta.url));
const LEDGERS = '/run/edgeway-lab';
const NETNS_FILES = '/etc/netns';
const UNDERLAY = '10.77.0';
const ETCD_HOST = 254;
export const NODES_MAX = 200;
/** Agents that come up together: a start is a second of computing. */
const STARTS_AT_ONCE = 4;

export type Runtime = 'node' | 'deno';

export interface Output {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

interface ProcessIdentity {
  readonly pid: number;
  /** Start time in clock ticks since boot (/proc/PID/stat field 22): a reused pid has another. */
  readonly started: string;
}

interface LedgerProcess extends ProcessIdentity {
  readonly what: string;
}

interface Ledger {
  readonly lab: string;
  readonly dir: string;
  /** Whose end makes the lab an abandoned one; undefined: it was meant to live on. */
  owner?: ProcessIdentity | undefined;
  readonly namespaces: string[];
  readonly processes: LedgerProcess[];
  /** Sockets of Docker Engines: their containers go first, or the engine's shims would outlive it. */
  readonly engines: string[];
  /** Files and directories outside `dir`. */
  readonly files: string[];
  /** Directories of the system that were not there before; they go when they are empty. */
  readonly parents: string[];
}

export interface LabOptions {
  /** Short unique name, at most 10 of [a-z0-9]; the default carries this process's id. */
  readonly lab?: string;
  readonly nodes: number;
  readonly runtime?: Runtime;
  /** Flags for every agent. */
  readonly agentFlags?: readonly string[];
  /** Told what is being done. */
  readonly progress?: (line: string) => void;
}

export interface LabNode {
  readonly index: number;
  readonly name: string;
  readonly netns: string;
  readonly ip: string;
  readonly apiSocket: string;
  readonly log: string;
  agent: ChildProcess | undefined;
}

export interface Answer {
  readonly status: number;
  // biome-ignore lint/suspicious/noExplicitAny: a test reads whatever the API answered
  readonly body: any;
}

function startTime(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // The command name may hold spaces and brackets; fields begin after the last bracket with field 3.
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}

const alive = ({ pid, started }: ProcessIdentity): boolean => startTime(pid) === started;

/** A failure that more time will not heal: `until` passes it on at once. */
export class Fatal extends Error {}

export interface RunOptions {
  readonly stdin?: string;
  readonly timeoutMs?: number;
  /** A group of its own, out of reach of a terminal's Ctrl-C. */
  readonly ownGroup?: boolean;
}

/** Runs a program to its end; never rejects for a non-zero status. */
export function run(argv: readonly string[], options: RunOptions = {}): Promise<Output> {
  return new Promise((resolve, reject) => {
    const [command, ...args] = argv;
    const { ownGroup: detached = false } = options;
    const child = spawn(command!, args, { stdio: ['pipe', 'pipe', 'pipe'], detached });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (chunk: Buffer) => {
      stdout += chunk.toString();
    });
    child.stderr.on('data', (chunk: Buffer) => {
      stderr += chunk.toString();
    });
    child.stdin.on('error', () => {}); // a program that does not read its input closes it
    child.stdin.end(options.stdin ?? '');
    const limit = setTimeout(() => child.kill('SIGKILL'), options.timeoutMs ?? 30_000);
    child.on('error', (cause) => {
      clearTimeout(limit);
      reject(new Error(`${argv.join(' ')}: ${cause.message}`));
    });
    child.on('close', (status) => {
      clearTimeout(limit);
      resolve({ status: status ?? 137, stdout, stderr });
    });
  });
}

/** Runs a program that must succeed. */
export async function must(argv: readonly string[], stdin?: string, options?: RunOptions): Promise<string> {
  const output = await run(argv, { ...options, ...(stdin === undefined ? {} : { stdin }) });
  if (output.status !== 0)
    throw new Error(`${argv.join(' ')}: status ${output.status}\n${output.stdout}${output.stderr}`);
  return output.stdout;
}

/** Polls until `probe` gives a value; rejects with `what` and the last failure after the bound, or with a `Fatal`. */
export async function until<T>(
  what: string,
  timeoutMs: number,
  probe: () => Promise<T | undefined> | T | undefined,
): Promise<T> {
  const deadline = performance.now() + timeoutMs;
  let last: unknown;
  for (;;) {
    try {
      const value = await probe();
      if (value !== undefined && value !== false) return value;
    } catch (thrown) {
      if (thrown instanceof Fatal) throw thrown;
      last = thrown;
    }
    if (performance.now() > deadline)
      throw new Error(
        `${what}: not within ${timeoutMs} ms${last === undefined ? '' : ` (${(last as Error).message})`}`,
      );
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** One HTTP request to a unix socket. */
export function callApi(socketPath: string, method: string, path: string, body?: unknown): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const text = body === undefined ? undefined : typeof body === 'string' ? body : JSON.stringify(body);
    const call = request(
      {
        socketPath,
        method,
        path,
        headers: {
          host: 'localhost',
          ...(text === undefined
            ? {}
            : { 'content-type': 'application/json', 'content-length': String(Buffer.byteLength(text)) }),
        },
      },
      (response) => {
        let answer = '';
        response.on('data', (chunk: Buffer) => {
          answer += chunk.toString();
        });
        response.on('end', () => {
          let parsed: unknown = answer;
          try {
            parsed = JSON.parse(answer);
          } catch {
            // not every answer is JSON; the text is kept
          }
          resolve({ status: response.statusCode ?? 0, body: parsed });
        });
      },
    );
    call.setTimeout(30_000, () => call.destroy(new Error(`${method} ${path}: no answer in 30 s`)));
    call.on('error', reject);
    call.end(text);
  });
}

export class Lab {
  readonly lab: string;
  readonly dir: string;
  readonly runtime: Runtime;
  readonly nodes: LabNode[] = [];
  readonly etcd = `${UNDERLAY}.${ETCD_HOST}:2379`;
  readonly switch: string;
  readonly #ledger: Ledger;
  readonly #nodeCount: number;
  readonly #agentFlags: readonly string[];
  readonly #progress: (line: string) => void;
  /** Commands that make something and have not ended: `down` waits for them, or it would miss what they make. */
  readonly #making = new Set<Promise<unknown>>();
  #ending: Promise<void> | undefined;

  private constructor(options: LabOptions) {
    this.lab = options.lab ?? `ewl${process.pid}`;
    if (!/^[a-z0-9]{1,10}$/.test(this.lab)) throw new Error(`lab name "${this.lab}": 1…10 of a-z 0-9`);
    if (!(Number.isInteger(options.nodes) && options.nodes >= 1 && options.nodes <= NODES_MAX))
      throw new Error(`nodes: ${options.nodes} must be 1…${NODES_MAX}`);
    this.dir = join('/tmp', `edgeway-lab-${this.lab}`);
    this.runtime = options.runtime ?? 'node';
    this.switch = `${this.lab}-net`;
    this.#nodeCount = options.nodes;
    this.#agentFlags = options.agentFlags ?? [];
    this.#progress = options.progress ?? (() => {});
    const owner = { pid: process.pid, started: startTime(process.pid) ?? '' };
    const { lab, dir } = this;
    this.#ledger = { lab, dir, owner, namespaces: [], processes: [], engines: [], files: [], parents: [] };
  }

  /** Builds hosts and etcd; agents are started by startAgent. On failure nothing is left. */
  static async up(options: LabOptions): Promise<Lab> {
    const lab = await Lab.create(options);
    await lab.build();
    return lab;
  }

  /** Claims the lab's name and makes nothing else: for those who may have to call `down` while it is built. */
  static async create(options: LabOptions): Promise<Lab> {
    const lab = new Lab(options);
    const old = readLedger(lab.lab);
    if (old !== undefined && abandoned(old)) await removeAll(old);
    lab.#claim();
    return lab;
  }

  static ledgerOf(lab: string): string {
    return join(LEDGERS, `${lab}.json`);
  }

  /** Labs whose ledger is on this machine. */
  static names(): string[] {
    if (!existsSync(LEDGERS)) return [];
    const files = readdirSync(LEDGERS).filter((file) => file.endsWith('.json'));
    return files.map((file) => file.replace(/\.json$/, ''));
  }

  /** Removes a lab that another process made, from its ledger. */
  static async sweep(lab: string): Promise<boolean> {
    const ledger = readLedger(lab);
    if (ledger !== undefined) await removeAll(ledger);
    return ledger !== undefined;
  }

  /** Removes the labs whose owner has ended without doing so; their names. */
  static async sweepAbandoned(): Promise<string[]> {
    const ledgers = Lab.names().map(readLedger);
    const left = ledgers.filter((ledger) => ledger !== undefined && abandoned(ledger)) as Ledger[];
    for (const ledger of left) await removeAll(ledger);
    return left.map((ledger) => ledger.lab);
  }

  /** The lab outlives this process: only `sweep` by its name ends it. */
  leave(): void {
    this.#ledger.owner = undefined;
    this.#save();
  }

  async build(): Promise<void> {
    try {
      mkdirSync(this.dir, { recursive: true, mode: 0o755 });
      this.#progress(`network: a switch and ${this.#nodeCount} hosts`);
      await this.#addNetns(this.switch);
      await must(
        ['ip', '-n', this.switch, '-batch', '-'],
        [
          'link add under type bridge',
          `addr add ${UNDERLAY}.${ETCD_HOST}/24 dev under`,
          'link set under up',
        ].join('\n'),
      );
      for (let index = 1; index <= this.#nodeCount; index++) await this.#addHost(index);
      this.#progress('etcd');
      await this.startEtcd();
    } catch (thrown) {
      const left = await this.down().catch((cause: Error) => `\n${cause.message}`);
      throw new Error(`${(thrown as Error).message}${left ?? ''}`, { cause: thrown });
    }
  }

  async #addHost(index: number): Promise<void> {
    const netns = `${this.lab}-n${index}`;
    const ip = `${UNDERLAY}.${index}`;
    // Each host has a resolv.conf of its own, so that nothing of ours ever writes the machine's.
    this.#addFile(`${NETNS_FILES}/${netns}`);
    mkdirSync(`${NETNS_FILES}/${netns}`, { recursive: true });
    writeFileSync(`${NETNS_FILES}/${netns}/resolv.conf`, `nameserver ${UNDERLAY}.${ETCD_HOST}\n`);
    await this.#addNetns(netns);
    await must([
      'ip',
      'link',
      'add',
      'eth0',
      'netns',
      netns,
      'type',
      'veth',
      'peer',
      'name',
      `p${index}`,
      'netns',
      this.switch,
    ]);
    await must(
      ['ip', '-n', this.switch, '-batch', '-'],
      [`link set p${index} master under`, `link set p${index} up`].join('\n'),
    );
    await must(
      ['ip', '-n', netns, '-batch', '-'],
      [
        `addr add ${ip}/24 dev eth0`,
        'link set eth0 up',
        `route add default via ${UNDERLAY}.${ETCD_HOST}`,
      ].join('\n'),
    );
    this.nodes.push({
      index,
      name: `n${index}`,
      netns,
      ip,
      apiSocket: join(this.dir, `n${index}.sock`),
      log: join(this.dir, `n${index}.log`),
      agent: undefined,
    });
  }

  /**
   * Puts a host behind a router that masquerades it, keeps its ports where it can and drops what comes unasked, as home
   * routers do. Before its agent starts; others then know the host by the router's address.
   */
  async behindNat(index: number): Promise<void> {
    const { netns } = this.node(index);
    const router = this.routerOf(index);
    const ip = `${UNDERLAY}.${100 + index}`;
    const inner = `10.78.${index}`;
    await this.#addNetns(router);
    await must(
      ['ip', '-n', this.switch, '-batch', '-'],
      [
        `link del p${index}`,
        `link add p${index} type veth peer name out0 netns ${router}`,
        `link set p${index} master under`,
        `link set p${index} up`,
      ].join('\n'),
    );
    await must(
      ['ip', '-n', router, '-batch', '-'],
      [
        `addr add ${ip}/24 dev out0`,
        'link set out0 up',
        `link add in0 type veth peer name eth0 netns ${netns}`,
        `addr add ${inner}.1/24 dev in0`,
        'link set in0 up',
      ].join('\n'),
    );
    await must(
      ['ip', '-n', netns, '-batch', '-'],
      [`addr add ${inner}.2/24 dev eth0`, 'link set eth0 up', `route add default via ${inner}.1`].join('\n'),
    );
    await must(['ip', 'netns', 'exec', router, 'sysctl', '-q', '-w', 'net.ipv4.ip_forward=1']);
    await this.#setNat(router, 'masquerade');
    this.nodes[index - 1] = { ...this.node(index), ip };
  }

  routerOf(index: number): string {
    return `${this.lab}-r${index}`;
  }

  /** That router forgets every mapping, and gives datagrams other ports from now on. */
  async forgetNat(index: number): Promise<void> {
    const router = this.routerOf(index);
    const address = `${this.node(index).ip}/24 dev out0`;
    await this.#setNat(router, 'meta l4proto udp masquerade random; oifname "out0" masquerade');
    // Linux lets go of the mappings of an address that goes; TCP from inside is taken up again in its midst.
    await must(
      ['ip', '-n', router, '-batch', '-'],
      [`addr del ${address}`, `addr add ${address}`].join('\n'),
    );
  }

  async #setNat(router: string, rule: string): Promise<void> {
    const rules = `flush ruleset
      table ip nat {
        chain post { type nat hook postrouting priority srcnat; oifname "out0" ${rule}; }
        chain unasked { type filter hook input priority filter; iifname "out0" ct state new drop; }
      }`;
    await must(['ip', 'netns', 'exec', router, 'nft', '-f', '-'], rules);
  }

  async #addNetns(netns: string): Promise<void> {
    this.#checkOpen();
    this.#ledger.namespaces.push(netns);
    this.#save();
    const making = must(['ip', 'netns', 'add', netns]);
    this.#making.add(making);
    await making.finally(() => this.#making.delete(making));
    await must(['ip', '-n', netns, 'link', 'set', 'lo', 'up']);
  }

  #addFile(path: string): void {
    this.#checkOpen();
    this.#ledger.files.push(path);
    const parent = dirname(path);
    if (!existsSync(parent)) this.#ledger.parents.push(parent);
    this.#save();
  }

  /** Nothing is made any more once `down` has begun. */
  #checkOpen(): void {
    if (this.#ending !== undefined) throw new Fatal(`lab ${this.lab} is being removed`);
  }

  /** Writes the first ledger; only one of several can. */
  #claim(): void {
    const path = Lab.ledgerOf(this.lab);
    const draft = this.#draft();
    try {
      linkSync(draft, path);
    } catch (cause) {
      if ((cause as NodeJS.ErrnoException).code !== 'EEXIST') throw cause;
      throw new Error(`lab ${this.lab} exists already; end it with: ${downCommand(this.lab)}`);
    } finally {
      rmSync(draft);
    }
  }

  /** A reader, also after kill -9, finds the whole ledger or the one before. */
  #save(): void {
    renameSync(this.#draft(), Lab.ledgerOf(this.lab));
  }

  #draft(): string {
    mkdirSync(LEDGERS, { recursive: true });
    const draft = `${Lab.ledgerOf(this.lab)}.${process.pid}`;
    writeFileSync(draft, JSON.stringify(this.#ledger, undefined, 1));
    return draft;
  }

  /** Starts a program in a namespace; its output goes to a file. It is ended by `down`. */
  spawn(
    netns: string,
    argv: readonly string[],
    logFile: string,
    env: Record<string, string> = {},
  ): ChildProcess {
    // The shell opens the file and execs: a descriptor handed to a child is closed twice on one of the runtimes.
    // `ip netns exec` execs too, so the child's pid is the program's. A group of its own keeps a terminal's Ctrl-C
    // away from it: the lab ends its processes itself, in order.
    this.#checkOpen();
    const child = spawn('sh', ['-c', 'exec ip netns exec "$@" >>"$0" 2>&1', logFile, netns, ...argv], {
      stdio: 'ignore',
      detached: true,
      cwd: root,
      env: { ...process.env, ...env },
    });
    if (child.pid === undefined) throw new Error(`${argv.join(' ')}: could not be started`);
    this.adopt(child.pid, argv.join(' '));
    return child;
  }

  /** Records a process that `down` must end. */
  adopt(pid: number, what: string): void {
    const started = startTime(pid);
    if (started === undefined) return;
    this.#ledger.processes.push({ pid, started, what });
    this.#save();
  }

  /** `loopback`: where no host reaches it. */
  async startEtcd({ loopback = false } = {}): Promise<void> {
    const url = `http://${this.etcd}`;
    const local = 'http://127.0.0.1:2379';
    const log = join(this.dir, 'etcd.log');
    const etcd = this.spawn(
      this.switch,
      // biome-ignore format: one flag and its value a line
      [
        'etcd', '--name', 'lab',
        '--data-dir', join(this.dir, 'etcd'),
        '--listen-client-urls', loopback ? local : `${url},${local}`,
        '--advertise-client-urls', url,
        '--listen-peer-urls', 'http://127.0.0.1:2380',
        '--initial-advertise-peer-urls', 'http://127.0.0.1:2380',
        '--initial-cluster', 'lab=http://127.0.0.1:2380',
        '--log-level', 'error',
      ],
      log,
    );
    await until('etcd answers', 15_000, async () => {
      this.#checkOpen();
      if (etcd.exitCode !== null || etcd.signalCode !== null)
        throw new Fatal(`it ended with ${etcd.exitCode ?? etcd.signalCode}`);
      const { status } = await run(['ip', 'netns', 'exec', this.switch, 'etcdctl', 'endpoint', 'health'], {
        timeoutMs: 3_000,
      });
      return status === 0 ? true : undefined;
    }).catch((cause: Error) => {
      throw new Error(`etcd: ${cause.message}\n${tailOf(log)}`, { cause });
    });
  }

  /** `etcdctl` against the lab's etcd. */
  async etcdctl(...args: string[]): Promise<string> {
    return await must(['ip', 'netns', 'exec', this.switch, 'env', 'ETCDCTL_API=3', 'etcdctl', ...args]);
  }

  node(index: number): LabNode {
    const node = this.nodes[index - 1];
    if (node === undefined) throw new Error(`the lab has no node ${index}`);
    return node;
  }

  /** How the agent or the command line is started under the lab's runtime. */
  command(...args: string[]): string[] {
    const runtime = this.runtime;
    if (runtime === 'deno') {
      const deno =
        process.env['DENO'] ?? (process.versions['deno'] === undefined ? undefined : process.execPath);
      if (deno === undefined) throw new Error('the environment variable DENO must name the deno binary');
      return [deno, 'run', '-A', '--quiet', DENO_HEAP_FLAGS, join(root, 'edge/main.ts'), ...args];
    }
    const node =
      process.env['NODE'] ?? (process.versions['deno'] === undefined ? process.execPath : undefined);
    if (node === undefined) throw new Error('the environment variable NODE must name the node binary');
    return [node, '--disable-warning=ExperimentalWarning', join(root, 'edge/main.ts'), ...args];
  }

  /** Starts the agent of a host and waits until its API answers. `etcd` empty: the agent starts its own. */
  async startAgent(index: number, flags: readonly string[] = [], etcd: string = this.etcd): Promise<LabNode> {
    const node = this.node(index);
    node.agent = this.spawn(
      node.netns,
      this.command(
        'agent',
        ...['--node', node.name, '--node-ip', node.ip, ...(etcd === '' ? [] : ['--etcd', etcd])],
        ...['--api', `unix:${node.apiSocket}`, '--data-dir', join(this.dir, node.name)],
        ...this.#agentFlags,
        ...flags,
      ),
      node.log,
    );
    const agent = node.agent;
    await until(`agent of ${node.name} answers`, 30_000, async () => {
      if (agent.exitCode !== null || agent.signalCode !== null)
        throw new Fatal(
          `agent of ${node.name} ended with ${agent.exitCode ?? agent.signalCode}:\n${this.tail(node)}`,
        );
      return (await callApi(node.apiSocket, 'GET', '/healthz')).status === 200 ? true : undefined;
    });
    return node;
  }

  /** Last lines of an agent's log. */
  tail(node: LabNode, lines = 30): string {
    return tailOf(node.log, lines);
  }

  api(index: number, method: string, path: string, body?: unknown): Promise<Answer> {
    return callApi(this.node(index).apiSocket, method, path, body);
  }

  /** Starts agents on all hosts, a few at a time, and registers them in order. */
  async startAll(): Promise<void> {
    for (let at = 0; at < this.nodes.length; at += STARTS_AT_ONCE)
      await Promise.all(
        this.nodes.slice(at, at + STARTS_AT_ONCE).map((node) => {
          this.#progress(`agent ${node.name} (${this.runtime})`);
          return this.startAgent(node.index);
        }),
      );
    for (const node of this.nodes) {
      const answer = await this.api(node.index, 'POST', '/register', {});
      if (answer.status !== 200)
        throw new Error(`register ${node.name}: ${JSON.stringify(answer.body)}\n${this.tail(node)}`);
    }
  }

  /** A namespace for an instance; not yet attached to anything. */
  async addInstance(label: string): Promise<string> {
    const netns = `${this.lab}-${label}`;
    // The agent writes a resolv.conf for it, and removes it again when it detaches.
    this.#addFile(`${NETNS_FILES}/${netns}`);
    await this.#addNetns(netns);
    return netns;
  }

  /** Where the lab's Docker Engine listens, once there is one; agents may be told before. */
  static dockerSocket(lab: string): string {
    return join('/tmp', `edgeway-lab-${lab}`, 'docker', 'docker.sock');
  }

  /** A Docker Engine on a host, with its default bridge and rules. One per lab. */
  async startDocker(index: number): Promise<Dockerd> {
    this.#checkOpen();
    this.#progress(`Docker Engine on n${index}`);
    const socket = Lab.dockerSocket(this.lab);
    this.#ledger.engines.push(socket);
    this.#save();
    return await startDockerd(this.node(index).netns, dirname(socket), (pid) => this.adopt(pid, 'dockerd'));
  }

  /** Runs a program in a namespace to its end. */
  exec(netns: string, argv: readonly string[], options: RunOptions = {}): Promise<Output> {
    return run(['ip', 'netns', 'exec', netns, ...argv], options);
  }

  /** Ends a process started by `spawn` and waits until it has ended. */
  async end(child: ChildProcess, signal: NodeJS.Signals = 'SIGTERM', timeoutMs = 15_000): Promise<void> {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const closed = new Promise<void>((resolve) => child.once('exit', () => resolve()));
    // Not child.kill: on Deno that makes the child look killed, however it then ends.
    process.kill(child.pid!, signal);
    const limit = setTimeout(() => child.kill('SIGKILL'), timeoutMs);
    await closed;
    clearTimeout(limit);
  }

  /** The host loses its power: its link is cut first, then its agent dies without a word. */
  async killHost(index: number): Promise<void> {
    const node = this.node(index);
    await must(['ip', '-n', this.switch, 'link', 'set', `p${index}`, 'down']);
    if (node.agent !== undefined) await this.end(node.agent, 'SIGKILL');
    node.agent = undefined;
  }

  /**
   * Removes everything, agents first so that they can leave in order. May be called at any moment, also of the
   * building, and again: there is one removal. Rejects with what is left and how to try again.
   */
  down(): Promise<void> {
    this.#ending ??= (async () => {
      await Promise.allSettled(this.#making);
      await Promise.allSettled(
        this.nodes.map((node) => (node.agent === undefined ? undefined : this.end(node.agent))),
      );
      await removeAll(this.#ledger);
    })();
    return this.#ending;
  }
}

/** A signal ends what was built and then this process: 130 when all is gone, 1 when something is left. */
export function endOnSignals(end: () => Promise<void>): { readonly interrupted: boolean } {
  const state = { interrupted: false };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const)
    process.on(signal, () => {
      console.log(`\n${signal}: cleaning up`);
      if (state.interrupted) return;
      state.interrupted = true;
      end().then(
        () => process.exit(130),
        (thrown: Error) => {
          console.error(thrown.message);
          process.exit(1);
        },
      );
    });
  return state;
}

/** How a person ends a lab by its name. */
export function downCommand(lab: string): string {
  return `scripts/run scripts/lab.ts down --lab ${lab}`;
}

function tailOf(file: string, lines = 30): string {
  return existsSync(file) ? readFileSync(file, 'utf8').trimEnd().split('\n').slice(-lines).join('\n') : '';
}

function readLedger(lab: string): Ledger | undefined {
  const path = Lab.ledgerOf(lab);
  return existsSync(path) ? (JSON.parse(readFileSync(path, 'utf8')) as Ledger) : undefined;
}

const abandoned = ({ owner }: Ledger): boolean => owner !== undefined && !alive(owner);

/** Mount points below a directory, in the order they were made. */
function mountsBelow(dir: string): string[] {
  const points = readFileSync('/proc/self/mounts', 'utf8')
    .split('\n')
    .map((line) => line.split(' ')[1] ?? '');
  return points.filter((point) => point.startsWith(`${dir}/`));
}

function signalAll(pids: readonly number[], name: NodeJS.Signals): void {
  for (const pid of pids)
    try {
      process.kill(pid, name);
    } catch {
      // it ended in between
    }
}

/**
 * Ends and removes what the ledger names, and nothing else; succeeds when things are gone already. A step that fails
 * does not keep the others from being done; the ledger stays until all have succeeded.
 */
async function removeAll(ledger: Ledger): Promise<void> {
  const left: string[] = [];
  const attempt = async (what: string, work: () => Promise<unknown>): Promise<void> => {
    try {
      await work();
    } catch (thrown) {
      left.push(`${what}: ${(thrown as Error).message}`);
    }
  };
  const clean = (...argv: string[]): Promise<string> => must(argv, undefined, { ownGroup: true });
  const living = (): number[] =>
    ledger.processes
      .toReversed()
      .filter(alive)
      .map(({ pid }) => pid);
  /** A zombie has ended: only its parent, possibly ourselves, has yet to collect it. */
  const running = (pid: number): boolean => !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  // One that ends while it is read throws, and `until` looks again.
  const gone = (): true | undefined => (living().some(running) ? undefined : true);
  const namespaces = (): string[] =>
    ledger.namespaces.toReversed().filter((netns) => existsSync(`/run/netns/${netns}`));

  for (const socket of ledger.engines.filter((path) => existsSync(path))) {
    const docker = (...args: string[]): Promise<Output> =>
      run(['docker', '-H', `unix://${socket}`, ...args], { ownGroup: true });
    await attempt(`containers of ${socket}`, async () => {
      const ids = (await docker('ps', '-aq')).stdout.split('\n').filter((id) => id !== '');
      if (ids.length > 0) await docker('rm', '-f', ...ids);
    });
  }
  signalAll(living(), 'SIGTERM');
  await until('processes end', 8_000, gone).catch(() => signalAll(living(), 'SIGKILL'));
  await attempt(`processes ${living().join(' ')}`, () => until('processes end', 5_000, gone));
  // What they started and left behind runs in namespaces that are ours alone.
  for (const netns of namespaces())
    await attempt(`processes in ${netns}`, () =>
      until('they end', 5_000, async () => {
        const pids = (await clean('ip', 'netns', 'pids', netns)).split('\n').filter((pid) => pid !== '');
        signalAll(pids.map(Number), 'SIGKILL');
        return pids.length === 0 ? true : undefined;
      }),
    );
  for (const netns of namespaces())
    await attempt(`namespace ${netns}`, () => clean('ip', 'netns', 'delete', netns));
  // An engine that was ended in a hurry leaves mounts below its directory, busy for as long as its last process ends.
  for (const mount of mountsBelow(ledger.dir).toReversed())
    await attempt(`mount ${mount}`, () =>
      until('it can be unmounted', 5_000, async () => {
        await clean('umount', mount);
        return true;
      }),
    );
  for (const path of [...ledger.files, ...(mountsBelow(ledger.dir).length === 0 ? [ledger.dir] : [])])
    await attempt(path, async () => rmSync(path, { recursive: true, force: true, maxRetries: 5 }));
  if (left.length > 0)
    throw new Error(
      `lab ${ledger.lab} is not gone: ${left.join('; ')}. Try again with: ${downCommand(ledger.lab)}`,
    );
  rmSync(Lab.ledgerOf(ledger.lab), { force: true });
  for (const parent of [...ledger.parents, LEDGERS])
    try {
      rmdirSync(parent);
    } catch {
      // others use it, or removed it
    }
}

/** `scripts/run scripts/lab.ts up|down|list`: a laboratory to play with. */
async function main(): Promise<void> {
  const { values, positionals } = readArguments(import.meta.url, {
    allowPositionals: true,
    options: {
      lab: { type: 'string', default: 'ewlab' },
      nodes: { type: 'string', default: '3' },
      runtime: { type: 'string', default: 'node' },
      flag: { type: 'string', multiple: true, default: [] },
    },
  });
  const [verb] = positionals;
  if (verb === 'list') {
    for (const name of Lab.names()) console.log(name);
    return;
  }
  if (verb === 'down') {
    console.log(
      (await Lab.sweep(values.lab)) ? `lab ${values.lab} is gone` : `there is no lab ${values.lab}`,
    );
    return;
  }
  if (verb !== 'up') refuse(import.meta.url, 'what to do must be up, down or list');
  if (values.runtime !== 'node' && values.runtime !== 'deno')
    refuse(import.meta.url, `--runtime ${values.runtime}: must be node or deno`);
  const lab = await Lab.create({
    lab: values.lab,
    nodes: Number(values.nodes),
    runtime: values.runtime,
    agentFlags: values.flag,
    progress: (line) => console.log(line),
  });
  const signals = endOnSignals(() => lab.down());
  try {
    await lab.build();
    await lab.startAll();
  } catch (thrown) {
    await lab.down();
    if (signals.interrupted) await new Promise(() => {}); // the handler has the last word
    throw thrown;
  }
  for (const node of lab.nodes)
    console.log(`${node.name}  ip netns exec ${node.netns} …  --api unix:${node.apiSocket}  ${node.log}`);
  console.log(`etcd  ip netns exec ${lab.switch} etcdctl get --prefix /edgeway/v1/`);
  lab.leave();
  process.exit(0); // its processes live on
}

if (process.argv[1] === fileURLToPath(import.meta.url))
  try {
    await main();
  } catch (thrown) {
    console.error((thrown as Error).message);
    process.exit(1);
  }
