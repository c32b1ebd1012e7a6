/** What the canvases show. Each is drawn whole from typed arrays, whatever the step. */

import { letter } from "./life";
import { HEAVY, POOLED, SINK, type Recording, type Run } from "./recording";

export interface Ink {
  paper: string;
  sheet: string;
  sunk: string;
  ink: string;
  soft: string;
  faint: string;
  line: string;
  rule: string;
  blue: string;
  orange: string;
  green: string;
  amber: string;
  pink: string;
  mono: string;
  sans: string;
  dark: boolean;
}

export function inkOf(element: Element): Ink {
  const style = getComputedStyle(element);
  const of = (name: string) => style.getPropertyValue(`--${name}`).trim();
  // A property is text, `light-dark(...)`, until it is some element's colour.
  const probe = element.appendChild(document.createElement("i"));
  const colour = (name: string) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const names = ["paper", "sheet", "sunk", "ink", "soft", "faint", "line", "rule", "blue", "orange", "green", "amber", "pink"];
  const found = Object.fromEntries(names.map((name) => [name, colour(name)]));
  probe.remove();
  return { ...found, mono: of("mono"), sans: of("sans"), dark: style.colorScheme === "dark" } as unknown as Ink;
}

/** The canvas's context, with a pixel for each of the screen's. */
function prepared(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const ratio = Math.min(3, devicePixelRatio || 1);
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d")!;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** The step from letter to letter of a monospace font, by its size in pixels. */
const advances = new Map<string, number>();
function advance(context: CanvasRenderingContext2D, font: string): number {
  let found = advances.get(font);
  if (found === undefined) {
    context.font = `100px ${font}`;
    found = context.measureText("0".repeat(50)).width / 5000;
    advances.set(font, found);
  }
  return found;
}

// Text ---------------------------------------------------------------------------------------------

const TEXT_SIZE = 13;
const TEXT_LINE = 20;
/** Nats at which a token's colour is full. */
export const FULL = 8;

export interface TextLayout {
  columns: number;
  /** The first byte of each row. */
  starts: Uint32Array;
  rows: number;
  length: number;
}

/** Where rows of text begin, of `columns` letters at most: at line breaks and where a row is full. */
export function layText(text: Uint8Array, length: number, columns: number): TextLayout {
  let rows = 0;
  let starts = new Uint32Array(1024);
  let column = 0;
  const begin = (byte: number) => {
    if (rows === starts.length) {
      const more = new Uint32Array(2 * rows);
      more.set(starts);
      starts = more;
    }
    starts[rows++] = byte;
    column = 0;
  };
  begin(0);
  for (let k = 0; k < length; k++) {
    if (column === columns) begin(k);
    column++;
    if (text[k] === 10 && k + 1 < length) begin(k + 1);
  }
  return { columns, starts, rows, length };
}

export function textColumns(canvas: HTMLCanvasElement, width: number, ink: Ink): number {
  return Math.max(16, Math.floor((width - 8) / (TEXT_SIZE * advance(canvas.getContext("2d")!, ink.mono))));
}

function textRows(height: number): number {
  return Math.floor(height / TEXT_LINE);
}

/** The row that byte `byte` lies in. */
function rowOf(layout: TextLayout, byte: number): number {
  let low = 0;
  let high = layout.rows;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (layout.starts[middle] <= byte) low = middle + 1;
    else high = middle;
  }
  return Math.max(0, low - 1);
}

/** The first row shown at position `p`: the token's own stands at three quarters of the height. */
function topRow(layout: TextLayout, p: number, shown: number): number {
  const row = rowOf(layout, Math.max(0, p - 1));
  return Math.max(0, Math.min(row - Math.floor(shown * 0.75), layout.rows - shown));
}

export function drawText(
  canvas: HTMLCanvasElement,
  width: number,
  height: number,
  recording: Recording,
  run: Run,
  p: number,
  layout: TextLayout,
  ink: Ink,
  marked: number,
): void {
  const context = prepared(canvas, width, height);
  const step = TEXT_SIZE * advance(context, ink.mono);
  const shown = textRows(height);
  const top = topRow(layout, p, shown);
  const { text } = recording;
  const strength = ink.dark ? 0.6 : 0.8;
  context.font = `${TEXT_SIZE}px ${ink.mono}`;
  context.textBaseline = "middle";
  const past = Math.min(p, run.last);
  for (let r = 0; r < shown && top + r < layout.rows; r++) {
    const start = layout.starts[top + r];
    const stop = top + r + 1 < layout.rows ? layout.starts[top + r + 1] : layout.length;
    const y = r * TEXT_LINE;
    context.fillStyle = ink.orange;
    for (let byte = start; byte < stop && byte < past; byte++) {
      const nats = run.surprise(byte);
      if (nats < 0.05) continue;
      context.globalAlpha = strength * Math.min(1, nats / FULL);
      context.fillRect(4 + (byte - start) * step, y + 1, step, TEXT_LINE - 2);
    }
    context.globalAlpha = 1;
    // Letters of one state in a row are one call.
    let from = start;
    let state = -2;
    let words = "";
    const put = () => {
      if (words.trim() === "" && state < SINK) return;
      context.fillStyle = state >= 0 ? ink.ink : state === -1 ? ink.faint : ink.rule;
      if (words.trim() !== "") context.fillText(words, 4 + (from - start) * step, y + TEXT_LINE / 2 + 0.5);
      if (state === SINK || state === HEAVY || state === POOLED) {
        context.fillStyle = kindInk(state, ink);
        context.fillRect(4 + (from - start) * step, y + TEXT_LINE - 3, words.length * step, 2.5);
      }
    };
    for (let byte = start; byte < stop; byte++) {
      const token = byte + 1;
      const now = token > p ? -3 : run.kindOf(token, Math.min(p, run.last));
      if (now !== state) {
        put();
        [state, from, words] = [now, byte, ""];
      }
      const code = text[byte];
      words += code === 10 ? " " : code < 32 ? " " : code > 126 ? multi(text, byte) : String.fromCharCode(code);
    }
    put();
    for (const [token, line] of [
      [p, 2],
      [marked, 1],
    ])
      if (token >= 1 && token - 1 >= start && token - 1 < stop) {
        context.strokeStyle = ink.ink;
        context.lineWidth = line;
        context.strokeRect(4 + (token - 1 - start) * step, y + 0.5, step, TEXT_LINE - 1);
      }
  }
}

/** A character of several bytes stands at its first; its others show a dot. */
function multi(text: Uint8Array, byte: number): string {
  return (text[byte] & 0xc0) === 0x80 ? "·" : "¤";
}

/** The position of the token under a place on the text's canvas; -1: none. */
export function textAt(canvas: HTMLCanvasElement, x: number, y: number, height: number, p: number, layout: TextLayout, ink: Ink): number {
  const step = TEXT_SIZE * advance(canvas.getContext("2d")!, ink.mono);
  const row = topRow(layout, p, textRows(height)) + Math.floor(y / TEXT_LINE);
  if (row < 0 || row >= layout.rows) return -1;
  const byte = layout.starts[row] + Math.floor((x - 4) / step);
  const stop = row + 1 < layout.rows ? layout.starts[row + 1] : layout.length;
  return x >= 4 && byte < stop ? byte + 1 : -1;
}

// A cache ------------------------------------------------------------------------------------------

function kindInk(kind: number, ink: Ink): string {
  return kind === SINK ? ink.amber : kind === HEAVY ? ink.pink : kind === POOLED ? ink.green : ink.blue;
}

const MAP = 16;
const GAP = 5;
const CELL_LINE = 14;
const LEAST_CELL = 6.4;

export interface StripLayout {
  columns: number;
  cell: number;
  rows: number;
  height: number;
}

export function layStrip(run: Run, width: number, room: number): StripLayout {
  const capacity = Math.min(run.about.capacity ?? room, room);
  const most = Math.max(16, Math.floor(width / LEAST_CELL));
  // A power of two a row where that fits, so that the eye can count.
  const columns = most >= 128 ? 128 : most >= 64 ? 64 : most;
  const rows = Math.max(1, Math.ceil(capacity / columns));
  const cell = Math.min(10, width / columns);
  return { columns, cell, rows, height: MAP + GAP + (rows + 1) * CELL_LINE + 4 };
}

/** A map of the stream with the tokens held, the slots with their letters, and who left last. */
export function drawStrip(
  canvas: HTMLCanvasElement,
  width: number,
  recording: Recording,
  run: Run,
  p: number,
  layout: StripLayout,
  ink: Ink,
  marked: number,
): void {
  const context = prepared(canvas, width, layout.height);
  const at = Math.min(p, run.last);
  const slots = run.slots(at);
  drawMap(context, width, recording, run, p, ink);
  const { columns, cell } = layout;
  const top = MAP + GAP;
  const size = Math.min(12, cell / advance(context, ink.mono));
  context.font = `${size}px ${ink.mono}`;
  context.textBaseline = "middle";
  context.fillStyle = ink.sunk;
  const room = layout.rows * columns;
  for (let r = 0; r < layout.rows; r++) {
    const count = Math.min(columns, Math.max(0, Math.min(room, run.about.capacity ?? room) - r * columns));
    context.fillRect(0, top + r * CELL_LINE, count * cell, CELL_LINE - 2);
  }
  for (let r = 0; r * columns < slots.count; r++) {
    const y = top + r * CELL_LINE;
    const stop = Math.min(slots.count, (r + 1) * columns);
    let words = "";
    let from = r * columns;
    for (let s = from; s < stop; s++) {
      words += letter(recording.text, slots.first[s]);
      if (s + 1 === stop || slots.kind[s + 1] !== slots.kind[s]) {
        context.globalAlpha = ink.dark ? 0.42 : 0.3;
        context.fillStyle = kindInk(slots.kind[s], ink);
        context.fillRect((from - r * columns) * cell, y, (s + 1 - from) * cell, CELL_LINE - 2);
        context.globalAlpha = 1;
        if (slots.kind[s] !== 1) {
          // A line beneath tells kinds apart without their colours: thick, thin, dotted.
          const kind = slots.kind[s];
          const dash = kind === POOLED ? 2 : 0;
          const thick = kind === SINK ? 3 : 2;
          for (let x = (from - r * columns) * cell; x < (s + 1 - r * columns) * cell - 0.01; x += dash ? 2 * dash : (s + 1 - from) * cell)
            context.fillRect(x, y + CELL_LINE - 2 - thick, dash || (s + 1 - from) * cell, thick);
        }
        from = s + 1;
      }
    }
    context.fillStyle = ink.ink;
    context.fillText(words, 0, y + CELL_LINE / 2 - 0.5);
  }
  const newest = slots.count - 1;
  if (p <= run.last && newest >= 0) {
    context.strokeStyle = ink.ink;
    context.lineWidth = 1.5;
    context.strokeRect((newest % columns) * cell, top + Math.floor(newest / columns) * CELL_LINE - 0.5, cell, CELL_LINE - 1);
  }
  if (marked >= 0) {
    const s = slotOf(run, at, marked);
    if (s >= 0) {
      context.strokeStyle = ink.ink;
      context.lineWidth = 1;
      context.strokeRect((s % columns) * cell - 1, top + Math.floor(s / columns) * CELL_LINE - 1, cell + 2, CELL_LINE);
    }
  }
  drawGone(context, width, recording, run, at, top + layout.rows * CELL_LINE + 4, size, cell, ink);
}

function drawMap(context: CanvasRenderingContext2D, width: number, recording: Recording, run: Run, p: number, ink: Ink): void {
  const whole = Math.max(1, recording.last);
  const scale = (width - 2) / whole;
  context.fillStyle = ink.line;
  context.fillRect(0, MAP / 2 - 1, width, 2);
  context.fillStyle = ink.rule;
  context.fillRect(0, MAP / 2 - 1, Math.min(p, run.last) * scale, 2);
  const slots = run.slots(Math.min(p, run.last));
  for (const pass of [1, 3, 2, 0]) {
    context.fillStyle = kindInk(pass, ink);
    let drawn = -1;
    for (let s = 0; s < slots.count; s++) {
      if (slots.kind[s] !== pass) continue;
      const x = Math.round(2 * slots.first[s] * scale) / 2;
      if (x === drawn) continue;
      context.fillRect(x, pass === 1 ? 3 : 2, pass === SINK ? 2.5 : 1.2, pass === 1 ? MAP - 6 : MAP - 4);
      drawn = x;
    }
  }
  context.fillStyle = ink.ink;
  context.fillRect(Math.min(p, run.last) * scale, 0, 1.5, MAP);
}

function drawGone(
  context: CanvasRenderingContext2D,
  width: number,
  recording: Recording,
  run: Run,
  at: number,
  y: number,
  size: number,
  cell: number,
  ink: Ink,
): void {
  context.font = `500 11px ${ink.sans}`;
  context.fillStyle = ink.faint;
  const label = "left last";
  context.fillText(label, 0, y + 5);
  const x = Math.ceil((context.measureText(label).width + 10) / cell) * cell;
  const room = Math.min(64, Math.floor((width - x) / cell));
  const gone = run.lastGone(at, room);
  context.font = `${size}px ${ink.mono}`;
  context.fillStyle = ink.faint;
  if (gone.length === 0) {
    context.fillText("nothing yet", x, y + 5);
    return;
  }
  let words = "";
  for (const token of gone) words += letter(recording.text, token);
  context.fillText(words, x, y + 5);
  context.fillRect(x, y + 4.5, gone.length * cell, 1);
}

/** The slot in which token `i` lies; -1: none. */
function slotOf(run: Run, at: number, i: number): number {
  const slots = run.slots(at);
  let low = 0;
  let high = slots.count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (slots.first[middle] <= i) low = middle + 1;
    else high = middle;
  }
  const s = low - 1;
  return s >= 0 && i < slots.first[s] + slots.size[s] ? s : -1;
}

/** What lies under a place on a strip: a token of a slot, or a position on the map. */
export function stripAt(run: Run, recording: Recording, p: number, layout: StripLayout, width: number, x: number, y: number): { token: number } | { place: number } | null {
  if (y < MAP) return { place: Math.round((Math.max(0, Math.min(width - 2, x)) / (width - 2)) * recording.last) };
  const row = Math.floor((y - MAP - GAP) / CELL_LINE);
  const column = Math.floor(x / layout.cell);
  if (row < 0 || row >= layout.rows || column < 0 || column >= layout.columns) return null;
  const slots = run.slots(Math.min(p, run.last));
  const s = row * layout.columns + column;
  return s < slots.count ? { token: slots.first[s] } : null;
}
