import { useMemo, useRef, useState } from "preact/hooks";
import type { ViewProps } from "../app";
import { Drawing, useWidth } from "../chart/frame";
import { AsText, Check, Copy, Panel, range, Select, Slider, Stat, Steps } from "../controls";
import { fixed, grouped } from "../format";
import { work } from "../model/forms";
import { pairs as countPairs, parse, sees, text, why, Wrong, type Named, type Pattern } from "../model/patterns";
import { totalPairs } from "../model/ring";
import { whole } from "../route";

const FAR = 131072;
const COLOURS = ["blue", "orange", "green", "pink", "amber"] as const;
const START = "SlidingWindow(8) | Sinks(2)";
const MARGIN = 46;

interface Leaf {
  path: ("left" | "right" | "inner")[];
  pattern: Named;
}

function leaves(pattern: Pattern, path: Leaf["path"] = []): Leaf[] {
  switch (pattern.kind) {
    case "And":
    case "Or":
      return [...leaves(pattern.left, [...path, "left"]), ...leaves(pattern.right, [...path, "right"])];
    case "Not":
      return leaves(pattern.inner, [...path, "inner"]);
    default:
      return [{ path, pattern }];
  }
}

/** What `|` joins at the top: a pair has the colour of the first that sees it. */
function sides(pattern: Pattern): Pattern[] {
  return pattern.kind === "Or" ? [...sides(pattern.left), ...sides(pattern.right)] : [pattern];
}

function replaced(pattern: Pattern, path: Leaf["path"], by: Pattern): Pattern {
  if (!path.length) return by;
  const [first, ...rest] = path;
  const held = pattern as unknown as Record<string, Pattern>;
  return { ...pattern, [first]: replaced(held[first], rest, by) } as Pattern;
}

/** What a click adds to a pattern. */
const ADDED: Record<string, Pattern> = {
  "| Sinks": { kind: "Sinks", sinks: 2 },
  "| SlidingWindow": { kind: "SlidingWindow", window: 6, includeSelf: true, dilation: 1, right: 0 },
  "| GlobalTokens": { kind: "GlobalTokens", tokens: [5, 20], causal: true },
  "| Strided": { kind: "Strided", window: 1, stride: 8 },
  "& Causal": { kind: "Causal" },
  "& Documents": { kind: "Documents", lengths: [12, 9, 19], causal: true },
  "& ~SlidingWindow": { kind: "Not", inner: { kind: "SlidingWindow", window: 4, includeSelf: true, dilation: 1, right: 0 } },
};

export function PatternView({ page, params, set }: ViewProps) {
  const asked = params.pattern ?? START;
  const n = whole(params.n, 40, 8, 72);
  const step = Math.min(whole(params.step, n - 1, 0, 71), n - 1);
  const [hover, setHover] = useState<[number, number] | null>(null);
  const kept = useRef<Pattern>(parse(START));
  const { pattern, wrong } = useMemo(() => {
    try {
      return { pattern: (kept.current = parse(asked)), wrong: "" };
    } catch (error) {
      if (!(error instanceof Wrong)) throw error;
      return { pattern: kept.current, wrong: error.message };
    }
  }, [asked]);
  const written = text(pattern);
  const parts = leaves(pattern);
  const change = (next: Pattern) => set({ pattern: text(next) });

  const counted = useMemo(() => {
    const all = countPairs(pattern, n);
    const causal = (n * (n + 1)) / 2;
    const rows = Array.from({ length: n }, (_, i) => {
      let keys = 0;
      for (let j = 0; j < n; j++) if (sees(pattern, i, j)) keys++;
      return keys;
    });
    return { all, causal, rows };
  }, [written, n]);
  const far = useMemo(() => {
    try {
      const found = work(pattern, FAR, 1, "contiguous");
      return found.exact ? totalPairs(found) : null;
    } catch {
      return null;
    }
  }, [written]);
  const [query, key] = hover ?? [step, Math.max(0, step - 3)];
  const seen = sees(pattern, query, key);
  const spec = policyOf(pattern);
  const example = page.patterns.find((each) => each.example === written);

  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">Which pairs see each other</h1>
        <p>
          Each row is a query, each column a key. {example ? example.says : "Patterns combine: | sees what either sees, & what both do, ~ the rest."} Roll
          through the queries, or point at a pair to learn why it is seen.
        </p>
      </header>
      <div class="desk">
        <div>
          <dl class="stats">
            <Stat id="pairs" label={`Pairs of ${n} tokens`} value={counted.all} mark="blue" note={`${fixed((100 * counted.all) / counted.causal, 1)} % of causal’s ${grouped(counted.causal)}`}>
              {grouped(counted.all)}
            </Stat>
            <Stat id="row-keys" label={`Query ${step} sees`} value={counted.rows[step]} note={`${grouped(Math.max(...counted.rows))} keys at most, of any query`}>
              {counted.rows[step]} {counted.rows[step] === 1 ? "key" : "keys"}
            </Stat>
            <Stat
              id="far-pairs"
              label={`Pairs of ${grouped(FAR)} tokens`}
              value={far}
              note={far === null ? "no closed form for this pattern" : `${share(far)} of causal’s`}
            >
              {far === null ? "–" : grouped(far)}
            </Stat>
          </dl>
          <figure class="figure">
            <Matrix pattern={pattern} n={n} step={step} hover={hover} point={setHover} says={`Pattern ${written}: ${grouped(counted.all)} of ${grouped(n * n)} pairs of ${n} queries and keys are seen; query ${step} sees ${counted.rows[step]} keys.`} />
            <Steps id="step" label="Query" value={step} most={n - 1} show={(value) => `${value} of 0–${n - 1}`} set={(value) => set({ step: value })} pace={180} />
            <ul class="legend">
              {sides(pattern).map((side, k) => (
                <li key={k}>
                  <i class={`swatch bg-${COLOURS[k % 5]}`} />
                  <code>{text(side)}</code>
                </li>
              ))}
            </ul>
            <p class="why" aria-live="polite" data-testid="why">
              <b>
                Query {query} {seen ? "sees" : "does not see"} key {key}.
              </b>{" "}
              {why(pattern, query, key).map((each, k) => (
                <span key={k}>
                  <code>{each.name}</code> {each.yes ? "says yes" : "says no"}: {each.because}.{" "}
                </span>
              ))}
            </p>
          </figure>
          <div class="copies">
            <Copy id="python" label="Python" text={`out = span.attention(q, k, v, ${text(pattern, "span.")})`} />
            <Copy id="command" label="What it costs" text={`attnspan plan mistral-7b --context 128K --pattern '${written}'`} />
            {spec && <Copy id="spec" label="As a cache’s policy" text={`--policy ${spec}`} />}
          </div>
          <AsText summary="Keys of each query as text">
            <table>
              <caption class="hidden">How many keys each query sees, and which</caption>
              <thead>
                <tr>
                  <th scope="col">query</th>
                  <th scope="col">keys</th>
                  <th scope="col">which</th>
                </tr>
              </thead>
              <tbody>
                {counted.rows.map((keys, i) => (
                  <tr key={i}>
                    <th scope="row">{i}</th>
                    <td>{keys}</td>
                    <td>{runs(pattern, i, n)}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </AsText>
        </div>
        <Panel label="The pattern">
          <div class="control">
            <label for="pattern">Pattern</label>
            <input
              id="pattern"
              data-testid="pattern"
              class="text-input"
              type="text"
              autocomplete="off"
              spellcheck={false}
              value={asked}
              maxLength={400}
              aria-invalid={wrong ? "true" : "false"}
              aria-describedby="pattern-wrong"
              onInput={(event) => set({ pattern: event.currentTarget.value })}
            />
            <p id="pattern-wrong" class="wrong" role="status" data-testid="pattern-wrong">
              {wrong}
            </p>
          </div>
          <Select
            id="example"
            label="Or one with a name"
            value={example?.name ?? ""}
            options={[...(example ? [] : [{ value: "", text: "combined" }]), ...page.patterns.map((each) => ({ value: each.name, text: each.name }))]}
            set={(name) => {
              const found = page.patterns.find((each) => each.name === name);
              if (found) set({ pattern: found.example });
            }}
          />
          {parts.map((part, k) => (
            <Knobs key={`${part.path.join()}${part.pattern.kind}`} number={k} pattern={part.pattern} n={n} set={(next) => change(replaced(pattern, part.path, next))} />
          ))}
          <div class="control">
            <span class="legend-text">Combine with</span>
            <div class="chips">
              {Object.entries(ADDED).map(([name, more]) => (
                <button
                  type="button"
                  key={name}
                  data-testid={`add-${name.replace(/\W+/g, "-")}`}
                  onClick={() => change({ kind: name[0] === "|" ? "Or" : "And", left: pattern, right: more })}
                >
                  {name}
                </button>
              ))}
              <button type="button" data-testid="invert" onClick={() => change(pattern.kind === "Not" ? pattern.inner : { kind: "Not", inner: pattern })}>
                ~ all
              </button>
              {(pattern.kind === "Or" || pattern.kind === "And") && (
                <button type="button" data-testid="remove" onClick={() => change(pattern.left)}>
                  remove the last
                </button>
              )}
            </div>
          </div>
          <hr />
          <Slider id="n" label="Tokens" stops={range(8, 72)} value={n} show={String} set={(value) => set({ n: value, step: null })} />
          {example?.source && (
            <p class="source">
              <a href={example.source} rel="noreferrer">
                {example.source.replace("https://", "")}
              </a>
            </p>
          )}
        </Panel>
      </div>
    </section>
  );
}

function share(far: bigint): string {
  const percent = (100 * Number(far)) / ((FAR * (FAR + 1)) / 2);
  return percent >= 1 ? `${fixed(percent, 1)} %` : `${percent.toPrecision(2)} %`;
}

function policyOf(pattern: Pattern): string | null {
  if (pattern.kind === "Causal") return "keep-all";
  const window = (each: Pattern) => (each.kind === "SlidingWindow" && each.includeSelf && each.dilation === 1 && !each.right ? each.window : null);
  const only = window(pattern);
  if (only !== null) return `window:${only}`;
  if (pattern.kind !== "Or") return null;
  const [a, b] = pattern.left.kind === "Sinks" ? [pattern.right, pattern.left] : [pattern.left, pattern.right];
  const wide = window(a);
  return wide !== null && b.kind === "Sinks" && b.sinks ? `sinks:${b.sinks}+window:${wide}` : null;
}

function runs(pattern: Pattern, i: number, n: number): string {
  const found: string[] = [];
  for (let j = 0; j < n; j++) {
    if (!sees(pattern, i, j)) continue;
    const start = j;
    while (j + 1 < n && sees(pattern, i, j + 1)) j++;
    found.push(start === j ? String(j) : `${start}–${j}`);
  }
  return found.join(", ") || "none";
}

interface MatrixProps {
  pattern: Pattern;
  n: number;
  step: number;
  hover: [number, number] | null;
  point: (pair: [number, number] | null) => void;
  says: string;
}

/** Drawn as a path a colour, so that thousands of cells are a few elements. */
function Matrix({ pattern, n, step, hover, point, says }: MatrixProps) {
  const [ref, width] = useWidth<HTMLDivElement>(640);
  const size = Math.min(width, 660);
  const cell = (size - MARGIN) / n;
  const gap = cell > 7 ? 1.2 : 0.5;
  const { done, later, past } = useMemo(() => {
    const box = (i: number, j: number) => {
      const side = (cell - gap).toFixed(2);
      return `M${(MARGIN + j * cell).toFixed(2)} ${(MARGIN + i * cell).toFixed(2)}h${side}v${side}h-${side}z`;
    };
    const done: string[] = Array(5).fill("");
    const later: string[] = Array(5).fill("");
    const branches = sides(pattern);
    let past = "";
    for (let i = 0; i < n; i++)
      for (let j = 0; j < n; j++) {
        if (!sees(pattern, i, j)) {
          if (j <= i) past += box(i, j);
          continue;
        }
        const by = branches.findIndex((side) => sees(side, i, j));
        (i <= step ? done : later)[by % 5] += box(i, j);
      }
    return { done, later, past };
  }, [text(pattern), n, step, cell]);
  const ticks = range(0, n - 1, n > 48 ? 16 : 8);
  const place = (event: PointerEvent) => {
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const [j, i] = [event.clientX - box.left, event.clientY - box.top].map((x) => Math.floor((x - MARGIN) / cell));
    point(i >= 0 && j >= 0 && i < n && j < n ? [i, j] : null);
  };
  const press = (event: KeyboardEvent) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [i, j] = hover ?? [step, step];
    point([Math.min(n - 1, Math.max(0, i + move[0])), Math.min(n - 1, Math.max(0, j + move[1]))]);
  };
  return (
    <div ref={ref} class="plot">
      <Drawing
        id="matrix"
        kind="matrix"
        says={`${says} Arrow keys point at pairs.`}
        width={size}
        height={size}
        tabIndex={0}
        style={{ width: `${size}px` }}
        onPointerMove={place}
        onPointerDown={place}
        onPointerLeave={() => point(null)}
        onKeyDown={press}
      >
        <text class="title" x={MARGIN} y={MARGIN - 24}>
          key j →
        </text>
        <text class="title" transform={`translate(2 ${MARGIN}) rotate(90)`}>
          query i →
        </text>
        {ticks.map((tick) => (
          <g key={tick}>
            <text x={MARGIN + (tick + 0.5) * cell} y={MARGIN - 6} text-anchor="middle">
              {tick}
            </text>
            <text x={MARGIN - 6} y={MARGIN + (tick + 0.5) * cell} dy="0.35em" text-anchor="end">
              {tick}
            </text>
          </g>
        ))}
        <path class="cells-past" d={past} />
        {COLOURS.map((colour, k) => (
          <g key={colour}>
            <path class={`fill-${colour}`} d={done[k]} />
            <path class={`fill-${colour} ahead`} d={later[k]} />
          </g>
        ))}
        <rect class="row" x={MARGIN - 1.5} y={MARGIN + step * cell - 1.5} width={n * cell + 2} height={cell + 2 - gap + 1} rx={2} />
        {hover && <rect class="cross" x={MARGIN + hover[1] * cell - 1} y={MARGIN + hover[0] * cell - 1} width={cell + 2 - gap} height={cell + 2 - gap} rx={1.5} />}
      </Drawing>
    </div>
  );
}

interface KnobsProps {
  number: number;
  pattern: Named;
  n: number;
  set: (pattern: Pattern) => void;
}

/** A slider for each number of a named pattern, a box for each flag. */
function Knobs({ number, pattern, n, set }: KnobsProps) {
  const slider = (name: string, label: string, value: number, least: number, change: (value: number) => Pattern) => (
    <Slider
      key={name}
      id={`knob-${number}-${name}`}
      label={`${pattern.kind}: ${label}`}
      stops={value > n ? [...range(least, n), value] : range(least, n)}
      value={value}
      show={String}
      set={(next) => set(change(next))}
    />
  );
  const check = (name: string, label: string, value: boolean, change: (value: boolean) => Pattern) => (
    <Check key={name} id={`knob-${number}-${name}`} label={label} value={value} set={(next) => set(change(next))} />
  );
  switch (pattern.kind) {
    case "SlidingWindow":
      return (
        <>
          {slider("window", "window", pattern.window, 1, (window) => ({ ...pattern, window }))}
          {slider("dilation", "dilation", pattern.dilation, 1, (dilation) => ({ ...pattern, dilation }))}
          {check("include_self", "includes the token itself", pattern.includeSelf, (includeSelf) => ({ ...pattern, includeSelf, right: includeSelf ? pattern.right : 0 }))}
        </>
      );
    case "Sinks":
      return slider("sinks", "sinks", pattern.sinks, 0, (sinks) => ({ ...pattern, sinks }));
    case "Strided":
      return (
        <>
          {slider("window", "window", pattern.window, 1, (window) => ({ ...pattern, window }))}
          {slider("stride", "stride", pattern.stride, 1, (stride) => ({ ...pattern, stride }))}
        </>
      );
    case "Blockwise":
      return (
        <>
          {slider("block", "block", pattern.block, 1, (block) => ({ ...pattern, block }))}
          {check("before", "with the block before", pattern.before, (before) => ({ ...pattern, before }))}
          {check("causal", "causal", pattern.causal, (causal) => ({ ...pattern, causal }))}
        </>
      );
    case "GlobalTokens":
      return (
        <>
          {typeof pattern.tokens === "number" && slider("tokens", "first tokens", pattern.tokens, 0, (tokens) => ({ ...pattern, tokens }))}
          {check("causal", "causal", pattern.causal, (causal) => ({ ...pattern, causal }))}
        </>
      );
    case "Longformer":
      return (
        <>
          {slider("window", "window", pattern.window, 1, (window) => ({ ...pattern, window }))}
          {typeof pattern.tokens === "number" && slider("tokens", "global tokens", pattern.tokens, 0, (tokens) => ({ ...pattern, tokens }))}
          {slider("right", "right", pattern.right, 0, (right) => ({ ...pattern, right }))}
        </>
      );
    case "Documents":
      return check("causal", "causal", pattern.causal, (causal) => ({ ...pattern, causal }));
    default:
      return null;
  }
}
