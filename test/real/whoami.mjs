// Tells every TCP client and every UDP datagram on a port NAME and the client's address. Runs inside a namespace:
//   whoami.mjs PORT NAME
import { createSocket } from 'node:dgram';
import { createServer } from 'node:net';
import process from 'node:process';

const [, , port, name] = process.argv;
const tcp = createServer((socket) => {
  socket.on('error', () => {});
  socket.end(`${name} ${socket.remoteAddress}\n`);
});
const udp = createSocket('udp4');
udp.on('message', (_message, client) => udp.send(`${name} ${client.address}\n`, client.port, client.address));
udp.bind(Number(port), '0.0.0.0', () => tcp.listen(Number(port), '0.0.0.0', () => console.log('ready')));
