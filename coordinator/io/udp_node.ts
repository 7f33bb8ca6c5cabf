// What a UDP socket of node:dgram may take on Node; udp_deno.ts is its twin. Chosen by the "#udp" import of package.json.
import type { Socket } from 'node:dgram';

/** Nothing is to be said: libuv reads into one slab of 64 KiB and copies out what came. */
export function sizeReceives(_socket: Socket, _messageMax: number): void {}
