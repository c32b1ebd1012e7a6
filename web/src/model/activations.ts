/** Bytes that prefill takes above weights and cache (`attnspan.planner.activations`, theory). */

import { big, sum } from "./numbers";
import { valueDim, type Spec } from "./spec";

export interface Peak {
  bytes: bigint;
  phase: string;
  parts: Record<string, bigint>;
  working: bigint;
}

export type Attention = "flash" | "standard";

export function prefillPeak(spec: Spec, tokens: number, batch: number, attention: Attention, chunk: number | null): Peak {
  const itemsize = 2n;
  const rows = big(batch) * big(chunk === null ? tokens : Math.min(chunk, tokens));
  const heads = big(spec.heads);
  const hidden = rows * big(spec.hidden) * itemsize;
  const queries = rows * heads * big(spec.head_dim) * itemsize;
  const values = rows * heads * big(valueDim(spec)) * itemsize;
  const flash = attention === "flash";
  const name = flash ? "log-sum-exp of each query and head, fp32" : "scores of every pair and head";
  const working = flash ? rows * heads * 4n : rows * heads * big(tokens) * itemsize;
  let inner = spec.intermediate;
  if (spec.experts) {
    const each = spec.experts.active + spec.experts.shared;
    const dense = spec.experts.layers < spec.layers ? spec.intermediate : 0;
    inner = Math.max(each * spec.experts.intermediate, dense);
  }
  const expanded = spec.latent
    ? big(batch) * big(tokens) * heads * big(spec.head_dim + valueDim(spec)) * itemsize
    : 0n;
  const residual = { "residual stream": hidden };
  const phases = [
    peak("queries, keys, values", { ...residual, "normed input": hidden, queries }),
    peak(
      "attention",
      { ...residual, queries, "keys and values of all heads": expanded, "attention's output": values, [name]: working },
      working,
    ),
    peak("feed-forward", {
      ...residual,
      "normed input": hidden,
      "gate and its product with the other half": rows * big(inner) * itemsize,
      "the other half": rows * big(inner) * itemsize,
    }),
    peak("output layer", { ...residual, "logits of the last token": big(batch) * big(spec.vocabulary) * itemsize }),
  ];
  return phases.reduce((widest, each) => (each.bytes > widest.bytes ? each : widest));
}

function peak(phase: string, parts: Record<string, bigint>, working = 0n): Peak {
  const there = Object.fromEntries(Object.entries(parts).filter(([, size]) => size));
  return { bytes: sum(Object.values(there)), phase, parts: there, working };
}
