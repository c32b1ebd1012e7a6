/**
 * Patterns: which (query position, key position) pairs see each other (`attnspan.patterns`).
 *
 * Texts, and what they mean, are Python's: `parse(text(pattern))` gives the pattern back.
 */

export type Pattern =
  | { kind: "Causal" }
  | { kind: "Full" }
  | { kind: "SlidingWindow"; window: number; includeSelf: boolean; dilation: number; right: number }
  | { kind: "Sinks"; sinks: number }
  | { kind: "Strided"; window: number; stride: number }
  | { kind: "Blockwise"; block: number; before: boolean; causal: boolean }
  | { kind: "GlobalTokens"; tokens: number | number[]; causal: boolean }
  | { kind: "Longformer"; window: number; tokens: number | number[]; right: number }
  | { kind: "Documents"; lengths: number[]; causal: boolean }
  | { kind: "And"; left: Pattern; right: Pattern }
  | { kind: "Or"; left: Pattern; right: Pattern }
  | { kind: "Not"; inner: Pattern };

export type Named = Exclude<Pattern, { kind: "And" | "Or" | "Not" }>;

export const causal: Pattern = { kind: "Causal" };

export function slidingWindow(window: number): Pattern {
  return { kind: "SlidingWindow", window, includeSelf: true, dilation: 1, right: 0 };
}

export function or(left: Pattern, right: Pattern): Pattern {
  return { kind: "Or", left, right };
}

const NAMES = [
  "Blockwise",
  "Causal",
  "Documents",
  "Full",
  "GlobalTokens",
  "Longformer",
  "Sinks",
  "SlidingWindow",
  "Strided",
] as const;
const ALLOWED = `allowed are ${NAMES.join(", ")}, joined by &, | and ~`;
const MOST = 2 ** 48;
/** Deeper than anybody writes, and far from where a browser's stack ends. */
const DEEPEST = 100;
/** Longer than anybody writes; of so many joined patterns, what walks through them fits a browser's stack. */
const LONGEST = 10_000;

type Value = number | boolean | number[];

/** What is wrong with a text, in one sentence. */
export class Wrong extends Error {}

interface Parameter {
  name: string;
  otherwise?: Value;
  check: (owner: string, name: string, value: Value) => void;
}

const PARAMETERS: Record<(typeof NAMES)[number], Parameter[]> = {
  Causal: [],
  Full: [],
  SlidingWindow: [
    { name: "window", check: count(1) },
    { name: "include_self", otherwise: true, check: flag },
    { name: "dilation", otherwise: 1, check: count(1) },
    { name: "right", otherwise: 0, check: count(0) },
  ],
  Sinks: [{ name: "sinks", check: count(0) }],
  Strided: [
    { name: "window", check: count(1) },
    { name: "stride", check: count(1) },
  ],
  Blockwise: [
    { name: "block", check: count(1) },
    { name: "before", otherwise: false, check: flag },
    { name: "causal", otherwise: true, check: flag },
  ],
  GlobalTokens: [
    { name: "tokens", check: globals },
    { name: "causal", otherwise: true, check: flag },
  ],
  Longformer: [
    { name: "window", check: count(1) },
    { name: "global_tokens", check: globals },
    { name: "right", otherwise: 0, check: count(0) },
  ],
  Documents: [
    { name: "lengths", check: lengths },
    { name: "causal", otherwise: true, check: flag },
  ],
};

function show(value: Value): string {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return value.length === 1 ? `(${value[0]},)` : `(${value.join(", ")})`;
  return String(value);
}

function count(from: number) {
  return (owner: string, name: string, value: Value) => {
    if (typeof value !== "number" || !Number.isInteger(value) || value < from)
      throw new Wrong(`${owner}: ${name} is ${show(value)}; a whole number of at least ${from} is allowed`);
    if (value > MOST) throw new Wrong(`${owner}: ${name} is ${value}; a whole number up to ${MOST} is allowed`);
  };
}

function flag(owner: string, name: string, value: Value): void {
  if (typeof value !== "boolean") throw new Wrong(`${owner}: ${name} is ${show(value)}; True or False is allowed`);
}

function globals(owner: string, name: string, value: Value): void {
  if (!Array.isArray(value)) return count(0)(owner, name, value);
  for (const token of value) count(0)(owner, `a position in ${name}`, token);
  if (value.some((token, k) => k > 0 && token <= value[k - 1]))
    throw new Wrong(`${owner}: ${name} is ${show(value)}; positions in rising order are allowed`);
}

function lengths(owner: string, name: string, value: Value): void {
  if (!Array.isArray(value) || !value.length)
    throw new Wrong(`${owner}: ${name} is ${show(value)}; a tuple of at least one length is allowed`);
  for (const length of value) count(1)(owner, "a length", length);
}

interface Token {
  text: string;
  at: number;
}

/** The pattern that a text names, such as `SlidingWindow(4096) | Sinks(4)`. */
export function parse(text: string): Pattern {
  if (text.length > LONGEST) throw new Wrong(`pattern has ${text.length} characters; at most ${LONGEST} are allowed`);
  const tokens = read(text);
  let next = 0;
  const peek = () => tokens[next]?.text ?? "";
  const bad = () =>
    new Wrong(
      next < tokens.length
        ? `pattern ${quoted(text)} goes wrong at ${quoted(tokens[next].text)}, character ${tokens[next].at + 1}; ${ALLOWED}`
        : `pattern ${quoted(text)} ends too early; ${ALLOWED}`,
    );
  const take = (wanted: string) => {
    if (peek() !== wanted) throw bad();
    next++;
  };
  const union = (depth: number): Pattern => {
    let left = both(depth);
    while (peek() === "|") {
      next++;
      left = { kind: "Or", left, right: both(depth) };
    }
    return left;
  };
  const both = (depth: number): Pattern => {
    let left = unary(depth);
    while (peek() === "&") {
      next++;
      left = { kind: "And", left, right: unary(depth) };
    }
    return left;
  };
  const unary = (depth: number): Pattern => {
    if (depth > DEEPEST) throw new Wrong(`pattern is nested deeper than ${DEEPEST}; fewer brackets and ~ are allowed`);
    if (peek() === "~") {
      next++;
      return { kind: "Not", inner: unary(depth + 1) };
    }
    if (peek() === "(") {
      next++;
      const inner = union(depth + 1);
      take(")");
      return inner;
    }
    const name = peek();
    if (!(NAMES as readonly string[]).includes(name)) throw bad();
    next++;
    return call(name as (typeof NAMES)[number]);
  };
  const call = (name: (typeof NAMES)[number]): Pattern => {
    const given: Record<string, Value> = Object.create(null);
    const parameters = PARAMETERS[name];
    take("(");
    let named = false;
    let place = 0;
    while (peek() !== ")") {
      let key: string;
      if (/^[a-z_]+$/.test(peek()) && tokens[next + 1]?.text === "=") {
        key = peek();
        next += 2;
        named = true;
        if (!parameters.some((each) => each.name === key))
          throw new Wrong(`pattern ${quoted(text)}: ${name} has no ${key}; ${takes(name)}`);
      } else {
        if (named) throw bad();
        if (place >= parameters.length) throw new Wrong(`pattern ${quoted(text)}: ${name} has too many arguments; ${takes(name)}`);
        key = parameters[place++].name;
      }
      if (key in given) throw new Wrong(`pattern ${quoted(text)}: ${name} has ${key} twice; once is allowed`);
      given[key] = value();
      if (peek() !== ")") take(",");
    }
    take(")");
    for (const { name: key, otherwise } of parameters)
      if (!(key in given)) {
        if (otherwise === undefined) throw new Wrong(`pattern ${quoted(text)}: ${name} lacks ${key}; ${takes(name)}`);
        given[key] = otherwise;
      }
    return make(name, given);
  };
  const value = (): Value => {
    const word = peek();
    if (word === "True" || word === "False") {
      next++;
      return word === "True";
    }
    if (word === "(") {
      next++;
      const items: number[] = [];
      let comma = false;
      while (peek() !== ")") {
        items.push(number());
        if (peek() !== ")") {
          take(",");
          comma = true;
        }
      }
      take(")");
      return items.length === 1 && !comma ? items[0] : items;
    }
    return number();
  };
  const number = (): number => {
    const minus = peek() === "-";
    if (minus) next++;
    if (!/^(0|[1-9](_?\d)*)$/.test(peek())) throw bad();
    const found = Number(peek().replaceAll("_", ""));
    next++;
    return minus ? -found : found;
  };
  const found = union(0);
  if (next < tokens.length) throw bad();
  return found;
}

function takes(name: (typeof NAMES)[number]): string {
  const parameters = PARAMETERS[name];
  if (!parameters.length) return `${name}() is allowed`;
  const shown = parameters.map((each) => (each.otherwise === undefined ? each.name : `${each.name}=${show(each.otherwise)}`));
  return `${name}(${shown.join(", ")}) is allowed`;
}

function quoted(text: string): string {
  return `'${text.length > 60 ? `${text.slice(0, 57)}...` : text}'`;
}

function read(text: string): Token[] {
  const tokens: Token[] = [];
  const pattern = /\s+|[A-Za-z_]\w*|\d[\d_]*|[()|&~,=-]/y;
  while (pattern.lastIndex < text.length) {
    const at = pattern.lastIndex;
    const match = pattern.exec(text);
    if (!match) throw new Wrong(`pattern ${quoted(text)} has ${quoted(text[at])} in it, character ${at + 1}; ${ALLOWED}`);
    if (match[0].trim()) tokens.push({ text: match[0], at });
  }
  return tokens;
}

function make(name: (typeof NAMES)[number], given: Record<string, Value>): Pattern {
  for (const each of PARAMETERS[name]) each.check(name, each.name, given[each.name]);
  switch (name) {
    case "Causal":
    case "Full":
      return { kind: name };
    case "SlidingWindow": {
      const window = given.window as number;
      const dilation = given.dilation as number;
      const right = given.right as number;
      count(0)(name, "window times dilation", window * dilation);
      count(0)(name, "right times dilation", right * dilation);
      if (right && !given.include_self)
        throw new Wrong(`SlidingWindow: right is ${right} with include_self=False; 0 is allowed`);
      return { kind: name, window, includeSelf: given.include_self as boolean, dilation, right };
    }
    case "Sinks":
      return { kind: name, sinks: given.sinks as number };
    case "Strided":
      return { kind: name, window: given.window as number, stride: given.stride as number };
    case "Blockwise":
      return { kind: name, block: given.block as number, before: given.before as boolean, causal: given.causal as boolean };
    case "GlobalTokens":
      return { kind: name, tokens: given.tokens as number | number[], causal: given.causal as boolean };
    case "Longformer":
      return {
        kind: name,
        window: given.window as number,
        tokens: given.global_tokens as number | number[],
        right: given.right as number,
      };
    case "Documents":
      return { kind: name, lengths: given.lengths as number[], causal: given.causal as boolean };
  }
}

/** The Python expression that makes the pattern; with a prefix, each name after it. */
export function text(pattern: Pattern, prefix = ""): string {
  const inside = (each: Pattern) => text(each, prefix);
  switch (pattern.kind) {
    case "And": {
      const left = pattern.left.kind === "Or" ? `(${inside(pattern.left)})` : inside(pattern.left);
      const right = ["And", "Or"].includes(pattern.right.kind) ? `(${inside(pattern.right)})` : inside(pattern.right);
      return `${left} & ${right}`;
    }
    case "Or":
      return `${inside(pattern.left)} | ${pattern.right.kind === "Or" ? `(${inside(pattern.right)})` : inside(pattern.right)}`;
    case "Not":
      return ["And", "Or"].includes(pattern.inner.kind) ? `~(${inside(pattern.inner)})` : `~${inside(pattern.inner)}`;
    default:
      return `${prefix}${pattern.kind}(${values(pattern).join(", ")})`;
  }
}

function values(pattern: Named): string[] {
  switch (pattern.kind) {
    case "Causal":
    case "Full":
      return [];
    case "SlidingWindow":
      return [
        show(pattern.window),
        ...(pattern.includeSelf ? [] : ["include_self=False"]),
        ...(pattern.dilation === 1 ? [] : [`dilation=${pattern.dilation}`]),
        ...(pattern.right ? [`right=${pattern.right}`] : []),
      ];
    case "Sinks":
      return [show(pattern.sinks)];
    case "Strided":
      return [show(pattern.window), show(pattern.stride)];
    case "Blockwise":
      return [show(pattern.block), ...(pattern.before ? ["before=True"] : []), ...(pattern.causal ? [] : ["causal=False"])];
    case "GlobalTokens":
      return [show(pattern.tokens), ...(pattern.causal ? [] : ["causal=False"])];
    case "Longformer":
      return [show(pattern.window), show(pattern.tokens), ...(pattern.right ? [`right=${pattern.right}`] : [])];
    case "Documents":
      return [show(pattern.lengths), ...(pattern.causal ? [] : ["causal=False"])];
  }
}

function modulo(a: number, b: number): number {
  return ((a % b) + b) % b;
}

function among(tokens: number | number[], x: number): boolean {
  return typeof tokens === "number" ? x < tokens : tokens.includes(x);
}

function documentOf(lengths: number[], x: number): number {
  let end = 0;
  for (let k = 0; k < lengths.length; k++) {
    end += lengths[k];
    if (x < end) return k;
  }
  return -1;
}

/** Whether the query at `i` sees the key at `j`. */
export function sees(pattern: Pattern, i: number, j: number): boolean {
  const d = i - j;
  switch (pattern.kind) {
    case "And":
      return sees(pattern.left, i, j) && sees(pattern.right, i, j);
    case "Or":
      return sees(pattern.left, i, j) || sees(pattern.right, i, j);
    case "Not":
      return !sees(pattern.inner, i, j);
    case "Full":
      return true;
    case "Causal":
      return d >= 0;
    case "SlidingWindow": {
      const { window, includeSelf, dilation, right } = pattern;
      const low = (includeSelf ? -right : 1) * dilation;
      const last = (includeSelf ? window - 1 : window) * dilation;
      return d >= low && d <= last && modulo(d, dilation) === 0;
    }
    case "Sinks":
      return d >= 0 && j < pattern.sinks;
    case "Strided":
      return d >= 0 && (d < pattern.window || d % pattern.stride === 0);
    case "Blockwise": {
      const [mine, theirs] = [Math.floor(i / pattern.block), Math.floor(j / pattern.block)];
      return (!pattern.causal || d >= 0) && theirs <= mine && theirs >= mine - (pattern.before ? 1 : 0);
    }
    case "GlobalTokens":
      return (!pattern.causal || d >= 0) && (among(pattern.tokens, i) || among(pattern.tokens, j));
    case "Longformer":
      return (
        (d >= -pattern.right && d < pattern.window) ||
        ((pattern.right > 0 || d >= 0) && (among(pattern.tokens, i) || among(pattern.tokens, j)))
      );
    case "Documents": {
      const mine = documentOf(pattern.lengths, i);
      return (!pattern.causal || d >= 0) && mine >= 0 && mine === documentOf(pattern.lengths, j);
    }
  }
}

/** Of a pair, what each named pattern says and why, in words. */
export function why(pattern: Pattern, i: number, j: number): { name: string; yes: boolean; because: string }[] {
  switch (pattern.kind) {
    case "And":
    case "Or":
      return [...why(pattern.left, i, j), ...why(pattern.right, i, j)];
    case "Not":
      return why(pattern.inner, i, j);
    default:
      return [{ name: text(pattern), yes: sees(pattern, i, j), because: reason(pattern, i, j) }];
  }
}

function reason(pattern: Named, i: number, j: number): string {
  const d = i - j;
  const later = `key ${j} is later than query ${i}`;
  switch (pattern.kind) {
    case "Full":
      return "every query sees every key";
    case "Causal":
      return d >= 0 ? `key ${j} is not later than query ${i}` : later;
    case "SlidingWindow": {
      const { window, includeSelf, dilation, right } = pattern;
      const low = (includeSelf ? -right : 1) * dilation;
      const last = (includeSelf ? window - 1 : window) * dilation;
      if (d < low) return d === 0 ? "the window ends before the token itself" : d < 0 && !right ? later : `distance ${d} is below ${low}`;
      if (d > last) return `distance ${d} is beyond ${last}`;
      if (modulo(d, dilation)) return `distance ${d} is no multiple of ${dilation}`;
      return `distance ${d} lies within ${low} to ${last}`;
    }
    case "Sinks":
      return d < 0 ? later : j < pattern.sinks ? `key ${j} is one of the first ${pattern.sinks}` : `key ${j} is none of the first ${pattern.sinks}`;
    case "Strided":
      if (d < 0) return later;
      if (d < pattern.window) return `distance ${d} lies within the nearest ${pattern.window}`;
      return d % pattern.stride ? `distance ${d} is no multiple of ${pattern.stride}` : `distance ${d} is a multiple of ${pattern.stride}`;
    case "Blockwise": {
      const [mine, theirs] = [Math.floor(i / pattern.block), Math.floor(j / pattern.block)];
      if (pattern.causal && d < 0) return later;
      return `the query is in block ${mine}, the key in block ${theirs}`;
    }
    case "GlobalTokens":
    case "Longformer": {
      const open = pattern.kind === "Longformer" ? pattern.right > 0 : !pattern.causal;
      if (pattern.kind === "Longformer" && d >= -pattern.right && d < pattern.window)
        return `distance ${d} lies within ${-pattern.right} to ${pattern.window - 1}`;
      if (!open && d < 0) return later;
      if (among(pattern.tokens, j)) return `key ${j} is global`;
      return among(pattern.tokens, i) ? `query ${i} is global` : "neither is global";
    }
    case "Documents": {
      const [mine, theirs] = [documentOf(pattern.lengths, i), documentOf(pattern.lengths, j)];
      if (mine < 0 || theirs < 0) return "past the last document";
      if (pattern.causal && d < 0) return later;
      return mine === theirs ? `both are in document ${mine}` : `the query is in document ${mine}, the key in document ${theirs}`;
    }
  }
}

/** How many pairs queries and keys 0 to n - 1 have, by looking at each. */
export function pairs(pattern: Pattern, n: number): number {
  let total = 0;
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) if (sees(pattern, i, j)) total++;
  return total;
}
