// One gRPC stream to etcd that carries any number of watches, told apart by ids of our own. It reports what etcd
// says, complete revisions only, and never resumes by itself: when the stream or a watch ends, its owner is told
// once and lists again. etcd3's own watcher is not used: it resumes from the store's revision instead of the last
// event's, so a cut during catch-up loses events silently.
import type { IDuplexStream, IEvent, IWatchRequest, IWatchResponse } from 'etcd3';

export interface WatchSink {
  /** etcd has accepted the watch; the store's revision at that moment, and the id of its cluster. */
  created(revision: number, cluster: string): void;
  /** Whole revisions, in order. Empty when etcd only tells how far it has come. */
  events(events: readonly IEvent[], revision: number): void;
  /** The watch is over. `compacted`: its start lies before what etcd still holds. */
  ended(reason: string, compacted: boolean): void;
}

export interface Watch {
  cancel(): void;
}

type Stream = IDuplexStream<IWatchRequest, IWatchResponse>;

interface Entry {
  readonly sink: WatchSink;
  /** Events of a response that etcd has split ("fragment"); delivered with the last part. */
  parts: IEvent[];
}

export class WatchStream {
  readonly #open: () => Promise<Stream>;
  readonly #watches = new Map<string, Entry>();
  #stream: Promise<Stream> | undefined;
  #nextId = 1;

  /** `open` makes a new gRPC stream; it is called when a watch is wanted and there is none. */
  constructor(open: () => Promise<Stream>) {
    this.#open = open;
  }

  /** Watches [key, end) from `start` on; a single key without `end`. */
  watch(range: { key: string; end?: string }, start: number, sink: WatchSink): Watch {
    const id = String(this.#nextId++);
    this.#watches.set(id, { sink, parts: [] });
    const stream = this.#ensure();
    stream.then(
      (open) => {
        if (!this.#watches.has(id)) return;
        open.write({
          create_request: {
            key: Buffer.from(range.key),
            ...(range.end === undefined ? {} : { range_end: Buffer.from(range.end) }),
            start_revision: start,
            progress_notify: true,
            fragment: true,
            watch_id: id,
          },
        });
      },
      () => {}, // #ensure has told every watch already
    );
    return {
      cancel: () => {
        if (!this.#watches.delete(id)) return;
        if (this.#watches.size === 0) this.#drop(stream);
        else
          stream.then(
            (open) => open.write({ cancel_request: { watch_id: id } }),
            () => {},
          );
      },
    };
  }

  /** Ends every watch; the next one opens another stream. */
  reset(reason: string): void {
    if (this.#stream !== undefined) this.#drop(this.#stream);
    this.#endAll(reason);
  }

  close(): void {
    this.#watches.clear();
    if (this.#stream !== undefined) this.#drop(this.#stream);
  }

  #ensure(): Promise<Stream> {
    if (this.#stream !== undefined) return this.#stream;
    const opening = this.#open();
    this.#stream = opening;
    const broken = (reason: string): void => {
      if (this.#stream === opening) this.#stream = undefined;
      else return;
      this.#endAll(reason);
    };
    opening.then(
      (stream) => {
        stream.on('error', (error) => broken(error.message));
        stream.on('end', () => broken('etcd ended the watch stream'));
        stream.on('data', (response) => {
          if (this.#stream === opening) this.#take(response);
        });
        // Nobody waited for it: every watch was cancelled while it opened.
        if (this.#stream !== opening) stream.cancel();
      },
      (error: unknown) => broken(error instanceof Error ? error.message : String(error)),
    );
    return opening;
  }

  #drop(stream: Promise<Stream>): void {
    if (this.#stream === stream) this.#stream = undefined;
    stream.then(
      (open) => {
        // A cancelled stream reports its own cancellation as an error.
        open.on('error', () => {});
        open.cancel();
      },
      () => {},
    );
  }

  #endAll(reason: string): void {
    const ended = [...this.#watches.values()];
    this.#watches.clear();
    for (const { sink } of ended) sink.ended(reason, false);
  }

  #take(response: IWatchResponse): void {
    const entry = this.#watches.get(response.watch_id);
    if (entry === undefined) return; // cancelled by us a moment ago
    if (response.canceled) {
      this.#watches.delete(response.watch_id);
      const compacted = Number(response.compact_revision) > 0;
      const reason = compacted
        ? `history before revision ${response.compact_revision} was compacted`
        : response.cancel_reason || 'etcd cancelled the watch';
      if (this.#watches.size === 0 && this.#stream !== undefined) this.#drop(this.#stream);
      entry.sink.ended(reason, compacted);
      return;
    }
    if (response.created) {
      entry.sink.created(Number(response.header.revision), response.header.cluster_id);
      return;
    }
    entry.parts.push(...response.events);
    if (response.fragment) return;
    const events = entry.parts;
    entry.parts = [];
    const last = events.at(-1);
    const revision = Number(last === undefined ? response.header.revision : last.kv.mod_revision);
    entry.sink.events(events, revision);
  }
}
