/** Numbers as the command line prints them (`attnspan.planner.quantities`). */

import { fixed, grouped } from "./model/quantities";

export { fixed, grouped, shown } from "./model/quantities";

type Count = number | bigint;

/** Three digits, without a power of ten where Python's `g` has none. */
export function three(value: number): string {
  const text = value.toPrecision(3);
  return text.includes("e") ? String(Number(text)) : text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

export function short(seconds: number): string {
  for (const [unit, scale] of [["s", 1], ["ms", 1e-3]] as const)
    if (seconds >= scale) return seconds < 1000 ? `${three(seconds / scale)} ${unit}` : `${fixed(seconds, 0)} s`;
  return `${three(seconds / 1e-6)} µs`;
}

/** A large number with a power of ten. */
export function scaled(count: Count): string {
  const size = Number(count);
  if (size < 1e6) return fixed(size, 0);
  const [digits, power] = size.toExponential(3).split("e+");
  return `${digits}e${power}`;
}

/** A tokens' axis: 128K is 131,072. */
export function tokens(count: number): string {
  if (count >= 2 ** 20 && count % 2 ** 18 === 0) return `${count / 2 ** 20}M`;
  if (count >= 1024 && count % 256 === 0) return `${count / 1024}K`;
  return grouped(count);
}

const SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹";

export function power(exponent: number): string {
  return `10${[...String(exponent)].map((d) => (d === "-" ? "⁻" : SUPER[Number(d)])).join("")}`;
}

/** The text of `tokens` back, as `--context` reads it; null where it is no number of tokens. */
export function parseTokens(text: string): number | null {
  const match = /^(\d[\d_,]*(?:\.\d+)?)\s*([KM]?)$/.exec(text.trim().toUpperCase());
  if (!match) return null;
  const count = Number(match[1].replace(/[_,]/g, "")) * { "": 1, K: 1024, M: 1024 ** 2 }[match[2] as "" | "K" | "M"];
  return Number.isInteger(count) && count >= 1 && count <= 2 ** 31 - 1 ? count : null;
}
