// `edgeway/kudo`: the nine functions, bound to this host. Programs that need root: they make links, namespaces and
// rules. State is kept in /var/lib/edgeway/kudo, or where EDGEWAY_KUDO_DIR says.
import process from 'node:process';
import { SILENT } from '../../src/log.ts';
import { hostLock } from '../io/directory_lock.ts';
import { hostRunner } from '../io/exec.ts';
import { hostFiles } from '../io/files.ts';
import { createKudo } from './kudo.ts';

export { EdgewayError, type ErrorCode } from '../../src/error.ts';
export {
  type CleanInstanceRequest,
  createKudo,
  getNamespaceName,
  type InstanceDescription,
  type Kudo,
  type KudoOptions,
  type NodeIp,
  type NodeRequest,
  type Port,
  type SetupInstanceRequest,
  type SetupInstanceResponse,
  type SetupNodeRequest,
  type SetupNodeResponse,
} from './kudo.ts';

const kudo = createKudo({
  runner: hostRunner,
  files: hostFiles,
  lock: hostLock,
  log: SILENT,
  stateDir: process.env['EDGEWAY_KUDO_DIR'] ?? '/var/lib/edgeway/kudo',
});

export const {
  setupNode,
  setupIptables,
  addOtherNodes,
  newNodeInCluster,
  deleteNodeInCluster,
  setupInstance,
  cleanInstance,
  cleanNode,
  describeNode,
} = kudo;
