// The API without a port: requests in, responses out. Behind it a NodeControl that keeps what it was asked.
import fc from 'fast-check';
import { test } from 'uvu';
import * as assert from 'uvu/assert';
import {
  type Change,
  createApp,
  type InstanceView,
  type NodeControl,
  type ServiceView,
} from '../../../edge/api/app.ts';
import { STATUS } from '../../../edge/api/status.ts';
import { EdgewayError, ERROR_CODES } from '../../../src/error.ts';
import { SILENT } from '../../../src/log.ts';

const INSTANCE: InstanceView = {
  service: 'a.b.c.d',
  instance: 1,
  node: 'n1',
  nodeIp: '10.0.0.1',
  ewp: 4790,
  namespaceIp: '172.16.0.2',
  instanceIp: '172.30.0.1',
};
const SERVICE: ServiceView = {
  service: 'a.b.c.d',
  ports: [],
  exposed: false,
  statefull: false,
  addresses: {},
  instances: 0,
};

function setUp(overrides: Partial<NodeControl> = {}) {
  const asked: unknown[] = [];
  const node: NodeControl = {
    register: async (subnetwork) => {
      asked.push(['register', subnetwork]);
      return { subnetwork: subnetwork ?? '172.16.0.0/26' };
    },
    deploy: async (request) => {
      asked.push(['deploy', request]);
      return INSTANCE;
    },
    undeploy: async (service, instance) => {
      asked.push(['undeploy', service, instance]);
    },
    apply: async (parsed) => {
      asked.push(['apply', parsed]);
      return SERVICE;
    },
    deleteService: async (service) => {
      asked.push(['delete', service]);
    },
    nodes: () => ({ items: [], problems: [] }),
    services: () => ({ items: [SERVICE], problems: [] }),
    instances: () => ({ items: [INSTANCE], problems: [] }),
    resolve: (name) => {
      throw new EdgewayError('invalid_name', `"${name}" is no name`);
    },
    explain: (of) => ({
      name: of,
      address: null,
      policy: 'closest',
      why: 'lowest RTT',
      candidates: [],
      choices: [],
    }),
    status: () => ({
      node: 'n1',
      cluster: 'default',
      nodeIp: '10.0.0.1',
      ewp: 4790,
      subnet: null,
      etcd: 'live',
      revision: 1,
      instances: 0,
      flows: 0,
      runtime: 'test',
      version: '0',
    }),
    counters: () => ({ forwarded: 3 }),
    ailment: () => undefined,
    watch: () => () => {},
    ...overrides,
  };
  const app = createApp(node, SILENT, '0');
  const call = async (method: string, path: string, body?: unknown) => {
    const response = await app.request(path, {
      method,
      ...(body === undefined
        ? {}
        : {
            body: typeof body === 'string' ? body : JSON.stringify(body),
            headers: { 'content-type': 'application/json' },
          }),
    });
    return { status: response.status, body: JSON.parse(await response.text()) };
  };
  return { app, asked, call };
}

const DEPLOY = {
  containerId: 'cart',
  appName: 'shop.prod.cart.v1',
  instanceNumber: 1,
  nodeIp: '10.0.0.1',
  nodePort: 4790,
  serviceIp: [
    { IpType: 'RR', Address: '172.30.0.5' },
    { IpType: 'Closest', Address: '172.30.0.6' },
    { IpType: 'InstanceNumber', Address: '172.30.0.7' },
  ],
};

test('/docker/deploy takes the seed document field for field and answers serviceName and nsAddress', async () => {
  const { asked, call } = setUp();
  assert.equal(await call('POST', '/docker/deploy', DEPLOY), {
    status: 200,
    body: { serviceName: 'a.b.c.d', nsAddress: '172.16.0.2' },
  });
  assert.equal(asked, [
    [
      'deploy',
      {
        service: 'shop.prod.cart.v1',
        instance: 1,
        target: { kind: 'container', container: 'cart' },
        addresses: { roundrobin: 0xac1e0005, closest: 0xac1e0006 },
        instanceIp: 0xac1e0007,
      },
    ],
  ]);
});

test('/docker/undeploy and /register pass on what they were given', async () => {
  const { asked, call } = setUp();
  assert.equal(await call('POST', '/docker/undeploy', { serviceName: 'Shop.Prod.Cart.V1' }), {
    status: 200,
    body: {},
  });
  assert.equal(await call('POST', '/register', { subnetwork: '172.16.1.0/26' }), {
    status: 200,
    body: { subnetwork: '172.16.1.0/26' },
  });
  assert.equal(await call('POST', '/register', {}), { status: 200, body: { subnetwork: '172.16.0.0/26' } });
  assert.equal(asked, [
    ['undeploy', 'shop.prod.cart.v1', undefined],
    ['register', '172.16.1.0/26'],
    ['register', undefined],
  ]);
});

const BAD_BODIES: readonly [path: string, body: unknown, what: string][] = [
  ['/docker/deploy', 'not json', 'is not JSON'],
  ['/docker/deploy', '', 'is not JSON'],
  ['/docker/deploy', [], 'body:'],
  ['/docker/deploy', {}, 'containerId'],
  ['/docker/deploy', { ...DEPLOY, containerId: '' }, 'containerId'],
  ['/docker/deploy', { ...DEPLOY, appName: 'only.three.parts' }, 'four'],
  ['/docker/deploy', { ...DEPLOY, appName: 'a.b.c-.d' }, 'hyphens'],
  ['/docker/deploy', { ...DEPLOY, instanceNumber: 0 }, 'instanceNumber'],
  ['/docker/deploy', { ...DEPLOY, instanceNumber: '1' }, 'instanceNumber'],
  ['/docker/deploy', { ...DEPLOY, nodePort: 70_000 }, 'nodePort'],
  ['/docker/deploy', { ...DEPLOY, serviceIp: [{ IpType: 'Fast', Address: '172.30.0.1' }] }, 'IpType'],
  ['/docker/deploy', { ...DEPLOY, serviceIp: [{ IpType: 'RR', Address: '172.30.0' }] }, 'IPv4'],
  ['/docker/deploy', { ...DEPLOY, serviceIp: [DEPLOY.serviceIp[0], DEPLOY.serviceIp[0]] }, 'twice'],
  ['/docker/undeploy', {}, 'serviceName'],
  ['/docker/undeploy', { serviceName: 7 }, 'serviceName'],
  ['/register', { subnetwork: 7 }, 'subnetwork'],
  ['/register', { subnet: '172.16.3.0/26' }, 'subnet'],
  ['/docker/deploy', { ...DEPLOY, instance: 2 }, 'instance'],
  ['/api/v1/instances', { service: 'a.b.c.d', instance: 1, netns: 'x', needs: [] }, 'needs'],
  [
    '/api/v1/services',
    { appname: 'a', appnamespace: 'b', servicename: 'c', servicenamespace: 'd', need: ['e.f.g.h'] },
    'need',
  ],
  ['/api/v1/instances', { service: 'a.b.c.d', instance: 1 }, 'exactly one of'],
  ['/api/v1/instances', { service: 'a.b.c.d', instance: 1, netns: 'x', pid: 5 }, 'exactly one of'],
  ['/api/v1/instances', { service: 'a.b.c.d', instance: 1, netns: '../etc' }, 'netns'],
  ['/api/v1/instances', { service: 'a.b.c.d', instance: 1, netns: '..' }, 'netns'],
  ['/api/v1/services', { appname: 'a' }, 'appnamespace'],
  [
    '/api/v1/services',
    { appname: 'a', appnamespace: 'b', servicename: 'c', servicenamespace: 'd', ports: [0] },
    'ports',
  ],
  [
    '/api/v1/services',
    { appname: 'a.b', appnamespace: 'b', servicename: 'c', servicenamespace: 'd' },
    'four',
  ],
  [
    '/api/v1/services',
    { appname: 'a', appnamespace: 'b', servicename: 'c', servicenamespace: 'd', needs: ['x'] },
    'four',
  ],
];

test('every bad body is a 400 that names the field and the rule, and reaches nobody', async () => {
  const { asked, call } = setUp();
  for (const [path, body, what] of BAD_BODIES) {
    const answer = await call('POST', path, body);
    const told = `${path} ${JSON.stringify(body)} → ${JSON.stringify(answer)}`;
    assert.is(answer.status, 400, told);
    assert.ok(answer.body.code === 'invalid_request' || answer.body.code === 'invalid_name', told);
    assert.ok(answer.body.message.includes(what), told);
  }
  assert.equal(asked, []);
});

test('any JSON at all gives an answer with a code, never a 500', async () => {
  const { call } = setUp();
  await fc.assert(
    fc.asyncProperty(
      fc.constantFrom(
        '/register',
        '/docker/deploy',
        '/docker/undeploy',
        '/api/v1/services',
        '/api/v1/instances',
      ),
      fc.jsonValue(),
      async (path, body) => {
        const answer = await call('POST', path, JSON.stringify(body));
        assert.ok(
          answer.status === 200 || (answer.status === 400 && typeof answer.body.code === 'string'),
          JSON.stringify(answer),
        );
      },
    ),
    { numRuns: 300, seed: 1 },
  );
});

test('a body larger than the bound is a 413', async () => {
  const { call } = setUp();
  const answer = await call('POST', '/docker/deploy', `"${'x'.repeat(300_000)}"`);
  assert.is(answer.status, 413);
});

test('an unknown endpoint and a wrong method are a 404 with a code', async () => {
  const { call } = setUp();
  assert.is((await call('GET', '/nowhere')).body.code, 'not_found');
  assert.is((await call('GET', '/docker/deploy')).status, 404);
});

test('every error code has the status of the table, and its message arrives', async () => {
  for (const code of ERROR_CODES) {
    const { call } = setUp({ deploy: () => Promise.reject(new EdgewayError(code, 'because')) });
    assert.equal(await call('POST', '/docker/deploy', DEPLOY), {
      status: STATUS[code],
      body: { code, message: 'because' },
    });
  }
});

test('what is not an EdgewayError becomes internal, 500', async () => {
  const { call } = setUp({ deploy: () => Promise.reject(new TypeError('x is undefined')) });
  assert.equal(await call('POST', '/docker/deploy', DEPLOY), {
    status: 500,
    body: { code: 'internal', message: 'x is undefined' },
  });
});

test('/api/v1/watch streams changes, and lets go of the node when the reader leaves', async () => {
  let tell: (change: Change) => void = () => {};
  let ended = 0;
  const { app } = setUp({
    watch: (listener) => {
      tell = listener;
      return () => {
        ended++;
      };
    },
  });
  const response = await app.request('/api/v1/watch');
  const reader = response.body!.getReader();
  const read = async (): Promise<string> => new TextDecoder().decode((await reader.read()).value);
  assert.match(await read(), 'event: ready');
  tell({ kind: 'service', name: 'a.b.c.d', service: null, instances: [] });
  tell({ kind: 'node', name: 'n1', node: null });
  assert.match(await read(), /event: service\ndata: \{"kind":"service","name":"a.b.c.d"/);
  assert.match(await read(), 'event: node');
  await reader.cancel();
  assert.is(ended, 1);
});

test('a body that does not say it is JSON is refused, whatever it holds', async () => {
  const { app, asked } = setUp();
  for (const type of [undefined, 'application/x-www-form-urlencoded', 'text/plain', 'application/jsonp']) {
    const response = await app.request('/register', {
      method: 'POST',
      body: new TextEncoder().encode('{"subnetwork":"172.16.3.0/26"}'),
      ...(type === undefined ? {} : { headers: { 'content-type': type } }),
    });
    const { code, message } = (await response.json()) as { code: string; message: string };
    assert.equal([response.status, code], [400, 'invalid_request'], message);
    assert.match(message, 'Content-Type must be application/json');
  }
  assert.equal(asked, []);
  const typed = await app.request('/register', {
    method: 'POST',
    body: '{}',
    headers: { 'content-type': 'application/json; charset=utf-8' },
  });
  assert.is(typed.status, 200);
});

test('/healthz says what ails the node', async () => {
  const { call } = setUp();
  assert.equal(await call('GET', '/healthz'), { status: 200, body: { status: 'ok' } });
  const ill = setUp({ ailment: () => 'the TUN device is gone' });
  assert.equal(await ill.call('GET', '/healthz'), {
    status: 503,
    body: { status: 'ailing', reason: 'the TUN device is gone' },
  });
});

test('/metrics: gauges from the status, drops by reason, one counter each for the rest', async () => {
  const { app } = setUp({
    counters: () => ({
      to_tunnel_packets: 7,
      drop_not_needed: 2,
      drop_ttl_exceeded: 0,
      dns_queries: 5,
      mdns_own: 1,
    }),
  });
  const response = await app.request('/metrics');
  assert.match(response.headers.get('content-type') ?? '', 'text/plain');
  const text = await response.text();
  for (const line of [
    'edgeway_build_info{version="0",runtime="test",node="n1",cluster="default"} 1',
    'edgeway_registered 0',
    'edgeway_etcd_live 1',
    'edgeway_dropped_packets_total{reason="not_needed"} 2',
    'edgeway_dropped_packets_total{reason="ttl_exceeded"} 0',
    'edgeway_dns_total{event="queries"} 5',
    'edgeway_mdns_total{event="own"} 1',
    'edgeway_to_tunnel_packets_total 7',
  ])
    assert.ok(text.includes(`${line}\n`), `${line}\n${text}`);
});

test('/api/v1/openapi.json describes every route with its shapes', async () => {
  const { call } = setUp();
  const { status, body } = await call('GET', '/api/v1/openapi.json');
  assert.is(status, 200);
  for (const path of [
    '/register',
    '/docker/deploy',
    '/docker/undeploy',
    '/api/v1/services',
    '/api/v1/instances',
    '/api/v1/resolve',
    '/api/v1/explain',
  ])
    assert.ok(body.paths[path], path);
  const deploy = body.paths['/docker/deploy'].post;
  const schema = JSON.stringify(deploy.requestBody);
  for (const field of [
    'containerId',
    'appName',
    'instanceNumber',
    'nodeIp',
    'nodePort',
    'serviceIp',
    'IpType',
    'Address',
  ])
    assert.ok(schema.includes(field), field);
  assert.ok(deploy.responses['200'].content['application/json'].schema);
});

test('GET /api/v1/explain hands on what `of` names, and says so when it is missing', async () => {
  const { call } = setUp();
  const answer = await call('GET', '/api/v1/explain?of=172.30.0.1');
  assert.is(answer.status, 200);
  assert.is(answer.body.name, '172.30.0.1');
  const missing = await call('GET', '/api/v1/explain');
  assert.is(missing.status, 400);
  assert.match(missing.body.message, '"of" is missing');
});

test.run();
