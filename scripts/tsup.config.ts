// Bundles the command and Kudo's library, with its types in one file, for shipping: dist/ is a package for Node that
// needs nothing but koffi beside it. Deno is not served: it runs the sources as they are. etcd3 and Kudo's service read
// their .proto files from beside the bundle's parent, so they are copied there.
import { cpSync, writeFileSync } from 'node:fs';
import { defineConfig } from 'tsup';
import packageJson from '../package.json' with { type: 'json' };

const { name, version, description, license, engines, dependencies } = packageJson;
/** What the bundle finds at run time in node_modules: koffi has one binary per platform. */
const shipped = {
  ...{ name, version, description, license, type: 'module', engines },
  bin: { edgeway: './bin/edgeway.js' },
  exports: {
    './kudo': { types: './bin/kudo.d.ts', default: './bin/kudo.js' },
    './kudo/network.proto': './kudo/network.proto',
  },
  dependencies: { koffi: dependencies.koffi },
};

export default defineConfig({
  entry: {
    edgeway: 'edge/main.ts',
    kudo: 'edge/kudo/mod.ts',
    packet_loop_worker: 'edge/io/packet_loop_worker.ts',
  },
  format: 'esm',
  platform: 'node',
  target: 'node22',
  outDir: 'dist/bin',
  splitting: true,
  minify: true,
  clean: true,
  // tsup sets `baseUrl`, which TypeScript 6 refuses unless it is told to let old options pass.
  dts: { entry: { kudo: 'edge/kudo/mod.ts' }, compilerOptions: { ignoreDeprecations: '6.0' } },
  shims: true,
  external: ['koffi'],
  noExternal: [/^(?!koffi$)/],
  banner: {
    js: "import { createRequire as edgewayRequire } from 'node:module'; const require = edgewayRequire(import.meta.url);",
  },
  onSuccess: async () => {
    cpSync('node_modules/etcd3/proto', 'dist/proto', { recursive: true });
    cpSync('edge/kudo/network.proto', 'dist/kudo/network.proto');
    writeFileSync('dist/package.json', `${JSON.stringify(shipped, undefined, 2)}\n`);
  },
});
