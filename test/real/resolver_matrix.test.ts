// Every resolver that an app may bring, unchanged, against the real server: does it find a seven-label name, at once,
// and a foreign one through us? "At once" has a bound of 4.5 s, start of the program included, because the failures that
// this table is about cost 5 s and more (a dead nameserver, an unanswered AAAA, a name taken by mDNS).
//
//   host namespace: resolver on 172.16.0.65, a web page on 172.30.0.2 (the name's address), dnsmasq as upstream
//   clients: one namespace per nsswitch.conf, each with exactly one nameserver
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { unpacked } from './debian.ts';
import { type Client, DnsLab, must, type Ran, run, type Talker, until } from './dns_lab.ts';

const NAME = 'shop.prod.cart.v1.any.closest.local';
const ADDRESS = '172.30.0.2';
const FOREIGN = 'www.example.test';
const AT_ONCE_MS = 4_500;
let lab: DnsLab;
let plain: Client;
let resolver: Talker;
let number = 0;

const clientWith = (hosts: string, more: Readonly<Record<string, string>> = {}): Promise<Client> =>
  lab.client(++number, { 'nsswitch.conf': `passwd: files\ngroup: files\nhosts: ${hosts}\n`, ...more });

/** avahi answers nothing in its first moments, when it still probes for its own host name. */
async function warmAvahi(client: Client): Promise<void> {
  await client.avahi();
  await until('avahi to resolve', async () =>
    (await client.run(['avahi-resolve', '-4', '-n', NAME])).stdout.includes(ADDRESS),
  );
}

function found(ran: Ran, what: string, pattern: RegExp | string = ADDRESS): void {
  assert.match(ran.stdout + ran.stderr, pattern, `${what}: ${ran.stdout}${ran.stderr}`);
  assert.ok(ran.ms < AT_ONCE_MS, `${what} took ${Math.round(ran.ms)} ms`);
}

test.before(async () => {
  lab = await new DnsLab().up();
  await lab.inHost(['ip', 'addr', 'add', `${ADDRESS}/32`, 'dev', 'lo']);
  const upstream = lab.talk([
    'ip',
    'netns',
    'exec',
    lab.host,
    'dnsmasq',
    '--keep-in-foreground',
    '--conf-file=/dev/null',
    '--no-resolv',
    '--local=/test/',
    '--no-hosts',
    '--listen-address=127.0.0.1',
    '--bind-interfaces',
    '--port=5300',
    '--pid-file=',
    '--user=root',
    `--host-record=${FOREIGN},192.0.2.80`,
    '--address=/big.example.test/192.0.2.81',
    ...Array.from({ length: 60 }, (_, i) => `--txt-record=big.example.test,${'x'.repeat(60)}${i}`),
  ]);
  upstream.isDaemon = true;
  resolver = await lab.resolver({ upstreams: ['127.0.0.1:5300'], page: ADDRESS });
  plain = await clientWith('files dns');
  await until('the upstream', async () =>
    (await plain.run(['dig', '+short', '@172.16.0.65', FOREIGN])).stdout.includes('192.0.2.80'),
  );
});
test.after(async () => {
  await lab.down();
});

test('dig: a name of ours, a foreign one, and a long answer that comes again over TCP', async () => {
  found(await plain.run(['dig', '+short', NAME]), 'dig');
  found(await plain.run(['dig', '+short', FOREIGN]), 'dig foreign', '192.0.2.80');
  const long = await plain.run(['dig', '+noedns', 'TXT', 'big.example.test']);
  found(long, 'dig TXT', /ANSWER: 60/);
  assert.match(long.stdout, '(TCP)');
});

test('glibc, hosts: files dns', async () => {
  found(await plain.run(['getent', 'ahosts', NAME]), 'getent');
  found(await plain.run(['getent', 'ahostsv4', NAME]), 'getent v4');
  found(await plain.run(['getent', 'ahosts', FOREIGN]), 'getent foreign', '192.0.2.80');
  found(await plain.run(['getent', 'hosts', ADDRESS]), 'getent reverse', NAME);
  const missing = await plain.run(['getent', 'ahosts', 'shop.prod.nil.v1.any.closest.local']);
  assert.is(missing.status, 2);
  assert.ok(missing.ms < AT_ONCE_MS);
});

test('glibc with libnss-mdns (Debian default), avahi absent and avahi running', async () => {
  const root = await unpacked('libnss-mdns');
  const client = await clientWith('files mdns4_minimal [NOTFOUND=return] dns');
  const getent = ['env', `LD_LIBRARY_PATH=${root}/lib/x86_64-linux-gnu`, 'getent', 'ahosts', NAME];
  found(await client.run(getent), 'without avahi');
  await warmAvahi(client);
  found(await client.run(getent), 'with avahi');
});

test('glibc with mdns4 and mdns.allow for our suffixes: the multicast face answers, through avahi', async () => {
  const root = await unpacked('libnss-mdns');
  const client = await clientWith('files mdns4', { 'mdns.allow': '.closest.local.\n.closest.local\n' });
  await warmAvahi(client);
  found(
    await client.run(['env', `LD_LIBRARY_PATH=${root}/lib/x86_64-linux-gnu`, 'getent', 'ahostsv4', NAME]),
    'mdns4',
  );
});

test('glibc with mdns (IPv4 and IPv6) does not wait for AAAA where the interface has no IPv6, as ours have none', async () => {
  const root = await unpacked('libnss-mdns');
  const client = await clientWith('files mdns', { 'mdns.allow': '.closest.local.\n.closest.local\n' });
  // What the environment manager does to the interface of an instance; with IPv6 this takes 5.2 s.
  await must(client.enter(['sysctl', '-q', '-w', 'net.ipv6.conf.eth0.disable_ipv6=1']));
  await warmAvahi(client);
  found(
    await client.run(['env', `LD_LIBRARY_PATH=${root}/lib/x86_64-linux-gnu`, 'getent', 'ahosts', NAME]),
    'mdns',
  );
});

test('musl, a static binary', async () => {
  const source = join(lab.directory, 'look.c');
  const binary = join(lab.directory, 'look');
  writeFileSync(
    source,
    `#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
int main(int n, char **v) {
  struct addrinfo *list, hint = {.ai_socktype = SOCK_STREAM};
  int status = getaddrinfo(v[1], "80", &hint, &list);
  if (status) return printf("%s\\n", gai_strerror(status)), 1;
  for (; list; list = list->ai_next) {
    char text[64];
    if (list->ai_family == AF_INET) puts(inet_ntop(AF_INET, &((struct sockaddr_in *)list->ai_addr)->sin_addr, text, 64));
  }
}
`,
  );
  await must(['musl-gcc', '-static', '-O1', '-o', binary, source]);
  assert.not.match((await run(['file', binary])).stdout, 'dynamically');
  found(await plain.run([binary, NAME]), 'musl');
  found(await plain.run([binary, FOREIGN]), 'musl foreign', '192.0.2.80');
  const missing = await plain.run([binary, 'shop.prod.nil.v1.any.closest.local']);
  found(missing, 'musl missing', /does not resolve/);
});

test('busybox: nslookup and wget', async () => {
  found(await plain.run(['busybox', 'nslookup', NAME]), 'nslookup');
  found(await plain.run(['busybox', 'wget', '-q', '-O', '-', `http://${NAME}/`]), 'wget', 'the page of cart');
});

test('Node: dns.lookup, dns.resolve4, dns.resolveSrv, dns.reverse and fetch', async () => {
  const script = `
    import { lookup, resolve4, resolveSrv, reverse } from 'node:dns/promises';
    const name = '${NAME}';
    console.log('lookup', (await lookup(name)).address);
    console.log('resolve4', (await resolve4(name))[0]);
    console.log('srv', (await resolveSrv(name)).map(({ port }) => port).sort().join());
    console.log('reverse', (await reverse('${ADDRESS}'))[0]);
    console.log('fetch', await (await fetch('http://' + name + '/')).text());
    console.log('code', await resolve4('shop.prod.nil.v1.any.closest.local').catch((error) => error.code));`;
  const node = process.env['NODE'] ?? process.execPath;
  const ran = await plain.run([node, '--input-type=module', '-e', script]);
  for (const line of [
    `lookup ${ADDRESS}`,
    `resolve4 ${ADDRESS}`,
    'srv 443,80',
    `reverse ${NAME}`,
    'fetch the page of cart',
    'code ENOTFOUND',
  ])
    found(ran, 'Node', line);
});

test('Deno: resolveDns, connect and fetch', async () => {
  const script = `
    const name = '${NAME}';
    console.log('resolveDns', (await Deno.resolveDns(name, 'A'))[0]);
    const connection = await Deno.connect({ hostname: name, port: 80 });
    console.log('connect', connection.remoteAddr.hostname);
    connection.close();
    console.log('fetch', await (await fetch('http://' + name + '/')).text());
    const missing = await Deno.resolveDns('shop.prod.nil.v1.any.closest.local', 'A').catch((error) => error.name);
    console.log('missing', missing);`;
  const ran = await plain.run([process.env['DENO']!, 'eval', script]);
  for (const line of [
    `resolveDns ${ADDRESS}`,
    `connect ${ADDRESS}`,
    'fetch the page of cart',
    'missing NotFound',
  ])
    found(ran, 'Deno', line);
});

test("Go's own resolver (etcdctl) goes to the name's address", async () => {
  const connections = async (): Promise<number> => Number((await resolver.ask({}))['connections']);
  const before = await connections();
  const etcdctl = `etcdctl --dial-timeout=1s --command-timeout=1s --endpoints=http://${NAME}:80 get x`;
  // There is no etcd: that it comes to the page by the name is what counts.
  const ran = await plain.run(['env', 'ETCDCTL_API=3', 'GODEBUG=netdns=go+1', 'sh', '-c', etcdctl]);
  assert.match(ran.stderr, "forcing use of Go's resolver");
  assert.ok((await connections()) > before, ran.stderr);
});

test('curl opens the page by its name', async () => {
  found(await plain.run(['curl', '-sS', '--max-time', '5', `http://${NAME}/`]), 'curl', 'the page of cart');
});

test('Chromium, headless, opens the page by its seven-label name', async () => {
  const ran = await plain.run(
    [
      'chromium-headless-shell',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-dev-shm-usage',
      `--user-data-dir=${lab.directory}/chromium`,
      '--dump-dom',
      `http://${NAME}/`,
    ],
    { limitMs: 60_000 },
  );
  assert.match(ran.stdout, 'the page of cart', ran.stderr.slice(-2000));
});

test('avahi-resolve finds the name by multicast', async () => {
  const client = await clientWith('files dns');
  await warmAvahi(client);
  found(await client.run(['avahi-resolve', '-4', '-n', NAME]), 'avahi-resolve');
});

test.run();
