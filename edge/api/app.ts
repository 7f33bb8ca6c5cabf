// The REST API as a function from request to response: no server, no host, no keyspace. What a request means is
// decided by the NodeControl behind it; here are routes, shapes and statuses.
//   /register /docker/deploy /docker/undeploy   the seed documents' contract, exactly
//   /api/v1/…                                   ours, described by /api/v1/openapi.json
import { Hono } from 'hono';
import { bodyLimit } from 'hono/body-limit';
import { streamSSE } from 'hono/streaming';
import { describeRoute, openAPIRouteHandler, resolver, validator } from 'hono-openapi';
import * as v from 'valibot';
import { EdgewayError, toEdgewayError, unwrap } from '../../src/error.ts';
import { BODY_BYTES_MAX, WATCH_QUEUE_MAX } from '../../src/limits.ts';
import type { Logger } from '../../src/log.ts';
import { parseInstanceNumber, parseServiceId, type ServiceId } from '../../src/name.ts';
import type { ParsedDescriptor } from '../../src/records.ts';
import { describeIssues, parseDescriptor } from '../../src/records.ts';
import {
  applySchema,
  attachSchema,
  type DeployRequest,
  dockerDeployAnswer,
  dockerDeploySchema,
  dockerUndeploySchema,
  emptyAnswer,
  errorAnswer,
  explainAnswer,
  fromAttach,
  fromDockerDeploy,
  instanceAnswer,
  nodeAnswer,
  problemAnswer,
  registerAnswer,
  registerSchema,
  resolveAnswer,
  serviceAnswer,
  statusAnswer,
} from './schema.ts';
import { STATUS } from './status.ts';

type Answer<Schema extends v.GenericSchema> = v.InferOutput<Schema>;
export type InstanceView = Answer<typeof instanceAnswer>;
export type ServiceView = Answer<typeof serviceAnswer>;
export type NodeView = Answer<typeof nodeAnswer>;
export type ExplainView = Answer<typeof explainAnswer>;
export type Problem = Answer<typeof problemAnswer>;
export interface Listing<Item> {
  readonly items: Item[];
  /** Keys of the same kind that could not be read. */
  readonly problems: Problem[];
}

/** A line of `GET /api/v1/watch`: what is now known of a service or a node; null when it is gone. */
export type Change =
  | {
      readonly kind: 'service';
      readonly name: string;
      readonly service: ServiceView | null;
      readonly instances: InstanceView[];
    }
  | { readonly kind: 'node'; readonly name: string; readonly node: NodeView | null };

/** What the node has at hand, or must ask the store for. */
type Awaitable<T> = T | Promise<T>;

/** What the API asks of the node. Every method rejects with an EdgewayError. */
export interface NodeControl {
  /** `subnetwork` as the caller wrote it; undefined = any free subnet. */
  register(subnetwork: string | undefined): Promise<Answer<typeof registerAnswer>>;
  deploy(request: DeployRequest): Promise<InstanceView>;
  /** Succeeds when there is nothing to remove. */
  undeploy(service: ServiceId, instance: number | undefined): Promise<void>;
  apply(parsed: ParsedDescriptor): Promise<ServiceView>;
  deleteService(service: ServiceId): Promise<void>;
  nodes(): Awaitable<Listing<NodeView>>;
  services(): Awaitable<Listing<ServiceView>>;
  instances(): Awaitable<Listing<InstanceView>>;
  resolve(name: string): Awaitable<Answer<typeof resolveAnswer>>;
  /** A name or an address. */
  explain(text: string): Awaitable<ExplainView>;
  status(): Answer<typeof statusAnswer>;
  /** Told of every change of the routing table from when this resolves; the answer ends it. */
  watch(listener: (change: Change) => void): Awaitable<() => void>;
  counters(): Readonly<Record<string, number>>;
  /** Why this node serves nobody although it should; undefined when all is well. */
  ailment(): string | undefined;
}

const json = (schema: v.GenericSchema, description: string) => ({
  description,
  content: { 'application/json': { schema: resolver(schema) } },
});
const failure = json(errorAnswer, 'refused: a stable code, and a message that names the thing and the rule');
const listing = (item: v.GenericSchema) =>
  v.object({ items: v.array(item), problems: v.array(problemAnswer) });

/** A body validator whose refusal is our own error. */
function body<Schema extends v.GenericSchema>(schema: Schema) {
  return validator('json', schema, (result) => {
    if (!result.success)
      throw new EdgewayError(
        'invalid_request',
        `body: ${describeIssues(result.error as readonly v.BaseIssue<unknown>[])}`,
      );
  });
}

/**
 * A body must say that it is JSON. Hono would else read it as `{}`, and a web page in a browser of this host could post
 * to us unasked: other types need no CORS preflight.
 */
function requireJson(request: Request): void {
  if (request.method !== 'POST' || request.body === null || request.headers.get('content-length') === '0')
    return;
  const type = request.headers.get('content-type');
  if (type === null || !/^application\/([\w.-]+\+)?json\b/i.test(type))
    throw new EdgewayError(
      'invalid_request',
      `body: Content-Type must be application/json, and is ${type === null ? 'missing' : `"${type}"`}`,
    );
}

function errorBody(error: EdgewayError): Answer<typeof errorAnswer> {
  return { code: error.code, message: error.message };
}

export function createApp(node: NodeControl, log: Logger, version: string): Hono {
  const app = new Hono();

  app.use(
    bodyLimit({
      maxSize: BODY_BYTES_MAX,
      onError: (c) =>
        c.json(
          errorBody(new EdgewayError('invalid_request', `body: more than ${BODY_BYTES_MAX} bytes`)),
          413,
        ),
    }),
  );
  app.use(async (c, next) => {
    requireJson(c.req.raw);
    await next();
  });
  app.notFound((c) =>
    c.json(errorBody(new EdgewayError('not_found', `no such endpoint: ${c.req.method} ${c.req.path}`)), 404),
  );
  app.onError((thrown, c) => {
    // Hono reports a body that is not JSON as its own HTTPException with status 400.
    const error =
      'status' in thrown && thrown.status === 400
        ? new EdgewayError('invalid_request', 'body: is not JSON')
        : toEdgewayError(thrown);
    const status = STATUS[error.code];
    const line = { code: error.code, name: `${c.req.method} ${c.req.path}`, error: error.message };
    if (status >= 500) log.warn(line, 'request failed');
    else log.debug(line, 'request refused');
    return c.json(errorBody(error), status);
  });

  app.post(
    '/register',
    describeRoute({
      summary: 'Claim a node subnet and start serving. Repeating it with the same subnet succeeds.',
      responses: { 200: json(registerAnswer, 'the subnet of this node'), default: failure },
    }),
    body(registerSchema),
    async (c) => c.json(await node.register(c.req.valid('json').subnetwork)),
  );
  app.post(
    '/docker/deploy',
    describeRoute({
      summary: 'Attach a running container as an instance of a service.',
      responses: {
        200: json(dockerDeployAnswer, 'the service and the namespace IP of the instance'),
        default: failure,
      },
    }),
    body(dockerDeploySchema),
    async (c) => {
      const instance = await node.deploy(unwrap(fromDockerDeploy(c.req.valid('json'))));
      return c.json({ serviceName: instance.service, nsAddress: instance.namespaceIp });
    },
  );
  app.post(
    '/docker/undeploy',
    describeRoute({
      summary: 'Detach the instances of a service from this node. Succeeds when they are gone already.',
      responses: { 200: json(emptyAnswer, 'nothing is left of them'), default: failure },
    }),
    body(dockerUndeploySchema),
    async (c) => {
      const { serviceName, instanceNumber } = c.req.valid('json');
      await node.undeploy(serviceName, instanceNumber);
      return c.json({});
    },
  );

  const api = new Hono();
  api.get(
    '/status',
    describeRoute({ summary: 'This node.', responses: { 200: json(statusAnswer, 'its state') } }),
    (c) => c.json(node.status()),
  );
  api.get(
    '/nodes',
    describeRoute({
      summary: 'Nodes that are present.',
      responses: { 200: json(listing(nodeAnswer), 'all of them') },
    }),
    async (c) => c.json(await node.nodes()),
  );
  api.get(
    '/services',
    describeRoute({
      summary: 'Services and their addresses.',
      responses: { 200: json(listing(serviceAnswer), 'all of them') },
    }),
    async (c) => c.json(await node.services()),
  );
  api.post(
    '/services',
    describeRoute({
      summary: 'Apply a service descriptor. Repeating it keeps the addresses.',
      responses: { 200: json(serviceAnswer, 'the service with its ServiceIPs'), default: failure },
    }),
    body(applySchema),
    async (c) => c.json(await node.apply(unwrap(parseDescriptor(await c.req.json())))),
  );
  api.delete(
    '/services/:service',
    describeRoute({
      summary: 'Delete a service and free its addresses.',
      responses: { 200: json(emptyAnswer, 'gone'), default: failure },
    }),
    async (c) => {
      await node.deleteService(unwrap(parseServiceId(c.req.param('service'))));
      return c.json({});
    },
  );
  api.get(
    '/instances',
    describeRoute({
      summary: 'Instances that are present.',
      responses: { 200: json(listing(instanceAnswer), 'all of them') },
    }),
    async (c) => c.json(await node.instances()),
  );
  api.post(
    '/instances',
    describeRoute({
      summary: 'Attach a network namespace, a process or a container as an instance.',
      responses: { 200: json(instanceAnswer, 'the instance'), default: failure },
    }),
    body(attachSchema),
    async (c) => c.json(await node.deploy(fromAttach(c.req.valid('json')))),
  );
  api.delete(
    '/instances/:service/:instance',
    describeRoute({
      summary: 'Detach one instance from this node. Succeeds when it is gone already.',
      responses: { 200: json(emptyAnswer, 'gone'), default: failure },
    }),
    async (c) => {
      const text = c.req.param('instance');
      const instance = parseInstanceNumber(text);
      if (instance === undefined)
        throw new EdgewayError('invalid_request', `instance "${text}" must be 1, 2, 3, …`);
      await node.undeploy(unwrap(parseServiceId(c.req.param('service'))), instance);
      return c.json({});
    },
  );
  api.get(
    '/resolve',
    describeRoute({
      summary: 'What a name means on this node now.',
      parameters: [{ name: 'name', in: 'query', required: true, schema: { type: 'string' } }],
      responses: { 200: json(resolveAnswer, 'the address, and the instances behind it'), default: failure },
    }),
    async (c) => {
      const name = c.req.query('name');
      if (name === undefined || name === '')
        throw new EdgewayError('invalid_request', 'query: "name" is missing');
      return c.json(await node.resolve(name));
    },
  );
  api.get(
    '/explain',
    describeRoute({
      summary: 'Which instance a name or address would reach from this node now, and why.',
      parameters: [{ name: 'of', in: 'query', required: true, schema: { type: 'string' } }],
      responses: {
        200: json(explainAnswer, 'candidates with RTT, load, health and share, and the last choices'),
        default: failure,
      },
    }),
    async (c) => {
      const of = c.req.query('of');
      if (of === undefined || of === '')
        throw new EdgewayError('invalid_request', 'query: "of" is missing: a name or an address');
      return c.json(await node.explain(of));
    },
  );
  api.get(
    '/counters',
    describeRoute({
      summary: 'Packets and lookups by verdict since the agent started.',
      responses: { 200: json(v.record(v.string(), v.number()), 'counter → value') },
    }),
    (c) => c.json(node.counters()),
  );
  api.get(
    '/watch',
    describeRoute({
      summary: 'Changes of services, instances and nodes as server-sent events, one JSON object each.',
      responses: { 200: { description: 'an endless text/event-stream' } },
    }),
    async (c) => {
      const changes: Change[] = [];
      let told = (): void => {};
      const end = await node.watch((change) => {
        changes.push(change);
        told();
      });
      return streamSSE(c, async (stream) => {
        let wake = (): void => {};
        told = () => {
          // A reader that cannot keep up is let go: it comes again and lists.
          if (changes.length > WATCH_QUEUE_MAX) stream.abort();
          wake();
        };
        stream.onAbort(() => {
          end();
          wake();
        });
        await stream.writeSSE({ event: 'ready', data: '{}' });
        while (!stream.aborted) {
          const change = changes.shift();
          if (change === undefined)
            await new Promise<void>((resolve) => {
              wake = resolve;
            });
          else await stream.writeSSE({ event: change.kind, data: JSON.stringify(change) });
        }
      });
    },
  );
  app.route('/api/v1', api);

  app.get('/metrics', async (c) => {
    // Loaded when somebody scrapes: an agent that nobody watches does not carry the library.
    const { metricsText } = await import('./metrics.ts');
    const { type, text } = await metricsText(node);
    return c.body(text, 200, { 'content-type': type });
  });
  app.get('/healthz', (c) => {
    const ailment = node.ailment();
    return ailment === undefined
      ? c.json({ status: 'ok' })
      : c.json({ status: 'ailing', reason: ailment }, 503);
  });
  app.get(
    '/api/v1/openapi.json',
    openAPIRouteHandler(app, {
      documentation: {
        info: { title: 'Edgeway agent', version, description: 'REST API of one node, on loopback.' },
      },
    }),
  );
  return app;
}
