/** A live run: what the server sends of it, put into a recording as it comes. */

import { fromBase64, Recording, Run, type About } from "./recording";

export interface Ask {
  policy: string;
  storage: string;
  limit: number;
  /** The name of a shipped text, or null for `text`. */
  source: string | null;
  text: string;
}

interface Head extends About {
  type: "head";
  layer: number;
  head: number;
  nll_most: number;
}

interface Step {
  type: "step";
  tokens: number;
  text: string;
  nll: string;
  changed: [number[], number[], number[]];
  cache_bytes: number;
  perplexity: number;
}

type Event = { type: "loading" } | Head | Step | { type: "end" } | { type: "error"; sentence: string };

/**
 * Asks for a run. `into` is a live recording of the same text, to which the run is added, or null;
 * `told` is called once it has begun and after each step, with the recording that holds it.
 */
export async function watch(
  ask: Ask,
  title: string,
  into: Recording | null,
  signal: AbortSignal,
  told: (recording: Recording, run: Run) => void,
): Promise<void> {
  const { policy, storage, limit, source, text } = ask;
  const body = { policy, storage, limit, ...(source === null ? { text } : { source }) };
  const answer = await fetch("/api/stream", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok || !answer.body) throw new Error((await answer.text()).trim() || `the server answered ${answer.status}`);
  let recording = into;
  let run: Run | null = null;
  for await (const line of lines(answer.body)) {
    const event = JSON.parse(line) as Event;
    if (event.type === "error") throw new Error(event.sentence);
    if (event.type === "head") {
      recording ??= new Recording({ name: "live", title, layer: event.layer, head: event.head, meta: null }, Math.max(event.tokens, limit));
      run = new Run(event, event.tokens, event.nll_most);
      recording.runs = [...recording.runs.filter((each) => each.key !== run!.key), run];
      told(recording, run);
    }
    if (event.type === "step" && run && recording) {
      if (event.tokens > recording.length) {
        const bytes = fromBase64(event.text);
        recording.text.set(bytes, event.tokens - bytes.length);
        recording.length = event.tokens;
      }
      run.extend(fromBase64(event.nll));
      const [tokens, left, pooled] = event.changed;
      for (let k = 0; k < tokens.length; k++) {
        run.left[tokens[k]] = left[k];
        if (run.pooled) run.pooled[tokens[k]] = pooled[k];
      }
      run.looks.tokens.push(event.tokens);
      run.looks.bytes.push(event.cache_bytes);
      run.looks.perplexity.push(event.perplexity);
      run.touch();
      told(recording, run);
    }
    if (event.type === "end" && run && recording) {
      run.ended = true;
      told(recording, run);
      return;
    }
  }
  throw new Error("the run ended before its text did");
}

async function* lines(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      let end = rest.indexOf("\n");
      for (; end >= 0; end = rest.indexOf("\n")) {
        yield rest.slice(0, end);
        rest = rest.slice(end + 1);
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
