/**
 * The work of a ring in closed form (`attnspan.planner.forms`): how many pairs each rank computes with
 * each other's keys, and how many of these keys it needs. No token is looked at.
 */

import { big } from "./numbers";
import { text, type Pattern } from "./patterns";

export const LAYOUTS = ["contiguous", "zigzag", "striped"] as const;
export type Layout = (typeof LAYOUTS)[number];
const FAR = 2 ** 40;
const TERMS = 5;

/** What a ring of `size` ranks has to do for one sequence. */
export interface Work {
  /** Tokens, with those that pad the sequence to whole chunks. */
  n: number;
  size: number;
  /** Of a query of rank r and a key of rank s. */
  pairs: bigint[][];
  /** Keys of rank s that a query of rank r sees. */
  needs: number[][];
  exact: boolean;
}

/** `least <= i - j < end`, queries before `queries`, keys before `keys`. */
interface Term {
  least: number;
  end: number;
  queries: number;
  keys: number;
}

function term(given: Partial<Term>): Term {
  return { least: -FAR, end: FAR, queries: FAR, keys: FAR, ...given };
}

function meet(a: Term, b: Term): Term {
  return {
    least: Math.max(a.least, b.least),
    end: Math.min(a.end, b.end),
    queries: Math.min(a.queries, b.queries),
    keys: Math.min(a.keys, b.keys),
  };
}

function noForm(pattern: Pattern): Error {
  return new Error(
    `pattern ${text(pattern)} has no closed form here; allowed are Full, Causal, SlidingWindow, Sinks, GlobalTokens ` +
      "and Longformer with the first tokens global, joined by | and &, and Blockwise, Documents or Strided alone",
  );
}

/** Rectangles with a band, whose union is the pattern. */
function terms(pattern: Pattern): Term[] {
  switch (pattern.kind) {
    case "Full":
      return [term({})];
    case "Causal":
      return [term({ least: 0 })];
    case "SlidingWindow": {
      const { window, includeSelf, dilation, right } = pattern;
      if (dilation !== 1) break;
      return [includeSelf ? term({ least: -right, end: window }) : term({ least: 1, end: window + 1 })];
    }
    case "Sinks":
      return pattern.sinks ? [term({ least: 0, keys: pattern.sinks })] : [];
    case "GlobalTokens": {
      const { tokens, causal } = pattern;
      if (typeof tokens !== "number") break;
      const least = causal ? 0 : -FAR;
      return tokens ? [term({ least, keys: tokens }), term({ least, queries: tokens })] : [];
    }
    case "Longformer": {
      const { window, tokens, right } = pattern;
      if (typeof tokens !== "number") break;
      return [term({ least: -right, end: window }), ...terms({ kind: "GlobalTokens", tokens, causal: !right })];
    }
    case "Or":
      return [...terms(pattern.left), ...terms(pattern.right)];
    case "And": {
      const right = terms(pattern.right);
      const both = terms(pattern.left).flatMap((a) => right.map((b) => meet(a, b)));
      return both.filter((each) => each.least < each.end);
    }
  }
  throw noForm(pattern);
}

/** `chunks` chunks of `width` tokens, of which each rank holds `each`. */
interface Grid {
  width: number;
  chunks: number;
  each: 1 | 2;
}

function held(grid: Grid, rank: number): number[] {
  return grid.each === 1 ? [rank] : [rank, grid.chunks - 1 - rank];
}

function below(t: number): bigint {
  if (t <= 0) return 0n;
  const x = big(t);
  return (x * (x + 1n)) / 2n;
}

/** Pairs of the queries from `first` and the keys from `start`, so many each, in the band. */
function band(each: Term, first: number, queries: number, start: number, keys: number): bigint {
  const closer = (end: number) => {
    const t = Math.min(Math.max(end - (first - start) + keys - 1, 0), queries + keys);
    return below(t) - below(t - queries) - below(t - keys) + below(t - queries - keys);
  };
  const found = closer(each.end) - closer(each.least);
  return found > 0n ? found : 0n;
}

type PairsOf = (queries: number, keys: number) => bigint;

/** Pairs of two chunks in the union of the terms, by inclusion and exclusion. */
function counts(grid: Grid, given: Term[]): PairsOf {
  const { width: c, chunks: m } = grid;
  // Chunks alike far apart have alike many, but for terms that are bounded; each is counted once.
  const byDistance: (bigint | undefined)[] = Array(2 * m - 1).fill(undefined);
  const open: [bigint, Term][] = [];
  const bounded: [bigint, Term][] = [];
  for (let chosen = 1; chosen < 1 << given.length; chosen++) {
    const some = given.filter((_, k) => (chosen >> k) & 1);
    const all = some.reduce(meet);
    const sign = some.length % 2 ? 1n : -1n;
    (all.queries === FAR && all.keys === FAR ? open : bounded).push([sign, all]);
  }
  const apart = (distance: number) => {
    let total = 0n;
    for (const [sign, each] of open) total += sign * band(each, distance * c, c, 0, c);
    return total;
  };
  return (a, b) => {
    let total = (byDistance[a - b + m - 1] ??= apart(a - b));
    for (const [sign, each] of bounded) {
      const [first, start] = [a * c, b * c];
      if (first >= each.queries || start >= each.keys) continue;
      total += sign * band(each, first, Math.min(c, each.queries - first), start, Math.min(c, each.keys - start));
    }
    return total;
  };
}

type Span = [number, number];
type NeedsOf = (rank: number, chunk: number) => number;

/** How many keys of a chunk lie in what a rank needs; its spans are made once. */
function within(grid: Grid, spansOf: (rank: number) => Span[]): NeedsOf {
  const known: Span[][] = [];
  return (rank, chunk) => {
    const spans = (known[rank] ??= joined(spansOf(rank)));
    const low = chunk * grid.width;
    const high = low + grid.width;
    let total = 0;
    for (let k = 0; k < spans.length; k++)
      total += Math.max(0, Math.min(spans[k][1], high) - Math.max(spans[k][0], low));
    return total;
  };
}

/** The same keys in spans that don't overlap. */
function joined(spans: Span[]): Span[] {
  const found: Span[] = [];
  for (const [start, stop] of spans.filter(([a, b]) => b > a).sort((a, b) => a[0] - b[0])) {
    const last = found[found.length - 1];
    if (last && start <= last[1]) last[1] = Math.max(last[1], stop);
    else found.push([start, stop]);
  }
  return found;
}

/** Keys of a chunk that a rank needs for the union of the terms. */
function needed(grid: Grid, given: Term[]): NeedsOf {
  const c = grid.width;
  return within(grid, (rank) =>
    held(grid, rank).flatMap((each) =>
      given.map((one): Span => {
        const first = each * c;
        const last = Math.min(first + c, one.queries) - 1;
        return last < first ? [0, 0] : [Math.max(0, first - one.end + 1), Math.min(last - one.least + 1, one.keys)];
      }),
    ),
  );
}

function folded(grid: Grid, pairs: PairsOf, needs: NeedsOf, exact: boolean): Work {
  const size = grid.chunks / grid.each;
  const ranks = [...Array(size).keys()];
  const chunks = ranks.map((rank) => held(grid, rank));
  let table: bigint[][] | undefined;
  const pair = (r: number, s: number) => {
    let total = 0n;
    for (const a of chunks[r]) for (const b of chunks[s]) total += pairs(a, b);
    return total;
  };
  return {
    n: grid.width * grid.chunks,
    size,
    // Memory doesn't depend on them, and a search for what fits asks for memory alone.
    get pairs() {
      return (table ??= ranks.map((r) => ranks.map((s) => pair(r, s))));
    },
    needs: ranks.map((r) => chunks.map((some) => some.reduce((total, b) => total + needs(r, b), 0))),
    exact,
  };
}

/** Edges that cut a sequence into blocks. */
interface Blocks {
  count: number;
  end: number;
  /** The block that holds a place. */
  of(place: number): number;
  start(block: number): number;
  /** Pairs of the blocks before one. */
  done(block: number): bigint;
}

function alike(block: number, n: number, causal: boolean): Blocks {
  const each = causal ? below(block) : big(block) * big(block);
  const count = Math.ceil(n / block) + 1;
  return {
    count,
    end: count * block,
    of: (place) => Math.floor(place / block),
    start: (k) => k * block,
    done: (k) => big(k) * each,
  };
}

function documents(lengths: number[], causal: boolean): Blocks {
  const bounds = [0];
  const done = [0n];
  for (const length of lengths) {
    bounds.push(bounds[bounds.length - 1] + length);
    done.push(done[done.length - 1] + (causal ? below(length) : big(length) * big(length)));
  }
  return {
    count: lengths.length,
    end: bounds[lengths.length],
    of(place) {
      let [low, high] = [0, bounds.length];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (bounds[middle] <= place) low = middle + 1;
        else high = middle;
      }
      return low - 1;
    },
    start: (k) => bounds[Math.min(k, lengths.length)],
    done: (k) => done[k],
  };
}

function blocked(grid: Grid, blocks: Blocks, causal: boolean, before: number): Work {
  /** Pairs within blocks, of the queries before one edge and the keys before the other. */
  const inner = (x: number, y: number): bigint => {
    if (causal && x < y) y = x;
    const [upper, lower] = x >= y ? [x, y] : [y, x];
    const block = blocks.of(lower);
    const [start, end] = [blocks.start(block), blocks.start(block + 1)];
    const keys = Math.min(lower, end) - start;
    if (!causal) return blocks.done(block) + big(Math.min(upper, end) - start) * big(keys);
    const more = Math.max(0, Math.min(upper, end) - Math.min(lower, end));
    return blocks.done(block) + below(keys) + big(more) * big(keys);
  };
  /** Pairs whose key lies in the block before the query's. */
  const earlier = (x: number, y: number): bigint => {
    const part = (block: number) =>
      big(Math.min(Math.max(x - block * before, 0), before)) *
      big(Math.min(Math.max(y - (block - 1) * before, 0), before));
    const whole = Math.max(Math.min(Math.floor(x / before) - 1, Math.floor(y / before)), 0);
    return big(whole) * big(before) ** 2n + part(whole + 1) + part(whole + 2);
  };
  const c = grid.width;
  const cut = (f: (x: number, y: number) => bigint): PairsOf => (a, b) => {
    const [x, y] = [a * c, b * c];
    return f(x + c, y + c) - f(x, y + c) - f(x + c, y) + f(x, y);
  };
  const [inside, across] = [cut(inner), cut(earlier)];
  const pairs: PairsOf = (a, b) => inside(a, b) + (before ? across(a, b) : 0n);
  const needs = within(grid, (rank) =>
    held(grid, rank).map((each): Span => {
      const first = each * c;
      const last = Math.min(first + c, blocks.end) - 1;
      if (last < first) return [0, 0];
      const clip = (k: number) => Math.min(Math.max(k, 0), blocks.count - 1);
      const mine = clip(blocks.of(first));
      const start = blocks.start(before ? Math.max(mine - 1, 0) : mine);
      return [start, causal ? last + 1 : blocks.start(clip(blocks.of(last)) + 1)];
    }),
  );
  return folded(grid, pairs, needs, true);
}

function striped(pattern: Pattern, n: number, size: number): Work {
  const c = Math.ceil(n / size);
  const ranks = [...Array(size).keys()];
  if (pattern.kind !== "Causal" && pattern.kind !== "Full")
    throw new Error(
      `layout striped has pattern ${text(pattern)}; Causal() and Full() are allowed, as under others every rank ` +
        "needs keys of every other all the same",
    );
  const full = pattern.kind === "Full";
  return {
    n: c * size,
    size,
    pairs: ranks.map((r) => ranks.map((s) => (full ? big(c) * big(c) : s <= r ? below(c) : below(c - 1)))),
    needs: ranks.map((r) => ranks.map((s) => (full || s <= r ? c : c - 1))),
    exact: true,
  };
}

/** The work of a ring of `size` ranks for a pattern that has a closed form. */
export function work(pattern: Pattern, n: number, size: number, layout: Layout): Work {
  if (layout === "striped") return striped(pattern, n, size);
  const each = layout === "zigzag" ? 2 : 1;
  const grid: Grid = { width: Math.ceil(n / (each * size)), chunks: each * size, each };
  switch (pattern.kind) {
    case "Strided": {
      const { window, stride } = pattern;
      const near = counts(grid, [term({ least: 0, end: window })]);
      const far = counts(grid, [term({ least: 0 })]);
      const all = needed(grid, [term({ least: 0 })]);
      const inside = needed(grid, [term({ least: 0, end: window })]);
      // Shards shorter than a stride see but some of each other's keys.
      const some = Math.min(grid.width * each, stride);
      return folded(
        grid,
        (a, b) => near(a, b) + (far(a, b) - near(a, b)) / big(stride),
        (r, b) => inside(r, b) + Number((big(all(r, b) - inside(r, b)) * big(some)) / big(stride)),
        stride === 1,
      );
    }
    case "SlidingWindow": {
      const { window, includeSelf, dilation, right } = pattern;
      if (dilation === 1) break;
      const [low, end] = includeSelf ? [-right, window] : [1, window + 1];
      const reach = term({ least: low * dilation, end: (end - 1) * dilation + 1 });
      // As wide as `end - low` strides, of which each holds one key.
      const wide = counts(grid, [term({ least: low * dilation, end: end * dilation })]);
      return folded(grid, (a, b) => wide(a, b) / big(dilation), needed(grid, [reach]), false);
    }
    case "Blockwise": {
      const { block, before, causal } = pattern;
      return blocked(grid, alike(block, grid.width * grid.chunks, causal), causal, before ? block : 0);
    }
    case "Documents":
      return blocked(grid, documents(pattern.lengths, pattern.causal), pattern.causal, 0);
  }
  const given = terms(pattern);
  if (given.length > TERMS) throw noForm(pattern);
  return folded(grid, counts(grid, given), needed(grid, given), true);
}

/** `work` for each size of a ring, each made once. */
export function works(pattern: Pattern, n: number, layout: Layout): (size: number) => Work {
  const made = new Map<number, Work>();
  return (size) => {
    let found = made.get(size);
    if (!found) made.set(size, (found = work(pattern, n, size, layout)));
    return found;
  };
}
