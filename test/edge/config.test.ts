import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { parseApiAddress, parseConfig, type SettingValues } from '../../edge/config.ts';
import { formatIpv4, parseIpv4 } from '../../src/addr.ts';
import { EdgewayError, unwrap } from '../../src/error.ts';

function why(flags: SettingValues, environment: Record<string, string> = {}): string {
  try {
    parseConfig(flags, environment, 'host');
  } catch (thrown) {
    assert.instance(thrown, EdgewayError);
    assert.is((thrown as EdgewayError).code, 'invalid_request');
    return (thrown as EdgewayError).message;
  }
  return 'accepted';
}

test('parseConfig: no setting at all gives a working single node', () => {
  const config = parseConfig({}, {}, 'Shop-Box');
  assert.is(config.node, 'shop-box');
  assert.equal(config.etcd, []);
  assert.equal(config.register, { kind: 'wait' });
  assert.equal(config.api, { kind: 'tcp', host: '127.0.0.1', port: 10_100 });
  assert.is(config.nodeIp, undefined);
  assert.is(config.ewp, 4790);
});

test('parseConfig: a flag wins over the environment, the environment over the default', () => {
  assert.is(parseConfig({ ewp: '5000' }, { EDGEWAY_EWP: '6000' }, 'h').ewp, 5000);
  assert.is(parseConfig({}, { EDGEWAY_EWP: '6000' }, 'h').ewp, 6000);
  assert.equal(parseConfig({}, { EDGEWAY_ETCD: 'a:1, b:2' }, 'h').etcd, ['a:1', 'b:2']);
  assert.is(
    formatIpv4(parseConfig({ 'node-ip': '10.0.0.7' }, {}, 'h').nodeIp ?? unwrap(parseIpv4('0.0.0.0'))),
    '10.0.0.7',
  );
});

test('parseConfig takes upstream servers with and without a port, IPv6 too', () => {
  const upstreams = ['192.0.2.1', '192.0.2.1:5300', '2001:db8::1', '[2001:db8::1]:5300'];
  assert.equal(parseConfig({ upstreams: upstreams.join(', ') }, {}, 'h').upstreams, upstreams);
});

test('parseConfig: each bad value names its flag, itself and the rule', () => {
  assert.match(why({ ewp: '0' }), '--ewp "0": must be an integer from 1 to 65535');
  assert.match(why({ ewp: 'x' }), 'must be an integer');
  assert.match(why({ 'node-ip': '10.0.0' }), '--node-ip "10.0.0"');
  assert.match(why({ node: 'UPPER' }), '--node "UPPER"');
  assert.match(why({ bridge: 'a-name-of-sixteen' }), '1…15');
  assert.match(why({ bridge: 'same', tun: 'same' }), 'must differ');
  assert.match(why({ register: '172.16.0.1/26' }), 'host bits');
  assert.match(why({ register: 'sometimes' }), 'must be wait, auto or a subnet');
  assert.match(why({ mdns: 'maybe' }), 'must be on or off');
  for (const bad of ['one.one', '192.0.2.1:0', '192.0.2.1:65536', '[2001:db8::1', '2001:db8::1]:53'])
    assert.match(
      why({ upstreams: `192.0.2.2,${bad}` }),
      `--upstreams "${bad}": must be ADDRESS or ADDRESS:PORT, with IPv6 [ADDRESS]:PORT`,
    );
  assert.match(why({ root: 'edgeway' }), '--root');
  assert.match(why({ 'presence-ttl': '1' }), 'from 2 to 3600');
  assert.match(why({}, { EDGEWAY_LOG_LEVEL: 'loud' }), '--log-level "loud"');
});

test('parseApiAddress: loopback and unix sockets only', () => {
  assert.equal(parseApiAddress('unix:/run/e.sock'), { kind: 'unix', path: '/run/e.sock' });
  assert.equal(parseApiAddress('/run/e.sock'), { kind: 'unix', path: '/run/e.sock' });
  assert.equal(parseApiAddress('http://127.0.0.1:80/'), { kind: 'tcp', host: '127.0.0.1', port: 80 });
  assert.equal(parseApiAddress('[::1]:80'), { kind: 'tcp', host: '::1', port: 80 });
  for (const text of ['0.0.0.0:80', '10.0.0.1:80', '127.0.0.1:70000', 'localhost', '', 'example.com:80'])
    assert.throws(
      () => parseApiAddress(text),
      (e: EdgewayError) => e.code === 'invalid_request',
      text,
    );
});

test('parseConfig reads LAN aliases, and says what is wrong with one', () => {
  const aliases = 'cart.local=shop.prod.cart.v1,Web.local=shop.prod.web.v1';
  const config = parseConfig({ 'mdns-lan': 'eth0', 'mdns-alias': aliases, 'host-dns': 'on' }, {}, 'n1');
  assert.equal(config.lan, {
    interface: 'eth0',
    aliases: [
      { name: 'cart.local', service: 'shop.prod.cart.v1' },
      { name: 'web.local', service: 'shop.prod.web.v1' },
    ],
  });
  assert.is(config.hostDns, true);
  const why = (flags: SettingValues): string => {
    try {
      parseConfig(flags, {}, 'n1');
      return 'fine';
    } catch (error) {
      return (error as Error).message;
    }
  };
  assert.match(why({ 'mdns-alias': aliases }), 'needs --mdns-lan');
  assert.match(
    why({ 'mdns-lan': 'eth0', 'mdns-alias': 'a.cart.local=shop.prod.cart.v1' }),
    'is not an alias',
  );
  assert.match(why({ 'mdns-lan': 'eth0', 'mdns-alias': 'cart.local' }), 'a service has four');
  assert.match(why({ 'host-dns': 'yes' }), 'must be on or off');
});

test.run();
