// Datagrams that no resolver sends, from a real neighbour on a real bridge, and how the multicast server answers those
// that one does send: to the group, to one asker, or to nobody. The neighbour is a Python script with raw sockets.
import { decode, encode, type Packet } from 'dns-packet';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { type Client, DnsLab, must, type Talker, until } from './dns_lab.ts';

const NAME = 'shop.prod.cart.v1.any.closest.local';
const BRIDGE = '172.16.0.65';
const GROUP = '224.0.0.251';
const OUTSIDE_PORT = 5300;
let lab: DnsLab;
let client: Client;

/** Sends each message from one port; a raw socket lets the port be 0, which no other can. */
const RAW = `
import json, socket, struct, sys
host, source, target, messages = json.loads(sys.argv[1])
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
for message in messages:
    body = bytes.fromhex(message)
    raw.sendto(struct.pack('!HHHH', source, target, 8 + len(body), 0) + body, (host, 0))
`;

/** A multicast DNS speaker: sends the messages from its port, and prints what comes within the time, one answer a
 *  line: how it came, from which port, and the bytes. */
const SPEAKER = `
import json, select, socket, sys, time
own, port, target, seconds, messages = json.loads(sys.argv[1])
def bound(address):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((address, port))
    return s
one = bound(own)
sockets = {one: 'unicast'}
if port == 5353:
    group = bound('224.0.0.251')
    group.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('224.0.0.251') + socket.inet_aton(own))
    sockets[group] = 'multicast'
one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
one.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
for message in messages:
    one.sendto(bytes.fromhex(message), (target, 5353))
end = time.time() + seconds
while time.time() < end:
    for s in select.select(list(sockets), [], [], max(0, end - time.time()))[0]:
        data, (host, source) = s.recvfrom(9000)
        if host == '172.16.0.65':
            print(json.dumps([sockets[s], source, data.hex()]), flush=True)
            end = min(end, time.time() + 0.7)
`;

async function raw(source: number, target: number, messages: readonly Buffer[], host = BRIDGE) {
  const told = [host, source, target, messages.map((message) => message.toString('hex'))];
  const ran = await client.run(['python3', '-c', RAW, JSON.stringify(told)]);
  assert.is(ran.status, 0, ran.stderr);
}

interface Heard {
  readonly how: string;
  readonly port: number;
  readonly id: number;
  readonly records: string;
}

/** What is heard within two seconds of the question, and no longer than 0.7 s after an answer: RFC 6762 §6 delays
 *  none by more than half a second. */
async function speak(
  message: Buffer,
  more: { port?: number; target?: string; own?: string } = {},
): Promise<readonly Heard[]> {
  const { port = 5353, target = GROUP, own = '172.16.0.66' } = more;
  const told = JSON.stringify([own, port, target, 2, [message.toString('hex')]]);
  const ran = await client.run(['python3', '-c', SPEAKER, told]);
  assert.is(ran.status, 0, ran.stderr);
  return ran.stdout
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => {
      const [how, from, hex] = JSON.parse(line) as [string, number, string];
      const packet = decode(Buffer.from(hex, 'hex'));
      const records = packet.answers!.map((record) => {
        const { ttl, flush, data } = record as { ttl?: number; flush?: boolean; data: unknown };
        return `${record.type} ${ttl}${flush ? ' flush' : ''} ${String(data)}`;
      });
      return { how, port: from, id: packet.id!, records: records.join('; ') };
    });
}

const question = (name: string, more: Packet = {}): Buffer =>
  encode({ type: 'query', id: 7, flags: 0x100, questions: [{ type: 'A', name }], ...more });

/** The same with the QU bit set (RFC 6762 §5.4). */
function unicastQuestion(name: string): Buffer {
  const message = question(name, { id: 0, flags: 0 });
  message[message.length - 2] = 0x80;
  return message;
}

async function counters(talker: Talker): Promise<Record<string, number>> {
  return (await talker.ask({}))['counters'] as Record<string, number>;
}

async function withResolver(options: object, body: (talker: Talker) => Promise<void>): Promise<void> {
  const talker = await lab.resolver(options);
  try {
    await body(talker);
  } finally {
    await talker.end();
  }
}

const dig = async (...args: string[]): Promise<string> =>
  (await client.run(['dig', '+tries=3', '+time=3', `@${BRIDGE}`, ...args])).stdout;

/** The announcements after the start are over, and their second has passed. */
async function announced(talker: Talker): Promise<void> {
  await until('both announcements', async () => (await counters(talker))['mdns_announced']! >= 6);
  await new Promise((resolve) => setTimeout(resolve, 1_100)); // RFC 6762 §6: a record's second
}

test.before(async () => {
  lab = await new DnsLab().up();
  client = await lab.client(1);
  // A second address, of no link that the bridge knows.
  await must(['ip', '-n', client.name, 'addr', 'add', '10.9.9.9/24', 'dev', 'eth0']);
  await lab.inHost(['ip', 'route', 'add', '10.9.9.0/24', 'dev', 'br0']);
});
test.after(async () => {
  await lab.down();
});

test('a source port of 0 is malformed to every server: none answers it and none ends', async () => {
  await withResolver({ outside: OUTSIDE_PORT }, async (talker) => {
    const messages = [
      question(NAME),
      question(NAME), // the second comes from memory
      question('shop.prod.nil.v1.any.closest.local'),
      question('example.org'),
      Buffer.from('not DNS at all'),
    ];
    await raw(0, 53, messages);
    await raw(0, 5353, messages);
    await raw(0, 5353, messages, GROUP);
    await raw(0, OUTSIDE_PORT, [question('edge.example.org'), ...messages]);
    await until('all to be counted', async () => {
      const told = await counters(talker);
      return told['dns_malformed'] === 5 && told['mdns_malformed'] === 10;
    });
    assert.is((await dig('+short', NAME)).trim(), '172.30.0.2');
    assert.is((await dig('+short', '-p', '5353', '+notcp', NAME)).trim(), '172.30.0.2');
    assert.match(await dig('-p', String(OUTSIDE_PORT), 'edge.example.org', 'SOA'), /status: NOERROR/);
  });
});

test('counts that a message cannot hold are refused before room is made for them', async () => {
  await withResolver({ outside: OUTSIDE_PORT }, async (talker) => {
    const boast = question(NAME);
    boast.writeUInt16BE(0xffff, 6);
    boast.writeUInt16BE(0xffff, 8);
    boast.writeUInt16BE(0xffff, 10);
    const messages = Array.from({ length: 50 }, () => boast);
    for (const target of [53, 5353, OUTSIDE_PORT]) await raw(40_000, target, messages);
    await until('all to be counted', async () => {
      const told = await counters(talker);
      return told['dns_malformed'] === 50 && told['mdns_malformed'] === 50;
    });
    assert.is((await dig('+short', NAME)).trim(), '172.30.0.2');
    assert.match(await dig('-p', String(OUTSIDE_PORT), 'edge.example.org', 'SOA'), /status: NOERROR/);
  });
});

test('startDnsServer is silent to clients outside its links', async () => {
  await withResolver({ linkOnly: true }, async (talker) => {
    const stranger = ['-b', '10.9.9.9', '+tries=1', '+time=1', NAME];
    assert.match(await dig('+notcp', ...stranger), /timed out|no servers could be reached/);
    assert.match(await dig('+tcp', ...stranger), /timed out|no servers could be reached|end of file|reset/);
    assert.ok((await counters(talker))['dns_off_link']! >= 2);
    assert.is((await dig('+short', NAME)).trim(), '172.30.0.2');
  });
});

test('startMdns answers a legacy asker by unicast, with the asker’s id and at most 10 s (§6.7)', async () => {
  await withResolver({}, async (talker) => {
    await announced(talker);
    for (const target of [GROUP, BRIDGE]) {
      const heard = await speak(question(NAME, { id: 4711 }), { port: 40_001, target });
      assert.equal(heard, [{ how: 'unicast', port: 5353, id: 4711, records: 'A 10 172.30.0.2' }], target);
    }
    assert.match(await dig('-p', '5353', '+notcp', NAME), /IN\s+A\s+172\.30\.0\.2/);
    assert.is((await counters(talker))['mdns_legacy'], 3);
  });
});

test('startMdns answers the group, a QU question and a question to itself, each as RFC 6762 §5.4 and §5.5 say', async () => {
  await withResolver({}, async (talker) => {
    await announced(talker);
    const answer = { port: 5353, id: 0, records: 'A 120 flush 172.30.0.2' };
    assert.equal(await speak(question(NAME, { id: 0, flags: 0 })), [{ how: 'multicast', ...answer }]);
    assert.equal(await speak(unicastQuestion(NAME)), [{ how: 'unicast', ...answer }]);
    assert.equal(await speak(question(NAME, { id: 0, flags: 0 }), { target: BRIDGE }), [
      { how: 'unicast', ...answer },
    ]);
    assert.equal(await speak(question('printer.local', { id: 0, flags: 0 })), [], 'not ours');
    const dotted = question(NAME, { id: 0, flags: 0 });
    dotted[12] = 'shop.prod'.length; // one label with a dot inside
    dotted[17] = 0x2e;
    assert.equal(await speak(dotted), [], 'not a name of ours');
  });
});

test('startMdns answers a name that the keyspace tells of only when it is asked', async () => {
  await withResolver({ late: 'shop.prod.late.v1' }, async (talker) => {
    await announced(talker);
    const late = question('shop.prod.late.v1.any.closest.local', { id: 0, flags: 0 });
    assert.equal(await speak(late), [
      { how: 'multicast', port: 5353, id: 0, records: 'A 120 flush 172.30.8.2' },
    ]);
  });
});

test('startMdns refuses what comes from outside the subnet of its link (§11)', async () => {
  await withResolver({}, async (talker) => {
    await announced(talker);
    for (const port of [5353, 40_002])
      for (const target of [GROUP, BRIDGE])
        assert.equal(await speak(question(NAME), { own: '10.9.9.9', port, target }), [], `${port} ${target}`);
    assert.is((await counters(talker))['mdns_off_link'], 4);
  });
});

test('startMdns survives hostile datagrams to its port and answers right afterwards', async () => {
  await withResolver({}, async (talker) => {
    const whole = encode({
      type: 'response',
      answers: [{ type: 'A', name: NAME, ttl: 120, data: '203.0.113.1' }],
    });
    const messages: Buffer[] = [Buffer.alloc(0), Buffer.alloc(9_000, 0xff), Buffer.alloc(12)];
    for (const message of [question(NAME), unicastQuestion(NAME), whole])
      for (let at = 0; at < message.length; at++) {
        messages.push(message.subarray(0, at));
        for (const octet of [0, 0x3f, 0x80, 0xc0, 0xff]) {
          const bent = Buffer.from(message);
          bent[at] = octet;
          messages.push(bent);
        }
      }
    await raw(5353, 5353, messages, GROUP);
    await raw(40_003, 5353, messages);
    await until('some to be counted', async () => (await counters(talker))['mdns_malformed']! > 100);
    const heard = await speak(question(NAME, { id: 4711 }), { port: 40_001 });
    assert.is(heard.at(-1)?.records, 'A 10 172.30.0.2');
  });
});

test.run();
