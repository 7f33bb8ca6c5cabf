// A client for measurements: new TCP connections at a steady rate, each asking one instance who it is. One JSON line
// per flow: {"at": wall ms of its start, "who": label, "ms": until the answer} or {"at", "error": code}.
//   bench_flows.ts HOST PORT PER_SECOND COUNT [keep]    keep: also four connections that stay, {"kept": label, "at"},
//                                                      {"lost": label, "at", "why"} when one ends, {"left": label,
//                                                      "at"} when it was given up for another while it still answered
//   COUNT 0: until it is killed.
import { lookup } from 'node:dns/promises';
import { connect } from 'node:net';
import process from 'node:process';

const [host = '', portText, rateText, countText, keep] = process.argv.slice(2);
const port = Number(portText);
const intervalMs = 1000 / Number(rateText);
const count = Number(countText) || Number.POSITIVE_INFINITY;
/** Longer than any RTT here, shorter than a client's patience: an unanswered flow went to somebody dead. */
const LIMIT_MS = 1_500;

const say = (line: object): void => {
  process.stdout.write(`${JSON.stringify(line)}\n`);
};
const codeOf = (error: Error): string => ('code' in error ? String(error.code) : error.message);

const { address } = await lookup(host, 4);
let open = 0;
let started = 0;

function flow(): void {
  const at = Date.now();
  const begun = performance.now();
  let done = false;
  open++;
  const socket = connect({ host: address, port }, () => socket.write('who'));
  const finish = (line: object): void => {
    if (done) return;
    done = true;
    open--;
    clearTimeout(limit);
    socket.resetAndDestroy();
    say(line);
    if (started >= count && open === 0) process.exit(0);
  };
  const limit = setTimeout(() => finish({ at, error: 'TIMEOUT' }), LIMIT_MS);
  socket.once('data', (chunk) =>
    finish({ at, who: chunk.toString().split(' ')[0], ms: performance.now() - begun }),
  );
  socket.once('error', (error) => finish({ at, error: codeOf(error) }));
  socket.once('end', () => finish({ at, error: 'END' }));
}

/** So that connections go on meeting everybody. */
const STAY_MS = 2_000;

/** A connection that says something every 200 ms: whom it lost and when. */
function stay(): void {
  const begun = performance.now();
  let left = false;
  const socket = connect({ host: address, port }, () => {
    const talk = setInterval(() => socket.write('ping'), 200);
    socket.once('close', () => clearInterval(talk));
    socket.write('who');
  });
  let kept: string | undefined;
  socket.on('data', (chunk) => {
    if (kept === undefined) {
      kept = chunk.toString().split(' ')[0];
      say({ kept, at: Date.now() });
    } else if (performance.now() - begun > STAY_MS) {
      say({ left: kept, at: Date.now() });
      left = true;
      socket.destroy();
    }
  });
  let why = 'END';
  socket.once('error', (error) => {
    why = codeOf(error);
  });
  socket.once('close', () => {
    if (kept !== undefined && !left) say({ at: Date.now(), lost: kept, why });
    setTimeout(stay, 100);
  });
}

if (keep === 'keep') for (let i = 0; i < 4; i++) stay();
const startAt = performance.now();
function pace(): void {
  while (started < count && performance.now() - startAt >= started * intervalMs) {
    started++;
    flow();
  }
  if (started < count) setTimeout(pace, 1);
}
pace();
