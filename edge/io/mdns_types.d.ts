// What mdns-server 1.0.11 exports; the package carries no types.
declare module 'mdns-server' {
  const create: (options: object) => unknown;
  export = create;
}
