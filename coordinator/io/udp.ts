// What udp_node.ts and udp_deno.ts both export, chosen by the "#udp" import of package.json: a UDP socket that serves
// many askers on one address. It knows nothing of what the messages say.
import type { Buffer } from 'node:buffer';
import type { Ipv4 } from '../../src/addr.ts';

export interface UdpOptions {
  readonly address: Ipv4;
  /** 0 takes a free one. */
  readonly port: number;
  /** Octets of the largest message; longer ones are cut. */
  readonly messageMax: number;
  /** Octets that may wait in the kernel, which gives at most net.core.rmem_max; its own default when left out. */
  readonly kernelBytes?: number | undefined;
}

export interface UdpServer {
  readonly port: number;
  /**
   * Begins to receive; once. The message is the callee's only until it returns: what stays must be copied. A source
   * port of 0 (RFC 768 allows it) is one that nothing can be sent to.
   */
  receive(onMessage: (message: Buffer, address: Ipv4, port: number) => void, onError: () => void): void;
  /** What cannot be sent is a lost datagram and told to `onError`. The message is the caller's again at once. */
  send(message: Buffer, address: Ipv4, port: number): void;
  /** Resolves when the port is free again. Repeating it is harmless. */
  close(): Promise<void>;
}
