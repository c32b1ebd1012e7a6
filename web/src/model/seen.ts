/** What queries see, in closed form (`attnspan.planner.seen`). */

import { big, ceilDiv, least, most, upTo } from "./numbers";
import type { Policy } from "./policies";

export interface View {
  key: string;
  /** Keys that the query of token `n - 1` sees. */
  read(n: bigint): bigint;
  /** Pairs over a prefill of `n` tokens. */
  pairs(n: bigint): bigint;
}

/** At each grid point `min(tokens, kept)` slots stay, and every token since is held. */
function capped(kept: bigint | null, block = 1n): View {
  if (kept === null) return { key: "all", read: (n) => n, pairs: upTo };
  return {
    key: `capped ${kept} ${block}`,
    read(n) {
      const last = ((n - 1n) / block) * block;
      return least(last, kept) + n - last;
    },
    pairs(n) {
      const blocks = n / block;
      const rest = n % block;
      const rising = least(blocks, kept / block + 1n);
      const stay = (block * rising * (rising - 1n)) / 2n + (blocks - rising) * kept;
      const since = blocks * upTo(block) + upTo(rest);
      return block * stay + rest * least(blocks * block, kept) + since;
    },
  };
}

function pooled(p: Extract<Policy, { kind: "compressive" }>): View {
  const [sinks, window, memory, rate, b] = [p.sinks, p.window, p.memory, p.rate, p.block].map(big);
  const start = sinks + window - 1n;
  const kept = (g: bigint) => {
    const groups = most(0n, g - start) / rate;
    return g - groups * rate + least(memory, groups);
  };
  return {
    key: `pooled ${start} ${memory} ${rate} ${b}`,
    read(n) {
      const last = ((n - 1n) / b) * b;
      return kept(last) + n - last;
    },
    pairs(n) {
      const blocks = n / b;
      const rest = n % b;
      const first = least(blocks, ceilDiv(start + rate, b));
      const full = least(blocks, most(first, ceilDiv(start + rate * memory, b)));
      const groups = (k: bigint) => (k > first ? floors(k - first, rate, b, first * b - start) : 0n);
      let stay = (b * blocks * (blocks - 1n)) / 2n - rate * groups(blocks);
      stay += groups(full) + (blocks - full) * memory;
      const since = blocks * upTo(b) + upTo(rest);
      return b * stay + rest * kept(blocks * b) + since;
    },
  };
}

/** The sum of `(a * k + b) // m` over k from 0 to n - 1. */
function floors(n: bigint, m: bigint, a: bigint, b: bigint): bigint {
  let total = 0n;
  while (n > 0n) {
    total += ((n * (n - 1n)) / 2n) * (a / m) + n * (b / m);
    a %= m;
    b %= m;
    const top = a * n + b;
    if (top < m) break;
    [n, b, a, m] = [top / m, top % m, m, a];
  }
  return total;
}

export function ofPolicy(policy: Policy): View {
  switch (policy.kind) {
    case "keep-all":
      return capped(null);
    case "window":
      return capped(big(policy.window - 1), big(policy.block));
    case "sinks":
      return capped(big(policy.sinks + policy.window - 1), big(policy.block));
    case "heavy":
    case "snap":
      return capped(big(policy.heavy + policy.window - 1), big(policy.block));
    case "compressive":
      return pooled(policy);
  }
}

export function ofWindow(window: number | null): View {
  return window === null ? capped(null) : capped(big(window - 1));
}
