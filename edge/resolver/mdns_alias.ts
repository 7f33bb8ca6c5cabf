// Two-label names for a LAN (`cart.local`), which phones and laptops resolve by multicast and nothing else would. The
// operator names them; each stands for one exposed service and leads to this node's own address, where the service's
// ports are published. A LAN is shared with strangers and with other nodes, so unlike our seven-label names an alias
// is probed for before it is used (RFC 6762 §8.1) and given up when somebody else has it: never renamed, and claimed
// again a minute later, so that another node takes over when its holder goes. What is held the responder (mdns.ts)
// announces, answers and takes back. Sans-I/O, like it.
import type { DecodedPacket, Packet } from 'dns-packet';
import { formatIpv4, type Ipv4, parseIpv4 } from '../../src/addr.ts';
import { fail, ok, type Result } from '../../src/error.ts';
import { DNS_TTL_S } from '../../src/limits.ts';
import { publishedPorts, type Service } from '../../src/model.ts';
import { LABEL_LENGTH_MAX, type ServiceId, TOP_LABEL } from '../../src/name.ts';
import { Rng } from '../../src/rng.ts';
import type { NameTable } from '../routes/table.ts';
import type { Decision, LocalRecord, Question } from './resolver.ts';

export interface Alias {
  /** Two labels, lower case. */
  readonly name: string;
  readonly service: ServiceId;
}

const PROBES = 3; // §8.1
const PROBE_EVERY_MS = 250;
const LOST_TIE_MS = 1_000; // §8.2
const AGAIN_MS = 60_000;
const HOST_LABEL = /^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/;

/** `label.local`: what mDNS clients take for a host name. */
export function parseAliasName(text: string): Result<string> {
  const lower = text.toLowerCase().replace(/\.$/, '');
  const [label, top, ...more] = lower.split('.');
  if (more.length > 0 || top !== TOP_LABEL || label === undefined || !HOST_LABEL.test(label))
    return fail(
      'invalid_name',
      `"${text}" is not an alias: one label of letters, digits and inner hyphens, then ".${TOP_LABEL}"`,
    );
  if (label.length > LABEL_LENGTH_MAX)
    return fail(
      'invalid_name',
      `"${text}": the label has ${label.length} octets, the limit is ${LABEL_LENGTH_MAX}`,
    );
  return ok(lower);
}

type Phase = 'idle' | 'probing' | 'held' | 'yielded';

export type AliasOutput =
  | { readonly kind: 'probe'; readonly packet: Packet }
  /** An alias of the service is held since now, or not any more: the responder's `changed` is due. */
  | { readonly kind: 'changed'; readonly service: ServiceId };

interface Claim {
  readonly alias: Alias;
  phase: Phase;
  sent: number;
  dueMs: number;
}

export interface AliasOptions {
  readonly aliases: readonly Alias[];
  readonly table: NameTable;
  /** This node's address on the LAN. */
  readonly address: Ipv4;
  readonly seed: number;
}

export class AliasClaims {
  readonly counters: Record<string, number> = {
    mdns_alias_held: 0,
    mdns_alias_conflicts: 0,
    mdns_alias_probes: 0,
  };
  readonly #table: NameTable;
  readonly #address: Ipv4;
  readonly #rng: Rng;
  readonly #claims: ReadonlyMap<string, Claim>;
  readonly #output: AliasOutput[] = [];

  constructor(options: AliasOptions) {
    this.#table = options.table;
    this.#address = options.address;
    this.#rng = new Rng(options.seed);
    this.#claims = new Map(
      options.aliases.map((alias) => [alias.name, { alias, phase: 'idle', sent: 0, dueMs: 0 }]),
    );
  }

  /** Drain until undefined after every input. */
  poll(): AliasOutput | undefined {
    return this.#output.shift();
  }

  deadline(): number | undefined {
    let next: number | undefined;
    for (const { phase, dueMs } of this.#claims.values()) {
      const waits = phase === 'probing' || phase === 'yielded';
      if (waits && (next === undefined || dueMs < next)) next = dueMs;
    }
    return next;
  }

  /** What a held alias resolves to; everything else is not ours to answer. */
  resolve(question: Question): Decision {
    const claim = this.#claims.get(question.name.toLowerCase());
    const service = claim?.phase === 'held' ? this.#served(claim.alias) : undefined;
    if (claim === undefined || service === undefined) return { kind: 'forward' };
    const { name } = question;
    const a: LocalRecord = { type: 'A', name, ttl: DNS_TTL_S, address: this.#address };
    const srv = publishedPorts(service.descriptor).map(
      ({ source }): LocalRecord => ({ type: 'SRV', name, ttl: DNS_TTL_S, port: source, target: name }),
    );
    const common = { kind: 'answer', service: claim.alias.service } as const;
    if (question.type === 'A') return { ...common, records: [a], additionals: [] };
    if (question.type === 'SRV') return { ...common, records: srv, additionals: [a] };
    if (question.type === 'ANY') return { ...common, records: [a, ...srv], additionals: [] };
    return {
      kind: 'nodata',
      service: claim.alias.service,
      zone: TOP_LABEL,
      ttl: DNS_TTL_S,
      types: ['A', 'SRV'],
    };
  }

  /** Aliases of a service, held or not. */
  namesOf(service: ServiceId): readonly string[] {
    return [...this.#claims.values()].flatMap(({ alias }) => (alias.service === service ? [alias.name] : []));
  }

  /** The table has changed; to be called at the start too. What is not served any more is given up. */
  changed(nowMs: number): void {
    for (const claim of this.#claims.values()) {
      const wanted = this.#served(claim.alias) !== undefined;
      if (wanted && claim.phase === 'idle') this.#probe(claim, nowMs + this.#rng.below(PROBE_EVERY_MS));
      else if (!wanted && claim.phase !== 'idle') this.#move(claim, 'idle');
    }
  }

  handleTimeout(nowMs: number): void {
    for (const claim of this.#claims.values()) {
      if (claim.dueMs > nowMs) continue;
      if (claim.phase === 'yielded') this.#probe(claim, nowMs);
      if (claim.phase === 'probing') {
        if (claim.sent < PROBES) {
          this.#sendProbe(claim);
          claim.sent++;
          claim.dueMs = nowMs + PROBE_EVERY_MS;
          continue;
        }
        this.#move(claim, 'held');
        this.counters['mdns_alias_held']!++;
      }
    }
  }

  /** Somebody else's records: another address under our alias means that it is theirs (§9). */
  handleResponse(packet: DecodedPacket, nowMs: number): void {
    for (const record of [...(packet.answers ?? []), ...(packet.additionals ?? [])]) {
      if (record.type !== 'A' && record.type !== 'AAAA') continue;
      const claim = this.#claims.get(record.name.toLowerCase());
      if (claim === undefined || (claim.phase !== 'probing' && claim.phase !== 'held')) continue;
      if ((record.ttl ?? 0) === 0 || record.data === formatIpv4(this.#address)) continue;
      this.counters['mdns_alias_conflicts']!++;
      this.#move(claim, 'yielded');
      claim.dueMs = nowMs + Math.round(this.#rng.jitter(AGAIN_MS, 0.25));
    }
  }

  /** Somebody else's probe while we probe too: the greater data wins (§8.2). What is held the responder defends. */
  handleProbe(packet: DecodedPacket, nowMs: number): void {
    for (const record of packet.authorities ?? []) {
      if (record.type !== 'A') continue;
      const claim = this.#claims.get(record.name.toLowerCase());
      const theirs = parseIpv4(record.data);
      if (claim?.phase !== 'probing' || !theirs.ok || theirs.value <= this.#address) continue;
      this.#probe(claim, nowMs + LOST_TIE_MS);
    }
  }

  /** To or from `held`, mostly: the responder must know. */
  #move(claim: Claim, phase: Phase): void {
    if (claim.phase === 'held' || phase === 'held')
      this.#output.push({ kind: 'changed', service: claim.alias.service });
    claim.phase = phase;
  }

  #probe(claim: Claim, dueMs: number): void {
    claim.phase = 'probing';
    claim.sent = 0;
    claim.dueMs = dueMs;
  }

  /** The service of an alias while it may be reached from a LAN: exposed, with a published port. */
  #served(alias: Alias): Service | undefined {
    const service = this.#table.service(alias.service);
    return service !== undefined && publishedPorts(service.descriptor).length > 0 ? service : undefined;
  }

  #sendProbe({ alias }: Claim): void {
    this.counters['mdns_alias_probes']!++;
    this.#output.push({
      kind: 'probe',
      packet: {
        type: 'query',
        id: 0,
        questions: [{ name: alias.name, type: 'ANY' as 'A', class: 'IN' }],
        authorities: [{ type: 'A', name: alias.name, ttl: DNS_TTL_S, data: formatIpv4(this.#address) }],
      },
    });
  }
}
