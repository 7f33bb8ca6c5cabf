// How a process proves itself to etcd: user and password, or a client certificate, or both; read from files so that
// no secret stands on a command line. It checks what belongs together, not whether etcd accepts it.
import { EdgewayError } from '../../src/error.ts';
import type { EtcdCredentials } from './client.ts';

export interface CredentialSettings {
  readonly user?: string | undefined;
  readonly password?: string | undefined;
  readonly passwordFile?: string | undefined;
  /** Paths of PEM files. */
  readonly ca?: string | undefined;
  readonly cert?: string | undefined;
  readonly key?: string | undefined;
}

/** Undefined when nothing is set. Throws `invalid_request` naming the setting that is wrong or missing. */
export function parseCredentials(
  settings: CredentialSettings,
  read: (path: string) => string,
): EtcdCredentials | undefined {
  const { user, password, passwordFile, ca, cert, key } = settings;
  const file = (setting: string, path: string, pem: boolean): string => {
    let text: string;
    try {
      text = read(path);
    } catch (cause) {
      throw new EdgewayError('invalid_request', `--${setting} ${path}: ${(cause as Error).message}`, {
        cause,
      });
    }
    if (pem && !text.includes('-----BEGIN '))
      throw new EdgewayError('invalid_request', `--${setting} ${path}: is not a PEM file`);
    return text;
  };
  if ((cert === undefined) !== (key === undefined))
    throw new EdgewayError('invalid_request', '--etcd-cert and --etcd-key belong together');
  if (cert !== undefined && ca === undefined)
    throw new EdgewayError('invalid_request', '--etcd-cert needs --etcd-ca: certificates mean TLS');
  if (user === undefined && (password !== undefined || passwordFile !== undefined))
    throw new EdgewayError('invalid_request', 'an etcd password needs --etcd-user');
  const secret =
    passwordFile === undefined ? password : file('etcd-password-file', passwordFile, false).trimEnd();
  if (user !== undefined && (secret === undefined || secret === ''))
    throw new EdgewayError(
      'invalid_request',
      '--etcd-user needs a password: EDGEWAY_ETCD_PASSWORD or --etcd-password-file',
    );
  const credentials: EtcdCredentials = {
    ...(user === undefined ? {} : { username: user, password: secret ?? '' }),
    ...(ca === undefined ? {} : { rootCertificate: file('etcd-ca', ca, true) }),
    ...(cert === undefined ? {} : { certificate: file('etcd-cert', cert, true) }),
    ...(key === undefined ? {} : { privateKey: file('etcd-key', key, true) }),
  };
  return Object.keys(credentials).length === 0 ? undefined : credentials;
}
