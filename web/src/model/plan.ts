/**
 * What a context costs: the planner's figures (`attnspan.planner.plan`), bytes as theory has them.
 *
 * `plan(...)` gives what `attnspan plan --json` gives, under the same names, whole numbers as
 * `bigint`. Tests hold the two equal to the last digit.
 */

import { prefillPeak, type Peak } from "./activations";
import { works, type Work } from "./forms";
import { big, ceilDiv, divide, least, sum } from "./numbers";
import { capacity, hasBand, KEEP_ALL, leading, policyText, slidingWindow, slots, type Policy } from "./policies";
import { grouped, shown } from "./quantities";
import { ringMemory, ringPatterns, ringPrefill, type RingPrefill } from "./ring";
import { ofPolicy, ofWindow, type View } from "./seen";
import { bound, linearParameters, type Device, type Link, type Spec } from "./spec";
import { stack, type Factor } from "./stack";
import { distinct, readBytes, weightBytes, type Weights } from "./weights";

export const STORAGES = ["dense", "int8", "int4"] as const;
export type Storage = (typeof STORAGES)[number];
export const MOST_TOKENS = 2 ** 31 - 1;

export interface Asked {
  context: number;
  device: Device;
  policy?: Policy | null;
  storage?: Storage;
  batch?: number;
  weights?: Weights;
  memory?: number | null;
  devices?: number;
  link?: Link | null;
  chunk?: number | null;
}

/** Layers that are alike. */
export interface Kind {
  name: string;
  sees: string;
  layers: number;
  held: bigint;
  bytes: bigint;
  read: bigint;
  pairs: bigint;
}

export interface Phase {
  linear: bigint;
  attention: bigint;
  bytes: bigint;
  seconds: number;
  ridge: number;
  operations: bigint;
  intensity: number;
  bound: "compute" | "memory";
}

export interface Plan {
  context: number;
  batch: number;
  policy: string | null;
  storage: Storage;
  weights_kind: Weights;
  chunk: number | null;
  devices: number;
  kinds: Kind[];
  token_bytes: bigint;
  reach: number | null;
  cache: { total: bigint; other: bigint; full_pages: bigint | null; of_a_device: bigint };
  weights: bigint;
  activations: { bytes: bigint; phase: string; parts: Record<string, bigint> };
  working: { head: bigint; standard: bigint; flash: bigint };
  prefill: Phase;
  decode: Phase;
  ring: RingPrefill | null;
  stack: Factor[];
  stack_of_the_cache: number;
  total: bigint;
  memory: bigint | null;
  fits: boolean | null;
  spare: bigint | null;
  notes: string[];
}

/** Bytes of one token's keys and values in one layer. */
function tokenBytes(spec: Spec, storage: Storage): bigint {
  if (spec.latent) {
    if (storage !== "dense")
      throw new Error(`storage ${storage}: ${spec.name} has latent attention, and its latents are held dense`);
    return big(spec.latent.rank + spec.latent.rope) * 2n;
  }
  const dim = spec.head_dim;
  if (storage === "int8") return big(spec.kv_heads * 2 * (dim + 2));
  if (storage === "int4") {
    if (dim % 32) throw new Error(`storage int4: head_dim is ${dim}; a multiple of 32 is allowed`);
    return big(spec.kv_heads * (dim + 2 * (dim / 32) + 4));
  }
  return big(spec.kv_heads * 2 * dim * 2);
}

interface Layers {
  window: number | null;
  layers: number;
  /** What its cache keeps: the model's own window where the policy leaves it as it is. */
  kept: Policy;
  /** The policy, where it is more than what the layer has of itself. */
  chosen: Policy | null;
}

/** The model's layers under a policy, those with one window together, in order. */
function layersOf(spec: Spec, policy: Policy | null): Layers[] {
  const counts = new Map<number | null, number>();
  for (const window of spec.windows) counts.set(window, (counts.get(window) ?? 0) + 1);
  const hybrid = counts.has(null);
  return [...counts].map(([window, layers]) => {
    const asked = policy ?? KEEP_ALL;
    const kept = window === null ? asked : hybrid ? slidingWindow(window) : within(asked, window);
    const own = kept.kind === "keep-all" || (window !== null && policyText(kept) === policyText(slidingWindow(window)));
    return { window, layers, kept, chosen: policy === null || own ? null : kept };
  });
}

function within(policy: Policy, window: number): Policy {
  if (policy.kind === "keep-all" || (policy.kind === "window" && policy.window >= window)) return slidingWindow(window);
  const held = capacity(policy)!;
  if (held > window)
    throw new Error(
      `policy ${policyText(policy)} holds up to ${held} tokens; every layer of this model was trained with a ` +
        `sliding window of ${window}, and no more are allowed`,
    );
  return policy;
}

interface Cache {
  /** Of each of `layersOf`, the tokens that a layer holds of one sequence. */
  held: bigint[];
  bytes: bigint[];
  total: bigint;
  full_pages: bigint | null;
}

function cacheOf(layers: Layers[], tokens: number, batch: number, token: bigint): Cache {
  const each = big(batch) * token;
  const held = layers.map((some) => big(slots(some.kept, tokens)));
  const bytes = layers.map((some, k) => big(some.layers) * held[k] * each);
  const everything = layers.map(
    (some, k) => big(some.layers) * (some.window === null ? held[k] : big(tokens)) * each,
  );
  const slides = layers.some((some) => some.window !== null);
  return { held, bytes, total: sum(bytes), full_pages: slides ? sum(everything) : null };
}

/** Bytes of the cache alone. */
export function cacheBytes(spec: Spec, tokens: number, policy: Policy | null, storage: Storage, batch: number): bigint {
  return cacheOf(layersOf(spec, policy), tokens, batch, tokenBytes(spec, storage)).total;
}

function kindsOf(spec: Spec, layers: Layers[], cache: Cache, context: number): Kind[] {
  const latent = spec.latent ? ", latent" : "";
  return layers.map((some, k) => {
    const view = viewOf(some);
    const own = some.window === null ? "all" : `the last ${grouped(some.window)}`;
    return {
      name: (some.window === null ? "full" : "sliding") + latent,
      sees: some.chosen ? policyText(some.chosen) : own,
      layers: some.layers,
      held: cache.held[k],
      bytes: cache.bytes[k],
      read: view.read(big(context)),
      pairs: view.pairs(big(context)),
    };
  });
}

function viewOf(some: Layers): View {
  return some.chosen ? ofPolicy(some.chosen) : ofWindow(some.window);
}

function pairOperations(spec: Spec): number {
  if (!spec.latent) return 4 * spec.head_dim;
  return 2 * (spec.latent.nope + spec.latent.rope) + 2 * spec.latent.value;
}

function readOperations(spec: Spec): number {
  if (!spec.latent) return 4 * spec.head_dim;
  return 2 * (spec.latent.rank + spec.latent.rope) + 2 * spec.latent.rank;
}

function phase(spec: Spec, linear: bigint, attention: bigint, bytes: bigint, device: Device, steps = 1): Phase {
  const computing = Number(linear) / device.linear + Number(attention) / device.forward;
  const seconds = Math.max(computing, Number(bytes) / device.memory_bandwidth) + steps * spec.layers * device.call;
  const ridge = device.linear / device.memory_bandwidth;
  const operations = linear + attention;
  const intensity = divide(operations, bytes);
  return { linear, attention, bytes, seconds, ridge, operations, intensity, bound: intensity >= ridge ? "compute" : "memory" };
}

/** Keys that the steps of a prefill read in a layer, whose last token sees `last` of them. */
function keysRead(tokens: bigint, chunk: bigint, last: bigint): bigint {
  const whole = tokens / chunk;
  const rest = tokens % chunk;
  const reach = last + chunk - 1n;
  const rising = least(whole, reach / chunk);
  const total = (chunk * rising * (rising + 1n)) / 2n + (whole - rising) * reach;
  return total + (rest ? least(tokens, last + rest - 1n) : 0n);
}

interface PrefillAsked {
  context: number;
  batch: number;
  weights: Weights;
  device: Device;
  devices: number;
  token: bigint;
  received: bigint;
  chunk: number | null;
}

function prefillOf(spec: Spec, kinds: Kind[], asked: PrefillAsked): Phase {
  const { context, batch, weights, device, devices, token, received, chunk } = asked;
  const [n, b, d] = [context, batch, devices].map(big);
  const output = big(spec.vocabulary) * big(spec.hidden);
  const linear = 2n * b * (n * big(linearParameters(spec)) + output);
  const pairs = sum(kinds.map((kind) => big(kind.layers) * kind.pairs));
  const attention = big(pairOperations(spec) * spec.heads) * b * pairs;
  const owners = big(kinds.reduce((total, kind) => total + (kind.held ? kind.layers : 0), 0));
  const size = chunk === null ? context : Math.min(chunk, context);
  const whole = Math.floor(context / size);
  const rest = context % size;
  let moved = big(whole) * big(readBytes(spec, weights, batch * size));
  if (rest) moved += big(readBytes(spec, weights, batch * rest));
  if (devices === 1) {
    const read = sum(kinds.map((kind) => big(kind.layers) * keysRead(n, big(size), kind.read)));
    moved += b * token * (owners * n + read);
  } else {
    const own = ceilDiv(n, d) * token * (owners + big(spec.layers));
    moved += b * (own + 2n * received);
  }
  return phase(spec, ceilDiv(linear, d), ceilDiv(attention, d), moved, device, whole + (rest ? 1 : 0));
}

function decodeOf(
  spec: Spec,
  kinds: Kind[],
  asked: { batch: number; weights: Weights; device: Device; devices: number; token: bigint; link: Link | null },
): Phase {
  const { batch, weights, device, devices, token, link } = asked;
  const b = big(batch);
  const linear = 2n * b * (big(linearParameters(spec)) + big(spec.vocabulary) * big(spec.hidden));
  const reads = sum(kinds.map((kind) => big(kind.layers) * ceilDiv(kind.read, big(devices))));
  const attention = big(readOperations(spec) * spec.heads) * b * reads;
  const moved = big(readBytes(spec, weights, batch)) + b * token * reads;
  const found = phase(spec, linear, attention, moved, device);
  if (!link) return found;
  const part = batch * spec.heads * (spec.head_dim + 1) * 4 * (devices - 1);
  return { ...found, seconds: found.seconds + spec.layers * (link.latency + part / link.bandwidth) };
}

/** The prefill alone, for curves: what `plan(...).prefill` is on one device. */
export function prefill(spec: Spec, asked: Asked): Phase {
  const { context, device, policy = null, storage = "dense", batch = 1, weights = "bf16", chunk = null } = asked;
  const layers = layersOf(spec, policy);
  const token = tokenBytes(spec, storage);
  const kinds = kindsOf(spec, layers, cacheOf(layers, context, batch, token), context);
  return prefillOf(spec, kinds, { context, batch, weights, device, devices: 1, token, received: 0n, chunk });
}

/** Of each kind of layer how many there are, and its work on a ring of any size. */
function layerWorks(layers: Layers[], context: number): [number, (size: number) => Work][] {
  return ringPatterns(layers).map(([count, each]) => [count, works(each, context, "zigzag")]);
}

/** Bytes of a device in all, and whether they fit: what `plan` has, and nothing else of it. */
export function memory(spec: Spec, asked: Asked): { total: bigint; fits: boolean | null } {
  const { context, device, policy = null, storage = "dense", batch = 1, weights = "bf16" } = asked;
  const { devices = 1, chunk = null } = asked;
  const layers = layersOf(spec, policy);
  const token = tokenBytes(spec, storage);
  const cache = cacheOf(layers, context, batch, token);
  const above =
    devices > 1
      ? ringMemory(spec, context, layerWorks(layers, context), devices).above
      : prefillPeak(spec, context, batch, "flash", chunk).bytes;
  const total = big(weightBytes(spec, weights)) + shareOf(layers, cache, batch, devices, token) + above;
  const limit = asked.memory ?? device.memory;
  return { total, fits: limit === null ? null : big(Math.trunc(limit)) >= total };
}

/** The cache's bytes of one device, over which its slots are dealt out evenly. */
function shareOf(layers: Layers[], cache: Cache, batch: number, devices: number, token: bigint): bigint {
  if (devices === 1) return cache.total;
  return sum(layers.map((some, k) => big(some.layers) * big(batch) * ceilDiv(cache.held[k], big(devices)) * token));
}

export function plan(spec: Spec, asked: Asked): Plan {
  const { context, device, policy = null, storage = "dense", batch = 1, weights = "bf16" } = asked;
  const { devices = 1, link = null, chunk = null } = asked;
  const limit = asked.memory ?? device.memory;
  if (devices > 1 && chunk !== null)
    throw new Error(`chunk is ${chunk} on ${devices} devices; a ring's prefill is planned in one step alone`);
  const layers = layersOf(spec, policy);
  const token = tokenBytes(spec, storage);
  const cache = cacheOf(layers, context, batch, token);
  const kinds = kindsOf(spec, layers, cache, context);
  const weightsHeld = big(weightBytes(spec, weights));

  const flash = prefillPeak(spec, context, batch, "flash", chunk);
  const standard = prefillPeak(spec, context, batch, "standard", chunk);
  const rows = big(Math.min(Math.ceil(context / devices), chunk ?? context));
  const every = big(batch) * big(spec.heads);
  const head = rows * big(context) * 2n;
  let peak: Omit<Peak, "working"> = flash;
  let working = { head, standard: standard.working || every * head, flash: flash.working || 4n * every * rows };
  const share = shareOf(layers, cache, batch, devices, token);
  let ring: RingPrefill | null = null;
  if (devices > 1) {
    working = { head, standard: every * head, flash: 4n * every * rows };
    if (!link) throw new Error(`devices is ${devices} without a link between them`);
    ring = ringPrefill(spec, context, { device, link }, layerWorks(layers, context), devices);
    const held = ring.memory - ring.weights - ring.cache;
    peak = { bytes: held, phase: "a layer", parts: { "a layer, and what the ring's schedule holds": held } };
  }
  const received = ring ? ring.sent : 0n;
  let ahead = prefillOf(spec, kinds, { context, batch, weights, device, devices, token, received, chunk });
  if (ring) ahead = { ...ahead, seconds: batch * ring.seconds };
  const step = decodeOf(spec, kinds, { batch, weights, device, devices, token, link: devices > 1 ? link : null });

  const total = weightsHeld + share + peak.bytes;
  const room = limit === null ? null : big(Math.trunc(limit));
  const factors = stack(spec, { context, batch, storage, kinds, cache: cache.total, working, dense: tokenBytes(spec, "dense"), stored: token });
  const ofCache = factors.filter((each) => each.quantity === "KV cache");
  return {
    context,
    batch,
    policy: policy ? policyText(policy) : null,
    storage,
    weights_kind: weights,
    chunk,
    devices,
    kinds,
    token_bytes: token,
    reach: reachOf(layers),
    cache: { total: cache.total, other: 0n, full_pages: cache.full_pages, of_a_device: share },
    weights: weightsHeld,
    activations: { bytes: peak.bytes, phase: peak.phase, parts: peak.parts },
    working,
    prefill: ahead,
    decode: step,
    ring,
    stack: factors,
    stack_of_the_cache: ofCache.length ? divide(ofCache[0].before, ofCache[ofCache.length - 1].after) : 1,
    total,
    memory: room,
    fits: room === null ? null : room >= total,
    spare: room === null ? null : room - total,
    notes: notesOf(spec, asked, cache, layers),
  };
}

function reachOf(layers: Layers[]): number | null {
  if (layers.some((some) => !hasBand(some.kept))) return null;
  const windows = layers.flatMap((some) => {
    const held = capacity(some.kept);
    return Array<number | null>(some.layers).fill(held === null ? null : held - leading(some.kept));
  });
  return bound(windows);
}

function notesOf(spec: Spec, asked: Asked, cache: Cache, layers: Layers[]): string[] {
  const { context, batch = 1, weights = "bf16", devices = 1 } = asked;
  const notes = [];
  if (spec.trained_length !== null && context > spec.trained_length)
    notes.push(
      `${spec.name} was trained for ${grouped(spec.trained_length)} positions; ${grouped(context)} tokens are beyond.`,
    );
  if (cache.full_pages !== null && cache.full_pages !== cache.total)
    notes.push(
      `Where sliding layers are given room for all tokens, the cache is ${shown(cache.full_pages)} instead of ` +
        `${shown(cache.total)}.`,
    );
  if (layers.some((some) => some.chosen?.kind === "heavy" || some.chosen?.kind === "snap"))
    notes.push(
      "The policy needs the attention that each token received: one more pass over queries and keys in prefill, " +
        "which isn't counted.",
    );
  if (weights !== "bf16")
    notes.push(
      `${weights} weights: codes and an fp16 scale for each 128; the embedding and the output layer stay in bf16. ` +
        "They are multiplied as bf16, at its rate.",
    );
  if (spec.experts) {
    const { total, active } = spec.experts;
    notes.push(
      `A token takes ${active} of ${total} experts; on average a decoding step of ${batch} reads ` +
        `${four(distinct(total, active, batch))} of them, this prefill ${four(distinct(total, active, batch * context))}.`,
    );
  }
  if (devices > 1) {
    if (batch > 1)
      notes.push(
        "On a ring the sequences of a batch go through the prefill one after another: activations are those of one.",
      );
    notes.push(
      `${devices} devices share the context, and each holds all weights; figures are of one device. Tensor ` +
        "parallelism is planned by `attnspan ring simulate`.",
    );
  }
  return notes;
}

/** As Python's `.4g`, of a number from 1 to 9,999. */
function four(value: number): string {
  return String(Number(value.toPrecision(4)));
}
