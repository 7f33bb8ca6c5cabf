// What logging looks like to everyone; the sink is chosen in main.ts. Field names are a closed dictionary so that a
// search finds every line about a thing.
export interface LogFields {
  readonly address?: string;
  readonly code?: string;
  readonly command?: string;
  readonly container?: string;
  readonly count?: number;
  readonly durationMs?: number;
  readonly error?: string;
  readonly file?: string;
  readonly instance?: number;
  readonly interface?: string;
  readonly key?: string;
  readonly lease?: string;
  readonly name?: string;
  readonly node?: string;
  readonly peer?: string;
  readonly port?: number;
  readonly reason?: string;
  readonly revision?: string;
  readonly service?: string;
  readonly subnet?: string;
}

/** trace: per packet · debug: addresses and names · warn: something you would wake someone for. */
export interface Logger {
  trace(fields: LogFields, message: string): void;
  debug(fields: LogFields, message: string): void;
  info(fields: LogFields, message: string): void;
  warn(fields: LogFields, message: string): void;
  error(fields: LogFields, message: string): void;
}

const nothing = (): void => {};
/** For tests and for tools whose output is something else. */
export const SILENT: Logger = {
  trace: nothing,
  debug: nothing,
  info: nothing,
  warn: nothing,
  error: nothing,
};
