// Vitals on the real host: /proc for load and processes, sockets and nsenter for health checks. It decides nothing:
// what a result means stands in health.ts.
import { readFileSync, statSync } from 'node:fs';
import { request } from 'node:http';
import { connect } from 'node:net';
import { formatIpv4, type Ipv4 } from '../../src/addr.ts';
import { LoadMeter, parseLoadFile, parseProcStat } from '../../src/load.ts';
import type { HealthProbe } from '../../src/model.ts';
import type { Home, Runner, Vitals } from '../ports.ts';

/** A busy share over less than this is noise: a tick is 10 ms. */
const SAMPLE_MS = 250;

interface CheckResult {
  readonly ok: boolean;
  readonly detail: string;
}

export interface VitalsOptions {
  readonly runner: Runner;
  /** A file with one number replaces the host's own load. */
  readonly loadFile?: string;
  /** Health checks of kind `command` run only then: whoever may write a descriptor may else run programs here. */
  readonly commands: boolean;
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return undefined; // gone is an answer
  }
}

export function hostVitals(options: VitalsOptions): Vitals {
  const meter = new LoadMeter();
  let sampledAt = Number.NEGATIVE_INFINITY;

  function load(): number | undefined {
    const text = options.loadFile === undefined ? undefined : read(options.loadFile);
    const given = text === undefined ? undefined : parseLoadFile(text);
    if (given !== undefined) return given;
    const now = performance.now();
    if (now - sampledAt >= SAMPLE_MS) {
      sampledAt = now;
      const sample = parseProcStat(read('/proc/stat') ?? '');
      if (sample !== undefined) meter.add(sample);
    }
    return meter.value;
  }

  function identify(home: Home): string | undefined {
    if (home.kind === 'netns') {
      try {
        const { dev, ino } = statSync(`/run/netns/${home.name}`);
        return `${dev}:${ino}`;
      } catch {
        return undefined;
      }
    }
    const stat = read(`/proc/${home.pid}/stat`);
    if (stat === undefined) return undefined;
    // The command's name may hold spaces and brackets; field 3 (state) follows the last bracket, 22 is the start time.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    const [state] = fields;
    return state === 'Z' || state === 'X' ? undefined : fields[19];
  }

  return {
    load,
    identify,
    check: async (probe, namespaceIp, home, timeoutMs) => {
      try {
        switch (probe.kind) {
          case 'tcp':
            return await checkTcp(namespaceIp, probe.port, timeoutMs);
          case 'http':
            return await checkHttp(namespaceIp, probe.port, probe.path, timeoutMs);
          case 'command':
            return options.commands
              ? await checkCommand(options.runner, probe, home, timeoutMs)
              : {
                  ok: false,
                  detail: 'this agent runs no health commands: start it with --health-commands on',
                };
        }
      } catch (thrown) {
        return { ok: false, detail: `${probe.kind} check: ${(thrown as Error).message}` };
      }
    },
  };
}

function checkTcp(address: Ipv4, port: number, timeoutMs: number): Promise<CheckResult> {
  return new Promise((resolve) => {
    const socket = connect({ host: formatIpv4(address), port });
    const end = (ok: boolean, detail: string): void => {
      clearTimeout(limit);
      socket.destroy();
      resolve({ ok, detail });
    };
    const limit = setTimeout(() => end(false, `port ${port}: no answer within ${timeoutMs} ms`), timeoutMs);
    socket.once('connect', () => end(true, `port ${port} accepts`));
    socket.once('error', (error) => end(false, `port ${port}: ${error.message}`));
  });
}

function checkHttp(address: Ipv4, port: number, path: string, timeoutMs: number): Promise<CheckResult> {
  return new Promise((resolve) => {
    const end = (ok: boolean, detail: string): void => {
      clearTimeout(limit);
      call.destroy();
      resolve({ ok, detail });
    };
    const call = request(
      { host: formatIpv4(address), port, path, method: 'GET', agent: false },
      (response) => {
        const status = response.statusCode ?? 0;
        response.resume();
        end(status >= 200 && status < 400, `GET ${path} on port ${port}: status ${status}`);
      },
    );
    const limit = setTimeout(
      () => end(false, `GET ${path} on port ${port}: no answer within ${timeoutMs} ms`),
      timeoutMs,
    );
    call.on('error', (error) => end(false, `GET ${path} on port ${port}: ${error.message}`));
    call.end();
  });
}

/** In all namespaces of a process; of a bare network namespace only in that one. */
async function checkCommand(
  runner: Runner,
  probe: Extract<HealthProbe, { kind: 'command' }>,
  home: Home,
  timeoutMs: number,
): Promise<CheckResult> {
  const enter =
    home.kind === 'pid'
      ? ['nsenter', '--target', String(home.pid), '--all', '--']
      : ['nsenter', `--net=/run/netns/${home.name}`, '--'];
  const result = await runner.run([...enter, ...probe.command], undefined, timeoutMs);
  if (result.status === 0) return { ok: true, detail: `${probe.command[0]} exits 0` };
  const detail =
    result.status === 124
      ? `${probe.command[0]}: not done within ${timeoutMs} ms`
      : `${probe.command[0]} exits ${result.status}: ${result.stderr.trim().split('\n').at(-1) ?? ''}`;
  return { ok: false, detail };
}
