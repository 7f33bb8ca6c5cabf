// What was done so far, to be taken back in reverse when a later step fails. A step that cannot be taken back is
// logged and the others go on.
import { toEdgewayError } from '../src/error.ts';
import type { Logger } from '../src/log.ts';

export class Undo {
  readonly #steps: { readonly what: string; readonly run: () => Promise<void> }[] = [];

  /** Remembers how to take back what was just done. */
  push(what: string, run: () => Promise<void>): void {
    this.#steps.push({ what, run });
  }

  /** Takes everything back, newest first. */
  async run(log: Logger): Promise<void> {
    for (let step = this.#steps.pop(); step !== undefined; step = this.#steps.pop())
      try {
        await step.run();
      } catch (thrown) {
        log.warn({ name: step.what, error: toEdgewayError(thrown).message }, 'could not be taken back');
      }
  }

  /** Runs `work`; when it throws, takes everything back and throws the same. */
  static async guard<T>(log: Logger, work: (undo: Undo) => Promise<T>): Promise<T> {
    const undo = new Undo();
    try {
      return await work(undo);
    } catch (thrown) {
      await undo.run(log);
      throw thrown;
    }
  }
}
