// The seams between the agent's machines and the world. Each is small enough to be implemented truly in a test.
import type { Ipv4 } from '../src/addr.ts';
import type { HealthProbe } from '../src/model.ts';
import type { ProxyCommand, ProxyConfig, ProxyReport } from './proxy/command.ts';

/** Monotonic and wall time in milliseconds. */
export interface Clock {
  /** Never goes back; origin arbitrary. */
  monotonicMs(): number;
  /** Milliseconds since 1970, for people. */
  wallMs(): number;
}

/** One-shot timers; a callback never runs before `after` has returned. */
export interface Timers {
  /** Runs the callback once, `ms` from now; the answer cancels it. */
  after(ms: number, callback: () => void): () => void;
}

export interface CommandResult {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a program of the host (`ip`, `nft`, `nsenter`, …) with an argument vector and, if given, standard input. */
export interface Runner {
  /** `limitMs` (default COMMAND_LIMIT_MS): then it is killed with its children, and its status is 124. */
  run(argv: readonly string[], stdin?: string, limitMs?: number): Promise<CommandResult>;
}

/** The few file operations that host set-up needs; paths are absolute. */
export interface Files {
  /** Undefined when it does not exist. */
  read(path: string): Promise<string | undefined>;
  /** Replaces the whole content atomically (a new file renamed over the old one). */
  write(path: string, content: string): Promise<void>;
  /** Truncates and writes the same inode: for files that somebody has bind-mounted. */
  writeInPlace(path: string, content: string): Promise<void>;
  /** Succeeds when it is gone already. */
  remove(path: string): Promise<void>;
}

/** Does the work while no other process does any for the same directory. */
export type Lock = <T>(directory: string, work: () => Promise<T>) => Promise<T>;

/** A container as the Docker Engine describes it. */
export interface Container {
  readonly id: string;
  readonly name: string;
  readonly pid: number;
  /** Host path of the file that is mounted as /etc/resolv.conf, if the engine manages one. */
  readonly resolvConfPath?: string;
}

export interface ContainerEngine {
  /** By name, id or unambiguous id prefix. Rejects with container_unknown, container_not_running, docker_unavailable. */
  inspect(nameOrId: string): Promise<Container>;
}

/** The packet loop, wherever it runs. Counters are cumulative since start. */
export interface PacketLoop {
  send(command: ProxyCommand): void;
  counters(): Readonly<Record<string, number>>;
  /** Flows currently tracked. */
  flows(): number;
  stop(): Promise<void>;
}

export type StartPacketLoop = (
  config: ProxyConfig,
  report: (report: ProxyReport) => void,
) => Promise<PacketLoop>;

/** A process or network namespace that an instance lives in. */
export type Home =
  | { readonly kind: 'netns'; readonly name: string }
  | { readonly kind: 'pid'; readonly pid: number };

/** The host's pulse, and that of the instances on it. */
export interface Vitals {
  /** Demand per core of this host (src/load.ts); undefined when it cannot be measured yet. */
  load(): number | undefined;
  /** What identifies the process (start time) or namespace (inode) as long as it exists; undefined when it does not.
   *  Answers at once. */
  identify(home: Home): string | undefined;
  /** Runs one health check; resolves within the time limit, never rejects. */
  check(
    probe: HealthProbe,
    namespaceIp: Ipv4,
    home: Home,
    timeoutMs: number,
  ): Promise<{ readonly ok: boolean; readonly detail: string }>;
}

/** A listening HTTP server. */
export interface HttpServer {
  /** Stops listening and ends open connections. */
  stop(): Promise<void>;
}
