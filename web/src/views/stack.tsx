import { useMemo } from "preact/hooks";
import type { ViewProps } from "../app";
import { Drawing, useWidth } from "../chart/frame";
import { scale } from "../chart/scale";
import { AsText, Choice, doublings, Num, Panel, Stat, TokensSlider } from "../controls";
import { fixed, grouped, shown } from "../format";
import { plan, type Plan } from "../model/plan";
import { oneOf, whole } from "../route";
import { BatchSlider, deskOf, ModelSelect, Refused, refused, StorageChoice } from "./desk";
import { policyFrom, PolicyControls } from "./policy";

const CONTEXTS = doublings(1024, 2 ** 22);

export function StackView({ page, params, set }: ViewProps) {
  const { spec, device, batch, storage } = deskOf(page, params, "int8");
  const context = whole(params.context, 131072, 1, 2 ** 22);
  const log = oneOf(params.axes, ["linear", "log"]) === "log";
  const policy = policyFrom(params, spec, "sinks");
  const made = useMemo(() => refused(() => plan(spec, { context, device, batch, storage, policy })), [spec, context, device, batch, storage, JSON.stringify(policy)]);

  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">What shrinks what</h1>
        <p>
          Optimisations multiply only where they act on the same bytes. Each bar is what is left of the KV cache after one
          more of them; flash attention acts on prefill’s working memory and leaves the cache as it is, so it stands apart.
        </p>
      </header>
      <div class="desk">
        <div>
          {made.value ? <Shown made={made.value} name={spec.name} log={log} /> : <Refused why={made.why} />}
        </div>
        <Panel label="What is planned">
          <ModelSelect page={page} spec={spec} set={set} />
          <TokensSlider id="context" label="Context, tokens" stops={CONTEXTS} value={context} set={set} />
          <BatchSlider batch={batch} set={set} />
          <PolicyControls policy={policy} spec={spec} set={set} />
          <StorageChoice spec={spec} storage={storage} set={set} />
          <hr />
          <Choice
            id="axes"
            label="Axis"
            value={log ? "log" : "linear"}
            options={[
              { value: "linear", text: "linear" },
              { value: "log", text: "logarithmic" },
            ]}
            set={(value) => set({ axes: value })}
          />
        </Panel>
      </div>
    </section>
  );
}

function Shown({ made, name, log }: { made: Plan; name: string; log: boolean }) {
  const factors = made.stack.filter((each) => each.quantity === "KV cache");
  const flash = made.stack[made.stack.length - 1];
  const first = factors[0]?.before ?? made.cache.total;
  const bars: Bar[] = [
    { name: "every query head’s keys and values, bf16", value: first, from: first, ratio: null },
    ...factors.map((each) => ({ name: each.name, value: each.after, from: each.before, ratio: each.ratio })),
  ];
  return (
    <>
      <dl class="stats">
        <Stat id="stack-from" label="If every head kept everything" value={first} mark="orange">
          {shown(first)}
        </Stat>
        <Stat id="stack-to" label="What is held" value={made.cache.total} mark="blue">
          {shown(made.cache.total)}
        </Stat>
        <Stat id="stack-ratio" label="In all" value={made.stack_of_the_cache} mark="green" note={factors.map((each) => fixed(each.ratio, 2)).join(" × ") || "nothing to multiply"}>
          {fixed(made.stack_of_the_cache, made.stack_of_the_cache >= 100 ? 0 : 2)} times
        </Stat>
      </dl>
      <figure class="figure">
        <Waterfall id="stack-chart" title="KV cache, bytes" bars={bars} log={log} says={`KV cache of ${name} at ${grouped(made.context)} tokens: ${bars.map((bar) => `${bar.name} ${shown(bar.value)}`).join("; ")}.`} />
      </figure>
      <h2>And beside it, once, in prefill</h2>
      <figure class="figure">
        <Waterfall
          id="flash-chart"
          title="Attention’s working memory, bytes"
          bars={[
            { name: "standard attention: a layer’s scores", value: flash.before, from: flash.before, ratio: null },
            { name: "flash: a log-sum-exp for each query", value: flash.after, from: flash.before, ratio: flash.ratio },
          ]}
          log={log}
          says={`Attention's working memory: standard ${shown(flash.before)}, flash ${shown(flash.after)}.`}
        />
        <figcaption>It is freed layer by layer and is no part of the cache, so its factor of {fixed(flash.ratio, 0)} may not be multiplied with the others.</figcaption>
      </figure>
      <AsText>
        <table data-testid="stack-table">
          <caption class="hidden">Factors, and the bytes before and after each</caption>
          <thead>
            <tr>
              <th scope="col">what</th>
              <th scope="col">from</th>
              <th scope="col">to</th>
              <th scope="col">times</th>
            </tr>
          </thead>
          <tbody>
            {made.stack.map((each, k) => (
              <tr key={k}>
                <th scope="row">{each.name}</th>
                <td>
                  <Num id={`factor-${k}-before`} value={each.before}>
                    {shown(each.before)}
                  </Num>
                </td>
                <td>
                  <Num id={`factor-${k}-after`} value={each.after}>
                    {shown(each.after)}
                  </Num>
                </td>
                <td>
                  <Num id={`factor-${k}-ratio`} value={each.ratio}>
                    {fixed(each.ratio, 2)}
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

interface Bar {
  name: string;
  value: bigint;
  from: bigint;
  ratio: number | null;
}

function Waterfall({ id, title, bars, log, says }: { id: string; title: string; bars: Bar[]; log: boolean; says: string }) {
  const [ref, width] = useWidth<HTMLDivElement>(700);
  const row = 54;
  const top = 26;
  const height = top + row * bars.length + 30;
  const top_ = Math.max(...bars.map((bar) => Number(bar.value)));
  const low = Math.min(...bars.map((bar) => Number(bar.value)));
  const [left, right] = [0, width - 8];
  const axis = { from: log ? 4 ** Math.floor(Math.log(Math.max(low, 4)) / Math.log(4) - 0.5) : 0, to: Math.max(top_, 1), log, kind: "bytes" as const };
  const x = scale(axis, left, right, 92);
  const at = (value: bigint) => Math.max(left, x(Math.max(Number(value), axis.from || 0)));
  return (
    <div ref={ref} class="plot">
      <Drawing id={id} says={says} width={width} height={height}>
        <text class="title" x={0} y={12}>
          {title}
        </text>
        <g class="grid">
          {x.ticks.map((tick) => (
            <line key={tick.value} x1={x(tick.value)} x2={x(tick.value)} y1={top} y2={height - 24} />
          ))}
        </g>
        {bars.map((bar, k) => {
          const y = top + k * row;
          const end = at(bar.value);
          const last = k === bars.length - 1;
          const colour = k === 0 ? "orange" : last ? "blue" : "sky";
          const inside = end > width - 190;
          return (
            <g key={k}>
              <text x={0} y={y + 15} class="bar-name halo">
                {bar.name}
              </text>
              {bar.ratio !== null && <rect class="gone" x={end} y={y + 22} width={Math.max(0, at(bar.from) - end)} height={18} />}
              <rect class={`fill-${colour}`} x={0} y={y + 22} width={Math.max(2, end)} height={18} rx={1.5} />
              <text class={`label${inside ? "" : " halo"}`} x={inside ? end - 8 : end + 8} y={y + 31} dy="0.36em" text-anchor={inside ? "end" : "start"} style={inside ? { fill: `var(--on-${colour})` } : undefined}>
                {shown(bar.value)}
                {bar.ratio !== null && `  ÷ ${fixed(bar.ratio, 2)}`}
              </text>
            </g>
          );
        })}
        <g class="axis">
          {x.ticks.map((tick, k) => (
            <text key={tick.value} x={x(tick.value)} y={height - 6} text-anchor={k === 0 && x(tick.value) < 12 ? "start" : x(tick.value) > width - 24 ? "end" : "middle"}>
              {tick.text}
            </text>
          ))}
        </g>
      </Drawing>
    </div>
  );
}
