// A health endpoint for tests: PATH answers 503 while FILE exists, 200 else; any other path 404.
//   http_health.ts PORT PATH FILE
import { existsSync } from 'node:fs';
import { createServer } from 'node:http';
import process from 'node:process';

const [port, path, file] = process.argv.slice(2);
createServer(({ url }, response) => {
  response.statusCode = url !== path ? 404 : existsSync(file!) ? 503 : 200;
  response.end();
}).listen(Number(port), '0.0.0.0');
