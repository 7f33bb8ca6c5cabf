// The house's own rules, checked like any test: who may import whom, what may not be called where, and why.
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { test } from 'uvu';
import * as assert from 'uvu/assert';

const root = fileURLToPath(new URL('..', import.meta.url));
const HOUSE = ['src', 'edge', 'coordinator'];

interface Import {
  readonly file: string;
  /** A path inside the repository, or a package name. */
  readonly to: string;
  readonly typeOnly: boolean;
}

function filesOf(folder: string): string[] {
  return readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith('.ts') && !file.includes('node_modules'))
    .map((file) => join(folder, file))
    .sort();
}

const textOf = (file: string): string => readFileSync(join(root, file), 'utf8');

function importsOf(file: string, text = textOf(file)): Import[] {
  const found: Import[] = [];
  const add = (specifier: string, typeOnly: boolean): void => {
    const to = specifier.startsWith('.') ? relative(root, join(root, dirname(file), specifier)) : specifier;
    found.push({ file, to, typeOnly });
  };
  const visit = (node: ts.Node): void => {
    if (
      (ts.isImportDeclaration(node) || ts.isExportDeclaration(node)) &&
      node.moduleSpecifier !== undefined
    ) {
      const specifier = (node.moduleSpecifier as ts.StringLiteral).text;
      const clause = ts.isImportDeclaration(node) ? node.importClause : undefined;
      const named = clause?.namedBindings;
      const everyNameIsType =
        named !== undefined &&
        ts.isNamedImports(named) &&
        clause?.name === undefined &&
        named.elements.every((e) => e.isTypeOnly);
      add(
        specifier,
        ts.isExportDeclaration(node)
          ? node.isTypeOnly
          : clause?.phaseModifier === ts.SyntaxKind.TypeKeyword || everyNameIsType,
      );
    } else if (ts.isCallExpression(node) && node.expression.kind === ts.SyntaxKind.ImportKeyword) {
      const [argument] = node.arguments;
      if (argument !== undefined && ts.isStringLiteral(argument)) add(argument.text, false);
    }
    ts.forEachChild(node, visit);
  };
  visit(ts.createSourceFile(file, text, ts.ScriptTarget.Latest, true));
  return found;
}

/** A floor: files matching `from` must not import what matches `to`, unless `except` allows it. */
interface Floor {
  readonly from: RegExp;
  readonly not?: RegExp;
  readonly to: RegExp;
  readonly except?: RegExp;
  /** Types may cross where code may not. */
  readonly typesMayCross?: boolean;
  readonly why: string;
}

const FLOORS: readonly Floor[] = [
  {
    from: /^src\//,
    not: /^src\/node-tun\//,
    to: /./,
    except: /^(src\/(?!node-tun)|valibot$|ip-address$|lru-cache$)/,
    why: 'src is the pure core: it imports itself and libraries that only compute, so that it runs and is tested anywhere',
  },
  {
    from: /^src\/wire\//,
    to: /./,
    except: /^src\/(wire\/|addr\.ts$|coordinate\.ts$|assert\.ts$|error\.ts$|limits\.ts$)/,
    why: 'the packet codecs know bytes and addresses, not the nouns of the platform',
  },
  {
    from: /^src\/node-tun\//,
    to: /./,
    except: /^(src\/node-tun\/|node:|koffi$)/,
    why: 'node-tun is a package of its own: it knows the kernel and the FFI, nothing of Edgeway',
  },
  { from: /^coordinator\//, to: /^edge\//, why: 'the coordinator also runs alone, without an agent' },
  {
    from: /^coordinator\//,
    not: /^coordinator\/(etcd\/|io\/|(main|command)\.ts$)/,
    to: /^(node:(?!buffer$)|etcd3$|@grpc\/|cockatiel$)/,
    why: 'coordination logic is tested on an injected clock and an in-memory store; only etcd/, io/ and main.ts touch the world',
  },
  {
    from: /^edge\/routes\//,
    to: /^(edge\/(?!routes\/|ports\.ts)|node:|etcd3$)/,
    why: 'routes have one author, the keyspace, and know none of their readers',
  },
  {
    from: /^edge\/resolver\//,
    to: /^(edge\/(?!resolver\/|routes\/table\.ts|ports\.ts)|coordinator\/|node:(?!buffer$))/,
    why: 'the resolver answers from the table and nothing else',
  },
  {
    from: /^edge\/proxy\//,
    to: /^(edge\/(?!proxy\/|ports\.ts)|coordinator\/|node:|node-tun$)/,
    why: 'the proxy turns bytes into verdicts; its loop and its device live in edge/io',
  },
  {
    from: /^edge\/host\//,
    to: /^(edge\/(?!host\/|ports\.ts|ipam\.ts)|coordinator\/|node:(?!crypto$))/,
    why: 'host set-up is decided as data and performed through ports',
  },
  {
    from: /^edge\/api\//,
    to: /^(edge\/(?!api\/)|coordinator\/|node:)/,
    why: 'the API is a function from request to response',
  },
  {
    from: /^edge\/(?!io\/|compose\w*\.ts|main\.ts|kudo\/)/,
    to: /^edge\/io\//,
    why: 'I/O is handed in by compose.ts, so that everything else can be tested without it',
  },
  {
    from: /^edge\/[^/]+\.ts$/,
    not: /^edge\/(compose\w*|main)\.ts$/,
    to: /^node:(?!buffer$)/,
    why: 'the agent reaches the world through what compose.ts hands in',
  },
  {
    from: /^(src|edge|coordinator)\//,
    not: /^(src\/node-tun\/|edge\/io\/|coordinator\/(etcd|io)\/|coordinator\/command\.ts$)/,
    to: /^(koffi$|node-tun$|etcd3$|@grpc\/|mdns-server$|pino$|@hono\/node-server$)/,
    why: 'libraries that touch the world stay where I/O is; the FFI in node-tun, etcd in coordinator/etcd',
  },
  {
    from: /^edge\//,
    to: /^(koffi|etcd3)$/,
    why: 'the FFI belongs to node-tun, etcd to the coordinator: the agent has both through a port',
  },
  {
    from: /^(src|edge|coordinator)\//,
    to: /^(scripts|test)\//,
    why: 'what ships does not need what tests it',
  },
];

const breaks = (floor: Floor, one: Import): boolean =>
  floor.from.test(one.file) &&
  !floor.not?.test(one.file) &&
  floor.to.test(one.to) &&
  !floor.except?.test(one.to) &&
  !(floor.typesMayCross && one.typeOnly);

test('floors: nobody imports what stands above or beside them', () => {
  const broken: string[] = [];
  for (const one of HOUSE.flatMap(filesOf).flatMap((file) => importsOf(file)))
    for (const floor of FLOORS)
      if (breaks(floor, one)) broken.push(`${one.file} imports ${one.to}: ${floor.why}`);
  assert.is(broken.join('\n'), '');
});

/** Imports that nobody may write, at least one for each floor. */
const OFFENDERS: readonly (readonly [file: string, to: string])[] = [
  ['src/name.ts', 'node:fs'],
  ['src/name.ts', 'koffi'],
  ['src/wire/udp.ts', 'src/name.ts'],
  ['src/node-tun/tun.ts', 'src/addr.ts'],
  ['coordinator/etcd/client.ts', 'edge/config.ts'],
  ['coordinator/root.ts', 'node:timers'],
  ['coordinator/root.ts', 'etcd3'],
  ['edge/routes/table.ts', 'etcd3'],
  ['edge/resolver/answer.ts', 'node:dgram'],
  ['edge/resolver/answer.ts', 'mdns-server'],
  ['edge/proxy/flows.ts', 'node-tun'],
  ['edge/host/rules.ts', 'node:child_process'],
  ['edge/api/app.ts', 'node:http'],
  ['edge/api/app.ts', '@hono/node-server'],
  ['edge/agent.ts', 'edge/io/exec.ts'],
  ['edge/agent.ts', 'node:fs'],
  ['edge/agent.ts', 'koffi'],
  ['edge/agent.ts', 'pino'],
  ['edge/steering.ts', '@grpc/grpc-js'],
  ['edge/io/packet_loop.ts', 'koffi'],
  ['edge/agent.ts', 'scripts/lab.ts'],
];

test('floors: each rule catches an offender, and every offender is caught', () => {
  const made = OFFENDERS.map(([file, to]) => ({ file, to, typeOnly: false }));
  for (const one of made)
    assert.ok(
      FLOORS.some((floor) => breaks(floor, one)),
      `${one.file} may import ${one.to}`,
    );
  for (const floor of FLOORS)
    assert.ok(
      made.some((one) => breaks(floor, one)),
      `nothing breaks "${floor.why}"`,
    );
});

test('floors: an import is seen in each way it can be written', () => {
  const text = `
    import 'node:fs';
    import koffi from 'koffi';
    import { type A, b } from './cli/print.ts';
    import type { C } from '../src/addr.ts';
    import { type D } from 'hono';
    export { e } from '../coordinator/kv.ts';
    export * from './io/log.ts';
    const late = await import('etcd3');
  `;
  assert.equal(
    importsOf('edge/made_up.ts', text).map(({ to, typeOnly }) => `${to}${typeOnly ? ' (types)' : ''}`),
    [
      ...['node:fs', 'koffi', 'edge/cli/print.ts', 'src/addr.ts (types)', 'hono (types)'],
      ...['coordinator/kv.ts', 'edge/io/log.ts', 'etcd3'],
    ],
  );
});

test('floors: each rule still guards files that exist', () => {
  const files = HOUSE.flatMap(filesOf);
  for (const floor of FLOORS)
    assert.ok(
      files.some((file) => floor.from.test(file)),
      `no file matches ${floor.from}`,
    );
});

interface Ban {
  readonly call: RegExp;
  /** Files that may. */
  readonly allowed: RegExp;
  readonly why: string;
}

/** kudo/ has composition roots of its own: of the library and of the service. */
const EDGES =
  /^(edge\/io\/|edge\/cli\/|edge\/compose\w*\.ts|edge\/main\.ts|edge\/kudo\/(mod|main)\.ts|coordinator\/etcd\/|coordinator\/io\/|coordinator\/(main|command)\.ts|src\/node-tun\/)/;
const BANS: readonly Ban[] = [
  {
    call: /\bMath\.random\b/,
    allowed: EDGES,
    why: 'randomness is a seed handed in, so that a run can be repeated',
  },
  {
    call: /\bDate\.now\b|\bnew Date\(\)|\bperformance\.now\b/,
    allowed: EDGES,
    why: 'time is an argument or a Clock',
  },
  {
    call: /\bset(Timeout|Interval|Immediate)\(/,
    allowed: EDGES,
    why: 'timers come from the Clock, so that tests own time',
  },
  {
    call: /\bconsole\./,
    allowed: /^$/,
    why: 'a Logger is handed in; the command line prints through edge/cli/print.ts',
  },
  {
    call: /\bprocess\.(exit|env|argv|stdout|stderr|on)\b/,
    allowed: EDGES,
    why: 'the process belongs to the composition roots',
  },
];

function bannedIn(file: string, source: string): string[] {
  // Comments may speak of anything.
  const text = source.replace(/\/\*[\s\S]*?\*\/|(^|\s)\/\/.*$/gm, (comment) =>
    comment.replace(/[^\n]/g, ' '),
  );
  return text
    .split('\n')
    .flatMap((line, index) =>
      BANS.filter((ban) => ban.call.test(line) && !ban.allowed.test(file)).map(
        (ban) => `${file}:${index + 1} ${line.trim()}: ${ban.why}`,
      ),
    );
}

test('bans: no clock, timer, randomness or console outside the edges', () => {
  const broken = HOUSE.flatMap(filesOf).flatMap((file) => bannedIn(file, textOf(file)));
  assert.is(broken.join('\n'), '');
});

test('bans: each call is seen, and a comment is not a call', () => {
  const calls = [
    'Math.random()',
    'Date.now()',
    'performance.now()',
    'new Date()',
    'setTimeout(f, 1)',
    'console.log(1)',
    'process.exit(1)',
  ];
  for (const call of calls) {
    assert.is(bannedIn('edge/agent.ts', `const x = 1;\n${call};`).length, 1, call);
    assert.equal(bannedIn('edge/agent.ts', `// ${call}\n/* ${call} */`), [], call);
  }
});

test('files: each begins with a comment that says what it is', () => {
  const silent = [...HOUSE, 'scripts'].flatMap(filesOf).filter((file) => {
    const [first, second] = textOf(file).split('\n');
    const line = first?.startsWith('#!') ? second : first;
    return !line?.startsWith('//');
  });
  assert.is(silent.join('\n'), '');
});

test('files: every file of the house is imported by somebody or is an entry', () => {
  const everything = [...HOUSE, 'scripts', 'test'].flatMap(filesOf);
  const imported = new Set(everything.flatMap((file) => importsOf(file)).map((one) => one.to));
  const manifest = `${textOf('package.json')}${textOf('src/node-tun/package.json')}`;
  const workers = everything.map((file) => textOf(file)).join('\n');
  const dead = HOUSE.flatMap(filesOf).filter((file) => {
    if (file.endsWith('.d.ts')) return false;
    const name = file.split('/').at(-1)!;
    return (
      !imported.has(file) && !manifest.includes(name) && !workers.includes(`./${name.replace(/\.ts$/, '')}`)
    );
  });
  assert.is(dead.join('\n'), '');
});

test('files: the top level holds what was agreed, and nothing else', () => {
  const agreed =
    'LICENSE README.md coordinator deno.json edge package-lock.json package.json scripts src test tsconfig.json';
  const made = ['node_modules', 'dist'];
  const found = readdirSync(root).filter((name) => !name.startsWith('.') && !made.includes(name));
  assert.equal(found.sort(), agreed.split(' ').sort());
});

test('tests: no .only and no .skip is left behind', () => {
  const left = filesOf('test').filter((file) =>
    /\b\w+\.(only|skip)\(/.test(textOf(file).replace(/`[^`]*`|'[^']*'|\/.*\//g, '')),
  );
  assert.is(left.join('\n'), '');
});

test.run();
