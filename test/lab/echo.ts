// An instance for tests: answers each TCP connection's and each UDP datagram's text with "LABEL SOURCE TEXT".
//   echo.ts PORT LABEL
import { createSocket } from 'node:dgram';
import { createServer } from 'node:net';
import process from 'node:process';

const [port, label] = [Number(process.argv[2]), process.argv[3]];
const tcp = createServer((socket) => {
  socket.on('error', () => socket.destroy()); // a client that went away
  socket.on('data', (chunk) => socket.write(`${label} ${socket.remoteAddress} ${chunk}`));
});
tcp.listen(port, '0.0.0.0');
const udp = createSocket('udp4');
udp.on('message', (message, from) =>
  udp.send(`${label} ${from.address} ${message}`, from.port, from.address),
);
udp.bind(port, '0.0.0.0');
