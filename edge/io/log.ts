// JSON lines on standard error, by pino with a synchronous destination: a line is out before the process can die.
import pino from 'pino';
import type { Logger } from '../../src/log.ts';

export function createLogger(level: string): Logger {
  return pino(
    { level, base: null, formatters: { level: (label) => ({ level: label }) } },
    pino.destination({ dest: 2, sync: true }),
  );
}
