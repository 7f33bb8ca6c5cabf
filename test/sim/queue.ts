// A closed loop for `fastest`: instances with a capacity, whose load follows from the flows they get; many client
// nodes that see that load only through probes. One instance is then overloaded from outside (another job takes its
// cores). Tells how fast the clients leave it, and whether they swing afterwards.
import type { ServiceId } from '../../src/name.ts';
import { Rng } from '../../src/rng.ts';
import { sites } from './truth.ts';
import { World } from './world.ts';

export interface OverloadResult {
  /** Share of the new flows that go elsewhere, in the three seconds that begin 5 s after the overload did … */
  readonly shareElsewhereAfter5s: number;
  /** … and of those that the overloaded instance would have had: what the overload moved. */
  readonly moved: number;
  /** Times that another instance overtook the one with most flows by SWITCH_MARGIN of all flows in one second. */
  readonly switches: number;
  /** Seconds of the observation after the overload began. */
  readonly seconds: number;
  /** Highest load of an instance that was not overloaded from outside, after the first 10 s. */
  readonly worstLoad: number;
}

const SERVICE = 'shop.prod.cart.v1' as ServiceId;
const SECONDS = 90;
/** Chance alone makes two equal halves of 150 flows differ by 8 % (one deviation). */
const SWITCH_MARGIN = 0.3;

export function overload(options: {
  readonly seed: number;
  readonly clients: number;
  readonly instances: number;
  readonly flowsPerSecond: number;
  /** Flows per second that saturate one instance. */
  readonly capacityPerSecond: number;
}): OverloadResult {
  const { seed, clients, instances, flowsPerSecond, capacityPerSecond } = options;
  const nodes = clients + instances;
  const world = new World({ truth: sites(nodes, 6, 20, seed), seed });
  const rng = new Rng(seed, 99);
  const servers = Array.from({ length: instances }, (_, k) => clients + k);
  world.service(
    SERVICE,
    servers,
    Array.from({ length: clients }, (_, i) => i),
  );
  const background = new Map<number, number>(servers.map((s) => [s, 0.05]));
  const queued = new Map<number, number>(servers.map((s) => [s, 0]));
  const arrived = new Map<number, number>(servers.map((s) => [s, 0]));
  const perSecond: Map<number, number>[] = [new Map()];
  const victim = servers[0]!;
  let worstLoad = 0;
  const startMs = 30_000;
  const endMs = startMs + SECONDS * 1000;

  world.every(1000 / flowsPerSecond, endMs, () => {
    const to = world.flow(rng.below(clients), SERVICE, 'fastest');
    if (to === undefined) return;
    arrived.set(to, arrived.get(to)! + 1);
    const second = perSecond.at(-1)!;
    second.set(to, (second.get(to) ?? 0) + 1);
  });
  // Each node measures its own load once a second: what came in against what it can do, and what is left over.
  world.every(1000, endMs, () => {
    for (const s of servers) {
      const room = capacityPerSecond * Math.max(0.02, 1 - background.get(s)!);
      const work = queued.get(s)! + arrived.get(s)!;
      // Clients give up: at most two seconds of work wait.
      queued.set(s, Math.min(2 * room, Math.max(0, work - room)));
      arrived.set(s, 0);
      const load = background.get(s)! + work / capacityPerSecond;
      const node = world.nodes[s]!;
      node.load = node.load === undefined ? load : node.load + (load - node.load) * 0.6;
      if (s !== victim && world.now > startMs + 10_000) worstLoad = Math.max(worstLoad, node.load);
    }
    perSecond.push(new Map());
  });
  world.at(startMs, () => background.set(victim, 1.5));
  world.run(endMs);

  const after = perSecond.slice(Math.floor(startMs / 1000));
  const total = (second: Map<number, number>): number => [...second.values()].reduce((a, b) => a + b, 0);
  const then = after.slice(5, 8);
  let switches = 0;
  let leader: number | undefined;
  for (const second of after.slice(0, SECONDS)) {
    const first = [...second].sort((a, b) => b[1] - a[1])[0];
    if (first === undefined) continue;
    if (leader === undefined) leader = first[0];
    else if (first[1] - (second.get(leader) ?? 0) > SWITCH_MARGIN * total(second)) {
      leader = first[0];
      switches++;
    }
  }
  const share = (second: Map<number, number>): number => (second.get(victim) ?? 0) / total(second);
  const mean = (list: readonly Map<number, number>[]): number =>
    list.reduce((sum, second) => sum + share(second), 0) / list.length;
  const usual = mean(perSecond.slice(Math.floor(startMs / 1000) - 5, Math.floor(startMs / 1000)));
  const left = mean(then);
  return {
    shareElsewhereAfter5s: 1 - left,
    moved: 1 - left / usual,
    switches,
    seconds: SECONDS,
    worstLoad,
  };
}
