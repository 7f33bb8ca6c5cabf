// A short hash for spreading things over slots. It refuses to be a secret's guard: anybody can make two texts collide.

/** FNV-1a over UTF-16 code units, with a final mix (Murmur3's fmix32) so that neighbours land far apart; unsigned. */
export function hash32(text: string, seed = 0): number {
  let h = (0x811c9dc5 ^ seed) >>> 0;
  for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
  h ^= h >>> 16;
  h = Math.imul(h, 0x85ebca6b);
  h ^= h >>> 13;
  h = Math.imul(h, 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}
