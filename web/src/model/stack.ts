/** What each optimisation does, and to which quantity (`attnspan.planner.stack`). */

import { big, divide, sum } from "./numbers";
import type { Kind, Storage } from "./plan";
import type { Spec } from "./spec";

export interface Factor {
  name: string;
  quantity: "KV cache" | "attention's working memory";
  before: bigint;
  after: bigint;
  ratio: number;
}

interface Given {
  context: number;
  batch: number;
  storage: Storage;
  kinds: Kind[];
  cache: bigint;
  working: { standard: bigint; flash: bigint };
  dense: bigint;
  stored: bigint;
}

export function stack(spec: Spec, given: Given): Factor[] {
  const tokens = big(given.context) * big(given.batch);
  const layers = big(spec.layers);
  const every = 2n * big(spec.heads * spec.head_dim) * 2n * tokens * layers;
  const owners = given.kinds.reduce((total, kind) => total + (kind.held ? kind.layers : 0), 0);
  const held = big(given.batch) * sum(given.kinds.map((kind) => big(kind.layers) * kind.held));
  const name = spec.latent
    ? "latents instead of keys and values"
    : `${spec.kv_heads} KV heads for ${spec.heads} query heads`;
  const steps: [string, bigint][] = [
    [name, layers * tokens * given.dense],
    [`${owners} of ${spec.layers} layers have keys of their own`, big(owners) * tokens * given.dense],
    ["what the layers keep of the tokens", held * given.dense],
    [`${given.storage} instead of bf16`, held * given.stored],
    ["as theory allocates it", given.cache],
  ];
  const factors: Factor[] = [];
  let before = every;
  for (const [step, after] of steps) {
    if (after !== before) factors.push(factor(step, "KV cache", before, after));
    before = after;
  }
  const { standard, flash } = given.working;
  factors.push(factor("flash instead of standard attention", "attention's working memory", standard, flash));
  return factors;
}

function factor(name: string, quantity: Factor["quantity"], before: bigint, after: bigint): Factor {
  return { name, quantity, before, after, ratio: after ? divide(before, after) : Infinity };
}
