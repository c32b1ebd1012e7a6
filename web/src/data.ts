import type { Spec, Device, Link } from "./model/spec";

/** What `attnspan.explorer.page.page()` gives. `recordings` are the stream view's. */
export interface Page {
  version: string;
  presets: Spec[];
  devices: Device[];
  links: Link[];
  patterns: PatternInfo[];
  measured: { reach: MeasuredReach[] };
  recordings: unknown[];
}

export interface PatternInfo {
  name: string;
  example: string;
  says: string;
  source: string;
}

/** Of one distance, or a range of them, the mean influence. */
export interface CurvePoint {
  from: number;
  to: number;
  mean: number;
}

export interface MeasuredReach {
  name: string;
  says: string;
  windows: (number | null)[];
  trained_window: number | null;
  bound: number | null;
  length: number;
  date: string;
  source: string;
  gradients: Measure;
  changes: Measure;
}

export interface Measure {
  within: Record<"0.5" | "0.9" | "0.99", number>;
  first_tokens: number;
  beyond_bound: number | null;
  beyond_bound_pairs: number;
  curve: CurvePoint[];
}

declare global {
  interface Window {
    __ATTNSPAN__?: Page;
  }
}

/** The exported file carries its data; a server is asked for it. */
export async function load(): Promise<Page> {
  if (window.__ATTNSPAN__) return window.__ATTNSPAN__;
  const answer = await fetch("/api/page.json", { headers: { accept: "application/json" } });
  if (!answer.ok) throw new Error(`the server answered ${answer.status} ${answer.statusText}`);
  return (await answer.json()) as Page;
}
