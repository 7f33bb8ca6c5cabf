// Finds containers through the Docker Engine API (Docker, Podman), on the engine's socket. It refuses to change
// anything there: it reads one container and nothing else.
import { request } from 'node:http';
import process from 'node:process';
import * as v from 'valibot';
import { EdgewayError } from '../../src/error.ts';
import { COMMAND_OUTPUT_MAX, ENGINE_LIMIT_MS } from '../../src/limits.ts';
import type { Container, ContainerEngine } from '../ports.ts';

/** Where Docker and (rootful) Podman listen. */
const SOCKETS = ['/var/run/docker.sock', '/run/podman/podman.sock'];

/** Docker: 64 hexadecimal digits or a prefix; names as in `[a-zA-Z0-9][a-zA-Z0-9_.-]+`. */
const CONTAINER_PATTERN = /^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$/;

/** The part of `GET /containers/{id}/json` that we use (Docker Engine API 1.24 and later; Podman's compatible API). */
const inspectSchema = v.object({
  Id: v.pipe(v.string(), v.minLength(1)),
  Name: v.string(),
  State: v.object({ Running: v.boolean(), Pid: v.number(), Status: v.optional(v.string()) }),
  ResolvConfPath: v.optional(v.string()),
});

type Target = { readonly socketPath: string } | { readonly host: string; readonly port: number };

/** Without a socket: DOCKER_HOST (unix:// or plain tcp://), else the places where Docker and Podman listen. */
export function dockerEngine(options: { readonly socketPath?: string } = {}): ContainerEngine {
  return {
    async inspect(nameOrId: string): Promise<Container> {
      if (!CONTAINER_PATTERN.test(nameOrId))
        throw new EdgewayError('container_unknown', `"${nameOrId}" is not a container name or id`);
      const targets =
        options.socketPath !== undefined
          ? [{ socketPath: options.socketPath }]
          : targetsOf(process.env['DOCKER_HOST']);
      return await inspectAt(targets, nameOrId);
    },
  };
}

/** @throws docker_unavailable for a DOCKER_HOST that we cannot speak to. */
export function targetsOf(dockerHost: string | undefined): readonly Target[] {
  if (dockerHost === undefined || dockerHost === '') return SOCKETS.map((socketPath) => ({ socketPath }));
  if (dockerHost.startsWith('unix://')) return [{ socketPath: dockerHost.slice('unix://'.length) }];
  const tcp = /^(?:tcp|http):\/\/(\[[0-9a-fA-F:]+\]|[^:/]+)(?::(\d+))?\/?$/.exec(dockerHost);
  if (tcp?.[1] === undefined)
    throw new EdgewayError(
      'docker_unavailable',
      `DOCKER_HOST "${dockerHost}" is not supported: give unix:///path or tcp://host:port`,
    );
  return [{ host: tcp[1].replace(/^\[|\]$/g, ''), port: Number(tcp[2] ?? 2375) }];
}

async function inspectAt(targets: readonly Target[], nameOrId: string): Promise<Container> {
  const reasons: string[] = [];
  for (const target of targets) {
    const place = 'socketPath' in target ? target.socketPath : `${target.host}:${target.port}`;
    let answer: { readonly status: number; readonly body: string };
    try {
      answer = await get(target, `/containers/${encodeURIComponent(nameOrId)}/json`);
    } catch (error) {
      reasons.push(`${place}: ${(error as Error).message}`);
      continue;
    }
    return read(answer, nameOrId, place);
  }
  throw new EdgewayError('docker_unavailable', `no container engine answers (${reasons.join('; ')})`);
}

function read(answer: { status: number; body: string }, nameOrId: string, place: string): Container {
  let json: unknown;
  try {
    json = JSON.parse(answer.body);
  } catch (cause) {
    throw new EdgewayError('docker_unavailable', `the engine at ${place} does not answer in JSON`, { cause });
  }
  // 400: an id prefix that several containers share.
  if (answer.status === 404 || answer.status === 400)
    throw new EdgewayError(
      'container_unknown',
      `no container "${nameOrId}": ${messageOf(json) ?? answer.status}`,
    );
  if (answer.status !== 200)
    throw new EdgewayError(
      'docker_unavailable',
      `the engine at ${place} answers ${answer.status}: ${messageOf(json) ?? ''}`,
    );
  const parsed = v.safeParse(inspectSchema, json);
  if (!parsed.success)
    throw new EdgewayError(
      'docker_unavailable',
      `the engine at ${place} describes container "${nameOrId}" in a way we cannot read: ${parsed.issues[0].message}`,
    );
  const { Id, Name, State, ResolvConfPath } = parsed.output;
  const name = Name.replace(/^\//, '');
  if (!State.Running || State.Pid <= 0)
    throw new EdgewayError(
      'container_not_running',
      `container "${name}" is ${State.Status ?? 'not running'}: start it first`,
    );
  return {
    id: Id,
    name,
    pid: State.Pid,
    ...(ResolvConfPath !== undefined && ResolvConfPath !== '' ? { resolvConfPath: ResolvConfPath } : {}),
  };
}

function messageOf(json: unknown): string | undefined {
  const parsed = v.safeParse(v.object({ message: v.string() }), json);
  return parsed.success ? parsed.output.message : undefined;
}

function get(target: Target, path: string): Promise<{ status: number; body: string }> {
  return new Promise((resolve, reject) => {
    const limit = setTimeout(
      () => call.destroy(new Error(`no answer within ${ENGINE_LIMIT_MS / 1000} s`)),
      ENGINE_LIMIT_MS,
    );
    const finish = (act: () => void): void => {
      clearTimeout(limit);
      act();
    };
    // A Host header that both engines accept; the path has no version, so the engine answers with its newest.
    const call = request(
      { ...target, path, method: 'GET', headers: { host: 'docker' }, agent: false },
      (response) => {
        let body = '';
        response.setEncoding('utf8');
        response.on('data', (text: string) => {
          body += text;
          if (body.length > COMMAND_OUTPUT_MAX) response.destroy(new Error('the answer is too long'));
        });
        response.once('end', () => finish(() => resolve({ status: response.statusCode ?? 0, body })));
        response.once('error', (error) => finish(() => reject(error)));
      },
    );
    call.once('error', (error) => finish(() => reject(error)));
    call.end();
  });
}
