// Asks one nameserver for names again and again and prints when each was answered first, in milliseconds since 1970;
// one JSON line on standard output when all were, or when the limit ends.
//   bench_dns_watch.ts SERVER LIMIT_MS NAME ...
import { createSocket } from 'node:dgram';
import process from 'node:process';
import { setTimeout as sleep } from 'node:timers/promises';
import { decode, encode } from 'dns-packet';

const EVERY_MS = 2;
const [server, limit, ...names] = process.argv.slice(2) as [string, string, ...string[]];
const first: Record<string, number> = {};
const socket = createSocket('udp4');
socket.on('message', (message) => {
  const packet = decode(message);
  const name = packet.questions?.[0]?.name;
  if (name !== undefined && first[name] === undefined && packet.answers?.[0]?.type === 'A')
    first[name] = Date.now();
});
const untilMs = performance.now() + Number(limit);
process.stdout.write('asking\n');
for (let id = 0; performance.now() < untilMs; id = (id + 1) & 0xffff) {
  const missing = names.filter((name) => first[name] === undefined);
  if (missing.length === 0) break;
  for (const name of missing)
    socket.send(encode({ type: 'query', id, flags: 0x100, questions: [{ type: 'A', name }] }), 53, server);
  await sleep(EVERY_MS);
}
socket.close();
process.stdout.write(`${JSON.stringify(first)}\n`);
