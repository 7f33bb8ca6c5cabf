// What a UDP socket may take on Node; udp_deno.ts is its twin. Chosen by the "#udp" import of package.json.
import type { Socket } from 'node:dgram';

/**
 * Sets how much a bound socket can take: messages of up to `messageMax` octets, and `kernelBytes` of them waiting in
 * the kernel, which gives at most net.core.rmem_max.
 */
export function sizeReceives(socket: Socket, _messageMax: number, kernelBytes?: number): void {
  // libuv reads into one slab of 64 KiB and copies out what came.
  if (kernelBytes !== undefined) socket.setRecvBufferSize(kernelBytes);
}
