// A transfer whose two ends are compared. Runs inside a namespace:
//   stream.mjs serve PORT              tells each TCP client at its end, and each UDP datagram, what came: BYTES SHA-256
//   stream.mjs tcp HOST PORT [BYTES]   sends so much, or says `ready` and goes on until standard input ends;
//                                      prints what was sent | what came
//   stream.mjs udp HOST PORT BYTES     the same for one datagram
import { createHash } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import process from 'node:process';

const LIMIT_MS = 10_000;
const BLOCK = 64 * 1024;
const [, , mode, ...rest] = process.argv;

/** Every octet of a transfer depends on where it stands. */
function block(at, length) {
  const bytes = Buffer.alloc(length);
  for (let i = 0; i + 4 <= length; i += 4) bytes.writeUInt32LE(Math.imul(at + i, 2_654_435_761) >>> 0, i);
  return bytes;
}
function tally() {
  const hash = createHash('sha256');
  let count = 0;
  return {
    add: (bytes) => {
      hash.update(bytes);
      count += bytes.length;
    },
    text: () => `${count} ${hash.digest('hex')}`,
  };
}
function say(sent, came) {
  console.log(`${sent} | ${String(came).trim()}`);
  process.exit(0);
}

if (mode === 'serve') {
  const tcp = createServer({ allowHalfOpen: true }, (socket) => {
    const seen = tally();
    socket.on('error', () => socket.destroy());
    socket.on('data', seen.add);
    socket.on('end', () => socket.end(seen.text()));
  });
  const udp = createSocket('udp4');
  udp.on('message', (bytes, client) => {
    const seen = tally();
    seen.add(bytes);
    udp.send(seen.text(), client.port, client.address);
  });
  udp.bind(Number(rest[0]), '0.0.0.0', () =>
    tcp.listen(Number(rest[0]), '0.0.0.0', () => console.log('ready')),
  );
} else {
  const [host, port, length] = [rest[0], Number(rest[1]), rest[2] === undefined ? Infinity : Number(rest[2])];
  const sent = tally();
  if (mode === 'udp') {
    const socket = createSocket('udp4');
    const bytes = block(0, length);
    sent.add(bytes);
    socket.on('message', (answer) => say(sent.text(), answer));
    socket.send(bytes, port, host, (error) => error && say('', error.code));
    setTimeout(() => say('', 'silence'), LIMIT_MS);
  } else {
    const socket = connect({ host, port });
    socket.on('error', (error) => say('', error.code));
    await once(socket, 'connect');
    if (length === Infinity) console.log('ready');
    let ended = false;
    if (length === Infinity) process.stdin.resume().on('end', () => (ended = true));
    for (let at = 0; at < length && !ended; at += BLOCK) {
      const bytes = block(at, Math.min(BLOCK, length - at));
      sent.add(bytes);
      if (!socket.write(bytes)) await once(socket, 'drain');
      // A stream that has no end leaves the machine to others now and then.
      if (length === Infinity) await new Promise((resolve) => setTimeout(resolve, 5));
    }
    socket.end();
    let answer = '';
    socket.on('data', (chunk) => (answer += chunk));
    socket.on('end', () => say(sent.text(), answer));
  }
}
