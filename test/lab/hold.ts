// A client for tests: one TCP connection that says one word and then only listens. Prints "open ANSWER" once it is
// answered, and "end CODE" when it is over.
//   hold.ts HOST PORT
import { lookup } from 'node:dns/promises';
import { connect } from 'node:net';
import process from 'node:process';

const [host = '', port] = process.argv.slice(2);
const { address } = await lookup(host, 4);
const socket = connect({ host: address, port: Number(port) }, () => socket.write('who'));
let code = 'END';
socket.once('data', (chunk) => console.log(`open ${chunk}`));
socket.once('error', (error) => {
  code = 'code' in error ? String(error.code) : error.message;
});
socket.once('close', () => {
  console.log(`end ${code}`);
  process.exit(0);
});
