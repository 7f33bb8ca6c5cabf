// The one error type that crosses our edges (API, config, keyspace, host). It refuses to carry anything that a
// caller must parse: `code` is the contract, `message` is for people and names the thing and the rule it broke.

/** Every code that an operator or a program may meet. Stable: a code is never renamed or given another meaning. */
export const ERROR_CODES = [
  'invalid_request', // a body, a flag or an environment value breaks a documented rule
  'invalid_name', // a name outside the grammar
  'invalid_record', // a keyspace value that cannot be read
  'not_registered', // deploy or undeploy before /register has succeeded
  'already_registered', // a second /register that asks for another subnet
  'not_found', // the named service, instance, node or container does not exist
  'container_unknown', // the Docker Engine knows no such container
  'container_not_running', // the container exists but has no process to attach to
  'docker_unavailable', // the Docker Engine does not answer
  'namespace_unknown', // no such network namespace or process
  'instance_exists', // the instance number is taken by a live instance
  'address_taken', // somebody else holds the address
  'address_not_in_plan', // the address or subnet does not belong to the address plan
  'port_taken', // somebody else publishes the node port
  'subnet_taken', // somebody else holds the subnet
  'subnets_exhausted', // no free node subnet
  'addresses_exhausted', // no free ServiceIP, InstanceIP or namespace IP
  'lease_lost', // presence or tenure ended while it was needed
  'coordination_unavailable', // etcd does not answer
  'permission_denied', // etcd's access rules refuse this to these credentials
  'conflict', // somebody else changed the same key; retry
  'timeout', // a bounded wait ended
  'host_command_failed', // ip, nft or nsenter said no
  'host_unsupported', // this kernel or host lacks something that is needed
  'etcd_not_installed', // a private etcd was wanted and there is no binary
  'internal', // a defect of ours
] as const;
export type ErrorCode = (typeof ERROR_CODES)[number];

/** An error with a stable code. `cause` holds what lies beneath. */
export class EdgewayError extends Error {
  override readonly name = 'EdgewayError';
  readonly code: ErrorCode;
  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

/** Anything thrown, as an EdgewayError; what is not ours becomes `internal`. */
export function toEdgewayError(thrown: unknown): EdgewayError {
  if (thrown instanceof EdgewayError) return thrown;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new EdgewayError('internal', message, { cause: thrown });
}

/** A value, or why there is none. For parsers whose failure is ordinary. */
export type Result<T> =
  | { readonly ok: true; readonly value: T }
  | { readonly ok: false; readonly error: EdgewayError };

export function ok<T>(value: T): Result<T> {
  return { ok: true, value };
}

export function fail(code: ErrorCode, message: string): { readonly ok: false; readonly error: EdgewayError } {
  return { ok: false, error: new EdgewayError(code, message) };
}

/** The value, or its error thrown. */
export function unwrap<T>(result: Result<T>): T {
  if (!result.ok) throw result.error;
  return result.value;
}
