import { useMemo } from "preact/hooks";
import type { ViewProps } from "../app";
import { Drawing, useWidth } from "../chart/frame";
import { AsText, Choice, doublings, Num, Panel, range, Select, Slider, Stat, Steps, TokensSlider } from "../controls";
import { fixed, grouped, short, shown } from "../format";
import { LAYOUTS, work, type Layout, type Work } from "../model/forms";
import { big, divide, sum } from "../model/numbers";
import { text, type Pattern } from "../model/patterns";
import { chunksOf, cost, imbalance, kvBytes, received, rounds, sent, shard } from "../model/ring";
import { oneOf, whole } from "../route";
import { deskOf, DeviceSelect, LinkChoice, ModelSelect, Refused, refused } from "./desk";

const TOKENS = doublings(64, 2 ** 22);
const WINDOWS = doublings(1, 2 ** 20);
const KINDS = ["causal", "window", "sinks", "full", "blocks", "strided"] as const;
const NAMES = {
  causal: "Causal",
  window: "Sliding window",
  sinks: "Window and sinks",
  full: "Full",
  blocks: "Blockwise",
  strided: "Strided",
};
const SAYS: Record<Layout, string> = {
  contiguous: "Each process holds one piece. A window needs only the end of the piece before; under a causal pattern the last process has twice the mean work.",
  zigzag: "Of twice as many pieces each process holds one and, counted from the end, its mirror: under a causal pattern all have the same work.",
  striped: "Tokens are dealt out one by one, like cards. All processes have nearly the same work, but each needs keys of all others whatever the window, so windows are refused.",
};

export function RingView({ page, params, set }: ViewProps) {
  const { spec, device, link } = deskOf(page, params);
  const n = whole(params.tokens, 131072, 16, 2 ** 22);
  const size = whole(params.processes, 6, 1, 16);
  const layout = oneOf(params.layout, LAYOUTS, "zigzag");
  const kind = oneOf(params.pattern, KINDS);
  const window = whole(params.window, 4096, 1, 2 ** 20);
  const step = Math.min(whole(params.step, Math.min(1, size - 1), 0, 15), size - 1);
  const pattern = made(kind, window);
  const { value: found, why } = useMemo(() => refused(() => work(pattern, n, size, layout)), [text(pattern), n, size, layout]);
  const heads = { query: spec.heads, kv: spec.kv_heads, dim: spec.head_dim };

  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">One sequence over many processes</h1>
        <p>
          Each process keeps its queries; keys and values come round. In step t process r receives what it needs of process
          r − t, and computes with it while the next is under way. {SAYS[layout]}
        </p>
      </header>
      <div class="desk">
        <div>
          {found ? (
            <Shown work={found} pattern={pattern} layout={layout} step={step} set={(value) => set({ step: value })} cost={cost("ring", found, heads, { device, link })} perKey={kvBytes(heads)} name={spec.name} />
          ) : (
            <Refused why={why} />
          )}
        </div>
        <Panel label="The ring">
          <Slider id="processes" label="Processes" stops={range(1, 16)} value={size} show={String} set={(value) => set({ processes: value, step: null })} />
          <TokensSlider id="tokens" label="Tokens" stops={TOKENS} value={n} set={set} />
          <Choice id="layout" label="Layout" value={layout} options={LAYOUTS.map((each) => ({ value: each, text: each }))} set={(value) => set({ layout: value })} />
          <Select id="pattern" label="Pattern" value={kind} options={KINDS.map((each) => ({ value: each, text: NAMES[each] }))} set={(value) => set({ pattern: value })} />
          {kind !== "causal" && kind !== "full" && (
            <TokensSlider id="window" label={kind === "blocks" ? "Block, tokens" : "Window, tokens"} stops={WINDOWS} value={window} set={set} />
          )}
          <hr />
          <ModelSelect page={page} spec={spec} label="Heads of" set={set} />
          <DeviceSelect page={page} device={device} set={set} />
          <LinkChoice page={page} link={link} set={set} />
        </Panel>
      </div>
    </section>
  );
}

function made(kind: (typeof KINDS)[number], window: number): Pattern {
  const sliding: Pattern = { kind: "SlidingWindow", window, includeSelf: true, dilation: 1, right: 0 };
  switch (kind) {
    case "causal":
      return { kind: "Causal" };
    case "full":
      return { kind: "Full" };
    case "window":
      return sliding;
    case "sinks":
      return { kind: "Or", left: sliding, right: { kind: "Sinks", sinks: 4 } };
    case "blocks":
      return { kind: "Blockwise", block: window, before: true, causal: true };
    case "strided":
      return { kind: "Strided", window, stride: Math.max(1, Math.round(Math.sqrt(window))) };
  }
}

interface ShownProps {
  work: Work;
  pattern: Pattern;
  layout: Layout;
  step: number;
  set: (step: number) => void;
  cost: ReturnType<typeof cost>;
  /** Bytes of a token's keys and values in one layer. */
  perKey: number;
  name: string;
}

function Shown({ work: found, pattern, layout, step, set, cost: costs, perKey, name }: ShownProps) {
  const { size, pairs, needs } = found;
  const ranks = range(0, size - 1);
  const totals = pairs.map(sum);
  const uneven = imbalance(found);
  const out = sent(found);
  const into = received(found);
  const joined = rounds(found).length - 1;
  const from = (r: number) => (r - step + size) % size;
  const says =
    `A ring of ${size} processes, layout ${layout}, pattern ${text(pattern)}, step ${step}: ` +
    ranks.map((r) => `process ${r} computes ${grouped(pairs[r][from(r)])} pairs with keys of process ${from(r)}`).join("; ");
  return (
    <>
      <dl class="stats">
        <Stat id="shard" label="A process holds" value={shard(found)} mark="blue" note={`${shown(shard(found) * perKey)} of keys and values a layer`}>
          {grouped(shard(found))} tokens
        </Stat>
        <Stat id="imbalance" label="The busiest over the mean" value={uneven} mark="orange" note={uneven < 5e-4 ? "all have the same work" : "the others wait for it"}>
          +{fixed(100 * uneven, uneven < 0.1 ? 2 : 1)} %
        </Stat>
        <Stat id="sent-mean" label="A process sends, a layer" value={costs.sent} mark="green" note={`in ${joined} ${joined === 1 ? "round" : "rounds"}, the most ${shown(costs.sent_most)}`}>
          {shown(Math.round(costs.sent))}
        </Stat>
        <Stat id="seconds" label="A layer’s attention" value={costs.seconds} note={`${short(costs.compute)} computing, ${costs.exposed ? short(costs.exposed) : "nothing"} of the exchange not hidden`}>
          {short(costs.seconds)}
        </Stat>
      </dl>
      <Steps id="step" label="Step" value={step} most={size - 1} show={(value) => (value === 0 ? "0: its own keys" : `${value} of ${size - 1}`)} set={set} pace={1100} />
      <div class="figures ring-figures">
        <figure class="figure">
          <Wheel work={found} step={step} says={says} />
        </figure>
        <figure class="figure">
          <Heat work={found} step={step} />
        </figure>
      </div>
      <figure class="figure">
        <Strip work={found} layout={layout} />
        <Bars work={found} step={step} />
        <figcaption>
          Above: which process holds which tokens. Below: the pairs that each computes, with those of this step lit. {found.exact ? "" : "A stride’s pairs are estimates: the mean over the stride. "}
          {name} has {shown(perKey)} of keys and values a token and layer; n is padded to {grouped(found.n)}.
        </figcaption>
      </figure>
      <AsText summary="What each process does, as text">
        <table data-testid="ring-table">
          <caption class="hidden">What each process computes, receives and sends</caption>
          <thead>
            <tr>
              <th scope="col">process</th>
              <th scope="col">holds tokens</th>
              <th scope="col">computes, pairs</th>
              <th scope="col">of the mean</th>
              <th scope="col">receives, keys</th>
              <th scope="col">sends, keys</th>
              <th scope="col">sends, a layer</th>
              <th scope="col">this step: keys of</th>
              <th scope="col">keys</th>
              <th scope="col">pairs</th>
            </tr>
          </thead>
          <tbody>
            {ranks.map((r) => (
              <tr key={r}>
                <th scope="row">{r}</th>
                <td>
                  {chunksOf(layout, found.n, size, r)
                    .map(([start, length, by]) => (by === 1 ? `${grouped(start)}–${grouped(start + length - 1)}` : `${start}, ${start + by}, … ${grouped(start + by * (length - 1))}`))
                    .join(" and ")}
                </td>
                <td>
                  <Num id={`pairs-${r}`} value={totals[r]}>
                    {grouped(totals[r])}
                  </Num>
                </td>
                <td>{fixed(100 * (Number(totals[r]) / (divide(sum(totals), big(size)) || 1)), 1)} %</td>
                <td>
                  <Num id={`received-${r}`} value={into[r]}>
                    {grouped(into[r])}
                  </Num>
                </td>
                <td>
                  <Num id={`sent-${r}`} value={out[r]}>
                    {grouped(out[r])}
                  </Num>
                </td>
                <td>{shown(out[r] * perKey)}</td>
                <td>{from(r)}</td>
                <td>
                  <Num id={`step-keys-${r}`} value={step ? needs[r][from(r)] : 0}>
                    {step ? grouped(needs[r][from(r)]) : "its own"}
                  </Num>
                </td>
                <td>
                  <Num id={`step-pairs-${r}`} value={pairs[r][from(r)]}>
                    {grouped(pairs[r][from(r)])}
                  </Num>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </AsText>
    </>
  );
}

/** Processes on a circle, each with its queries and the keys that it has in this step. */
function Wheel({ work: found, step, says }: { work: Work; step: number; says: string }) {
  const [ref, width] = useWidth<HTMLDivElement>(400);
  const { size, pairs, needs } = found;
  const side = Math.min(width, 430);
  const node = size > 10 ? 19 : size > 6 ? 23 : 29;
  const radius = side / 2 - node - 26;
  const middle = side / 2;
  const most = pairs.flat().reduce((a, b) => (b > a ? b : a), 1n);
  const place = (r: number, out = 0): [number, number] => {
    const angle = (2 * Math.PI * r) / size - Math.PI / 2;
    return [middle + (radius + out) * Math.cos(angle), middle + (radius + out) * Math.sin(angle)];
  };
  const ranks = range(0, size - 1);
  return (
    <div ref={ref} class="plot">
      <Drawing id="ring-wheel" kind="wheel" says={says} width={side} height={side} style={{ width: `${side}px` }}>
        <defs>
          <marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">
            <path d="M0 0 8 4 0 8z" class="arrow" />
          </marker>
        </defs>
        <circle class="track" cx={middle} cy={middle} r={radius} />
        {step > 0 &&
          ranks.map((r) => {
            const source = (r - step + size) % size;
            if (!needs[r][source]) return null;
            const [a, b] = [place(source), place(r)];
            const length = Math.hypot(b[0] - a[0], b[1] - a[1]) || 1;
            const [ux, uy] = [(b[0] - a[0]) / length, (b[1] - a[1]) / length];
            // Bent inwards, so that two that cross can be told apart.
            const bend = length * 0.16;
            const [mx, my] = [(a[0] + b[0]) / 2 - uy * bend, (a[1] + b[1]) / 2 + ux * bend];
            const cut = (p: [number, number], q: [number, number]): string => {
              const d = Math.hypot(q[0] - p[0], q[1] - p[1]) || 1;
              return `${(p[0] + ((q[0] - p[0]) / d) * (node + 3)).toFixed(1)} ${(p[1] + ((q[1] - p[1]) / d) * (node + 3)).toFixed(1)}`;
            };
            const arc = `M${cut(a, [mx, my])}Q${mx.toFixed(1)} ${my.toFixed(1)} ${cut(b, [mx, my])}`;
            return (
              <g key={`${step} ${r}`}>
                <path class="flow" marker-end="url(#arrow)" d={arc} />
                <rect class="parcel" x={-5} y={-5} width={10} height={10} rx={2} style={{ offsetPath: `path("${arc}")` }} />
              </g>
            );
          })}
        {ranks.map((r) => {
          const source = (r - step + size) % size;
          const [x, y] = place(r);
          const busy = Number(pairs[r][source]) / Number(most);
          const has = step === 0 || needs[r][source] > 0;
          const [lx, ly] = place(r, node + 13);
          return (
            <g key={r}>
              <circle class={has ? "node" : "node idle"} cx={x} cy={y} r={node} />
              <circle class="load ease" cx={x} cy={y} r={(node - 2) * Math.sqrt(busy)} />
              <text class="node-name" x={x} y={y} dy="0.35em" text-anchor="middle">
                {r}
              </text>
              <text x={lx} y={ly} dy="0.35em" text-anchor="middle" class={`halo${has ? " text-orange label" : ""}`}>
                {has ? `K${source}` : "–"}
              </text>
            </g>
          );
        })}
        <text class="title" x={middle} y={middle - 6} text-anchor="middle">
          step {step}
        </text>
        <text x={middle} y={middle + 12} text-anchor="middle">
          {step === 0 ? "own keys" : `keys of r − ${step}`}
        </text>
      </Drawing>
      <p class="note">A disc is a process, its filling the pairs of this step. K2: keys and values of process 2; –: none of them are needed, so none are sent.</p>
    </div>
  );
}

/** Pairs of each process's queries with each one's keys; this step's are framed. */
function Heat({ work: found, step }: { work: Work; step: number }) {
  const [ref, width] = useWidth<HTMLDivElement>(400);
  const { size, pairs } = found;
  const margin = 34;
  const side = Math.min(width, 430);
  const cell = (side - margin) / size;
  const most = Number(pairs.flat().reduce((a, b) => (b > a ? b : a), 1n));
  const ranks = range(0, size - 1);
  return (
    <div ref={ref} class="plot">
      <Drawing id="ring-heat" says={`Pairs of the queries of each of ${size} processes with the keys of each.`} width={side} height={side} style={{ width: `${side}px` }}>
        <text class="title" x={margin} y={10}>
          keys of process →
        </text>
        <text class="title" transform={`translate(0 ${margin}) rotate(90)`}>
          queries of process →
        </text>
        {ranks.map((r) => (
          <g key={r}>
            <text x={margin + (r + 0.5) * cell} y={margin - 7} text-anchor="middle">
              {r}
            </text>
            <text x={margin - 6} y={margin + (r + 0.5) * cell} dy="0.35em" text-anchor="end">
              {r}
            </text>
            {ranks.map((s) => (
              <rect key={s} class={pairs[r][s] ? "fill-blue" : "cells-past"} x={margin + s * cell} y={margin + r * cell} width={cell - 1.5} height={cell - 1.5} style={pairs[r][s] ? { opacity: 0.12 + 0.88 * (Number(pairs[r][s]) / most) } : undefined} />
            ))}
          </g>
        ))}
        {ranks.map((r) => (
          <rect key={r} class="frame" x={margin + ((r - step + size) % size) * cell - 0.5} y={margin + r * cell - 0.5} width={cell - 0.5} height={cell - 0.5} />
        ))}
      </Drawing>
      <p class="note">The stronger the colour, the more pairs. Framed: what is computed in this step, one field a process.</p>
    </div>
  );
}

const TONES = ["blue", "amber", "green", "orange", "sky", "pink"] as const;

/** The sequence from left to right, and which process holds which part. */
function Strip({ work: found, layout }: { work: Work; layout: Layout }) {
  const [ref, width] = useWidth<HTMLDivElement>(700);
  const { size, n } = found;
  const parts = layout === "striped" ? Math.min(n, size * 8) : layout === "zigzag" && size > 1 ? 2 * size : size;
  const wide = width / parts;
  const holder = (k: number) => (layout === "striped" ? k % size : k < size ? k : 2 * size - 1 - k);
  return (
    <div ref={ref} class="plot">
      <Drawing id="ring-strip" says={`Layout ${layout}: the sequence lies over the processes in this order: ${Array.from({ length: Math.min(parts, 2 * size) }, (_, k) => holder(k)).join(", ")}${layout === "striped" ? ", and so on, token by token" : ""}.`} width={width} height={52}>
        {Array.from({ length: parts }, (_, k) => (
          <g key={k}>
            <rect class={`fill-${TONES[holder(k) % 6]}`} x={k * wide} y={16} width={Math.max(1, wide - 1)} height={18} style={holder(k) >= 6 ? { opacity: holder(k) >= 12 ? 0.35 : 0.6 } : undefined} />
            {wide > 15 && (
              <text x={(k + 0.5) * wide} y={48} text-anchor="middle">
                {holder(k)}
              </text>
            )}
          </g>
        ))}
        <text class="title" x={0} y={10}>
          token 0
        </text>
        <text class="title" x={width} y={10} text-anchor="end">
          {layout === "striped" ? `the first ${grouped(parts)} of ${grouped(n)} tokens` : `token ${grouped(n - 1)}`}
        </text>
      </Drawing>
    </div>
  );
}

/** What each process computes in all; lit, what it does in this step. */
function Bars({ work: found, step }: { work: Work; step: number }) {
  const [ref, width] = useWidth<HTMLDivElement>(700);
  const { size, pairs } = found;
  const row = size > 8 ? 17 : 22;
  const [left, top] = [82, 24];
  const height = top + row * size + 6;
  const totals = pairs.map((each) => Number(sum(each)));
  const most = Math.max(...totals, 1);
  const mean = totals.reduce((a, b) => a + b, 0) / size;
  const x = (value: number) => (value / most) * (width - left - 4);
  return (
    <div ref={ref} class="plot">
      <Drawing id="ring-bars" says={`Pairs that each process computes: ${totals.map((total, r) => `${r}: ${grouped(total)}`).join(", ")}.`} width={width} height={height}>
        <text class="title" x={0} y={12}>
          pairs computed
        </text>
        <text x={left + x(mean)} y={12} text-anchor={x(mean) > width - left - 60 ? "end" : "middle"}>
          mean {grouped(Math.round(mean))}
        </text>
        {totals.map((total, r) => {
          const done = range(0, step - 1).reduce((some, t) => some + Number(pairs[r][(r - t + size) % size]), 0);
          const now = Number(pairs[r][(r - step + size) % size]);
          const y = top + r * row;
          return (
            <g key={r}>
              <text x={0} y={y + row / 2 - 2} dy="0.35em">
                process {r}
              </text>
              <rect class="rest" x={left} y={y} width={x(total)} height={row - 4} />
              <rect class="fill-sky ease" x={left} y={y} width={x(done)} height={row - 4} />
              <rect class="fill-blue ease" x={left + x(done)} y={y} width={x(now)} height={row - 4} />
            </g>
          );
        })}
        <line class="now" x1={left + x(mean)} x2={left + x(mean)} y1={top - 6} y2={height} />
      </Drawing>
    </div>
  );
}
