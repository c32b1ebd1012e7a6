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
