/** A recording as `attnspan.explorer.recording` writes it, and what the view reads of it. */

export interface RunHead {
  policy: string;
  storage: string;
  tokens: number;
}

export interface RecordingHead {
  name: string;
  title: string;
  tokens: number;
  layer: number;
  head: number;
  meta: Meta;
  runs: RunHead[];
  /** The whole, where the page carries it. */
  whole?: Whole;
}

interface Meta {
  date: string;
  versions: Record<string, string>;
  device: string;
  model: { name: string; parameters: number; dtype: string; trained_length: number | null };
}

/** What is known of a run before it begins. */
export interface About extends RunHead {
  block: number;
  sinks: number;
  window: number | null;
  capacity: number | null;
  heavy: number;
  rate: number;
  slot_bytes: number;
}

interface WholeRun extends About {
  nll_mean: number;
  nll: string;
  left: string | null;
  pooled: string | null;
  looks: { tokens: number[]; held: number[]; cache_bytes: number[] };
  perplexity: number[];
}

export interface Whole {
  format: string;
  version: number;
  title: string;
  tokens: number;
  layer: number;
  head: number;
  nll_most: number;
  meta: Meta;
  text: string;
  runs: WholeRun[];
}

/** What live runs may be asked for; null where no server is there to run them. */
export interface LiveOffer {
  texts: Record<string, string>;
  storages: string[];
  policies: string[];
  pasted: number;
  limit: number;
  largest: number;
}

export const SINK = 0;
const RECENT = 1;
export const HEAVY = 2;
export const POOLED = 3;
export const KINDS = ["sinks", "window", "heavy hitters", "pooled"] as const;

/** The slots of a cache at one place of the stream, oldest first, in memory that is used again. */
export interface Slots {
  count: number;
  /** The first token of each slot. */
  first: Uint32Array;
  /** How many tokens are pooled in it, or 1. */
  size: Uint8Array;
  kind: Uint8Array;
}

/**
 * The tokens' lives under one policy and storage. Position 0 is BOS, and position p > 0 byte p - 1 of
 * the text; the query at p sees the tokens with i <= p < left[i], where left[i] = 0 stands for ever.
 */
export class Run {
  readonly about: About;
  readonly key: string;
  /** Positions that went by. */
  tokens = 0;
  ended = false;
  readonly codes: Uint8Array;
  readonly left: Uint32Array;
  readonly pooled: Uint32Array | null;
  readonly looks: { tokens: number[]; bytes: number[]; perplexity: number[] } = { tokens: [], bytes: [], perplexity: [] };
  private readonly nats: Float64Array;
  /** Sums of nats of the bytes before each. */
  private readonly sums: Float64Array;
  /** Tokens in the order in which they left, and how many have left by each count of tokens seen. */
  private order = new Uint32Array(0);
  private gone = new Uint32Array(0);
  private merged = new Uint32Array(0);
  private mergedGone = new Uint32Array(0);
  private counted = -1;
  private version = 0;
  private readonly slotsNow: Slots;
  private slotsAt = -1;

  constructor(about: About, room: number, most: number) {
    this.about = about;
    this.key = `${about.policy} ${about.storage}`;
    this.codes = new Uint8Array(room);
    this.left = new Uint32Array(room);
    this.pooled = about.rate > 1 ? new Uint32Array(room) : null;
    this.sums = new Float64Array(room + 1);
    this.nats = Float64Array.from({ length: 256 }, (_, code) => (most * code * code) / 65025);
    const slots = Math.min(room, about.capacity ?? room) + 1;
    this.slotsNow = { count: 0, first: new Uint32Array(slots), size: new Uint8Array(slots), kind: new Uint8Array(slots) };
  }

  get name(): string {
    return this.about.storage === "dense" ? this.about.policy : `${this.about.policy}, ${this.about.storage}`;
  }

  /** The last position. */
  get last(): number {
    return this.tokens - 1;
  }

  /** Takes in the surprise of further bytes, as codes. */
  extend(codes: Uint8Array): void {
    this.codes.set(codes, this.tokens);
    for (let k = 0; k < codes.length; k++) {
      const p = this.tokens + k;
      this.sums[p + 1] = this.sums[p] + this.nats[codes[k]];
    }
    this.tokens += codes.length;
    this.touch();
  }

  /** Says that lives have changed. */
  touch(): void {
    this.version++;
    this.slotsAt = -1;
  }

  /** Nats that byte `byte` of the text cost. */
  surprise(byte: number): number {
    return this.nats[this.codes[byte]];
  }

  /** The perplexity of the first `count` bytes: exact at a look, by codes of a byte since. */
  perplexity(count: number): number {
    if (count < 1) return NaN;
    const { tokens, perplexity } = this.looks;
    const k = before(tokens, count);
    const base = k < 0 ? 0 : Math.log(perplexity[k]) * tokens[k];
    const from = k < 0 ? 0 : tokens[k];
    return Math.exp((base + this.sums[count] - this.sums[from]) / count);
  }

  /** The perplexity of the last `span` of the first `count` bytes, by codes. */
  recent(count: number, span: number): number {
    if (count < 1) return NaN;
    const from = Math.max(0, count - span);
    return Math.exp((this.sums[count] - this.sums[from]) / (count - from));
  }

  /** Bytes allocated at the look before, or the first. */
  allocated(count: number): number {
    return this.looks.bytes[Math.max(0, before(this.looks.tokens, count))] ?? 0;
  }

  /** How many slots the query at `p` sees. */
  held(p: number): number {
    if (!this.tokens) return 0;
    this.count();
    const t = Math.min(p, this.last);
    const { rate } = this.about;
    const pooled = this.merged[t] - this.mergedGone[t];
    return t + 1 - this.gone[t] - pooled + pooled / rate;
  }

  heldBytes(p: number): number {
    return this.held(p) * this.about.slot_bytes;
  }

  /** Up to `most` tokens that the query at `p` no longer sees, the last to leave last. */
  lastGone(p: number, most: number): Uint32Array {
    this.count();
    const stop = this.gone[Math.min(p, this.last)];
    return this.order.subarray(Math.max(0, stop - most), stop);
  }

  /** The kind of slot that token `i` lies in for the query at `p`; -1: none. */
  kindOf(i: number, p: number): number {
    if (i > p || i >= this.tokens || (this.left[i] !== 0 && this.left[i] <= p)) return -1;
    const { sinks, heavy, block, window } = this.about;
    if (i < sinks) return SINK;
    if (this.pooled !== null && this.pooled[i] !== 0 && this.pooled[i] <= p) return POOLED;
    if (heavy && window !== null && i < p - (p % block) - (window - 1)) return HEAVY;
    return RECENT;
  }

  /** What the query at `p` sees. */
  slots(p: number): Slots {
    const at = Math.min(p, this.last);
    const found = this.slotsNow;
    if (this.slotsAt === at) return found;
    const { left, pooled } = this;
    const { sinks, rate } = this.about;
    let count = 0;
    for (let i = 0; i <= at; i++) {
      if (left[i] !== 0 && left[i] <= at) continue;
      const kind = this.kindOf(i, at);
      // Groups are counted from the sinks on; a group's tokens come and go together.
      const size = kind === POOLED && pooled !== null ? rate - ((i - sinks) % rate) : 1;
      found.first[count] = i;
      found.size[count] = size;
      found.kind[count] = kind;
      count++;
      i += size - 1;
    }
    found.count = count;
    this.slotsAt = at;
    return found;
  }

  private count(): void {
    if (this.counted === this.version) return;
    this.counted = this.version;
    const n = this.tokens;
    const gone = new Uint32Array(n + 1);
    const merged = new Uint32Array(n + 1);
    const mergedGone = new Uint32Array(n + 1);
    for (let i = 0; i < n; i++) {
      const t = this.left[i];
      if (t && t <= n) gone[t]++;
      const m = this.pooled?.[i] ?? 0;
      if (m && m <= n) {
        merged[m]++;
        if (t && t <= n) mergedGone[t]++;
      }
    }
    for (let t = 1; t <= n; t++) {
      gone[t] += gone[t - 1];
      merged[t] += merged[t - 1];
      mergedGone[t] += mergedGone[t - 1];
    }
    const order = new Uint32Array(gone[n]);
    const place = gone.slice();
    for (let i = 0; i < n; i++) {
      const t = this.left[i];
      if (t && t <= n) order[place[t - 1]++] = i;
    }
    this.order = order;
    this.gone = gone;
    this.merged = merged;
    this.mergedGone = mergedGone;
  }
}

/** The index of the last of rising `values` that is at most `value`; -1: none. */
function before(values: number[], value: number): number {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** A text and the runs over it. */
export class Recording {
  readonly name: string;
  readonly title: string;
  readonly layer: number;
  readonly head: number;
  readonly meta: Meta | null;
  readonly text: Uint8Array;
  /** Bytes of the text that have come. */
  length = 0;
  runs: Run[] = [];

  constructor(about: { name: string; title: string; layer: number; head: number; meta: Meta | null }, room: number) {
    this.name = about.name;
    this.title = about.title;
    this.layer = about.layer;
    this.head = about.head;
    this.meta = about.meta;
    this.text = new Uint8Array(room);
  }

  /** The last position of the longest run. */
  get last(): number {
    return Math.max(0, ...this.runs.map((run) => run.last));
  }
}

export async function fetchRecording(head: RecordingHead): Promise<Recording> {
  let whole = head.whole;
  if (!whole) {
    const answer = await fetch(`/api/recordings/${encodeURIComponent(head.name)}.json`);
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    whole = (await answer.json()) as Whole;
  }
  const found = new Recording({ ...whole, name: head.name }, whole.tokens);
  found.text.set(await inflate(whole.text));
  found.length = whole.tokens;
  found.runs = await Promise.all(whole.runs.map((run) => decode(run, whole.nll_most)));
  return found;
}

async function decode(about: WholeRun, most: number): Promise<Run> {
  const run = new Run(about, about.tokens, most);
  const [codes, left, pooled] = await Promise.all([inflate(about.nll), lives(about.left, about), lives(about.pooled, about)]);
  run.extend(codes);
  if (left) run.left.set(left);
  if (pooled && run.pooled) run.pooled.set(pooled);
  run.looks.tokens = about.looks.tokens;
  run.looks.bytes = about.looks.cache_bytes;
  run.looks.perplexity = about.perplexity;
  run.ended = true;
  run.touch();
  return run;
}

async function lives(packed: string | null, { block }: About): Promise<Uint32Array | null> {
  if (packed === null) return null;
  const data = await inflate(packed);
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const found = new Uint32Array(data.byteLength / 4);
  for (let i = 0; i < found.length; i++) {
    const code = view.getUint32(4 * i, true);
    found[i] = code ? (code + Math.floor(i / block)) * block : 0;
  }
  return found;
}

export function fromBase64(text: string): Uint8Array {
  const raw = atob(text);
  const data = new Uint8Array(raw.length);
  for (let k = 0; k < raw.length; k++) data[k] = raw.charCodeAt(k);
  return data;
}

async function inflate(packed: string): Promise<Uint8Array> {
  const stream = new Blob([fromBase64(packed) as BlobPart]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
