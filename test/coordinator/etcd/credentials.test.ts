import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { type CredentialSettings, parseCredentials } from '../../../coordinator/etcd/credentials.ts';
import { parseRoles } from '../../../coordinator/roles.ts';
import { EdgewayError, unwrap } from '../../../src/error.ts';

const PEM = '-----BEGIN CERTIFICATE-----\n';
const files: Record<string, string> = { ca: PEM, cert: PEM, key: PEM, secret: 'hush\n', junk: 'junk' };
const read = (path: string): string => {
  const text = files[path];
  if (text === undefined) throw new Error('ENOENT: no such file');
  return text;
};
const refused = (settings: CredentialSettings): string => {
  try {
    parseCredentials(settings, read);
  } catch (error) {
    assert.instance(error, EdgewayError);
    return (error as EdgewayError).message;
  }
  return 'taken';
};

test('parseCredentials reads what is set and nothing else', () => {
  assert.is(parseCredentials({}, read), undefined);
  assert.equal(parseCredentials({ ca: 'ca' }, read), { rootCertificate: PEM });
  assert.equal(parseCredentials({ ca: 'ca', cert: 'cert', key: 'key' }, read), {
    rootCertificate: PEM,
    certificate: PEM,
    privateKey: PEM,
  });
  assert.equal(parseCredentials({ user: 'n1', passwordFile: 'secret' }, read), {
    username: 'n1',
    password: 'hush',
  });
});

test('parseCredentials says what is wrong or missing', () => {
  assert.match(refused({ cert: 'cert', ca: 'ca' }), 'belong together');
  assert.match(refused({ cert: 'cert', key: 'key' }), 'needs --etcd-ca');
  assert.match(refused({ user: 'n1' }), 'needs a password');
  assert.match(refused({ password: 'x' }), 'needs --etcd-user');
  assert.match(refused({ ca: 'nowhere' }), '--etcd-ca nowhere: ENOENT');
  assert.match(refused({ ca: 'junk' }), 'is not a PEM file');
});

test('parseRoles takes any of the roles, once each, in one order', () => {
  assert.equal(unwrap(parseRoles('')), []);
  assert.equal(unwrap(parseRoles('cluster, root')), ['root', 'cluster']);
  const bad = parseRoles('root,king');
  assert.not.ok(bad.ok);
  if (!bad.ok) assert.match(bad.error.message, 'role "king" must be one of root, cluster');
});

test.run();
