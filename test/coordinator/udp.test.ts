// The UDP socket of a DNS server; test/edge/io/dns_server.test.ts says what goes over it.
import { Buffer } from 'node:buffer';
import { createSocket, type Socket } from 'node:dgram';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { bindUdp, type UdpServer } from '../../coordinator/io/udp_server.ts';
import { type Ipv4, ipv4 } from '../../src/addr.ts';

const LOOPBACK = ipv4(0x7f000001);
const ROOM = 64;

interface Heard {
  readonly text: string;
  readonly address: Ipv4;
  readonly port: number;
}

async function withPair(
  body: (server: UdpServer, client: Socket, told: { heard: Heard[]; lost: number }) => Promise<void>,
): Promise<void> {
  const server = await bindUdp({ address: LOOPBACK, port: 0, messageMax: ROOM, kernelBytes: 1 << 20 });
  const client = createSocket('udp4');
  await new Promise<void>((resolve) => client.bind(0, '127.0.0.1', resolve));
  const told = { heard: [] as Heard[], lost: 0 };
  try {
    server.receive(
      (message, address, port) => told.heard.push({ text: message.toString('latin1'), address, port }),
      () => told.lost++,
    );
    await body(server, client, told);
  } finally {
    client.close();
    await server.close();
  }
}

/** One after the other: Deno's own sockets keep no order among those under way. */
async function say(client: Socket, to: UdpServer, ...messages: string[]): Promise<void> {
  for (const message of messages)
    await new Promise<void>((resolve) => client.send(message, to.port, '127.0.0.1', () => resolve()));
}

async function until(what: string, holds: () => boolean): Promise<void> {
  const end = performance.now() + 10_000;
  while (!holds()) {
    if (performance.now() > end) throw new Error(`${what}: not within 10 s`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

test('a message comes with who sent it, and the answer goes back to it', async () => {
  await withPair(async (server, client, { heard }) => {
    const answers: string[] = [];
    client.on('message', (message) => answers.push(message.toString('latin1')));
    await say(client, server, 'who?', '');
    await until('both came', () => heard.length === 2);
    const { port } = client.address();
    assert.equal(heard, [
      { text: 'who?', address: LOOPBACK, port },
      { text: '', address: LOOPBACK, port },
    ]);
    const answer = Buffer.from('first');
    server.send(answer, LOOPBACK, port);
    answer.write('other'); // it is the caller's again
    server.send(answer, LOOPBACK, port);
    await until('both answers came', () => answers.length === 2);
    assert.equal(answers, ['first', 'other']);
  });
});

test('a thousand in a row are all taken, in order', async () => {
  await withPair(async (server, client, { heard }) => {
    const sent = Array.from({ length: 1_000 }, (_, i) => String(i));
    await say(client, server, ...sent);
    await until('all came', () => heard.length === sent.length);
    assert.equal(
      heard.map(({ text }) => text),
      sent,
    );
  });
});

test('a message beyond the room is cut, and the next one is whole', async () => {
  await withPair(async (server, client, { heard }) => {
    await say(client, server, 'x'.repeat(1_400), 'next');
    await until('both came', () => heard.length === 2);
    assert.ok(heard[0]!.text.length <= 1_400 && /^x+$/.test(heard[0]!.text));
    assert.is(heard[1]!.text, 'next');
  });
});

test('what cannot be sent is a lost datagram: too long, to port 0, or after the end', async () => {
  await withPair(async (server, client, told) => {
    const { port } = client.address();
    server.send(Buffer.alloc(65_535), LOOPBACK, port);
    await until('too long is told', () => told.lost === 1);
    server.send(Buffer.from('nobody'), LOOPBACK, 0);
    await until('port 0 is told', () => told.lost === 2);
    await server.close();
    server.send(Buffer.from('late'), LOOPBACK, port);
    await until('the end is told', () => told.lost === 3);
  });
});

test('a port that is taken is EADDRINUSE, an address of another host EADDRNOTAVAIL; closing frees the port', async () => {
  const code = async (address: Ipv4, port: number): Promise<string> => {
    try {
      await (await bindUdp({ address, port, messageMax: ROOM })).close();
      return 'bound';
    } catch (error) {
      return String((error as { code?: string }).code);
    }
  };
  const held = await bindUdp({ address: LOOPBACK, port: 0, messageMax: ROOM });
  assert.is(await code(LOOPBACK, held.port), 'EADDRINUSE');
  await held.close();
  await held.close();
  assert.is(await code(LOOPBACK, held.port), 'bound');
  assert.is(await code(ipv4(0xc6336407), 5353), 'EADDRNOTAVAIL');
});

test.run();
