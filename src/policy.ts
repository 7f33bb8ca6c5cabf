// The policies that an address can mean, and the one table that ties their spellings together: our word (also the
// DNS label), and the word of the /docker/deploy body. How an instance is chosen stands in choose.ts.

/** Policies of a ServiceIP. `fixed` belongs to an InstanceIP and is spelled only in names. */
export const POLICIES = ['roundrobin', 'closest', 'fastest'] as const;
export type Policy = (typeof POLICIES)[number];

export function isPolicy(text: string): text is Policy {
  return (POLICIES as readonly string[]).includes(text);
}

/** `IpType` of a /docker/deploy body. */
export const IP_TYPES = ['RR', 'Closest', 'InstanceNumber'] as const;
export type IpType = (typeof IP_TYPES)[number];

/** What an `IpType` means here; undefined stands for the InstanceIP. */
export function policyOfIpType(type: IpType): Policy | undefined {
  return type === 'RR' ? 'roundrobin' : type === 'Closest' ? 'closest' : undefined;
}
