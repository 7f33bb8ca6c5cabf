// A logger that keeps what it is told, for tests about what is reported and how often.
import type { LogFields, Logger } from '../../src/log.ts';

export interface Line extends LogFields {
  readonly level: string;
  readonly message: string;
}

export function keepLogs(): { log: Logger; lines: Line[]; of(level: string): Line[] } {
  const lines: Line[] = [];
  const at =
    (level: string) =>
    (fields: LogFields, message: string): void => {
      lines.push({ level, message, ...fields });
    };
  return {
    lines,
    log: { trace: at('trace'), debug: at('debug'), info: at('info'), warn: at('warn'), error: at('error') },
    of: (level) => lines.filter((line) => line.level === level),
  };
}
