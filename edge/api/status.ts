// Error code → HTTP status: the one table.
import type { ContentfulStatusCode } from 'hono/utils/http-status';
import type { ErrorCode } from '../../src/error.ts';

export const STATUS: Readonly<Record<ErrorCode, ContentfulStatusCode>> = {
  invalid_request: 400,
  invalid_name: 400,
  invalid_record: 422,
  not_registered: 409,
  already_registered: 409,
  not_found: 404,
  container_unknown: 404,
  container_not_running: 409,
  docker_unavailable: 503,
  namespace_unknown: 404,
  instance_exists: 409,
  address_taken: 409,
  address_not_in_plan: 400,
  port_taken: 409,
  subnet_taken: 409,
  subnets_exhausted: 507,
  addresses_exhausted: 507,
  lease_lost: 503,
  coordination_unavailable: 503,
  permission_denied: 403,
  conflict: 409,
  timeout: 504,
  host_command_failed: 500,
  host_unsupported: 501,
  etcd_not_installed: 501,
  internal: 500,
};
