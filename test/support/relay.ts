// A TCP relay on loopback that a test can cut, freeze and mend: the network between a client and etcd.
import { createServer, type Server, Socket } from 'node:net';

export class Relay {
  readonly #server: Server;
  readonly #pairs = new Set<[Socket, Socket]>();
  #target: { host: string; port: number };
  #mode: 'open' | 'cut' | 'frozen' = 'open';
  port = 0;
  /** Sent by clients, and by the other side. */
  bytes = 0;
  answered = 0;

  private constructor(target: string) {
    this.#target = parse(target);
    this.#server = createServer((client) => this.#accept(client));
  }

  static async to(endpoint: string): Promise<Relay> {
    const relay = new Relay(endpoint);
    await new Promise<void>((resolve) => relay.#server.listen(0, '127.0.0.1', resolve));
    const address = relay.#server.address();
    relay.port = typeof address === 'object' && address !== null ? address.port : 0;
    return relay;
  }

  get endpoint(): string {
    return `127.0.0.1:${this.port}`;
  }
  get connections(): number {
    return this.#pairs.size;
  }

  /** New connections go there. */
  target(endpoint: string): void {
    this.#target = parse(endpoint);
  }
  /** Resets those connections, counted from the oldest; new ones are let in. */
  drop(from: number, to?: number): void {
    for (const [a, b] of [...this.#pairs].slice(from, to)) {
      a.destroy();
      b.destroy();
    }
  }
  /** Every connection is reset, new ones too. */
  cut(): void {
    this.#mode = 'cut';
    for (const [a, b] of this.#pairs) {
      a.destroy();
      b.destroy();
    }
  }
  /** Connections stay open but nothing passes: a hung member or a black hole. */
  freeze(): void {
    this.#mode = 'frozen';
    for (const [a, b] of this.#pairs) {
      a.pause();
      b.pause();
    }
  }
  mend(): void {
    this.#mode = 'open';
    for (const [a, b] of this.#pairs) {
      a.resume();
      b.resume();
    }
  }
  async close(): Promise<void> {
    this.cut();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  #accept(client: Socket): void {
    if (this.#mode === 'cut') {
      client.destroy();
      return;
    }
    const upstream = new Socket();
    const pair: [Socket, Socket] = [client, upstream];
    this.#pairs.add(pair);
    const end = (): void => {
      client.destroy();
      upstream.destroy();
      this.#pairs.delete(pair);
    };
    for (const socket of pair) {
      socket.on('error', end);
      socket.on('close', end);
    }
    client.on('data', (chunk) => {
      this.bytes += chunk.length;
      upstream.write(chunk);
    });
    upstream.on('data', (chunk) => {
      this.answered += chunk.length;
      client.write(chunk);
    });
    upstream.connect(this.#target);
    if (this.#mode === 'frozen') {
      client.pause();
      upstream.pause();
    }
  }
}

function parse(endpoint: string): { host: string; port: number } {
  const [host, port] = endpoint.split(':');
  return { host: host ?? '127.0.0.1', port: Number(port) };
}
