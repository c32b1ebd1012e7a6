/** Cache policies as values, with the text that `--policy` takes (`attnspan.policies`). */

import { gcd } from "./numbers";

export type Policy =
  | { kind: "keep-all" }
  | { kind: "window"; window: number; block: number }
  | { kind: "sinks"; sinks: number; window: number; block: number }
  | { kind: "heavy"; heavy: number; window: number; block: number }
  | { kind: "snap"; heavy: number; window: number; observed: number; neighbours: number; block: number }
  | { kind: "compressive"; window: number; memory: number; rate: number; sinks: number; block: number };

export const KEEP_ALL: Policy = { kind: "keep-all" };

export function slidingWindow(window: number): Policy {
  return { kind: "window", window, block: 1 };
}

export function sinkWindow(sinks: number, window: number): Policy {
  return { kind: "sinks", sinks, window, block: 1 };
}

const FORMS =
  "keep-all, window:1024, sinks:4+window:1020, heavy:512+window:512, snap:448+window:64, compressive:window=512,memory=256,rate=4";

/** Of each form its kind, the sizes that it needs, and those that it has of itself. */
const FIELDS: Record<string, [Policy["kind"], string[], Record<string, number>]> = {
  window: ["window", ["window"], { block: 1 }],
  "sinks+window": ["sinks", ["sinks", "window"], { block: 1 }],
  "heavy+window": ["heavy", ["heavy", "window"], { block: 64 }],
  "snap+window": ["snap", ["heavy", "window"], { observed: 16, neighbours: 3, block: 64 }],
  compressive: ["compressive", ["window", "memory", "rate"], { sinks: 4, block: 64 }],
};

/** What a SPEC text names, but for `heads(...)`, `layers(...)` and poolings, which no figure of the page has. */
export function parsePolicy(text: string): Policy {
  const spec = text.trim();
  const wrong = () => new Error(`policy '${spec}' is not known; allowed are ${FORMS}`);
  const [head, ...options] = spec.split(",").map((part) => part.trim());
  if (head === "keep-all" && !options.length) return KEEP_ALL;
  const values: Record<string, number> = Object.create(null);
  const named = head.startsWith("compressive:");
  const counts = named ? [] : head.split("+");
  const key = named ? "compressive" : counts.map((part) => part.split(":")[0].trim()).join("+");
  if (key === "snap+window") counts[0] = counts[0].replace("snap", "heavy");
  const first = named ? [head.slice("compressive:".length)] : counts.map((part) => part.replace(":", "="));
  for (const pair of [...first, ...options]) {
    const match = /^\s*(\w+)\s*=\s*([+-]?\d+)\s*$/.exec(pair);
    if (!match || match[1] in values) throw wrong();
    values[match[1]] = Number(match[2]);
  }
  if (!Object.hasOwn(FIELDS, key)) throw wrong();
  const [kind, needed, defaults] = FIELDS[key];
  const all = { ...defaults, ...values };
  if (needed.some((name) => !(name in values)) || Object.keys(all).length !== needed.length + Object.keys(defaults).length)
    throw wrong();
  for (const [name, value] of Object.entries(all)) {
    const least = name === "sinks" || name === "neighbours" ? 0 : 1;
    if (value < least) throw new Error(`${key}: ${name} is ${value}; a whole number of at least ${least} is allowed`);
  }
  const policy = { kind, ...all } as Policy;
  if (policy.kind === "snap" && policy.observed > policy.block)
    throw new Error(`${key}: observed is ${policy.observed}; at most block, ${policy.block}, is allowed`);
  return policy;
}

export function policyText(policy: Policy): string {
  switch (policy.kind) {
    case "keep-all":
      return "keep-all";
    case "window":
      return `window:${policy.window}${policy.block !== 1 ? `,block=${policy.block}` : ""}`;
    case "sinks":
      return `sinks:${policy.sinks}+window:${policy.window}${policy.block !== 1 ? `,block=${policy.block}` : ""}`;
    case "heavy":
      return `heavy:${policy.heavy}+window:${policy.window}${policy.block !== 64 ? `,block=${policy.block}` : ""}`;
    case "snap":
      return (
        `snap:${policy.heavy}+window:${policy.window}` +
        (policy.observed !== 16 ? `,observed=${policy.observed}` : "") +
        (policy.neighbours !== 3 ? `,neighbours=${policy.neighbours}` : "") +
        (policy.block !== 64 ? `,block=${policy.block}` : "")
      );
    case "compressive":
      return (
        `compressive:window=${policy.window},memory=${policy.memory},rate=${policy.rate}` +
        (policy.sinks !== 4 ? `,sinks=${policy.sinks}` : "") +
        (policy.block !== 64 ? `,block=${policy.block}` : "")
      );
  }
}

/** The most slots held at once; null: no bound. */
export function capacity(policy: Policy): number | null {
  switch (policy.kind) {
    case "keep-all":
      return null;
    case "window":
      return policy.window - 1 + policy.block;
    case "sinks":
      return policy.sinks + policy.window - 1 + policy.block;
    case "heavy":
    case "snap":
      return policy.heavy + policy.window - 1 + policy.block;
    case "compressive":
      return policy.sinks + policy.memory + (policy.rate - 1) + (policy.window - 1) + policy.block;
  }
}

/** How many of the stream's first tokens stay for ever. */
export function leading(policy: Policy): number {
  return policy.kind === "sinks" || policy.kind === "compressive" ? policy.sinks : 0;
}

export function hasBand(policy: Policy): boolean {
  return policy.kind === "keep-all" || policy.kind === "window" || policy.kind === "sinks";
}

/** The most tokens that a layer has held once it has seen `tokens` (`attnspan.planner.held.slots`). */
export function slots(policy: Policy, tokens: number): number {
  if (policy.kind === "keep-all") return tokens;
  const { block } = policy;
  const rate = policy.kind === "compressive" ? policy.rate : 1;
  const period = rate / gcd(rate, block);
  const last = Math.floor(Math.max(0, tokens - 1) / block);
  let held = 0;
  for (let point = Math.max(0, last - period); point <= last; point++)
    held = Math.max(held, after(policy, point * block) + Math.min(block, tokens - point * block));
  return held;
}

function after(policy: Exclude<Policy, { kind: "keep-all" }>, tokens: number): number {
  if (policy.kind === "compressive") {
    const past = tokens - policy.sinks;
    if (past <= 0) return tokens;
    const groups = Math.floor(Math.max(0, past - (policy.window - 1)) / policy.rate);
    return policy.sinks + Math.min(groups, policy.memory) + past - groups * policy.rate;
  }
  return Math.min(tokens, capacity(policy)! - policy.block);
}
