import type { ViewProps } from "../app";
import type { Measure, MeasuredReach } from "../data";
import { Drawing, useWidth } from "../chart/frame";
import { Plot, type Line } from "../chart/plot";
import type { Axis } from "../chart/scale";
import { AsText, Choice, doublings, Panel, range, Select, Slider, Stat, Steps, TokensSlider } from "../controls";
import { fixed, grouped } from "../format";
import { bound } from "../model/spec";
import { oneOf, whole } from "../route";

const WINDOWS = doublings(1, 65536);

export function ReachView({ page, params, set }: ViewProps) {
  const sliding = page.presets.filter((each) => each.windows.some((window) => window !== null));
  const preset = sliding.find((each) => each.name === params.preset);
  const count = whole(params.layers, 8, 1, 128);
  const window = whole(params.window, 12, 1, 65536);
  const windows = preset ? preset.windows : Array<number | null>(count).fill(window);
  const layers = windows.length;
  const step = Math.min(whole(params.step, layers, 0, 128), layers);
  const reach = bound(windows);
  const far = bound(windows.slice(layers - step)) ?? null;
  const stepReach = step === 0 ? 0 : far;

  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">How far a token reaches</h1>
        <p>
          A layer with a window of W carries what it knows W − 1 places on: the window holds the token itself.{" "}
          {reach === null ? (
            <>
              One layer of <b>{preset?.name}</b> sees everything, so nothing bounds its reach.
            </>
          ) : (
            <>
              A stack of <b>{layers}</b> carries it <b data-testid="bound-lead">{grouped(reach)}</b> tokens, and not one
              further, whatever the weights.
            </>
          )}
        </p>
      </header>
      <div class="desk">
        <div>
          <dl class="stats">
            <Stat id="bound" label="Reach, at most" value={reach} mark="blue" note={reach === null ? "a layer sees everything" : preset ? `the sum of ${layers} windows, less ${layers}` : `${layers} × (${grouped(window)} − 1)`}>
              {reach === null ? "no bound" : `${grouped(reach)} tokens`}
            </Stat>
            <Stat id="step-reach" label={`Through the last ${step} of ${layers} layers`} value={stepReach} mark="orange">
              {stepReach === null ? "everything" : grouped(stepReach)}
            </Stat>
            {reach !== null && !preset && (
              <Stat id="naive" label="L × W would say" value={layers * window} note={`${layers} too many: each window counts its own token`}>
                {grouped(layers * window)}
              </Stat>
            )}
          </dl>
          <figure class="figure">
            <Cone windows={windows} step={step} />
            <Steps id="step" label="Layers gone through" value={step} most={layers} show={(value) => `${value} of ${layers}`} set={(value) => set({ step: value })} pace={Math.max(120, 2400 / layers)} />
            <figcaption>
              What can reach the last token’s output, layer by layer, from the output down to the input. First tokens
              that are kept for every query reach everywhere; all other tokens stay within the bound.
            </figcaption>
          </figure>
        </div>
        <Panel label="The stack of layers">
          <Select
            id="preset"
            label="Layers of"
            value={preset?.name ?? ""}
            options={[{ value: "", text: "a stack of your own" }, ...sliding.map((each) => ({ value: each.name, text: each.name }))]}
            set={(name) => set({ preset: name || null, step: null })}
          />
          {!preset && (
            <>
              <Slider id="layers" label="Layers" stops={range(1, 128)} value={count} show={String} set={(value) => set({ layers: value, step: null })} />
              <TokensSlider id="window" label="Window, tokens" stops={WINDOWS} value={window} set={set} />
            </>
          )}
        </Panel>
      </div>
      <Measured page={page} params={params} set={set} />
    </section>
  );
}

/** Layers from top to bottom, distances from right to left, to scale; few tokens are drawn each. */
function Cone({ windows, step }: { windows: (number | null)[]; step: number }) {
  const [ref, width] = useWidth<HTMLDivElement>(700);
  const layers = windows.length;
  const top = 26;
  const gap = Math.max(7, Math.min(30, 300 / layers));
  const height = top + gap * layers + 44;
  const [left, right] = [58, width - 18];
  const reaches = [0];
  let open = false;
  for (let k = 1; k <= layers; k++) {
    const window = windows[layers - k];
    if (window === null) open = true;
    reaches.push(open ? Infinity : reaches[k - 1] + window! - 1);
  }
  const finite = reaches.filter(Number.isFinite);
  const most = Math.max(finite[finite.length - 1], 1) * (open ? 1.5 : 1);
  const toX = (distance: number) => right - (Math.min(distance, most) / most) * (right - left);
  const y = (k: number) => top + k * gap;
  const dots = most <= 110 && gap >= 12 && (right - left) / most > 5;
  const shownReach = (k: number) => (Number.isFinite(reaches[k]) ? grouped(reaches[k]) : "all");
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(part * (open ? most / 1.5 : most)));
  return (
    <div ref={ref} class="plot">
      <Drawing id="reach-cone" width={width} height={height} says={`Reach through ${layers} layers: ${reaches.map((_, k) => shownReach(k)).join(", ")} tokens.`}>
        <text class="title" x={0} y={12}>
          layer
        </text>
        <text class="title" x={right} y={12} text-anchor="end">
          output of the last token ↓
        </text>
        {step > 0 && <path class="cone" d={`${outline(reaches.slice(0, step + 1), toX, y)}`} />}
        {reaches.map((reach, k) => (
          <g key={k}>
            <line class={k <= step ? "level on" : "level"} x1={toX(k <= step ? reach : 0)} x2={right} y1={y(k)} y2={y(k)} />
            {(gap >= 11 || k % Math.ceil(11 / gap) === 0 || k === layers) && (
              <text x={0} y={y(k)} dy="0.35em">
                {k === layers ? "input" : layers - k}
              </text>
            )}
            {dots && Array.from({ length: Math.floor(most) + 1 }, (_, d) => <circle key={d} class={k <= step && d <= reach ? "token on" : "token"} cx={toX(d)} cy={y(k)} r={2.6} />)}
          </g>
        ))}
        {step > 0 && (
          <text class="label halo text-blue" x={Math.min(toX(reaches[step]) + 4, right - 60)} y={y(step)} dy={step === layers ? "-0.8em" : "1.5em"} text-anchor="start">
            {Number.isFinite(reaches[step]) ? `${grouped(reaches[step])} back` : "everything"}
          </text>
        )}
        <g class="axis">
          {ticks.map((tick, k) => (
            <text key={k} x={toX(tick)} y={height - 20} text-anchor={k === 0 ? "end" : "middle"}>
              {grouped(tick)}
            </text>
          ))}
          <text x={(left + right) / 2} y={height - 4} text-anchor="middle">
            tokens back from the last one
          </text>
        </g>
      </Drawing>
    </div>
  );
}

function outline(reaches: number[], x: (d: number) => number, y: (k: number) => number): string {
  const edge = reaches.map((reach, k) => `L${x(reach).toFixed(1)} ${y(k).toFixed(1)}`).join("");
  return `M${x(0).toFixed(1)} ${y(0).toFixed(1)}${edge}L${x(0).toFixed(1)} ${y(reaches.length - 1).toFixed(1)}Z`;
}

function Measured({ page, params, set }: ViewProps) {
  const all = page.measured.reach;
  const chosen = all.find((each) => each.name === params.model) ?? all[0];
  const kind = oneOf(params.by, ["gradients", "changes"] as const);
  const beside = chosen.name === "windowed" ? all.find((each) => each.name === "undeclared") : undefined;
  const measure = chosen[kind];
  const lines: Line[] = [line(chosen, kind, "blue"), ...(beside ? [line(beside, kind, "orange")] : [])];
  const values = lines.flatMap((each) => each.points.map(([, y]) => y));
  const x: Axis = { from: 1, to: chosen.length, log: true, kind: "count" };
  const low = 10 ** Math.floor(Math.log10(Math.min(...values)));
  const y: Axis = { from: low, to: 10 ** Math.ceil(Math.log10(Math.max(...values))), log: true, kind: "count" };
  const beyond = measure.beyond_bound_pairs;
  return (
    <>
      <h2 class="break">What was measured</h2>
      <div class="desk">
        <div>
          <dl class="stats">
            {(["0.5", "0.9", "0.99"] as const).map((part) => (
              <Stat key={part} id={`within-${part.slice(2)}`} label={`${Number(part) * 100} % of the influence`} value={measure.within[part]} mark="blue" note={measure.within[part] === 1 ? "token back" : "tokens back"}>
                {grouped(measure.within[part])}
              </Stat>
            ))}
            <Stat id="beyond" label="Beyond the bound" value={measure.beyond_bound} mark="orange" note={chosen.bound === null ? "a full layer: there is none" : `in ${grouped(beyond)} pairs farther than ${grouped(chosen.bound)}`}>
              {measure.beyond_bound === null ? "no bound" : measure.beyond_bound === 0 ? "exactly 0" : measure.beyond_bound.toExponential(1)}
            </Stat>
          </dl>
          <figure class="figure">
            <Plot
              id="reach-chart"
              title={kind === "gradients" ? "Mean norm of the gradient of a token’s log-probability" : "Mean KL divergence after a token was changed, nats"}
              says={`Mean influence of a token on a later one against their distance, ${chosen.name}. ${within(measure)} ${chosen.bound === null ? "" : `Beyond ${chosen.bound} tokens it is exactly zero.`}`}
              x={x}
              y={y}
              xTitle="tokens back, logarithmic"
              lines={lines}
              height={360}
            >
              {(toX, toY) =>
                chosen.bound !== null && (
                  <g>
                    <rect class="beyond" x={toX(chosen.bound)} y={toY(y.to)} width={Math.max(0, toX(x.to) - toX(chosen.bound))} height={toY(y.from) - toY(y.to)} />
                    <line class="now" x1={toX(chosen.bound)} x2={toX(chosen.bound)} y1={toY(y.from)} y2={toY(y.to)} />
                    <text class="label halo" x={toX(chosen.bound) - 6} y={toY(y.from) - 10} text-anchor="end">
                      bound {grouped(chosen.bound)}, then exactly zero
                    </text>
                  </g>
                )
              }
            </Plot>
            <figcaption>
              {chosen.name}: {chosen.says}. {within(measure)} The first four tokens are left out; their share is{" "}
              {fixed(100 * measure.first_tokens, 1)} %. A gradient is the slope for an
              infinitesimal push, of which hundreds of far tokens keep a little; a change is what another token really does.
              {beside && " The orange line is the same weights without the window."}
              <span class="source">
                {" "}
                {chosen.source}, {chosen.date.slice(0, 10)}
              </span>
            </figcaption>
          </figure>
          <AsText>
            <table>
              <caption class="hidden">Mean influence against distance, {chosen.name}</caption>
              <thead>
                <tr>
                  <th scope="col">tokens back</th>
                  <th scope="col">mean influence</th>
                </tr>
              </thead>
              <tbody>
                {measure.curve.map((each) => (
                  <tr key={each.from}>
                    <th scope="row">{each.from === each.to ? each.from : `${each.from}–${each.to}`}</th>
                    <td data-value={each.mean}>{each.mean === 0 ? "0" : each.mean.toPrecision(4)}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </AsText>
        </div>
        <Panel label="What was measured">
          <Select id="model" label="Model" value={chosen.name} options={all.map((each) => ({ value: each.name, text: each.name }))} set={(name) => set({ model: name })} />
          <Choice
            id="by"
            label="Measured by"
            value={kind}
            options={[
              { value: "gradients", text: "gradients" },
              { value: "changes", text: "changes" },
            ]}
            set={(value) => set({ by: value })}
          />
          <p class="note">
            <code>attnspan doctor MODEL</code> measures it for a model of your own.
          </p>
        </Panel>
      </div>
    </>
  );
}

function within(measure: Measure): string {
  const [half, ninety] = [measure.within["0.5"], measure.within["0.9"]];
  return `Half of the influence comes from ${grouped(half)} ${half === 1 ? "token" : "tokens"} back or nearer, 90 % from ${grouped(ninety)}.`;
}

function line(of: MeasuredReach, kind: "gradients" | "changes", colour: Line["colour"]): Line {
  const points = of[kind].curve
    .filter((each) => each.from >= 1 && each.mean > 0)
    // A range that the bound cuts has its influence before it.
    .map((each) => [Math.min(Math.sqrt(each.from * each.to), of.bound ?? Infinity), each.mean] as const);
  return { name: of.name, colour, points };
}
