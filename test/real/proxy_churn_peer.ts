// Servers and clients of the churn test. A server process is many instances, one per address of its namespace; every
// answer begins with who gave it. Clients dial ServiceIPs only and print one line per exchange series: who answered,
// and what went wrong, with the time.
//   serve PORT {"172.16.0.130":"service instance",…}
//   dial PORT LOOPS SECONDS SEED {"service":"172.30.0.4",…}
import { createSocket, type Socket as Datagrams } from 'node:dgram';
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import process from 'node:process';
import { Rng } from '../../src/rng.ts';

const NAME = 64;
const say = (value: unknown): void => {
  process.stdout.write(`${JSON.stringify(value)}\n`);
};

function named(name: string, payload: Buffer): Buffer {
  const head = Buffer.alloc(NAME, ' ');
  head.write(name);
  return Buffer.concat([head, payload]);
}

function framed(payload: Buffer): Buffer {
  const head = Buffer.alloc(4);
  head.writeUInt32BE(payload.length);
  return Buffer.concat([head, payload]);
}

/** Calls back with every whole frame of a stream. */
function frames(socket: Socket, each: (payload: Buffer) => void): void {
  let held = Buffer.alloc(0);
  socket.on('data', (chunk: Buffer) => {
    held = Buffer.concat([held, chunk]);
    while (held.length >= 4 && held.length >= 4 + held.readUInt32BE(0)) {
      const end = 4 + held.readUInt32BE(0);
      each(held.subarray(4, end));
      held = held.subarray(end);
    }
  });
}

async function serve(port: number, names: Readonly<Record<string, string>>): Promise<void> {
  for (const [address, name] of Object.entries(names)) {
    const server = createServer((socket) => {
      socket.on('error', () => socket.destroy());
      frames(socket, (payload) => socket.write(framed(named(name, payload))));
    });
    server.listen(port, address);
    const datagrams = createSocket('udp4');
    datagrams.on('error', () => {});
    datagrams.on('message', (message, from) => datagrams.send(named(name, message), from.port, from.address));
    datagrams.bind(port, address);
    await Promise.all([once(server, 'listening'), once(datagrams, 'listening')]);
  }
  say({ ready: true });
}

interface Series {
  readonly kind: 'tcp' | 'udp';
  readonly service: string;
  readonly began: number;
  /** Every instance that answered, in order, without repetition of neighbours. */
  readonly by: string[];
  ended: number;
  exchanges: number;
  lost: number;
  /** Empty when all was well. */
  error: string;
}

function bytes(rng: Rng, length: number): Buffer {
  const out = Buffer.alloc(length);
  for (let i = 0; i < length; i++) out[i] = rng.u32();
  return out;
}

function take(series: Series, answer: Buffer, sent: Buffer): void {
  const name = answer.subarray(0, NAME).toString().trim();
  if (series.by.at(-1) !== name) series.by.push(name);
  if (!answer.subarray(NAME).equals(sent)) series.error = 'corrupted';
  series.exchanges++;
}

async function tcp(series: Series, ip: string, port: number, rng: Rng): Promise<void> {
  const socket = connect(port, ip);
  socket.setNoDelay(true);
  let answered: (answer: Buffer | string) => void = () => {};
  frames(socket, (answer) => answered(answer));
  // The end may come between two exchanges; the next one then ends with it.
  let over = '';
  const end = (why: string): void => {
    if (over === '') over = why;
    answered(over);
  };
  socket.on('error', (error) => end((error as NodeJS.ErrnoException).code ?? 'error'));
  socket.on('close', () => end('closed'));
  for (let i = 0; i < 20 && series.error === ''; i++) {
    const sent = bytes(rng, 1 + rng.below(rng.below(10) === 0 ? 60_000 : 3_000));
    const answer = await new Promise<Buffer | string>((resolve) => {
      const late = setTimeout(() => resolve('silent'), 10_000);
      answered = (value) => {
        clearTimeout(late);
        resolve(value);
      };
      if (over === '') socket.write(framed(sent));
      else answered(over);
    });
    if (typeof answer === 'string') series.error = answer;
    else take(series, answer, sent);
    await new Promise((resolve) => setTimeout(resolve, rng.below(60)));
  }
  answered = () => {};
  socket.destroy();
}

function ask(socket: Datagrams, ip: string, port: number, sent: Buffer): Promise<Buffer | string> {
  return new Promise((resolve) => {
    const late = setTimeout(() => {
      socket.removeAllListeners('message');
      resolve('lost');
    }, 700);
    socket.on('message', (message, from) => {
      // An answer that was given up on may still come.
      if (!message.subarray(NAME, NAME + 8).equals(sent.subarray(0, 8))) return;
      clearTimeout(late);
      socket.removeAllListeners('message');
      resolve(
        from.address === ip && from.port === port ? message : `answered by ${from.address}:${from.port}`,
      );
    });
    socket.send(sent, port, ip);
  });
}

async function udp(series: Series, ip: string, port: number, rng: Rng): Promise<void> {
  const socket = createSocket('udp4');
  socket.on('error', () => {});
  for (let i = 0; i < 20 && series.error === ''; i++) {
    const sent = bytes(rng, 8 + rng.below(rng.below(8) === 0 ? 6_000 : 1_200));
    const answer = await ask(socket, ip, port, sent);
    if (answer === 'lost') series.lost++;
    else if (typeof answer === 'string') series.error = answer;
    else take(series, answer, sent);
    await new Promise((resolve) => setTimeout(resolve, rng.below(60)));
  }
  socket.close();
}

async function dial(
  port: number,
  loops: number,
  seconds: number,
  seed: number,
  addresses: Readonly<Record<string, string>>,
): Promise<void> {
  const services = Object.entries(addresses);
  const end = Date.now() + seconds * 1000;
  await Promise.all(
    Array.from({ length: loops }, async (_, i) => {
      const rng = new Rng(seed, i);
      while (Date.now() < end) {
        const [service, ip] = services[rng.below(services.length)]!;
        const kind = i % 2 === 0 ? 'tcp' : 'udp';
        const series: Series = {
          kind,
          service,
          began: Date.now(),
          by: [],
          ended: 0,
          exchanges: 0,
          lost: 0,
          error: '',
        };
        await (kind === 'tcp' ? tcp(series, ip, port, rng) : udp(series, ip, port, rng));
        series.ended = Date.now();
        say(series);
      }
    }),
  );
  process.exit(0);
}

const [mode, first = '', ...rest] = process.argv.slice(2);
if (mode === 'serve') await serve(Number(first), JSON.parse(rest[0] ?? '{}') as Record<string, string>);
else
  await dial(
    Number(first),
    Number(rest[0]),
    Number(rest[1]),
    Number(rest[2]),
    JSON.parse(rest[3] ?? '{}') as Record<string, string>,
  );
