// A laboratory for the data plane alone: hosts and instances out of network namespaces, a packet loop in each host,
// routes told by hand. Everything has a name of its own and is taken away by exact name and pid.
//
//   inst ── veth ── bridge ─ host 1 ─ tun        host 2 …        host n: subnet 172.16.0.64·n/26, instances .66, .67 …
//                             └── veth ── switch ── veth ──┘     underlay 10.78.0.n, MTU 1500
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { DENO_HEAP_FLAGS } from '../coordinator/io/heap.ts';
import type { InstanceRoute, ProxyCommand, ProxyConfig, ProxyReport } from '../edge/proxy/command.ts';
import { formatIpv4, type Ipv4, ipv4 } from '../src/addr.ts';
import { MTU_DEFAULT, sendSegments, VNI_DEFAULT } from '../src/limits.ts';
import type { ServiceId } from '../src/name.ts';

const root = join(import.meta.dirname, '..');
export const SERVICES = 0xac1e0000;

export type Runtime = 'node' | 'deno';

/** The command that runs a TypeScript file of this tree. */
export function runtimeArgv(runtime: Runtime): string[] {
  return runtime === 'deno'
    ? [process.env['DENO'] ?? 'deno', 'run', '-A', '--quiet', DENO_HEAP_FLAGS]
    : [process.env['NODE'] ?? process.execPath, '--disable-warning=ExperimentalWarning'];
}

export function shell(argv: readonly string[], input?: string): string {
  const [command, ...args] = argv;
  const result = spawnSync(command!, args, { encoding: 'utf8', ...(input === undefined ? {} : { input }) });
  if (result.status !== 0)
    throw new Error(`${argv.join(' ')}: ${(result.stderr || result.error?.message || '').trim()}`);
  return result.stdout;
}

function ipBatch(netns: string | undefined, lines: readonly string[]): void {
  const where = netns === undefined ? [] : ['-n', netns];
  shell(['ip', ...where, '-batch', '-'], `${lines.join('\n')}\n`);
}

export const inside = (netns: string, ...argv: string[]): string[] => ['ip', 'netns', 'exec', netns, ...argv];

export interface LinkEnd {
  readonly netns: string;
  readonly device: string;
}

/** Off, every frame on the link has its real size and the receiver joins them; on, a veth lets super-packets through. */
export function setOffloads(ends: readonly LinkEnd[], on: boolean): void {
  const state = on ? 'on' : 'off';
  const set = ['tso', 'gso', 'tx-udp-segmentation'].flatMap((name) => [name, state]);
  for (const { netns, device } of ends)
    shell(inside(netns, 'ethtool', '-K', device, ...set, 'gro', on ? 'off' : 'on'));
}

function octets(_key: string, value: unknown): unknown {
  return value instanceof Uint8Array ? { octets: [...value] } : value;
}

export interface LabInstance {
  readonly netns: string;
  readonly host: LabHost;
  readonly namespaceIp: Ipv4;
  readonly instanceIp: Ipv4;
  readonly service: ServiceId;
  readonly number: number;
}

export class LabHost {
  readonly index: number;
  readonly netns: string;
  nodeIp: Ipv4;
  readonly subnet: Ipv4;
  readonly bridge: Ipv4;
  readonly reports: ProxyReport[] = [];
  readonly instances: LabInstance[] = [];
  process: ChildProcess | undefined;
  #answers: ((value: Record<string, unknown>) => void)[] = [];
  stderr = '';

  constructor(prefix: string, index: number) {
    this.index = index;
    this.netns = `${prefix}-h${index}`;
    this.nodeIp = ipv4(0x0a4e0000 + index);
    this.subnet = ipv4(0xac100000 + 64 * index);
    this.bridge = ipv4(this.subnet + 1);
  }

  /** Starts the packet loop; resolves when it is ready. `flags` are the runtime's own. */
  async start(
    runtime: Runtime,
    changes: Partial<ProxyConfig> = {},
    flags: readonly string[] = [],
  ): Promise<void> {
    const config: ProxyConfig = {
      tun: 'ewtun',
      mtu: MTU_DEFAULT,
      vni: VNI_DEFAULT,
      nodeIp: this.nodeIp,
      ewp: 4790,
      servicesBase: ipv4(SERVICES),
      servicesBits: 16,
      subnetBase: this.subnet,
      subnetBits: 26,
      flowsMax: 65_536,
      seed: this.index,
      ...changes,
    };
    const file = join(root, 'scripts/proxy_host.ts');
    const argv = inside(this.netns, ...runtimeArgv(runtime), ...flags, file);
    const child = spawn(argv[0]!, argv.slice(1), { cwd: root, stdio: ['pipe', 'pipe', 'pipe'] });
    this.process = child;
    child.stderr.on('data', (chunk: Buffer) => {
      this.stderr = (this.stderr + chunk.toString()).slice(-10_000);
    });
    const ready = Promise.withResolvers<void>();
    createInterface({ input: child.stdout }).on('line', (line) => {
      const value = JSON.parse(line) as { report?: ProxyReport } & Record<string, unknown>;
      if (value.report === undefined) {
        this.#answers.shift()?.(value);
        return;
      }
      this.reports.push(value.report);
      if (value.report.kind === 'ready') ready.resolve();
      if (value.report.kind === 'stopped') ready.reject(new Error(value.report.error ?? 'stopped'));
    });
    child.on('exit', () => ready.reject(new Error(`packet loop ended: ${this.stderr}`)));
    child.stdin.write(`${JSON.stringify({ config }, octets)}\n`);
    await ready.promise;
    ipBatch(this.netns, [
      `route replace ${formatIpv4(ipv4(SERVICES))}/16 dev ${config.tun} src ${formatIpv4(this.bridge)}`,
    ]);
  }

  send(...commands: ProxyCommand[]): void {
    this.process?.stdin?.write(`${JSON.stringify({ commands }, octets)}\n`);
  }

  async #ask(what: 'counters' | 'memory'): Promise<Record<string, unknown>> {
    const answer = Promise.withResolvers<Record<string, unknown>>();
    this.#answers.push(answer.resolve);
    this.process?.stdin?.write(`${JSON.stringify({ ask: what })}\n`);
    return answer.promise;
  }
  async counters(): Promise<Record<string, number>> {
    return (await this.#ask('counters'))['counters'] as Record<string, number>;
  }
  /** Resident set in kB and CPU time so far in ms, of the whole process. */
  async memory(): Promise<{ rssKb: number; cpuMs: number }> {
    return (await this.#ask('memory'))['memory'] as { rssKb: number; cpuMs: number };
  }

  async stop(): Promise<void> {
    const child = this.process;
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.stdin?.write('{"stop":true}\n');
    const late = setTimeout(() => child.kill('SIGKILL'), 5_000);
    await gone;
    clearTimeout(late);
    this.process = undefined;
  }
}

export class ProxyLab {
  readonly prefix: string;
  readonly hosts: LabHost[] = [];
  readonly #namespaces: string[] = [];
  /** Per service: its number in the address plan, and its policies' addresses. */
  readonly #services = new Map<ServiceId, number>();

  constructor(prefix = `ewA${process.pid}`) {
    this.prefix = prefix;
  }

  #netns(name: string): void {
    shell(['ip', 'netns', 'add', name]);
    this.#namespaces.push(name);
    ipBatch(name, ['link set lo up']);
  }

  /** Makes the underlay and that many hosts. Two hosts may be joined by one veth pair instead of a switch. */
  up(hosts: number, underlayMtu = 1500, direct = false): void {
    if (direct) {
      this.#pair();
      return;
    }
    const wire = `${this.prefix}-w`;
    this.#netns(wire);
    ipBatch(wire, ['link add sw type bridge', `link set sw mtu ${underlayMtu} up`]);
    for (let index = 1; index <= hosts; index++) {
      const host = new LabHost(this.prefix, index);
      this.hosts.push(host);
      this.#netns(host.netns);
      ipBatch(wire, [
        `link add p${index} mtu ${underlayMtu} type veth peer name up0 mtu ${underlayMtu} netns ${host.netns}`,
        `link set p${index} master sw`,
        `link set p${index} up`,
      ]);
      this.#dress(host);
    }
  }

  #pair(): void {
    const [one, two] = [1, 2].map((index) => {
      const host = new LabHost(this.prefix, index);
      this.hosts.push(host);
      this.#netns(host.netns);
      return host;
    }) as [LabHost, LabHost];
    ipBatch(one.netns, [`link add up0 type veth peer name up0 netns ${two.netns}`]);
    this.#dress(one);
    this.#dress(two);
  }

  /** Addresses, bridge and forwarding of a host whose uplink is there. */
  #dress(host: LabHost): void {
    ipBatch(host.netns, [
      `addr add ${formatIpv4(host.nodeIp)}/24 dev up0`,
      'link set up0 up',
      'link add br0 type bridge',
      `link set br0 mtu ${MTU_DEFAULT}`,
      `addr add ${formatIpv4(host.bridge)}/26 dev br0`,
      'link set br0 up',
    ]);
    const settings = ['net.ipv4.ip_forward=1', 'net.ipv4.conf.all.rp_filter=0'];
    shell(inside(host.netns, 'sysctl', '-q', '-w', ...settings));
  }

  /**
   * Puts a host behind a NAT of nftables: it is 10.80.0.2 now, and seen from the others as 10.78.0.50 with a port that
   * the NAT chooses.
   */
  behindNat(host: LabHost): void {
    const nat = `${this.prefix}-n`;
    this.#netns(nat);
    ipBatch(`${this.prefix}-w`, [
      `link add p50 type veth peer name out0 netns ${nat}`,
      'link set p50 master sw',
      'link set p50 up',
    ]);
    ipBatch(host.netns, ['link del up0', `link add up0 type veth peer name in0 netns ${nat}`]);
    ipBatch(nat, [
      'addr add 10.78.0.50/24 dev out0',
      'addr add 10.80.0.1/24 dev in0',
      'link set out0 up',
      'link set in0 up',
    ]);
    ipBatch(host.netns, [
      'addr add 10.80.0.2/24 dev up0',
      'link set up0 up',
      'route add default via 10.80.0.1',
    ]);
    shell(inside(nat, 'sysctl', '-q', '-w', 'net.ipv4.ip_forward=1'));
    const rules = [
      'table ip nat {',
      '  chain post {',
      '    type nat hook postrouting priority srcnat',
      '    oifname "out0" masquerade random',
      '  }',
      '}',
      '',
    ];
    shell(inside(nat, 'nft', '-f', '-'), rules.join('\n'));
    host.nodeIp = ipv4(0x0a500002);
  }

  /** An instance of a service, by number, in a network namespace behind the host's bridge. */
  instance(host: LabHost, service: string, number: number): LabInstance {
    const id = service as ServiceId;
    const place = host.instances.length + 2;
    const netns = `${this.prefix}-h${host.index}i${place}`;
    const index = this.#serviceIndex(id);
    const instance: LabInstance = {
      netns,
      host,
      namespaceIp: ipv4(host.subnet + place),
      instanceIp: ipv4(SERVICES + 0x8000 + index * 64 + number),
      service: id,
      number,
    };
    this.#netns(netns);
    ipBatch(host.netns, [
      `link add v${place} mtu ${MTU_DEFAULT} type veth peer name eth0 mtu ${MTU_DEFAULT} netns ${netns}`,
      `link set v${place} master br0 up`,
      `link set dev v${place} type bridge_slave isolated on`,
    ]);
    ipBatch(netns, [
      `addr add ${formatIpv4(instance.namespaceIp)}/26 dev eth0`,
      'link set eth0 up',
      // As the agent does (edge/host/plan.ts); a host without a loop is the kernel's own.
      ...(host.process === undefined ? [] : [`link set eth0 gso_max_segs ${sendSegments(MTU_DEFAULT)}`]),
      `route add default via ${formatIpv4(host.bridge)}`,
    ]);
    host.instances.push(instance);
    return instance;
  }

  #serviceIndex(id: ServiceId): number {
    let index = this.#services.get(id);
    if (index === undefined) {
      index = this.#services.size + 1;
      this.#services.set(id, index);
    }
    return index;
  }

  /** ServiceIP of a service for `roundrobin`, `closest`, `fastest`. */
  serviceIp(service: string, policy: 0 | 1 | 2 = 0): Ipv4 {
    return ipv4(SERVICES + this.#serviceIndex(service as ServiceId) * 4 + policy);
  }

  route(instance: LabInstance, to: LabHost): InstanceRoute {
    return {
      instance: instance.number,
      instanceIp: instance.instanceIp,
      namespaceIp: instance.namespaceIp,
      nodeIp: instance.host.nodeIp,
      ewp: 4790,
      local: instance.host === to,
    };
  }

  serviceCommand(service: string, instances: readonly LabInstance[], to: LabHost): ProxyCommand {
    return {
      kind: 'service',
      service: service as ServiceId,
      addresses: {
        roundrobin: this.serviceIp(service, 0),
        closest: this.serviceIp(service, 1),
        fastest: this.serviceIp(service, 2),
      },
      instances: instances.map((instance) => this.route(instance, to)),
    };
  }

  /** Tells every host everything: all services with all instances, and its own instances' rights. */
  tellAll(needs: Readonly<Record<string, readonly string[]>> = {}): void {
    const all = this.hosts.flatMap((host) => host.instances);
    const services = [...new Set([...this.#services.keys(), ...all.map(({ service }) => service)])];
    for (const host of this.hosts) {
      host.send(
        ...services.map((service) =>
          this.serviceCommand(
            service,
            all.filter((instance) => instance.service === service),
            host,
          ),
        ),
        ...host.instances.map((instance): ProxyCommand => {
          const needed = needs[instance.service] as readonly ServiceId[] | undefined;
          return {
            kind: 'local',
            namespaceIp: instance.namespaceIp,
            instanceIp: instance.instanceIp,
            service: instance.service,
            ...(needed === undefined ? {} : { needs: needed }),
          };
        }),
      );
    }
  }

  /** Takes everything away, also after a failure half-way. */
  async down(): Promise<void> {
    await Promise.all(this.hosts.map((host) => host.stop()));
    for (const netns of this.#namespaces.splice(0).reverse()) spawnSync('ip', ['netns', 'del', netns]);
  }
}
