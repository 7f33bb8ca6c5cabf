// Bundles the command for shipping: dist/edgeway.js with everything but the native parts. etcd3 reads its .proto
// files from beside the bundle's parent, so they are copied there.
import { cpSync } from 'node:fs';
import { defineConfig } from 'tsup';

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
  dts: false,
  shims: true,
  // Found at run time in node_modules: koffi has one binary per platform.
  external: ['koffi', 'node-tun'],
  noExternal: [/^(?!koffi|node-tun)/],
  banner: {
    js: "import { createRequire as edgewayRequire } from 'node:module'; const require = edgewayRequire(import.meta.url);",
  },
  onSuccess: async () => {
    cpSync('node_modules/etcd3/proto', 'dist/proto', { recursive: true });
    cpSync('edge/kudo/network.proto', 'dist/kudo/network.proto');
  },
});
