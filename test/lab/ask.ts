// A client for tests: asks COUNT times over one protocol, a new socket each time, and prints the answers as JSON:
// [{ text, address }] where `address` is whom the client saw answering. The same for each further question.
//   ask.ts tcp|udp HOST PORT TEXT COUNT [tcp|udp HOST PORT TEXT COUNT …]
import { createSocket } from 'node:dgram';
import { lookup } from 'node:dns/promises';
import { connect } from 'node:net';
import process from 'node:process';

const LIMIT_MS = 3_000;

interface Answer {
  readonly text: string;
  readonly address: string;
}

function askTcp(address: string, port: string, text: string): Promise<Answer> {
  return new Promise((resolve) => {
    const socket = connect({ host: address, port: Number(port) }, () => socket.write(text));
    socket.setTimeout(LIMIT_MS, () => socket.destroy(new Error('no answer')));
    socket.once('data', (chunk) => {
      resolve({ text: chunk.toString(), address: socket.remoteAddress ?? '' });
      socket.destroy();
    });
    socket.once('error', (error) => resolve({ text: `error: ${error.message}`, address: '' }));
  });
}

function askUdp(address: string, port: string, text: string): Promise<Answer> {
  return new Promise((resolve) => {
    const socket = createSocket('udp4');
    const finish = (answer: Answer): void => {
      clearTimeout(limit);
      socket.close();
      resolve(answer);
    };
    const limit = setTimeout(() => finish({ text: 'error: no answer', address: '' }), LIMIT_MS);
    socket.once('message', (message, from) => finish({ text: message.toString(), address: from.address }));
    socket.send(text, Number(port), address);
  });
}

const answers: Answer[] = [];
for (let at = 2; at < process.argv.length; at += 5) {
  const [protocol, host, port, text, count] = process.argv.slice(at) as [
    string,
    string,
    string,
    string,
    string,
  ];
  const ask = protocol === 'tcp' ? askTcp : askUdp;
  for (let i = 0; i < Number(count); i++)
    answers.push(await ask((await lookup(host, 4)).address, port, text));
}
console.log(JSON.stringify(answers));
process.exit(0);
