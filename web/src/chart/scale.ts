/** Scales and the ticks that suit tokens, bytes, seconds and counts. */

import { power, tokens as tokensText } from "../format";
import { shown } from "../model/quantities";

export interface Scale {
  (value: number): number;
  back(place: number): number;
  start: number;
  end: number;
  ticks: { value: number; text: string }[];
}

export interface Axis {
  from: number;
  to: number;
  log: boolean;
  kind: "tokens" | "bytes" | "seconds" | "count" | "plain";
}

export function scale(axis: Axis, start: number, end: number, room: number): Scale {
  const { from, to, log } = axis;
  const f = log ? Math.log2 : (x: number) => x;
  const g = log ? (x: number) => 2 ** x : (x: number) => x;
  const [low, high] = [f(from), f(to)];
  const made = ((value: number) => start + ((f(value) - low) / (high - low || 1)) * (end - start)) as Scale;
  [made.start, made.end] = [start, end];
  made.back = (place) => g(low + ((place - start) / (end - start)) * (high - low));
  const wanted = Math.max(2, Math.floor(Math.abs(end - start) / room));
  made.ticks = (log ? logTicks(axis, wanted) : linearTicks(axis, wanted)).map((value) => ({ value, text: label(value, axis) }));
  return made;
}

function binary(kind: Axis["kind"]): boolean {
  return kind === "tokens" || kind === "bytes";
}

function logTicks({ from, to, kind }: Axis, wanted: number): number[] {
  const base = binary(kind) ? 2 : 10;
  const low = Math.ceil(Math.log(from) / Math.log(base) - 1e-9);
  const high = Math.floor(Math.log(to) / Math.log(base) + 1e-9);
  const steps = kind === "bytes" ? [1, 2, 3, 5, 10] : [1, 2, 3, 4, 6];
  const step = steps.find((each) => (high - low) / each <= wanted) ?? steps[steps.length - 1];
  const values = [];
  for (let k = low; k <= high; k += step) values.push(base ** k);
  return values;
}

function linearTicks({ from, to, kind }: Axis, wanted: number): number[] {
  const least = (to - from) / wanted;
  let step: number;
  if (binary(kind)) step = 2 ** Math.ceil(Math.log2(least));
  else {
    const ten = 10 ** Math.floor(Math.log10(least));
    step = [1, 2, 5, 10].map((each) => each * ten).find((each) => each >= least * (1 - 1e-9))!;
    if (kind === "plain") step = Math.max(1, Math.round(step));
  }
  const values = [];
  for (let k = Math.ceil(from / step); k * step <= to * (1 + 1e-9); k++) values.push(k * step);
  return values;
}

function label(value: number, { kind }: Axis): string {
  switch (kind) {
    case "tokens":
      return tokensText(value);
    case "bytes":
      return value ? shown(value).replace(/\.0+ /, " ") : "0";
    case "seconds":
      return seconds(value);
    case "count": {
      if (value === 0) return "0";
      const exponent = Math.floor(Math.log10(value) + 1e-9);
      const digits = Number((value / 10 ** exponent).toPrecision(3));
      if (exponent < 4 && exponent >= -1) return value.toLocaleString("en-US");
      return digits === 1 ? power(exponent) : `${digits}·${power(exponent)}`;
    }
    case "plain":
      return value.toLocaleString("en-US");
  }
}

function seconds(value: number): string {
  if (value === 0) return "0";
  for (const [unit, size] of [["d", 86400], ["h", 3600]] as const)
    if (value >= 10 * size) return `${Number((value / size).toPrecision(3)).toLocaleString("en-US")} ${unit}`;
  for (const [unit, size] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6], ["ns", 1e-9]] as const)
    if (value >= size * 0.999) return `${Number((value / size).toPrecision(3)).toLocaleString("en-US")} ${unit}`;
  return "";
}

/** A domain that holds the values, from whole steps of its kind. */
export function around(values: number[], log: boolean, kind: Axis["kind"]): Axis {
  const top = Math.max(...values);
  if (!log) return { from: 0, to: top > 0 ? top * 1.06 : 1, log, kind };
  const base = binary(kind) ? 4 : 10;
  const f = (x: number) => Math.log(x) / Math.log(base);
  const low = Math.min(...values.filter((value) => value > 0));
  return { from: base ** Math.floor(f(low)), to: base ** Math.ceil(f(top) + 0.05), log, kind };
}
