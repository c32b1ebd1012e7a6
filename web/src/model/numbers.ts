/** Whole numbers as Python has them: of any size in `bigint`, divided and rounded as it does. */

export const big = BigInt;

/** `-(-a // b)` of what isn't negative. */
export function ceilDiv(a: bigint, b: bigint): bigint {
  return (a + b - 1n) / b;
}

export function least(a: bigint, b: bigint): bigint {
  return a < b ? a : b;
}

export function most(a: bigint, b: bigint): bigint {
  return a > b ? a : b;
}

export function sum(values: Iterable<bigint>): bigint {
  let total = 0n;
  for (const value of values) total += value;
  return total;
}

/** `1 + 2 + ... + n`. */
export function upTo(n: bigint): bigint {
  return (n * (n + 1n)) / 2n;
}

function bits(value: bigint): number {
  return value.toString(16).length * 4;
}

/** `a / b` of whole numbers, rounded once, as Python's true division is. */
export function divide(a: bigint, b: bigint): number {
  if (a === 0n) return 0;
  // 66 bits of the quotient and a last one that says whether anything is left: more than the 53 of
  // a double, and `Number` rounds them to even.
  const shift = 66 - (bits(a) - bits(b));
  const [above, below] = shift > 0 ? [a << big(shift), b] : [a, b << big(-shift)];
  const quotient = above / below;
  const sticky = quotient * below === above ? quotient << 1n : (quotient << 1n) | 1n;
  return Number(sticky) * 2 ** (-shift - 1);
}

/** The sum of some doubles, rounded once: `math.fsum`. */
export function fsum(values: Iterable<number>): number {
  const partials: number[] = [];
  for (let x of values) {
    let kept = 0;
    for (let y of partials) {
      if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
      const high = x + y;
      const low = y - (high - x);
      if (low) partials[kept++] = low;
      x = high;
    }
    partials.length = kept;
    partials.push(x);
  }
  let n = partials.length - 1;
  if (n < 0) return 0;
  let high = partials[n];
  let low = 0;
  while (n > 0) {
    const x = high;
    const y = partials[--n];
    high = x + y;
    low = y - (high - x);
    if (low) break;
  }
  // Halfway cases are rounded to even by looking at what lies below.
  if (n > 0 && ((low < 0 && partials[n - 1] < 0) || (low > 0 && partials[n - 1] > 0))) {
    const y = low * 2;
    const x = high + y;
    if (y === x - high) high = x;
  }
  return high;
}

/** Python's `round` to a whole number: halves go to the even one. */
export function rounded(value: number): number {
  const low = Math.floor(value);
  const rest = value - low;
  return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
}

/** `x ** n` of a double from 0 to 1, rounded once. */
export function power(x: number, n: number): number {
  if (x === 0 || x === 1 || n * Math.log2(x) < -200) return x ** n;
  let scale = 0;
  let whole = x;
  while (!Number.isInteger(whole)) {
    whole *= 2;
    scale++;
  }
  return divide(big(whole) ** big(n), 1n << big(scale * n));
}

export function gcd(a: number, b: number): number {
  while (b) [a, b] = [b, a % b];
  return a;
}

/** JSON in which a `bigint` is a number with all its digits, as Python reads it. */
export function toJson(value: unknown): string {
  if (typeof value === "bigint") return value.toString();
  if (Array.isArray(value)) return `[${value.map((each) => toJson(each ?? null)).join(",")}]`;
  if (typeof value === "object" && value !== null) {
    const fields = Object.entries(value).filter(([, each]) => each !== undefined);
    return `{${fields.map(([key, each]) => `${JSON.stringify(key)}:${toJson(each)}`).join(",")}}`;
  }
  return JSON.stringify(value) ?? "null";
}
