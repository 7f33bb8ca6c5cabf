// Asks one nameserver for names again and again and prints when each was answered first, and when no longer, in
// milliseconds since 1970; one JSON line on standard output when all are gone again, or when the limit ends.
//   bench_dns_watch.ts SERVER LIMIT_MS NAME ...
import { createSocket } from 'node:dgram';
import process from 'node:process';
import { setTimeout as sleep } from 'node:timers/promises';
import { decode, encode } from 'dns-packet';

/** A name that is not there yet, and one that is: all of those together must not be a load. */
const EVERY_MS = 2;
const THERE_EVERY_MS = 10;
const [server, limit, ...names] = process.argv.slice(2) as [string, string, ...string[]];
const seen: Record<string, number> = {};
const gone: Record<string, number> = {};
const socket = createSocket('udp4');
socket.on('message', (message) => {
  const packet = decode(message);
  const name = packet.questions?.[0]?.name;
  if (name === undefined) return;
  if (packet.answers?.[0]?.type === 'A') seen[name] ??= Date.now();
  else if (seen[name] !== undefined) gone[name] ??= Date.now();
});
const untilMs = performance.now() + Number(limit);
process.stdout.write('asking\n');
for (let id = 0; performance.now() < untilMs; id = (id + 1) & 0xffff) {
  const left = names.filter((name) => gone[name] === undefined);
  if (left.length === 0) break;
  const all = id % (THERE_EVERY_MS / EVERY_MS) === 0;
  for (const name of left.filter((each) => all || seen[each] === undefined))
    socket.send(encode({ type: 'query', id, flags: 0x100, questions: [{ type: 'A', name }] }), 53, server);
  await sleep(EVERY_MS);
}
socket.close();
process.stdout.write(`${JSON.stringify({ seen, gone })}\n`);
