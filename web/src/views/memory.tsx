import { useMemo } from "preact/hooks";
import type { ViewProps } from "../app";
import { around, type Axis } from "../chart/scale";
import { Plot, type Line } from "../chart/plot";
import { AsText, Choice, doublings, Panel, Stat, TokensSlider } from "../controls";
import { fixed, grouped, power, scaled, short, shown, three, tokens } from "../format";
import { cacheBytes, plan, prefill, type Asked, type Phase } from "../model/plan";
import { slidingWindow, type Policy } from "../model/policies";
import { unbounded, type Spec } from "../model/spec";
import { oneOf, whole } from "../route";
import { BatchSlider, deskOf, DeviceSelect, ModelSelect, StorageChoice } from "./desk";

const CONTEXTS = doublings(1024, 2 ** 22);
const WINDOWS = doublings(16, 2 ** 20);
const TABLE = [1024, 4096, 16384, 65536, 131072, 262144, 1048576, 4194304];

interface Curve {
  key: "full" | "window" | "model";
  name: string;
  colour: Line["colour"];
  dashed?: boolean;
  spec: Spec;
  policy: Policy | null;
}

export function MemoryView({ page, params, set }: ViewProps) {
  const { spec, device, batch, storage } = deskOf(page, params);
  const context = whole(params.context, 131072, 1024, 2 ** 22);
  const window = whole(params.window, 4096, 1, 2 ** 20);
  const log = oneOf(params.axes, ["log", "linear"]) === "log";
  const time = oneOf(params.show, ["time", "operations"]) === "time";

  const curves = useMemo((): Curve[] => {
    const open = unbounded(spec);
    const found: Curve[] = [
      { key: "full", name: "full", colour: "orange", spec: open, policy: null },
      { key: "window", name: `window ${tokens(window)}`, colour: "blue", spec: open, policy: slidingWindow(window) },
    ];
    if (spec.windows.some((each) => each !== null))
      found.push({ key: "model", name: "as it is", colour: "green", dashed: true, spec, policy: null });
    return found;
  }, [spec, window]);

  const asked: Omit<Asked, "context" | "policy"> = { device, storage, batch };
  const xs = useMemo(() => {
    const most = log ? 2 ** 22 : Math.min(2 ** 22, context * 1.25);
    const values = log
      ? Array.from({ length: 73 }, (_, k) => Math.round(2 ** (10 + k / 6)))
      : Array.from({ length: 61 }, (_, k) => Math.max(1, Math.round((most * k) / 60)));
    return [...new Set([...values, context])].sort((a, b) => a - b);
  }, [context, log]);

  const phase = (curve: Curve, n: number): Phase => prefill(curve.spec, { ...asked, policy: curve.policy, context: n });
  const [bytes, work] = useMemo(() => {
    const line = (curve: Curve, value: (n: number) => number): Line => ({
      name: curve.name,
      colour: curve.colour,
      dashed: curve.dashed,
      points: xs.map((n) => [n, value(n)] as const),
    });
    return [
      curves.map((curve) => line(curve, (n) => Number(cacheBytes(curve.spec, n, curve.policy, storage, batch)))),
      curves.map((curve) => line(curve, (n) => (time ? phase(curve, n).seconds : Number(phase(curve, n).operations)))),
    ];
  }, [curves, xs, device, storage, batch, time]);

  const now = curves.map((curve) => {
    const made = plan(curve.spec, { ...asked, policy: curve.policy, context });
    return { curve, cache: made.cache.total, prefill: made.prefill, decode: made.decode };
  });
  const [full, windowed, own] = now;
  const ratio = Number(full.cache) / Number(windowed.cache);
  const faster = full.prefill.seconds / windowed.prefill.seconds;
  const x: Axis = { from: log ? 1024 : 0, to: log ? 2 ** 22 : Math.max(...xs), log, kind: "tokens" };
  const values = (lines: Line[]) => lines.flatMap((line) => line.points.map(([, y]) => y));
  const pick = (n: number) => set({ context: nearest(n) });
  const says = (what: string, of: (each: (typeof now)[number]) => string) =>
    `${what} of ${spec.name} against context. At ${grouped(context)} tokens: ${now.map((each) => `${each.curve.name} ${of(each)}`).join(", ")}.`;

  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">What a context costs, with a window and without</h1>
        <p>
          A cache of all tokens grows with the context, and attention’s work with its square. A window bounds the first
          and straightens the second. At <b>{grouped(context)} tokens</b> {spec.name} holds <b>{shown(full.cache)}</b> of
          keys and values if every layer sees everything, and <b>{shown(windowed.cache)}</b> under a window of{" "}
          {grouped(window)}.
        </p>
      </header>
      <div class="desk">
        <div>
          <dl class="stats">
            <Stat id="full-cache" label="Cache, full" value={full.cache} mark="orange">
              {shown(full.cache)}
            </Stat>
            <Stat
              id="window-cache"
              label={`Cache, window ${grouped(window)}`}
              value={windowed.cache}
              mark="blue"
              note={ratio > 1 ? `${times(ratio)} less` : "the window holds all"}
            >
              {shown(windowed.cache)}
            </Stat>
            <Stat
              id="full-prefill"
              label="Prefill, full"
              value={full.prefill.seconds}
              mark="orange"
              note={`${scaledText(full.prefill.operations)} operations`}
            >
              {short(full.prefill.seconds)}
            </Stat>
            <Stat
              id="window-prefill"
              label="Prefill, window"
              value={windowed.prefill.seconds}
              mark="blue"
              note={`${scaledText(windowed.prefill.operations)} operations${faster >= 1.05 ? `, ${times(faster)} faster` : ""}`}
            >
              {short(windowed.prefill.seconds)}
            </Stat>
            {own && (
              <Stat
                id="model-cache"
                label={`${spec.name} as it is`}
                value={own.cache}
                mark="green"
                note={`${layersText(spec)}; prefill ${short(own.prefill.seconds)}`}
              >
                {shown(own.cache)}
              </Stat>
            )}
          </dl>
          <div class="figures">
            <figure class="figure">
              <Plot
                id="memory-chart"
                title="KV cache, bytes"
                says={says("KV cache", (each) => shown(each.cache))}
                x={x}
                y={around(values(bytes), log, "bytes")}
                xTitle="tokens of context"
                lines={bytes}
                now={context}
                pick={pick}
              />
            </figure>
            <figure class="figure">
              <Plot
                id="time-chart"
                title={time ? `Prefill on ${device.name}, time` : "Prefill, operations"}
                says={says(time ? "Prefill time" : "Operations of prefill", (each) =>
                  time ? short(each.prefill.seconds) : scaled(each.prefill.operations),
                )}
                x={x}
                y={around(values(work), log, time ? "seconds" : "count")}
                xTitle="tokens of context"
                lines={work}
                now={context}
                pick={pick}
              />
            </figure>
          </div>
          <p class="caption">
            Prefill is matrix products with the weights, {linearShare(full.prefill)} of the operations here without a
            window, and attention. Bytes are those that a query still sees. Drag in a chart to move the context.
          </p>
          <AsText>
            <table data-testid="memory-table">
              <caption class="hidden">KV cache and prefill of {spec.name} against context</caption>
              <thead>
                <tr>
                  <th scope="col">tokens</th>
                  {curves.map((curve) => (
                    <th scope="col" key={curve.key}>
                      cache, {curve.name}
                    </th>
                  ))}
                  {curves.map((curve) => (
                    <th scope="col" key={curve.key}>
                      prefill, {curve.name}
                    </th>
                  ))}
                </tr>
              </thead>
              <tbody>
                {TABLE.map((n) => (
                  <tr key={n}>
                    <th scope="row">{grouped(n)}</th>
                    {curves.map((curve) => {
                      const held = cacheBytes(curve.spec, n, curve.policy, storage, batch);
                      return (
                        <td key={curve.key} data-value={held}>
                          {shown(held)}
                        </td>
                      );
                    })}
                    {curves.map((curve) => {
                      const { seconds } = phase(curve, n);
                      return (
                        <td key={curve.key} data-value={seconds}>
                          {short(seconds)}
                        </td>
                      );
                    })}
                  </tr>
                ))}
              </tbody>
            </table>
          </AsText>
        </div>
        <Panel label="What is planned">
          <ModelSelect page={page} spec={spec} set={set} />
          <TokensSlider id="context" label="Context, tokens" stops={CONTEXTS} value={context} set={set} />
          <TokensSlider id="window" label="Window, tokens" stops={WINDOWS} value={window} set={set} />
          <BatchSlider batch={batch} set={set} />
          <StorageChoice spec={spec} storage={storage} set={set} />
          <hr />
          <DeviceSelect page={page} device={device} set={set} />
          <Choice
            id="show"
            label="Prefill in"
            value={time ? "time" : "operations"}
            options={[
              { value: "time", text: "time" },
              { value: "operations", text: "operations" },
            ]}
            set={(value) => set({ show: value })}
          />
          <Choice
            id="axes"
            label="Axes"
            value={log ? "log" : "linear"}
            options={[
              { value: "log", text: "logarithmic" },
              { value: "linear", text: "linear" },
            ]}
            set={(value) => set({ axes: value })}
          />
        </Panel>
      </div>
    </section>
  );
}

function nearest(n: number): number {
  return CONTEXTS.reduce((best, each) => (Math.abs(Math.log(each / n)) < Math.abs(Math.log(best / n)) ? each : best));
}

function times(ratio: number): string {
  return `${ratio >= 100 ? grouped(Math.round(ratio)) : three(ratio)} times`;
}

function scaledText(count: bigint): string {
  const [digits, exponent] = scaled(count).split("e");
  return exponent ? `${Number(digits).toPrecision(3)}·${power(Number(exponent))}` : digits;
}

function linearShare(phase: Phase): string {
  return `${fixed((100 * Number(phase.linear)) / Number(phase.operations), 1)} %`;
}

function layersText(spec: Spec): string {
  const full = spec.windows.filter((each) => each === null).length;
  const windows = [...new Set(spec.windows.filter((each) => each !== null))].map((each) => grouped(each as number));
  const sliding = spec.layers - full;
  return full ? `${full} of ${spec.layers} layers full, ${sliding} with a window of ${windows.join(", ")}` : `all ${sliding} layers with a window of ${windows.join(", ")}`;
}
