// Runs a plan through Runner and Files; on failure it undoes what was done, newest first, and says which command the
// host refused. It refuses to stop half-way: either every step holds or none does.
import { EdgewayError, toEdgewayError } from '../../src/error.ts';
import type { Logger } from '../../src/log.ts';
import type { CommandResult, Files, Runner } from '../ports.ts';
import {
  type Action,
  type CommandAction,
  type FileAction,
  formatAction,
  type Plan,
  type Step,
} from './plan.ts';

export interface Host {
  readonly runner: Runner;
  readonly files: Files;
  readonly log: Logger;
}

/** What programs say when the thing that is to be removed is gone. */
const GONE =
  /Cannot find device|No such (?:file|process|device)|does not exist|No chain\/target\/match|Bad rule|Couldn't load target|Address not found|Cannot assign requested address|not empty|is not installed/;

/** Why a plan did not come about, and whether everything that it had begun was taken back. */
export interface Failure {
  readonly error: EdgewayError;
  readonly undone: boolean;
}

/** Undefined when every step holds. */
export async function apply(host: Host, plan: Plan): Promise<Failure | undefined> {
  const begun: Step[] = [];
  try {
    for (const group of grouped(plan)) {
      begun.push(...group);
      await perform(host, group);
    }
    return undefined;
  } catch (thrown) {
    const undone = await clear(
      host,
      begun.toReversed().flatMap((step) => step.undo),
    ).then(
      () => true,
      () => false,
    );
    return { error: toEdgewayError(thrown), undone };
  }
}

/** Every action, whether or not there is anything left to take away. Says which ones the host refused. */
export async function clear(host: Host, actions: readonly Action[]): Promise<void> {
  let first: unknown;
  for (const action of actions) {
    try {
      await one(host, action, true);
    } catch (error) {
      first ??= error;
      host.log.warn({ command: formatAction(action), error: (error as Error).message }, 'could not clean up');
    }
  }
  if (first !== undefined) throw first;
}

/** Neighbouring `ip` commands of one namespace go to one `ip -batch`, which stops at the first refusal; neighbouring
 *  switches of one namespace that get the same value, to one `tee`. */
function grouped(plan: Plan): readonly (readonly Step[])[] {
  const groups: Step[][] = [];
  for (const step of plan) {
    const group = groups.at(-1);
    const last = group?.at(-1);
    if (group !== undefined && last !== undefined && joins(last, step)) group.push(step);
    else groups.push([step]);
  }
  return groups;
}

function joins(last: Step, { act, lenient }: Step): boolean {
  if (last.lenient || lenient) return false;
  if (last.act.kind === 'ip') return act.kind === 'ip' && last.act.netns === act.netns;
  if (last.act.kind !== 'sysctl' || act.kind !== 'sysctl') return false;
  return last.act.netns === act.netns && last.act.value === act.value;
}

async function perform(host: Host, group: readonly Step[]): Promise<void> {
  const [first] = group;
  if (first === undefined) return;
  if (group.length === 1) return await one(host, first.act, first.lenient ?? false);
  if (first.act.kind === 'sysctl') {
    const paths = group.map((step) => (step.act.kind === 'sysctl' ? step.act.path : ''));
    const result = await setSwitches(host, first.act, paths);
    if (result.status === 0) return;
    // "tee: /proc/sys/net/…: Permission denied"
    const at = paths.findIndex((path) => result.stderr.includes(`/${path}:`));
    throw refused((group[at] ?? first).act, result);
  }
  if (first.act.kind !== 'ip') return;
  const lines = group.map((step) => (step.act.kind === 'ip' ? step.act.args : ''));
  const result = await host.runner.run(
    [...enter(first.act.netns), 'ip', '-batch', '-'],
    `${lines.join('\n')}\n`,
  );
  if (result.status === 0) return;
  // "Command failed -:3"
  const at = Number(/Command failed -:(\d+)/.exec(result.stderr)?.[1] ?? 1);
  throw refused((group[at - 1] ?? first).act, result);
}

/** `gone`: a refusal because there is nothing to act on is a success. */
async function one(host: Host, action: Action, gone: boolean): Promise<void> {
  if (action.kind === 'writeInPlace' || action.kind === 'remove') return await file(host, action, gone);
  const result = await command(host, action);
  if (result.status === 0) return;
  if (gone && GONE.test(result.stderr)) return;
  throw refused(action, result);
}

async function file({ files }: Host, action: FileAction, gone: boolean): Promise<void> {
  try {
    if (action.kind === 'remove') await files.remove(action.path);
    else await files.writeInPlace(action.path, action.content);
  } catch (cause) {
    const code = (cause as { code?: unknown }).code;
    if (gone && (code === 'ENOENT' || code === 'ESRCH')) return;
    throw new EdgewayError(
      'host_command_failed',
      `${action.kind} ${action.path}: ${(cause as Error).message}`,
      {
        cause,
      },
    );
  }
}

function command({ runner }: Host, action: CommandAction): Promise<CommandResult> {
  switch (action.kind) {
    case 'ip':
      return runner.run([...enter(action.netns), 'ip', ...action.args.split(' ')]);
    case 'sysctl':
      return setSwitches({ runner }, action, [action.path]);
    case 'nft':
      // nft opens /dev/stdin by name, which fails for the socket pair that Node makes of a pipe.
      return runner.run(['sh', '-c', 'cat | nft -f -'], action.ruleset);
    case 'iptables':
      return runner.run(['iptables', '-w', '10', ...action.args.split(' ')]);
    case 'iptablesRestore': {
      const table = ['*filter', ...action.lines, 'COMMIT', ''].join('\n');
      return runner.run(['iptables-restore', '-w', '10', '--noflush'], table);
    }
    case 'run':
      return runner.run(action.argv);
  }
}

function setSwitches(
  { runner }: Pick<Host, 'runner'>,
  { netns, value }: CommandAction & { readonly kind: 'sysctl' },
  paths: readonly string[],
): Promise<CommandResult> {
  return runner.run([...enter(netns), 'tee', ...paths.map((path) => `/proc/sys/${path}`)], value);
}

/** Only the network namespace is entered: /proc/sys/net follows it, files stay the host's. */
export function enter(netns: string | undefined): readonly string[] {
  return netns === undefined ? [] : ['nsenter', `--net=${netns}`, '--'];
}

export function refused(action: Action, result: CommandResult): EdgewayError {
  const said = result.stderr.trim().split('\n')[0] ?? '';
  return new EdgewayError(
    'host_command_failed',
    `${formatAction(action).split('\n')[0]}: ${said === '' ? `status ${result.status}` : said}`,
  );
}
