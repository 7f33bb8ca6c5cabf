// The command line's side of the REST API: one request, one answer, errors as the agent stated them.
import { type IncomingMessage, request } from 'node:http';
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
      call.on('response', (response) => this.#read<T>(response).then(resolve, reject));
      call.end(text);
    });
  }

  /** Server-sent events of a stream that has no end: rejects when the agent ends it, however it does. */
  events(path: string, take: (event: string, data: string) => void): Promise<never> {
    return new Promise((_, reject) => {
      const call = request({ ...this.#where(), method: 'GET', path, headers: { host: 'localhost' } });
      call.on('error', (cause) => reject(this.#unreachable(cause)));
      call.on('response', (response) => {
        if (response.statusCode !== 200) {
          this.#read(response).then(() => reject(this.#gone()), reject);
          return;
        }
        let rest = '';
        response.setEncoding('utf8');
        response.on('data', (chunk: string) => {
          const blocks = (rest + chunk).split('\n\n');
          rest = blocks.pop() ?? '';
          for (const block of blocks) {
            const field = (name: string): string =>
              new RegExp(`^${name}: ?(.*)$`, 'm').exec(block)?.[1] ?? '';
            take(field('event'), field('data'));
          }
        });
        response.on('error', (cause) => reject(this.#gone(cause)));
        response.on('close', () => reject(this.#gone()));
      });
      call.end();
    });
  }

  /** A whole answer; an agent that ends in the middle of it is an error, not a short answer. */
  #read<T>(response: IncomingMessage): Promise<T> {
    return new Promise((resolve, reject) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (chunk: string) => {
        text += chunk;
      });
      response.on('error', (cause) => reject(this.#gone(cause)));
      response.on('close', () => {
        if (!response.complete) return reject(this.#gone());
        try {
          resolve(readAnswer<T>(response.statusCode ?? 0, text));
        } catch (thrown) {
          reject(thrown);
        }
      });
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

  #gone(cause?: Error): EdgewayError {
    return new EdgewayError('not_found', `the agent at ${this.#text} ended before its answer did`, { cause });
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
