#!/usr/bin/env node
// The coordinator as a program of its own, without the agent's packages.
import process from 'node:process';
import { runCoordinator } from './command.ts';

await runCoordinator(process.argv.slice(2));
