/** A token's life in words. */

import { grouped } from "../format";
import type { Run } from "./recording";

// Latin-1 alone: a fallback font's letters would be of another width.
const NEWLINE = "¶";

/** One letter for the token at position `p`, as wide as any other. */
export function letter(text: Uint8Array, p: number): string {
  if (p === 0) return "§";
  const byte = text[p - 1];
  if (byte === 10) return NEWLINE;
  if (byte < 32 || byte > 126) return "¤";
  return String.fromCharCode(byte);
}

/** A token by name. */
export function named(text: Uint8Array, p: number): string {
  if (p === 0) return "BOS";
  const byte = text[p - 1];
  if (byte === 10) return "line break";
  if (byte === 32) return "space";
  if (byte < 32 || byte === 127) return `byte ${byte}`;
  if (byte < 127) return `“${String.fromCharCode(byte)}”`;
  return `byte ${byte} of “${character(text, p - 1)}”`;
}

function character(text: Uint8Array, byte: number): string {
  let start = byte;
  while (start > 0 && (text[start] & 0xc0) === 0x80) start--;
  let stop = start + 1;
  while (stop < text.length && (text[stop] & 0xc0) === 0x80) stop++;
  return new TextDecoder().decode(text.subarray(start, stop));
}

export interface Life {
  /** Why it stayed or left. */
  why: string;
  pooled: number;
  left: number;
}

export function life(run: Run, i: number): Life | null {
  if (i >= run.tokens) return null;
  const { sinks, window, heavy, rate, block } = run.about;
  const left = run.left[i];
  const pooled = run.pooled?.[i] ?? 0;
  if (window === null) return { why: "everything stays", pooled, left };
  if (i < sinks) return { why: sinks === 1 ? "the sink, for ever" : `one of the ${sinks} sinks, for ever`, pooled, left };
  if (pooled)
    return {
      why: left
        ? `pooled ${rate} to one, until newer slots filled the memory`
        : `pooled ${rate} to one, and still there`,
      pooled,
      left,
    };
  const outlived = (left || run.tokens) - i >= window + block;
  if (heavy && outlived)
    return {
      why: left ? "a heavy hitter, until others had received more attention" : "a heavy hitter, still there",
      pooled,
      left,
    };
  if (!left) return { why: "in the window when the recording ends", pooled, left };
  return {
    why: heavy ? "left with the window: too little attention received" : `the window of ${grouped(window)} passed it`,
    pooled,
    left,
  };
}
