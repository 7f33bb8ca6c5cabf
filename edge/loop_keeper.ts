// A packet loop that is started again when it ends by itself: somebody deleted its device, or it met a defect. What it
// knew is gone then, so whoever feeds it tells everything anew; flows come back from their file. It refuses to hide
// that packets stand still: `down` says so until they move again.
import { toEdgewayError } from '../src/error.ts';
import type { Logger } from '../src/log.ts';
import type { PacketLoop, Timers } from './ports.ts';
import type { ProxyCommand, ProxyReport } from './proxy/command.ts';

const PAUSE_MIN_MS = 500;
const PAUSE_MAX_MS = 30_000;

export interface LoopKeeperParts {
  readonly start: (report: (report: ProxyReport) => void) => Promise<PacketLoop>;
  /** Everything that the loop says, but for its end. */
  readonly report: (report: ProxyReport) => void;
  /** A new loop runs: give it its device and tell it everything. When this fails it is ended and started once more. */
  readonly restarted: () => Promise<void>;
  readonly timers: Timers;
  readonly log: Logger;
}

export class LoopKeeper implements PacketLoop {
  readonly #parts: LoopKeeperParts;
  #loop: PacketLoop | undefined;
  /** Resolves when no start is under way. */
  #starting: Promise<void> = Promise.resolve();
  #cancel: (() => void) | undefined;
  #pauseMs = PAUSE_MIN_MS;
  #stopped = false;
  #why: string | undefined;

  private constructor(parts: LoopKeeperParts) {
    this.#parts = parts;
  }

  /** Rejects when the first start fails; then nothing runs. */
  static async start(parts: LoopKeeperParts): Promise<LoopKeeper> {
    const keeper = new LoopKeeper(parts);
    keeper.#loop = await keeper.#startOne();
    return keeper;
  }

  /** Why no packet moves now; undefined when packets move. */
  get down(): string | undefined {
    return this.#why;
  }

  /** Dropped while no loop runs: the next one is told everything. */
  send(command: ProxyCommand): void {
    this.#loop?.send(command);
  }

  counters(): Readonly<Record<string, number>> {
    return this.#loop?.counters() ?? {};
  }

  flows(): number {
    return this.#loop?.flows() ?? 0;
  }

  async stop(): Promise<void> {
    this.#stopped = true;
    this.#cancel?.();
    await this.#starting;
    await this.#loop?.stop();
    this.#loop = undefined;
  }

  #startOne(): Promise<PacketLoop> {
    return this.#parts.start((report) => {
      if (report.kind === 'stopped') this.#ended(report.error ?? 'without a reason');
      else this.#parts.report(report);
    });
  }

  #ended(why: string): void {
    if (this.#stopped || this.#loop === undefined) return;
    this.#loop = undefined;
    this.#why = why;
    this.#parts.log.error({ reason: why }, 'the packet loop ended; starting it again');
    this.#again();
  }

  #again(): void {
    this.#cancel = this.#parts.timers.after(this.#pauseMs, () => {
      this.#starting = this.#restart();
    });
    this.#pauseMs = Math.min(PAUSE_MAX_MS, 2 * this.#pauseMs);
  }

  async #restart(): Promise<void> {
    let loop: PacketLoop | undefined;
    try {
      loop = await this.#startOne();
      this.#loop = loop;
      await this.#parts.restarted();
      this.#why = undefined;
      this.#pauseMs = PAUSE_MIN_MS;
      this.#parts.log.info({}, 'packets move again');
    } catch (thrown) {
      const { code, message } = toEdgewayError(thrown);
      this.#parts.log.warn({ code, error: message }, 'the packet loop is not back yet');
      this.#loop = undefined;
      await loop?.stop();
      if (!this.#stopped) this.#again();
    }
  }
}
