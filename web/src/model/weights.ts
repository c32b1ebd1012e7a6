/** Bytes of weights: what is held, and what is read (`attnspan.planner.weight_bytes`). */

import { power } from "./numbers";
import { apart, type Spec } from "./spec";

export const WEIGHTS = ["bf16", "int8", "int4"] as const;
export type Weights = (typeof WEIGHTS)[number];
const GROUP = 128;
const BITS = { bf16: 16, int8: 8, int4: 4 };

export function weightBytes(spec: Spec, kind: Weights): number {
  return coded(spec.parameters - apart(spec), kind) + 2 * apart(spec);
}

function coded(count: number, kind: Weights): number {
  const codes = Math.ceil((count * BITS[kind]) / 8);
  return kind === "bf16" ? codes : codes + 2 * Math.ceil(count / GROUP);
}

/** Experts of a layer that some token takes: an expectation. */
export function distinct(total: number, active: number, tokens: number): number {
  return total * (1 - power(1 - active / total, tokens));
}

/** Weights of one routed expert that may go unread, over all layers that have them. */
function expert(spec: Spec): number {
  if (!spec.experts || spec.active === null || spec.experts.total === spec.experts.active) return 0;
  return (spec.parameters - spec.active) / (spec.experts.total - spec.experts.active);
}

/** Bytes of weights that are read for so many tokens at once. */
export function readBytes(spec: Spec, kind: Weights, tokens: number): number {
  let count = spec.parameters - apart(spec);
  if (spec.experts) {
    const unread = spec.experts.total - distinct(spec.experts.total, spec.experts.active, tokens);
    count -= unread * expert(spec);
  }
  return coded(count, kind) + 2 * spec.vocabulary * spec.hidden;
}
