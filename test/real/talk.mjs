// A client that keeps one socket: sends each line of its standard input and prints what came of it, one line each: the
// answer, `error CODE`, or `silence`. A line `hex:…` is sent as those bytes. Runs inside a namespace:
//   talk.mjs tcp|udp HOST PORT
import { createSocket } from 'node:dgram';
import { connect } from 'node:net';
import process from 'node:process';
import { createInterface } from 'node:readline';

const LIMIT_MS = 2_000;
const [, , protocol, host, port] = process.argv;
let heard = () => {};
let failed;
const hear = (bytes) => heard(String(bytes).trim());
const fail = (error) => {
  failed = `error ${error.code}`;
  heard(failed);
};

let send;
if (protocol === 'tcp') {
  const socket = connect({ host, port: Number(port) });
  socket.on('data', hear);
  socket.on('error', fail);
  socket.on('close', () => fail({ code: 'closed' }));
  send = (bytes) => socket.write(bytes);
} else {
  // Connected, so that an ICMP error is heard.
  const socket = createSocket(host.includes(':') ? 'udp6' : 'udp4');
  socket.on('message', hear);
  socket.on('error', fail);
  await new Promise((resolve, reject) => {
    socket.connect(Number(port), host, (error) => (error ? reject(error) : resolve()));
  });
  send = (bytes) => socket.send(bytes);
}

for await (const line of createInterface({ input: process.stdin })) {
  const answer = new Promise((resolve) => {
    heard = resolve;
    setTimeout(() => resolve('silence'), LIMIT_MS);
  });
  if (failed === undefined || protocol === 'udp')
    send(line.startsWith('hex:') ? Buffer.from(line.slice(4), 'hex') : line);
  else heard(failed);
  console.log(await answer);
}
process.exit(0);
