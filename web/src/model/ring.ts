/** What the schedules of a ring cost (`attnspan.planner.work`, `.ring` and `.prefill`). */

import { big, divide, fsum, rounded, sum } from "./numbers";
import type { Layout, Work } from "./forms";
import { causal, or, slidingWindow, type Pattern } from "./patterns";
import { policyText, type Policy } from "./policies";
import { innerWidth, linearParameters, type Device, type Link, type Spec } from "./spec";

export interface Machine {
  device: Device;
  link: Link;
}

/** The most that any rank has in a round. */
export interface Round {
  pairs: bigint;
  received: number;
  moved: number;
}

export interface Heads {
  query: number;
  kv: number;
  dim: number;
}

/** Of one token's keys and values. */
export function kvBytes(heads: Heads): number {
  return 2 * heads.kv * heads.dim * 2;
}

export function shard(work: Work): number {
  return work.n / work.size;
}

export function totalPairs(work: Work): bigint {
  return sum(work.pairs.map(sum));
}

/** The largest share of the pairs over the mean one, less 1. */
export function imbalance(work: Work): number {
  const mean = divide(totalPairs(work), big(work.size));
  const most = work.pairs.map(sum).reduce((a, b) => (b > a ? b : a));
  return mean ? Number(most) / mean - 1 : 0;
}

/** Keys that each rank sends to others: a key that two ranks need counts twice. */
export function sent(work: Work): number[] {
  return work.needs.map((_, s) => work.needs.reduce((total, row, r) => total + (r === s ? 0 : row[s]), 0));
}

/** Keys that each rank receives. */
export function received(work: Work): number[] {
  return work.needs.map((row, r) => row.reduce((total, keys, s) => total + (r === s ? 0 : keys), 0));
}

function most(values: readonly number[]): number {
  return values.reduce((a, b) => Math.max(a, b), 0);
}

function mostBig(values: readonly bigint[]): bigint {
  return values.reduce((a, b) => (b > a ? b : a), 0n);
}

function round(pairs: bigint[], received: number[], sent: number[]): Round {
  const keys = most(received);
  return { pairs: mostBig(pairs), received: keys, moved: Math.max(keys, most(sent)) };
}

/** What the ring does, round by round: in step t rank r receives from rank r - t. */
export function rounds(work: Work): Round[] {
  return roundsOf(work, work.pairs);
}

/** With `pairs` null only what is received and moved. */
function roundsOf({ size, needs, n }: Work, pairs: bigint[][] | null): Round[] {
  const ranks = [...Array(size).keys()];
  const found = [{ pairs: pairs ? mostBig(ranks.map((r) => pairs[r][r])) : 0n, received: 0, moved: 0 }];
  const empty = () => ({ pairs: ranks.map(() => 0n), received: ranks.map(() => 0), sent: ranks.map(() => 0) });
  let now = empty();
  for (let step = 1; step < size; step++) {
    const more: number[] = [];
    const gone: number[] = [];
    let heaviest = 0;
    let needed = false;
    for (const r of ranks) {
      more.push(needs[r][(r - step + size) % size]);
      gone.push(needs[(r + step) % size][r]);
      needed ||= more[r] > 0;
      heaviest = Math.max(heaviest, now.received[r] + more[r], now.sent[r] + gone[r]);
    }
    if (!needed) continue;
    if (now.received.some(Boolean) && heaviest > n / size) {
      found.push(round(now.pairs, now.received, now.sent));
      now = empty();
    }
    for (const r of ranks) {
      if (pairs) now.pairs[r] += pairs[r][(r - step + size) % size];
      now.received[r] += more[r];
      now.sent[r] += gone[r];
    }
  }
  if (now.received.some(Boolean)) found.push(round(now.pairs, now.received, now.sent));
  return found;
}

/** The same with one round for all that others hold. */
export function atOnce(work: Work): Round[] {
  const own = work.pairs.map((row, r) => row[r]);
  const first = { pairs: mostBig(own), received: 0, moved: 0 };
  const rest = round(work.pairs.map((row, r) => sum(row) - own[r]), received(work), sent(work));
  return rest.received ? [first, rest] : [first];
}

/** One schedule's cost of one attention layer, forward. */
export interface Cost {
  schedule: Schedule;
  seconds: number;
  compute: number;
  communication: number;
  exposed: number;
  sent: number;
  sent_most: number;
  extra: bigint;
  imbalance: number;
  exchanges: number;
}

export type Schedule = "ring" | "allgather";

export function cost(schedule: Schedule, work: Work, heads: Heads, machine: Machine): Cost {
  const { link, device } = machine;
  const perPair = (4 * heads.dim * heads.query) / device.forward;
  const each = schedule === "allgather" ? atOnce(work) : rounds(work);
  const compute = each.map((one) => (one.pairs ? Number(one.pairs) * perPair + device.call : 0));
  const exchanged = [...each.slice(1).map((one) => one.moved * kvBytes(heads)), 0, 0];
  const moving = exchanged.map((bytes) => (bytes ? link.latency + bytes / link.bandwidth : 0));
  const beside = [...compute, 0];
  const exposed = fsum(moving.map((x, k) => x - link.overlap * Math.min(x, beside[k])));
  const gone = sent(work).map((keys) => keys * kvBytes(heads));
  const busy = fsum(compute);
  return {
    schedule,
    seconds: busy + exposed,
    compute: busy,
    communication: fsum(moving),
    exposed,
    sent: gone.reduce((a, b) => a + b, 0) / work.size,
    sent_most: most(gone),
    extra: work.size > 1 ? extra(work, each, heads) : 0n,
    imbalance: imbalance(work),
    exchanges: moving.filter((x) => x > 0).length,
  };
}

/** What a rank holds beside its shards: two rounds' keys and values, output and log-sum-exp in fp32. */
function extra(work: Work, each: Round[], heads: Heads): bigint {
  const keys = each.map((one) => one.received).sort((a, b) => b - a);
  const flight = (keys[0] ?? 0) + (keys[1] ?? 0);
  const output = big((heads.dim + 1) * heads.query * 4) * big(shard(work));
  return big(flight) * big(kvBytes(heads)) + output;
}

/** What each kind of layer sees, as a ring computes it, and how many there are. */
export function ringPatterns(
  layers: { window: number | null; layers: number; chosen: Policy | null }[],
): [number, Pattern][] {
  return layers.map(({ window, layers: count, chosen }) => [count, ringPattern(window, chosen)]);
}

function ringPattern(window: number | null, chosen: Policy | null): Pattern {
  if (chosen === null) return window === null ? causal : slidingWindow(window);
  if (chosen.kind === "window" && chosen.block === 1) return slidingWindow(chosen.window);
  if (chosen.kind === "sinks" && chosen.block === 1)
    return or(slidingWindow(chosen.window), { kind: "Sinks", sinks: chosen.sinks });
  throw new Error(
    `policy ${policyText(chosen)}: on a ring keep-all, window:W and sinks:S+window:W are allowed; others decide where ` +
      "no device has all tokens",
  );
}

/** The prefill of one sequence on a ring. */
export interface RingPrefill {
  devices: number;
  schedule: Schedule;
  seconds: number;
  attention: number;
  linear: number;
  tensor: number;
  communication: number;
  exposed: number;
  sent: bigint;
  memory: bigint;
  weights: bigint;
  cache: bigint;
  imbalance: number;
  copies: number;
  fits: boolean | null;
}

export function ringPrefill(
  spec: Spec,
  context: number,
  machine: Machine,
  layers: [number, (size: number) => Work][],
  devices: number,
): RingPrefill {
  const schedule = "ring";
  refuse(spec);
  const heads = { query: spec.heads, kv: spec.kv_heads, dim: spec.head_dim };
  const costs = layers.map(([count, of]): [number, Cost] => [count, cost(schedule, of(devices), heads, machine)]);
  const total = (field: (each: Cost) => number) => fsum(costs.map(([count, each]) => count * field(each)));
  const tokens = Math.ceil(context / devices);
  const attention = total((each) => each.seconds);
  const linear = Number(2n * big(linearParameters(spec)) * big(tokens)) / machine.device.linear;
  const { weights, cache, above } = ringMemory(spec, context, layers, devices);
  const memory = weights + cache + above;
  const limit = machine.device.memory;
  return {
    devices,
    schedule,
    seconds: attention + linear,
    attention,
    linear,
    tensor: 0,
    communication: total((each) => each.communication),
    exposed: total((each) => each.exposed),
    sent: big(rounded(total((each) => each.sent))),
    memory,
    weights,
    cache,
    imbalance: most(costs.map(([, each]) => each.imbalance)),
    copies: 1,
    fits: limit === null ? null : Number(memory) <= limit,
  };
}

/** Bytes of a device in the schedule "ring": weights, cache, and what is above them. */
export function ringMemory(
  spec: Spec,
  context: number,
  layers: [number, (size: number) => Work][],
  devices: number,
): { weights: bigint; cache: bigint; above: bigint } {
  refuse(spec);
  const heads = { query: spec.heads, kv: spec.kv_heads, dim: spec.head_dim };
  const tokens = Math.ceil(context / devices);
  const widest = Math.max((2 * heads.query + 2 * heads.kv) * heads.dim, 2 * innerWidth(spec));
  const extras = layers.map(([, of]) => extra(of(devices), roundsOf(of(devices), null), heads));
  return {
    weights: big(2 * spec.parameters),
    cache: big(spec.layers * kvBytes(heads)) * big(tokens),
    above: 2n * big(tokens) * big(2 * spec.hidden + widest) + mostBig(extras),
  };
}

function refuse(spec: Spec): void {
  if (spec.latent) throw new Error(`model ${spec.name} has multi-head latent attention; a ring of that isn't simulated`);
}

/** Positions that a rank holds, in its order: runs of (start, length, step) (`attnspan.ring.layout`). */
export function chunksOf(layout: Layout, n: number, size: number, rank: number): [number, number, number][] {
  if (layout === "striped") return [[rank, n / size, size]];
  if (layout === "contiguous" || size === 1) return [[(rank * n) / size, n / size, 1]];
  const part = n / (2 * size);
  return [
    [rank * part, part, 1],
    [(2 * size - 1 - rank) * part, part, 1],
  ];
}
