// The data plane with a real kernel: TUN devices, namespaces, sockets; no control plane, routes are told by hand.
//
//   client, web 2 ── host 1      cart 1, db ── host 2      cart 2 ── host 3       underlay 10.78.0.0/24
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { ProxyReport } from '../../edge/proxy/command.ts';
import { FLOW_STATE } from '../../edge/proxy/flows.ts';
import {
  inside,
  type LabInstance,
  ProxyLab,
  type Runtime,
  runtimeArgv,
  SERVICES,
  shell,
} from '../../scripts/proxy_lab.ts';
import { formatIpv4, ipv4 } from '../../src/addr.ts';
import { eventually } from '../support/eventually.ts';

const runtime: Runtime = 'deno' in process.versions ? 'deno' : 'node';
const PEER = join(import.meta.dirname, 'proxy_peer.ts');
const CART = 'shop.prod.cart.v1';
const DB = 'shop.prod.db.v1';
const WEB = 'shop.prod.web.v1';

const lab = new ProxyLab(`ewAt${process.pid}`);
const children: ChildProcess[] = [];
let client: LabInstance;
let web2: LabInstance;
let cart1: LabInstance;
let cart2: LabInstance;
let db: LabInstance;

const until = (what: string, condition: () => boolean | Promise<boolean>): Promise<void> =>
  eventually(condition, what);

interface Running {
  readonly child: ChildProcess;
  readonly lines: Record<string, unknown>[];
  /** Whether it has ended and all its output was read. */
  readonly closed: { value: boolean };
}

function start(netns: string, argv: readonly string[]): Running {
  const [command, ...args] = inside(netns, ...argv);
  const child = spawn(command!, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  children.push(child);
  const lines: Record<string, unknown>[] = [];
  createInterface({ input: child.stdout }).on('line', (line) => {
    lines.push(line.startsWith('{') ? (JSON.parse(line) as Record<string, unknown>) : { text: line });
  });
  createInterface({ input: child.stderr }).on('line', (text) => lines.push({ text }));
  const closed = { value: false };
  child.once('close', () => {
    closed.value = true;
  });
  return { child, lines, closed };
}
const peer = (netns: string, ...args: readonly (string | number)[]): Running =>
  start(netns, [...runtimeArgv('node'), PEER, ...args.map(String)]);

/** Waits for a process that ends by itself, and for what it still had to say. */
const ended = ({ child, closed }: Running): Promise<void> =>
  eventually(() => closed.value, `${child.spawnargs.join(' ')} to end`, 60_000);

/** Runs to its end and gives the one line that it said. */
async function ask(netns: string, ...args: readonly (string | number)[]): Promise<Record<string, unknown>> {
  const running = peer(netns, ...args);
  await ended(running);
  const { lines } = running;
  return lines.find((line) => !('text' in line)) ?? { lines };
}

async function echo(instance: LabInstance): Promise<Running> {
  const running = peer(instance.netns, 'echo', 7000, `${instance.service} ${instance.number}`);
  await until(`${instance.netns} to serve`, () => running.lines.some((line) => line['ready'] === true));
  return running;
}

function ping(netns: string, address: string, size = 56): string {
  return shell(inside(netns, 'busybox', 'ping', '-c', '2', '-W', '2', '-s', String(size), address));
}

/** A process and those that it started: `ip netns exec` may stand between. */
function pidsBelow(pid: number): number[] {
  const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim();
  return [pid, ...(children === '' ? [] : children.split(' ').flatMap((child) => pidsBelow(Number(child))))];
}

const sip = (service: string, policy: 0 | 1 | 2 = 0): string => formatIpv4(lab.serviceIp(service, policy));
const iip = (instance: LabInstance): string => formatIpv4(instance.instanceIp);

const proxy = suite('ProxyTUN');

proxy.before(async () => {
  lab.up(3);
  await Promise.all(lab.hosts.map((host) => host.start(runtime)));
  const [one, two, three] = lab.hosts as [
    (typeof lab.hosts)[0],
    (typeof lab.hosts)[0],
    (typeof lab.hosts)[0],
  ];
  client = lab.instance(one, WEB, 1);
  web2 = lab.instance(one, WEB, 2);
  cart1 = lab.instance(two, CART, 1);
  db = lab.instance(two, DB, 1);
  cart2 = lab.instance(three, CART, 2);
  lab.tellAll();
  await Promise.all([cart1, cart2, db, web2].map((instance) => echo(instance)));
});

proxy.after(async () => {
  for (const child of children) if (child.exitCode === null) child.kill('SIGKILL');
  await lab.down();
});

proxy(
  'TCP across nodes: 20 connections at once, every byte comes back from the address that was dialled',
  async () => {
    for (const address of [sip(CART), iip(cart1), sip(DB, 1)])
      assert.equal(await ask(client.netns, 'tcp', address, 7000, 20, 300_000), { ok: 20, bad: [] }, address);
  },
);

proxy('TCP on one node passes through the ProxyTUN, as super-packets that nobody cuts', async () => {
  const before = await lab.hosts[0]!.counters();
  assert.equal(await ask(client.netns, 'tcp', iip(web2), 7000, 4, 2_000_000), { ok: 4, bad: [] });
  const after = await lab.hosts[0]!.counters();
  assert.ok(after['same_node_packets']! > before['same_node_packets']!);
  assert.is(after['segmented_packets'], before['segmented_packets']);
});

proxy(
  'UDP of every size from 0 to 8,000 bytes arrives whole and unaltered, on one node and across nodes',
  async () => {
    for (const size of [0, 1, 64, 1_400, 1_422, 1_423, 1_436, 1_437, 2_000, 4_000, 8_000])
      for (const address of [sip(CART), iip(web2)])
        assert.equal(
          await ask(client.netns, 'udp', address, 7000, size, 3),
          { ok: 3, bad: [] },
          `${size} to ${address}`,
        );
  },
);

proxy('roundrobin spreads connections evenly, an InstanceIP means one instance', async () => {
  const names = await ask(client.netns, 'who', sip(CART), 7000, 40);
  assert.is((names[`${CART} 1`] as number) + (names[`${CART} 2`] as number), 40, JSON.stringify(names));
  assert.ok((names[`${CART} 1`] as number) >= 16, JSON.stringify(names));
  assert.equal(await ask(client.netns, 'who', iip(cart2), 7000, 5), { [`${CART} 2`]: 5 });
});

proxy('ICMP echo to a ServiceIP and to InstanceIPs, small and fragmented', () => {
  for (const address of [sip(CART), iip(cart1), iip(web2)])
    for (const size of [8, 56, 1_436, 1_437, 8_000])
      assert.match(ping(client.netns, address, size), '2 packets transmitted, 2 packets received', `${size}`);
});

proxy(
  'on the underlay tcpdump reads VXLAN-GPE, with the InstanceIP and the namespace IP inside',
  async () => {
    const dump = start(lab.hosts[0]!.netns, [
      // Octet 3 of the tunnel header is the next protocol: IPv4, and so no greeting.
      ...['tcpdump', '-n', '-v', '-l', '-i', 'up0', '-c', '4', 'udp port 4790 and udp[11] = 1'],
    ]);
    await until('tcpdump to listen', () => dump.lines.some(({ text }) => String(text).includes('listening')));
    ping(client.netns, iip(cart1));
    await ended(dump);
    const text = dump.lines.map((line) => line['text']).join('\n');
    assert.match(text, /VXLAN-GPE, flags \[IP\], vni 17751/);
    assert.match(text, `${iip(client)} > ${formatIpv4(cart1.namespaceIp)}: ICMP echo request`);
    assert.match(text, `${iip(cart1)} > ${formatIpv4(client.namespaceIp)}: ICMP echo reply`);
    assert.not.match(text, 'bad cksum');
  },
);

proxy('inner checksums are right on the wire, for TCP segments and datagrams', async () => {
  const dump = start(lab.hosts[0]!.netns, [
    ...['tcpdump', '-n', '-vv', '-l', '-i', 'up0', 'udp port 4790 and udp[11] = 1 and src 10.78.0.1'],
  ]);
  await until('tcpdump to listen', () => dump.lines.some(({ text }) => String(text).includes('listening')));
  await ask(client.netns, 'udp', iip(cart1), 7000, 700, 4);
  await ask(client.netns, 'tcp', iip(cart1), 7000, 2, 200_000);
  const said = (): string => dump.lines.map((line) => line['text']).join('\n');
  // How many frames carry the bytes is the kernel's affair.
  await until('both kinds to be seen', () => {
    const text = said();
    return text.includes('udp sum ok') && /cksum 0x[0-9a-f]{4} \(correct\)/.test(text);
  });
  dump.child.kill('SIGTERM');
  await ended(dump);
  // The outer checksum is left to the device; every inner one was made here.
  const inner = dump.lines.map(({ text }) => String(text)).filter((line) => line.includes(iip(client)));
  assert.ok(inner.length > 5);
  assert.is(inner.filter((line) => line.includes('incorrect')).length, 0, inner.join('\n'));
});

proxy('super-packets of very small segments, many at once, keep their headers', async () => {
  const way = (...more: string[]): string[] => [
    ...['ip', '-n', client.netns, 'route', 'replace', 'default', 'via', formatIpv4(lab.hosts[0]!.bridge)],
    ...more,
  ];
  const before = await lab.hosts[0]!.counters();
  shell(way('advmss', '88'));
  shell([
    'ip',
    '-n',
    cart1.netns,
    'route',
    'replace',
    'default',
    'via',
    formatIpv4(lab.hosts[1]!.bridge),
    'advmss',
    '88',
  ]);
  try {
    assert.equal(await ask(client.netns, 'tcp', iip(cart1), 7000, 20, 300_000), { ok: 20, bad: [] });
    const after = await lab.hosts[0]!.counters();
    assert.ok(after['segmented_packets']! - before['segmented_packets']! > 20_000);
    assert.is(after['drop_malformed_transport'], before['drop_malformed_transport']);
  } finally {
    shell(way());
    shell(['ip', '-n', cart1.netns, 'route', 'replace', 'default', 'via', formatIpv4(lab.hosts[1]!.bridge)]);
  }
});

proxy('nothing listens: the client is told at once, by the address that it had dialled', async () => {
  const running = peer(client.netns, 'hold', sip(CART), 7999);
  await ended(running);
  assert.equal(running.lines[0], { event: 'ECONNREFUSED' });
});

proxy(
  'an instance that goes: its client gets a reset at once, and new connections go elsewhere',
  async () => {
    const [one] = lab.hosts;
    const holds = [sip(DB), iip(db)].map((address) => peer(client.netns, 'hold', address, 7000));
    for (const { lines } of holds) await until('the echo', () => lines.some(({ event }) => event === 'data'));
    one!.send(lab.serviceCommand(DB, [], one!));
    // Long before the client's own patience, which is minutes.
    for (const { lines } of holds)
      await eventually(() => lines.some(({ event }) => event === 'ECONNRESET'), 'the reset', 10_000);
    one!.send(lab.serviceCommand(DB, [db], one!));
    for (const address of [sip(DB), iip(db)])
      assert.equal(await ask(client.netns, 'tcp', address, 7000, 1, 1_000), { ok: 1, bad: [] });
  },
);

proxy('needs: a service outside them is refused at once and counted', async () => {
  lab.tellAll({ [WEB]: [CART] });
  const running = peer(client.netns, 'hold', sip(DB), 7000);
  await ended(running);
  assert.match(String(running.lines[0]!['event']), /^(EHOSTUNREACH|EACCES|ECONNREFUSED)$/);
  assert.equal(await ask(client.netns, 'tcp', sip(CART), 7000, 2, 1_000), { ok: 2, bad: [] });
  assert.ok((await lab.hosts[0]!.counters())['drop_not_needed']! > 0);
  lab.tellAll();
});

proxy('a route that is missing is asked for, and the packet that missed it is not lost', async () => {
  const [one, two] = lab.hosts;
  one!.send({ kind: 'serviceGone', service: db.service });
  two!.send({ kind: 'serviceGone', service: client.service });
  const since = one!.reports.length;
  const running = ask(client.netns, 'udp', sip(DB), 7000, 100, 1);
  const missed = (reports: readonly ProxyReport[], address: number): boolean =>
    reports.some((report) => report.kind === 'miss' && report.address === address);
  await until('the miss at the sender', () => missed(one!.reports.slice(since), lab.serviceIp(DB)));
  one!.send(lab.serviceCommand(DB, [db], one!));
  await until('the miss at the receiver', () => missed(two!.reports, client.instanceIp));
  two!.send(lab.serviceCommand(WEB, [client, web2], two!));
  assert.equal(await running, { ok: 1, bad: [] });
});

proxy('an address that nobody has: its client is refused as soon as that is known', async () => {
  const [one] = lab.hosts;
  const nobody = ipv4(SERVICES + 0xff00);
  let from = one!.reports.length;
  const running = peer(client.netns, 'hold', formatIpv4(nobody), 7000);
  await until('the refusal', () => {
    for (const report of one!.reports.slice(from))
      if (report.kind === 'miss' && report.address === nobody)
        one!.send({ kind: 'unowned', address: nobody });
    from = one!.reports.length;
    return running.lines.some(({ event }) => event === 'ECONNREFUSED');
  });
});

proxy('a node that cannot be reached, and one where nothing listens, stop nothing', async () => {
  const [one] = lab.hosts;
  const ghost = (nodeIp: string, n: number) => ({
    instance: n,
    instanceIp: ipv4(0xac1ef000 + n),
    namespaceIp: ipv4(0xac1f0000 + 64 * n + 2),
    nodeIp: ipv4(nodeIp.split('.').reduce((sum, part) => sum * 256 + Number(part), 0)),
    ewp: n === 2 ? 4791 : 4790,
    local: false,
  });
  one!.send({
    kind: 'service',
    service: 'a.b.ghost.v1' as typeof db.service,
    addresses: {},
    instances: [ghost('203.0.113.9', 1), ghost('10.78.0.2', 2), ghost('10.78.0.99', 3)],
  });
  for (const n of [1, 2, 3]) await ask(client.netns, 'udp', formatIpv4(ipv4(0xac1ef000 + n)), 7000, 64, 1);
  assert.equal(await ask(client.netns, 'tcp', sip(CART), 7000, 2, 100_000), { ok: 2, bad: [] });
  const counters = await one!.counters();
  assert.ok(counters['drop_send_unreachable']! > 0, JSON.stringify(counters));
});

proxy('garbage on the tunnel port is counted and stops nothing (oakestra.md §10, 1)', async () => {
  const [one] = lab.hosts;
  const script = `
    const { createSocket } = require('node:dgram');
    const s = createSocket('udp4');
    const frames = [[], [0], [12,0,0,1,0,69,87], [8,0,0,1,0,69,87,0,69], [12,0,0,1,0,0,1,0,69], [12,0,0,7,0,69,87,0,69],
      [12,0,0,254,0,69,87,0,1,2,3], [12,0,0,1,0,69,87,0,69,0,0,20], Array(300).fill(255)];
    let left = frames.length;
    for (const f of frames) s.send(Buffer.from(f), 4790, '10.78.0.1', () => { if (--left === 0) s.close(); });`;
  shell(inside(lab.hosts[1]!.netns, ...runtimeArgv('node').slice(0, 1), '-e', script));
  await until('all of it to be counted', async () => {
    const counters = await one!.counters();
    return (
      counters['drop_short_frame']! >= 3 &&
      counters['drop_bad_flags']! >= 2 &&
      counters['drop_wrong_vni']! >= 1 &&
      counters['drop_unknown_protocol']! >= 1 &&
      counters['drop_bad_control']! >= 1 &&
      counters['drop_malformed_ipv4']! >= 1
    );
  });
  assert.equal(await ask(client.netns, 'tcp', sip(CART), 7000, 1, 1_000), { ok: 1, bad: [] });
});

proxy('path MTU: a narrower underlay is found out, TCP and big datagrams go on', async () => {
  // A route with a smaller MTU stands for a narrower link: the kernel then says "too big" just as after an ICMP error.
  shell(['ip', '-n', lab.hosts[0]!.netns, 'route', 'add', '10.78.0.2/32', 'dev', 'up0', 'mtu', '1300']);
  assert.equal(await ask(client.netns, 'tcp', iip(cart1), 7000, 3, 400_000), { ok: 3, bad: [] });
  // The datagram that finds out is lost, and whoever sends datagrams repeats them.
  for (const size of [1_200, 1_400, 4_000])
    await until(`datagrams of ${size} to pass`, async () => {
      const { ok } = await ask(client.netns, 'udp', iip(cart1), 7000, size, 4);
      return ok === 4;
    });
  const counters = await lab.hosts[0]!.counters();
  assert.ok(counters['drop_too_big']! > 0 && counters['icmp_made']! > 0);
  shell(['ip', '-n', lab.hosts[0]!.netns, 'route', 'del', '10.78.0.2/32']);
});

proxy('probes are answered by the loop itself, with the status it was given', async () => {
  const [one, two] = lab.hosts;
  two!.send({ kind: 'probeStatus', status: new Uint8Array([1, 2, 3]) });
  // Two processes take their commands each in its own time: asked until the new status is in the answer.
  let token = 0xfedcba90;
  let found: Extract<ProxyReport, { kind: 'probed' }> | undefined;
  await until('the answer', async () => {
    token++;
    one!.send({ kind: 'probe', token, nodeIp: two!.nodeIp, ewp: 4790 });
    await until(`an answer to ${token}`, () => {
      found = one!.reports.find(
        (report): report is typeof found & object => report.kind === 'probed' && report.token === token,
      );
      return found !== undefined;
    });
    return Object.values(found!.status).length > 0;
  });
  assert.is(found!.nodeIp, two!.nodeIp);
  assert.equal(Object.values(found!.status), [1, 2, 3]);
  assert.ok(found!.rttNs > 1_000 && found!.rttNs < 1e9);
});

proxy('TTL: what runs out between the nodes is answered and counted', async () => {
  const before = await lab.hosts[0]!.counters();
  // The host takes one as a router, the loop another.
  spawnSync('ip', [
    'netns',
    'exec',
    client.netns,
    'busybox',
    'ping',
    '-c',
    '1',
    '-W',
    '1',
    '-t',
    '2',
    iip(cart1),
  ]);
  await until('it to be counted', async () => {
    const after = await lab.hosts[0]!.counters();
    return (
      after['drop_ttl_exceeded']! > before['drop_ttl_exceeded']! && after['icmp_made']! > before['icmp_made']!
    );
  });
});

for (const without of [['gso', 'gro'], ['uso'], ['tso', 'gso', 'gro']] as const)
  proxy(`without ${without.join(', ')} everything arrives whole, in more packets`, async () => {
    const [one, two] = lab.hosts;
    for (const host of [one!, two!]) {
      await host.stop();
      await host.start(runtime, { without });
    }
    lab.tellAll();
    assert.equal(await ask(client.netns, 'tcp', iip(cart1), 7000, 4, 300_000), { ok: 4, bad: [] });
    assert.equal(await ask(client.netns, 'tcp', iip(web2), 7000, 2, 300_000), { ok: 2, bad: [] });
    for (const size of [64, 1_400, 8_000])
      assert.equal(await ask(client.netns, 'udp', iip(cart1), 7000, size, 4), { ok: 4, bad: [] }, `${size}`);
    const counters = await one!.counters();
    if ((without as readonly string[]).includes('tso'))
      assert.is(counters['segmented_packets']! + counters['joined_packets']!, 0);
  });

proxy('kill -9 of the loop: its flows go on within 2 s of its start, ServiceIPs included', async () => {
  const [one] = lab.hosts;
  const flowsFile = join(tmpdir(), `${lab.prefix}-flows`);
  try {
    for (const host of lab.hosts.slice(1, 2)) {
      await host.stop();
      await host.start(runtime);
    }
    await one!.stop();
    await one!.start(runtime, { flowsFile });
    lab.tellAll();
    const holds = [sip(CART), sip(CART), sip(CART), iip(cart1)].map((address) =>
      peer(client.netns, 'hold', address, 7000),
    );
    for (const { lines } of holds) await until('the echo', () => lines.some(({ event }) => event === 'data'));
    // What is younger than the last write to the file is lost with the agent.
    const established = (): number => {
      const records = readFileSync(flowsFile).subarray(8);
      let count = 0;
      for (let at = 0; at < records.length; at += 24) if (records[at] === FLOW_STATE.established + 1) count++;
      return count;
    };
    await until('the flows to be on disk', () => established() >= 4);
    const child = one!.process!;
    const gone = new Promise((resolve) => child.once('exit', resolve));
    shell(['kill', '-9', ...pidsBelow(child.pid!).map(String)]);
    await gone;
    const outSince = performance.now();
    await one!.start(runtime, { flowsFile });
    lab.tellAll();
    const since = performance.now();
    // A client repeats itself after as long as it has waited already.
    const outage = since - outSince;
    const counts = holds.map(({ lines }) => lines.length);
    for (const [i, { lines }] of holds.entries())
      await until('the echo to go on', () => lines.length > counts[i]!);
    // Long before a client gives up; how fast it really is, is no question for a busy machine.
    assert.ok(performance.now() - since < 10_000 + outage, `${performance.now() - since} ms`);
    for (const { lines } of holds)
      assert.equal([...new Set(lines.map(({ event }) => event))], ['connected', 'data']);
    assert.ok((await one!.counters())['flows_restored']! >= 4);
  } finally {
    rmSync(flowsFile, { force: true });
  }
});

proxy('the loop says so and ends when its TUN device is deleted', async () => {
  const three = lab.hosts[2]!;
  shell(['ip', '-n', three.netns, 'link', 'del', 'ewtun']);
  await until('the report', () =>
    three.reports.some((report) => report.kind === 'stopped' && /TUN device/.test(report.error ?? '')),
  );
});

proxy.run();
