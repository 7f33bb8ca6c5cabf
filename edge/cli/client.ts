// The command line's side of the REST API: one request, one answer, errors as the agent stated them.
import { request } from 'node:http';
import { EdgewayError, ERROR_CODES, type ErrorCode } from '../../src/error.ts';
import { type ApiAddress, parseApiAddress } from '../config.ts';

const TIMEOUT_MS = 30_000;

/** A client of the agent at `address`, written as `--api` takes it. */
export class ApiClient {
  readonly #address: ApiAddress;
  readonly #text: string;
  constructor(address: string) {
    this.#address = parseApiAddress(address);
    this.#text = address;
  }

  /** The answer's body; rejects with the agent's own error. */
  call<T>(method: string, path: string, body?: unknown): Promise<T> {
    const text = body === undefined ? undefined : JSON.stringify(body);
    return new Promise((resolve, reject) => {
      const call = request({
        ...this.#where(),
        method,
        path,
        headers: {
          host: 'localhost',
          ...(text === undefined
            ? {}
            : { 'content-type': 'application/json', 'content-length': String(Buffer.byteLength(text)) }),
        },
      });
      call.setTimeout(TIMEOUT_MS, () =>
        call.destroy(
          new EdgewayError('timeout', `the agent at ${this.#text} gave no answer in ${TIMEOUT_MS / 1000} s`),
        ),
      );
      call.on('error', (cause) => reject(this.#unreachable(cause)));
      call.on('response', (response) => {
        const chunks: Buffer[] = [];
        response.on('data', (chunk: Buffer) => chunks.push(chunk));
        response.on('end', () => {
          try {
            resolve(readAnswer<T>(response.statusCode ?? 0, Buffer.concat(chunks).toString()));
          } catch (thrown) {
            reject(thrown);
          }
        });
      });
      call.end(text);
    });
  }

  /** Server-sent events of a stream that does not end by itself; resolves when the agent ends it. */
  events(path: string, take: (event: string, data: string) => void): Promise<void> {
    return new Promise((resolve, reject) => {
      const call = request({ ...this.#where(), method: 'GET', path, headers: { host: 'localhost' } });
      call.on('error', (cause) => reject(this.#unreachable(cause)));
      call.on('response', (response) => {
        let rest = '';
        response.on('data', (chunk: Buffer) => {
          const blocks = (rest + chunk.toString()).split('\n\n');
          rest = blocks.pop() ?? '';
          for (const block of blocks) {
            const field = (name: string): string =>
              new RegExp(`^${name}: ?(.*)$`, 'm').exec(block)?.[1] ?? '';
            take(field('event'), field('data'));
          }
        });
        response.on('end', () => resolve());
      });
      call.end();
    });
  }

  #where() {
    return this.#address.kind === 'unix'
      ? { socketPath: this.#address.path }
      : { host: this.#address.host, port: this.#address.port };
  }

  #unreachable(cause: Error): EdgewayError {
    if (cause instanceof EdgewayError) return cause;
    const message = `no agent answers at ${this.#text}: ${cause.message}. Start one with: edgeway agent`;
    return new EdgewayError('not_found', message, { cause });
  }
}

function readAnswer<T>(status: number, text: string): T {
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch (cause) {
    throw new EdgewayError('internal', `the agent answered ${status} with something that is not JSON`, {
      cause,
    });
  }
  if (status < 400) return body as T;
  const { code, message } = body as { code?: string; message?: string };
  const known = ERROR_CODES.find((one): one is ErrorCode => one === code) ?? 'internal';
  throw new EdgewayError(known, message ?? `the agent answered ${status}`);
}
