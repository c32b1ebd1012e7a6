/** What fits a memory (`attnspan.planner.fit`). */

import { memory, MOST_TOKENS, type Asked } from "./plan";
import { sinkWindow } from "./policies";
import type { Spec } from "./spec";

const CHUNK = 2048;
const SINKS = 4;
const LEAST_WINDOW = 256;
const RANK = { dense: 0, bf16: 0, int8: 1, int4: 2 };

/** Tokens of the longest context that fits, to the token; 0: none. Halved: more never takes less. */
export function longest(spec: Spec, asked: Omit<Asked, "context">): number {
  const fits = (context: number) => memory(spec, { ...asked, context }).fits;
  if (!fits(1)) return 0;
  if (fits(MOST_TOKENS)) return MOST_TOKENS;
  let [low, high] = [1, MOST_TOKENS];
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (fits(middle)) low = middle;
    else high = middle;
  }
  return low;
}

/** One change to a plan; `total`, its bytes, is null where it can't be had. */
export interface Candidate {
  change: string;
  loses: string;
  asked: Asked;
  total: bigint | null;
  fits: boolean | null;
  why: string;
}

function attempt(change: string, loses: string, spec: Spec, asked: Asked): Candidate {
  try {
    return { change, loses, asked, ...memory(spec, asked), why: "" };
  } catch (error) {
    return { change, loses, asked, total: null, fits: false, why: error instanceof Error ? error.message : String(error) };
  }
}

/** Changes in the order of what they lose; the first that fits is the one to take. */
export function cheapest(spec: Spec, asked: Asked): Candidate[] {
  // A change that can't be had is one of the answers; what was asked for is refused.
  const found: Candidate[] = [{ change: "as asked", loses: "nothing", asked, ...memory(spec, asked), why: "" }];
  let base = asked;
  if ((asked.devices ?? 1) === 1 && !asked.chunk && asked.context > CHUNK) {
    base = { ...asked, chunk: CHUNK };
    found.push(attempt("prefill in steps of 2,048", "nothing", spec, base));
  }
  const given = [{ storage: asked.storage ?? "dense", weights: asked.weights ?? "bf16" }];
  for (const [what, kind, loses] of [
    ["storage", "int8", "next to nothing"],
    ["weights", "int8", "next to nothing"],
    ["storage", "int4", "little"],
    ["weights", "int4", "little"],
  ] as const) {
    const last = given[given.length - 1];
    if (RANK[kind] <= RANK[last[what]]) continue;
    const changed = { ...last, [what]: kind };
    const each = attempt(named(changed), loses, spec, { ...base, ...changed });
    found.push(each);
    if (each.total !== null) given.push(changed);
  }
  if (!asked.policy)
    for (const changed of given) {
      if (attempt("", "", spec, { ...base, ...changed }).fits) break;
      const each = dropping(named(changed), spec, { ...base, ...changed });
      found.push(each);
      if (each.total === null) break;
    }
  return found;
}

function named(changed: { storage: string; weights: string }): string {
  return `${changed.storage} cache, ${changed.weights} weights`;
}

/** Sinks and the largest window that fits, by halving. */
function dropping(change: string, spec: Spec, asked: Asked): Candidate {
  const at = (window: number) =>
    attempt(`${change}, sinks:${SINKS}+window:${window}`, "dropped tokens", spec, {
      ...asked,
      policy: sinkWindow(SINKS, window),
    });
  let [fits, wrong] = [Math.min(LEAST_WINDOW, asked.context), asked.context];
  const low = at(fits);
  if (!low.fits) return low;
  while (wrong - fits > 1) {
    const middle = Math.floor((fits + wrong) / 2);
    if (at(middle).fits) fits = middle;
    else wrong = middle;
  }
  return at(fits);
}
