import { useMemo } from "preact/hooks";
import type { ViewProps } from "../app";
import { Drawing, useWidth } from "../chart/frame";
import { AsText, Choice, Copy, doublings, Num, Panel, Slider, Stat, TokensSlider } from "../controls";
import { fixed, grouped, short, shown, tokens } from "../format";
import { cheapest, longest, type Candidate } from "../model/fit";
import { MOST_TOKENS, plan, type Asked, type Plan } from "../model/plan";
import { policyText } from "../model/policies";
import { WEIGHTS } from "../model/weights";
import { oneOf, whole } from "../route";
import { BatchSlider, deskOf, DeviceSelect, LinkChoice, ModelSelect, Refused, refused, StorageChoice } from "./desk";
import { policyFrom, PolicyControls } from "./policy";

const CONTEXTS = doublings(1024, 2 ** 23);
const DEVICES = [1, 2, 4, 8, 16];
const MEMORIES = [8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192, 256, 384, 512];
const GIB = 2 ** 30;

export function PlanView({ page, params, set }: ViewProps) {
  const { spec, device, link, batch, storage } = deskOf(page, params);
  const context = whole(params.context, 131072, 1, 2 ** 23);
  const count = whole(params.devices, 1, 1, 16);
  const weights = oneOf(params.weights, WEIGHTS);
  const memory = params.memory === undefined && device.memory !== null ? null : whole(params.memory, 64, 1, 4096) * GIB;
  const policy = policyFrom(params, spec, "model");
  const chunk = params.chunk === "2048" && count === 1 ? 2048 : null;
  const asked: Asked = { context, device, policy, storage, batch, weights, memory, devices: count, link: count > 1 ? link : null, chunk };
  const key = JSON.stringify({ ...asked, spec: spec.name });
  const made = useMemo(() => refused(() => plan(spec, asked)), [key]);
  const fit = useMemo(() => refused(() => ({ longest: longest(spec, asked), cheapest: cheapest(spec, asked) })), [key]);
  const command = commandOf(spec.name, asked);

  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">What fits</h1>
        {made.value && (
          <p>
            {spec.name} with {grouped(context)} tokens{batch > 1 ? ` of each of ${batch} sequences` : ""} takes{" "}
            <b>{shown(made.value.total)}</b>
            {count > 1 ? " of each device" : ""}
            {made.value.memory !== null && made.value.spare !== null && (
              <>
                {" "}
                of {shown(made.value.memory)}:{" "}
                <b class={made.value.fits ? "text-green" : "text-orange"} data-testid="verdict">
                  {made.value.fits ? `it fits, ${shown(made.value.spare)} to spare` : `it doesn’t fit, ${shown(-made.value.spare)} too much`}
                </b>
              </>
            )}
            .
          </p>
        )}
      </header>
      <div class="desk">
        <div>
          {made.value ? (
            <>
              <Numbers made={made.value} deepest={fit.value?.longest ?? null} batch={batch} />
              <figure class="figure">
                <MemoryBar made={made.value} name={spec.name} />
              </figure>
              <div class="copies">
                <Copy id="command" label="On the command line" text={command} />
                <Copy id="python" label="In Python" text={pythonOf(spec.name, asked)} />
              </div>
              {fit.value && <Fits found={fit.value.cheapest} />}
              <h2>What else to know</h2>
              <ul class="notes" data-testid="notes">
                {made.value.notes.map((note) => (
                  <li key={note}>{note}</li>
                ))}
                <li class="source">
                  {spec.source.startsWith("http") ? <a href={spec.source}>{spec.source.replace("https://", "")}</a> : spec.source}
                </li>
                <li class="source">
                  {device.name}: {device.source}
                </li>
              </ul>
              <Layers made={made.value} />
            </>
          ) : (
            <Refused why={made.why} />
          )}
        </div>
        <Panel label="What is planned">
          <ModelSelect page={page} spec={spec} set={set} />
          <TokensSlider id="context" label="Context, tokens" stops={CONTEXTS} value={context} set={set} />
          <BatchSlider batch={batch} set={set} />
          <PolicyControls policy={policy} spec={spec} set={set} />
          <StorageChoice spec={spec} storage={storage} set={set} />
          <Choice id="weights" label="Weights" value={weights} options={WEIGHTS.map((each) => ({ value: each, text: each }))} set={(value) => set({ weights: value })} />
          <hr />
          <DeviceSelect page={page} device={device} set={(patch) => set({ ...patch, memory: null })} />
          <Slider
            id="memory"
            label="Its memory"
            stops={MEMORIES}
            value={memory === null ? (device.memory ?? 0) / GIB : memory / GIB}
            show={(value) => (memory === null && value === (device.memory ?? 0) / GIB ? `${fixed(value, 2)} GiB` : `${value} GiB`)}
            set={(value) => set({ memory: value })}
            note={memory === null ? "its own" : undefined}
          />
          <Slider id="devices" label="Devices that share the context" stops={DEVICES} value={count} show={String} set={(value) => set({ devices: value })} />
          {count > 1 ? (
            <LinkChoice page={page} link={link} set={set} />
          ) : (
            <Choice
              id="chunk"
              label="Prefill"
              value={chunk ? "2048" : "whole"}
              options={[
                { value: "whole", text: "at once" },
                { value: "2048", text: "2,048 a step" },
              ]}
              set={(value) => set({ chunk: value === "2048" ? value : null })}
            />
          )}
        </Panel>
      </div>
    </section>
  );
}

function options({ context, device, policy, storage, batch, weights, memory, devices, link, chunk }: Asked): [string, string | number][] {
  return [
    ["context", context],
    ...(policy ? ([["policy", policyText(policy)]] as [string, string][]) : []),
    ...(storage !== "dense" ? ([["storage", storage!]] as [string, string][]) : []),
    ...(batch !== 1 ? ([["batch", batch!]] as [string, number][]) : []),
    ...(weights !== "bf16" ? ([["weights", weights!]] as [string, string][]) : []),
    ...(device.name !== "h100" ? ([["device", device.name]] as [string, string][]) : []),
    ...(memory ? ([["memory", `${memory / GIB}GiB`]] as [string, string][]) : []),
    ...(devices !== 1 ? ([["devices", devices!], ["link", link!.name]] as [string, string | number][]) : []),
    ...(chunk ? ([["chunk", chunk]] as [string, number][]) : []),
  ];
}

function commandOf(name: string, asked: Asked): string {
  const words = options(asked).map(([key, value]) => `--${key} ${key === "context" ? tokens(Number(value)).replaceAll(",", "") : value}`);
  return `attnspan plan ${name} ${words.join(" ")}`;
}

function pythonOf(name: string, asked: Asked): string {
  const words = options(asked).map(([key, value]) => {
    const text = typeof value === "number" ? grouped(value).replaceAll(",", "_") : `"${value}"`;
    return key === "context" ? text : `${key}=${text}`;
  });
  return `print(span.plan("${name}", ${words.join(", ")}))`;
}

function Numbers({ made, deepest, batch }: { made: Plan; deepest: number | null; batch: number }) {
  return (
    <dl class="stats">
      <Stat id="total" label="In all" value={made.total} mark={made.fits === false ? "orange" : "green"} note={made.devices > 1 ? "of each device" : undefined}>
        {shown(made.total)}
      </Stat>
      <Stat id="longest" label="Longest context that fits" value={deepest} mark="blue" note={deepest === MOST_TOKENS ? "the most that is counted" : deepest === 0 ? `weights alone take ${shown(made.weights)}` : "to the token"}>
        {deepest === null ? "–" : deepest === MOST_TOKENS ? "any" : deepest === 0 ? "none" : grouped(deepest)}
      </Stat>
      <Stat id="prefill" label="Prefill" value={made.prefill.seconds} note={`${made.prefill.bound === "compute" ? "computing" : "memory"} is the bound`}>
        {short(made.prefill.seconds)}
      </Stat>
      <Stat id="decode" label="One more token" value={made.decode.seconds} note={`${fixed(batch / made.decode.seconds, 1)} tokens a second; ${made.decode.bound === "compute" ? "computing" : "memory"} is the bound`}>
        {short(made.decode.seconds)}
      </Stat>
      <Stat id="reach" label="Reach, at most" value={made.reach} note={made.reach === null ? "some layer sees everything, or scores choose" : "tokens back"}>
        {made.reach === null ? "no bound" : grouped(made.reach)}
      </Stat>
    </dl>
  );
}

function MemoryBar({ made, name }: { made: Plan; name: string }) {
  const [ref, width] = useWidth<HTMLDivElement>(700);
  const parts = [
    { name: "weights", bytes: made.weights, colour: "blue" },
    { name: "KV cache", bytes: made.cache.of_a_device, colour: "amber" },
    { name: "prefill’s activations", bytes: made.activations.bytes, colour: "green" },
  ];
  const most = Math.max(Number(made.total), Number(made.memory ?? 0n));
  const x = (bytes: number) => (bytes / most) * (width - 2);
  let start = 0;
  return (
    <div ref={ref} class="plot">
      <Drawing
        id="plan-bar"
        width={width}
        height={74}
        says={`Memory of ${name}: ${parts.map((part) => `${part.name} ${shown(part.bytes)}`).join(", ")}${made.memory === null ? "" : `, of ${shown(made.memory)}`}.`}
      >
        <text class="title" x={0} y={12}>
          Memory{made.devices > 1 ? " of a device" : ""}, bytes
        </text>
        {made.memory !== null && <rect class="rest" x={0} y={24} width={x(Number(made.memory))} height={34} />}
        {parts.map((part) => {
          const from = start;
          start += Number(part.bytes);
          return <rect key={part.name} class={`fill-${part.colour}`} x={x(from)} y={24} width={Math.max(1, x(Number(part.bytes)) - 1)} height={34} />;
        })}
        {made.memory !== null && (
          <g>
            <line class="limit" x1={x(Number(made.memory))} x2={x(Number(made.memory))} y1={18} y2={64} />
            <text x={x(Number(made.memory))} y={12} text-anchor={x(Number(made.memory)) > width - 60 ? "end" : "middle"}>
              {shown(made.memory)}
            </text>
          </g>
        )}
      </Drawing>
      <ul class="legend">
        {parts.map((part) => (
          <li key={part.name}>
            <i class={`swatch bg-${part.colour}`} />
            {part.name}
            <Num id={`part-${part.name.split(" ").pop()}`} value={part.bytes}>
              <b>{shown(part.bytes)}</b>
            </Num>
          </li>
        ))}
      </ul>
    </div>
  );
}

function Fits({ found }: { found: Candidate[] }) {
  const taken = found.find((each) => each.fits);
  if (found[0].fits === null) return null;
  return (
    <>
      <h2>
        {taken === found[0] ? "It fits as asked" : taken ? `The least change that fits: ${taken.change}` : "Nothing of this fits"}
      </h2>
      <div class="scroll" tabIndex={0} role="group" aria-label="Changes, in the order of what they lose">
        <table data-testid="cheapest">
          <caption class="hidden">Changes in the order of what they lose</caption>
          <thead>
            <tr>
              <th scope="col">change</th>
              <th scope="col">loses</th>
              <th scope="col">in all</th>
              <th scope="col">fits</th>
            </tr>
          </thead>
          <tbody>
            {found.map((each) => (
              <tr key={each.change} class={each === taken ? "taken" : undefined}>
                <th scope="row">{each.change}</th>
                <td>{each.loses}</td>
                <td data-value={each.total ?? ""}>{each.total === null ? "can’t be had" : shown(each.total)}</td>
                <td>{each.fits ? "yes" : "no"}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </>
  );
}

function Layers({ made }: { made: Plan }) {
  return (
    <AsText summary="Layers and phases in numbers">
      <table data-testid="plan-table">
        <caption class="hidden">Layers: what they hold and read</caption>
        <thead>
          <tr>
            <th scope="col">layers</th>
            <th scope="col">how many</th>
            <th scope="col">hold, tokens</th>
            <th scope="col">last reads, keys</th>
            <th scope="col">bytes</th>
          </tr>
        </thead>
        <tbody>
          {made.kinds.map((kind) => (
            <tr key={kind.name + kind.sees}>
              <th scope="row">
                {kind.name}: {kind.sees}
              </th>
              <td>{kind.layers}</td>
              <td>{grouped(kind.held)}</td>
              <td>{grouped(kind.read)}</td>
              <td data-value={kind.bytes}>{shown(kind.bytes)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <table>
        <caption class="hidden">Prefill and decoding: operations, bytes and seconds</caption>
        <thead>
          <tr>
            <th scope="col">phase</th>
            <th scope="col">operations</th>
            <th scope="col">bytes moved</th>
            <th scope="col">operations a byte</th>
            <th scope="col">time</th>
          </tr>
        </thead>
        <tbody>
          {(["prefill", "decode"] as const).map((phase) => (
            <tr key={phase}>
              <th scope="row">{phase === "prefill" ? "prefill" : "one token"}</th>
              <td data-value={made[phase].operations}>{grouped(made[phase].operations)}</td>
              <td data-value={made[phase].bytes}>{shown(made[phase].bytes)}</td>
              <td data-value={made[phase].intensity}>{fixed(made[phase].intensity, 1)}</td>
              <td data-value={made[phase].seconds}>{short(made[phase].seconds)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </AsText>
  );
}
