// A client or a server of the data plane tests, in an instance's network namespace. Every byte is checked.
//   echo PORT NAME                      TCP and UDP: gives back what it gets; asked with "who\n" over TCP it says NAME
//   tcp IP PORT CONNECTIONS BYTES       sends seeded bytes on each, in parallel, and wants them back
//   udp IP PORT SIZE COUNT              sends datagrams one by one from one socket and wants each back from there
//   hold IP PORT                        keeps a connection open and says what happens to it: one line per event
//   who IP PORT COUNT                   asks for the name, once per connection
import { createSocket } from 'node:dgram';
import { connect, createServer } from 'node:net';
import process from 'node:process';
import { Rng } from '../../src/rng.ts';

const say = (value: unknown): void => {
  process.stdout.write(`${JSON.stringify(value)}\n`);
};

function data(seed: number, length: number): Buffer {
  const rng = new Rng(seed);
  const out = Buffer.alloc(length);
  for (let i = 0; i + 4 <= length; i += 4) out.writeUInt32LE(rng.u32(), i);
  for (let i = length & ~3; i < length; i++) out[i] = rng.u32();
  return out;
}

function echo(port: number, name: string): void {
  const server = createServer((socket) => {
    socket.on('data', (chunk) => {
      if (chunk.toString('latin1') === 'who\n') socket.end(`${name}\n`);
      else if (!socket.write(chunk)) socket.pause();
    });
    socket.on('drain', () => socket.resume());
    socket.on('end', () => socket.end());
    socket.on('error', () => socket.destroy());
  });
  const datagrams = createSocket('udp4');
  datagrams.on('message', (message, from) => datagrams.send(message, from.port, from.address));
  datagrams.bind(port, '0.0.0.0', () => server.listen(port, '0.0.0.0', () => say({ ready: true })));
}

function tcpOnce(ip: string, port: number, seed: number, length: number): Promise<string> {
  return new Promise((resolve) => {
    const sent = data(seed, length);
    let got = 0;
    const socket = connect(port, ip, () => {
      if (socket.remoteAddress !== ip) resolve(`connected to ${socket.remoteAddress}`);
      socket.end(sent);
    });
    socket.setTimeout(20_000, () => {
      resolve(`silent after ${got} of ${length} bytes`);
      socket.destroy();
    });
    socket.on('data', (chunk: Buffer) => {
      if (chunk.compare(sent, got, got + chunk.length) !== 0) {
        resolve(`wrong bytes after ${got}`);
        socket.destroy();
      }
      got += chunk.length;
    });
    socket.on('error', (error) => resolve(`${(error as NodeJS.ErrnoException).code}`));
    socket.on('close', () => resolve(got === length ? 'ok' : `${got} of ${length} bytes`));
  });
}

async function tcp(ip: string, port: number, connections: number, length: number): Promise<void> {
  const results = await Promise.all(
    Array.from({ length: connections }, (_, i) => tcpOnce(ip, port, i + 1, length)),
  );
  say({
    ok: results.filter((result) => result === 'ok').length,
    bad: results.filter((result) => result !== 'ok'),
  });
}

function udpOnce(
  socket: ReturnType<typeof createSocket>,
  ip: string,
  port: number,
  sent: Buffer,
): Promise<string> {
  return new Promise((resolve) => {
    const late = setTimeout(() => {
      socket.removeAllListeners('message');
      resolve('no answer');
    }, 2_000);
    socket.once('message', (message, from) => {
      clearTimeout(late);
      if (from.address !== ip || from.port !== port) resolve(`answered by ${from.address}:${from.port}`);
      else resolve(message.equals(sent) ? 'ok' : `altered: ${message.length} of ${sent.length} bytes`);
    });
    socket.send(sent, port, ip);
  });
}

async function udp(ip: string, port: number, size: number, count: number): Promise<void> {
  const socket = createSocket('udp4');
  socket.on('error', () => {});
  const results: string[] = [];
  for (let i = 0; i < count; i++) results.push(await udpOnce(socket, ip, port, data(i + 1, size)));
  socket.close();
  say({
    ok: results.filter((result) => result === 'ok').length,
    bad: results.filter((result) => result !== 'ok'),
  });
}

function hold(ip: string, port: number): void {
  const socket = connect(port, ip, () => say({ event: 'connected' }));
  socket.on('data', () => say({ event: 'data' }));
  socket.on('error', (error) => say({ event: (error as NodeJS.ErrnoException).code }));
  socket.on('close', () => {
    say({ event: 'closed' });
    process.exit(0);
  });
  socket.write('hello');
  const tick = setInterval(() => socket.write('x'), 200);
  socket.on('close', () => clearInterval(tick));
}

async function who(ip: string, port: number, count: number): Promise<void> {
  const names: Record<string, number> = {};
  for (let i = 0; i < count; i++) {
    const name = await new Promise<string>((resolve) => {
      let text = '';
      const socket = connect(port, ip, () => socket.write('who\n'));
      socket.setTimeout(5_000, () => {
        resolve('silent');
        socket.destroy();
      });
      socket.on('data', (chunk) => {
        text += chunk.toString();
      });
      socket.on('error', (error) => resolve(`${(error as NodeJS.ErrnoException).code}`));
      socket.on('close', () => resolve(text.trim()));
    });
    names[name] = (names[name] ?? 0) + 1;
  }
  say(names);
}

const [mode, first = '', second = '', third = '', fourth = ''] = process.argv.slice(2);
if (mode === 'echo') echo(Number(first), second);
else if (mode === 'tcp') await tcp(first, Number(second), Number(third), Number(fourth));
else if (mode === 'udp') await udp(first, Number(second), Number(third), Number(fourth));
else if (mode === 'hold') hold(first, Number(second));
else if (mode === 'who') await who(first, Number(second), Number(third));
else throw new Error(`mode "${mode}" is none of echo, tcp, udp, hold, who`);
