/** What the planner knows of a model, as its JSON has it (`attnspan.planner.spec.ModelSpec`). */
export interface Spec {
  name: string;
  layers: number;
  hidden: number;
  intermediate: number;
  heads: number;
  kv_heads: number;
  head_dim: number;
  vocabulary: number;
  parameters: number;
  feed_forward: number;
  windows: (number | null)[];
  tied: boolean;
  source: string;
  active: number | null;
  trained_length: number | null;
  chunked: boolean;
  experts: Experts | null;
  latent: Latent | null;
  shares: (number | null)[];
  learned_sinks: boolean;
  family: string;
  aside: number;
}

export interface Experts {
  total: number;
  active: number;
  intermediate: number;
  layers: number;
  shared: number;
}

export interface Latent {
  rank: number;
  rope: number;
  nope: number;
  value: number;
  query_rank: number | null;
}

export interface Device {
  name: string;
  forward: number;
  backward: number;
  linear: number;
  memory: number | null;
  memory_bandwidth: number;
  call: number;
  source: string;
}

export interface Link {
  name: string;
  latency: number;
  bandwidth: number;
  joins: number | null;
  overlap: number;
  source: string;
}

/** Weights that no layer multiplies with: embedding, the output's own matrix, and what is aside. */
export function apart(spec: Spec): number {
  return spec.vocabulary * spec.hidden * (spec.tied ? 1 : 2) + spec.aside;
}

function activeParameters(spec: Spec): number {
  return spec.active ?? spec.parameters;
}

/** Weights that every token is multiplied with, of experts those that it takes. */
export function linearParameters(spec: Spec): number {
  return activeParameters(spec) - apart(spec);
}

export function innerWidth(spec: Spec): number {
  if (!spec.experts) return spec.intermediate;
  const { active, shared, intermediate, layers } = spec.experts;
  const some = (active + shared) * intermediate;
  return layers === spec.layers ? some : Math.max(some, spec.intermediate);
}

export function valueDim(spec: Spec): number {
  return spec.latent ? spec.latent.value : spec.head_dim;
}

/** The same model as if every layer saw everything. */
export function unbounded(spec: Spec): Spec {
  return { ...spec, windows: spec.windows.map(() => null), chunked: false };
}

/** How many tokens back one can influence the present one at most; null: any number. */
export function bound(windows: readonly (number | null)[]): number | null {
  let reach = 0;
  for (const window of windows) {
    if (window === null) return null;
    reach += window - 1;
  }
  return reach;
}
