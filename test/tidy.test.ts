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

function sourceOf(file: string): ts.SourceFile {
  return ts.createSourceFile(file, readFileSync(join(root, file), 'utf8'), ts.ScriptTarget.Latest, true);
}

function importsOf(file: string): Import[] {
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
  visit(sourceOf(file));
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
    from: /^(src|edge|coordinator)\//,
    to: /^(scripts|test)\//,
    why: 'what ships does not need what tests it',
  },
];

test('floors: nobody imports what stands above or beside them', () => {
  const broken: string[] = [];
  for (const folder of HOUSE)
    for (const one of filesOf(folder).flatMap(importsOf))
      for (const floor of FLOORS)
        if (
          floor.from.test(one.file) &&
          !floor.not?.test(one.file) &&
          floor.to.test(one.to) &&
          !floor.except?.test(one.to) &&
          !(floor.typesMayCross && one.typeOnly)
        )
          broken.push(`${one.file} imports ${one.to}: ${floor.why}`);
  assert.is(broken.join('\n'), '');
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

test('bans: no clock, timer, randomness or console outside the edges', () => {
  const broken: string[] = [];
  for (const file of HOUSE.flatMap(filesOf)) {
    // Comments may speak of anything.
    const text = readFileSync(join(root, file), 'utf8').replace(
      /\/\*[\s\S]*?\*\/|(^|\s)\/\/.*$/gm,
      (comment) => comment.replace(/[^\n]/g, ' '),
    );
    for (const [index, line] of text.split('\n').entries())
      for (const ban of BANS)
        if (ban.call.test(line) && !ban.allowed.test(file))
          broken.push(`${file}:${index + 1} ${line.trim()}: ${ban.why}`);
  }
  assert.is(broken.join('\n'), '');
});

test('files: each begins with a comment that says what it is', () => {
  const silent = [...HOUSE, 'scripts'].flatMap(filesOf).filter((file) => {
    const [first, second] = readFileSync(join(root, file), 'utf8').split('\n');
    const line = first?.startsWith('#!') ? second : first;
    return !line?.startsWith('//');
  });
  assert.is(silent.join('\n'), '');
});

test('files: every file of the house is imported by somebody or is an entry', () => {
  const everything = [...HOUSE, 'scripts', 'test'].flatMap(filesOf);
  const imported = new Set(everything.flatMap(importsOf).map((one) => one.to));
  const manifest = `${readFileSync(join(root, 'package.json'), 'utf8')}${readFileSync(join(root, 'src/node-tun/package.json'), 'utf8')}`;
  const workers = everything.map((file) => readFileSync(join(root, file), 'utf8')).join('\n');
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
    /\b\w+\.(only|skip)\(/.test(
      readFileSync(join(root, file), 'utf8').replace(/`[^`]*`|'[^']*'|\/.*\//g, ''),
    ),
  );
  assert.is(left.join('\n'), '');
});

test.run();
