import { doublings, range, Select, Slider, TokensSlider } from "../controls";
import { policyText, type Policy } from "../model/policies";
import type { Spec } from "../model/spec";
import { oneOf, whole, type Params, type Patch } from "../route";

const KINDS = ["model", "window", "sinks", "heavy", "snap", "compressive"] as const;
const WINDOWS = doublings(16, 2 ** 20);

/** The policy of the address; null: what the model itself can see. Left to itself it fits the model. */
export function policyFrom(params: Params, spec: Spec, otherwise: (typeof KINDS)[number]): Policy | null {
  const kind = oneOf(params.policy, KINDS, otherwise);
  const slides = spec.windows.every((each) => each !== null);
  const budget = slides ? Math.min(4096, ...(spec.windows as number[])) : 4096;
  const count = (name: string, usual: number) => whole(params[name], Math.max(1, usual), 1, 2 ** 20);
  const sinks = whole(params.sinks, 4, 0, 64);
  switch (kind) {
    case "model":
      return null;
    case "window":
      return { kind, window: count("window", budget), block: 1 };
    case "sinks":
      return { kind, sinks, window: count("window", budget - sinks), block: 1 };
    case "heavy":
      return { kind, heavy: count("heavy", Math.floor(budget / 4)), window: count("window", Math.floor(budget / 2)), block: 64 };
    case "snap":
      return { kind, heavy: count("heavy", Math.floor(budget / 2)), window: count("window", Math.floor(budget / 8)), observed: 16, neighbours: 3, block: 64 };
    case "compressive":
      return { kind, window: count("window", Math.floor(budget / 2)), memory: count("pooled", Math.floor(budget / 4)), rate: whole(params.rate, 4, 1, 16), sinks: 4, block: 64 };
  }
}

export function PolicyControls({ policy, spec, set }: { policy: Policy | null; spec: Spec; set: (patch: Patch) => void }) {
  const tokens = (id: string, label: string, value: number) => <TokensSlider id={id} label={label} stops={WINDOWS} value={value} set={set} />;
  const own = spec.windows.some((each) => each !== null) ? "the model’s own windows" : "all tokens";
  return (
    <>
      <Select
        id="policy"
        label="The cache keeps"
        value={policy?.kind ?? "model"}
        options={[
          { value: "model", text: own },
          { value: "window", text: "a window" },
          { value: "sinks", text: "sinks and a window" },
          { value: "heavy", text: "heavy hitters and a window" },
          { value: "snap", text: "what the last queries look at" },
          { value: "compressive", text: "a window and a pooled memory" },
        ]}
        set={(kind) => set({ policy: kind, window: null })}
      />
      {policy && policy.kind !== "keep-all" && tokens("window", "Window, tokens", policy.window)}
      {policy?.kind === "sinks" && <Slider id="sinks" label="Sinks, tokens" stops={range(0, 64)} value={policy.sinks} show={String} set={(next) => set({ sinks: next })} />}
      {policy?.kind === "heavy" && tokens("heavy", "Heavy hitters, tokens", policy.heavy)}
      {policy?.kind === "snap" && tokens("heavy", "Looked at, tokens", policy.heavy)}
      {policy?.kind === "compressive" && (
        <>
          {tokens("pooled", "Pooled slots", policy.memory)}
          <Slider id="rate" label="Tokens a slot" stops={range(1, 16)} value={policy.rate} show={String} set={(next) => set({ rate: next })} />
        </>
      )}
      {policy && <p class="note">SPEC: <code data-testid="policy-spec">{policyText(policy)}</code></p>}
    </>
  );
}
