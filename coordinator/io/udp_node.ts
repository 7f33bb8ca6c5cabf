// UDP sockets on Node; udp_deno.ts is its twin. Chosen by the "#udp" import of package.json.
import { Buffer } from 'node:buffer';
import { createSocket, type Socket } from 'node:dgram';
import { formatIpv4, type Ipv4, parseIpv4 } from '../../src/addr.ts';
import type { UdpOptions, UdpServer } from './udp.ts';

/** Addresses whose two forms are kept. */
const KNOWN_MAX = 1_024;

/**
 * Sets how much a bound socket can take: messages of up to `messageMax` octets, and `kernelBytes` of them waiting in
 * the kernel, which gives at most net.core.rmem_max.
 */
export function sizeReceives(socket: Socket, _messageMax: number, kernelBytes?: number): void {
  // libuv reads into one slab of 64 KiB and copies out what came.
  if (kernelBytes !== undefined) socket.setRecvBufferSize(kernelBytes);
}

/** Rejects with the system's error, whose `code` tells what stands in the way. */
export async function bindUdp(options: UdpOptions): Promise<UdpServer> {
  const socket = createSocket({
    type: 'udp4',
    // Peers are numeric addresses: nothing is to be looked up on the way out.
    lookup: (host, _options, done) => done(null, host, 4),
  });
  await new Promise<void>((resolve, reject) => {
    socket.once('error', (error) => {
      socket.close();
      reject(error);
    });
    socket.bind({ address: formatIpv4(options.address), port: options.port, exclusive: true }, () => {
      socket.removeAllListeners('error');
      resolve();
    });
  });
  sizeReceives(socket, options.messageMax, options.kernelBytes);

  const texts = new Map<Ipv4, string>();
  const numbers = new Map<string, Ipv4>();
  function numberOf(text: string): Ipv4 | undefined {
    const known = numbers.get(text);
    if (known !== undefined) return known;
    const parsed = parseIpv4(text);
    if (!parsed.ok) return undefined;
    if (numbers.size >= KNOWN_MAX) {
      numbers.clear();
      texts.clear();
    }
    numbers.set(text, parsed.value);
    texts.set(parsed.value, text);
    return parsed.value;
  }

  let failed = (): void => {};
  const sent = (error: Error | null): void => {
    if (error !== null) failed();
  };
  let closed: Promise<void> | undefined;
  return {
    port: socket.address().port,
    receive(onMessage, onError) {
      failed = onError;
      socket.on('error', onError);
      socket.on('message', (message, from) => {
        const address = numberOf(from.address);
        if (address !== undefined) onMessage(message, address, from.port);
      });
    },
    send(message, address, port) {
      try {
        // A copy: the socket may hold it for a while.
        socket.send(Buffer.from(message), port, texts.get(address) ?? formatIpv4(address), sent);
      } catch {
        failed(); // closed meanwhile, or port 0
      }
    },
    close() {
      closed ??= new Promise((resolve) => socket.close(() => resolve()));
      return closed;
    },
  };
}
