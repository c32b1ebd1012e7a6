import { Select } from "../controls";
import { grouped } from "../format";
import type { Ask } from "./live";
import type { LiveOffer } from "./recording";

/** What stands in the form, which outlives the view of one recording. */
export interface Fields {
  policy: string;
  storage: string;
  source: string;
  limit: string;
  text: string;
}

export function blank(offer: LiveOffer): Fields {
  return {
    policy: offer.policies[2] ?? offer.policies[0],
    storage: offer.storages[0],
    source: Object.keys(offer.texts)[0],
    limit: "10000",
    text: "",
  };
}

interface LiveProps {
  offer: LiveOffer;
  fields: Fields;
  change: (fields: Fields) => void;
  running: boolean;
  says: string;
  wrong: string;
  start: (ask: Ask, title: string) => void;
  stop: () => void;
}

const PASTED = "your own";

/** Asks for a run of the model on this machine. */
export function LiveForm({ offer, fields, change, running, says, wrong, start, stop }: LiveProps) {
  const { policy, storage, source, limit, text } = fields;
  const set = (name: keyof Fields) => (value: string) => change({ ...fields, [name]: value });
  const own = source === PASTED;
  const bytes = own ? new TextEncoder().encode(text).length : 0;
  const count = Number(limit);
  const bad =
    (!/^\d+$/.test(limit) || count < 2 || count > offer.limit) ? `Tokens: 2 to ${grouped(offer.limit)}.`
    : own && (bytes < 2 || bytes > offer.pasted) ? `The text has ${grouped(bytes)} bytes; 2 to ${grouped(offer.pasted)} are allowed.`
    : "";
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    if (running) return;
    start({ policy: policy.trim(), storage, limit: count, source: own ? null : source, text }, own ? "your text" : offer.texts[source]);
  };
  return (
    <form class="live" onSubmit={submit} aria-labelledby="live-title" data-testid="live">
      <h2 id="live-title">Run it here</h2>
      <div class="control">
        <label for="live-policy">Policy</label>
        <input
          id="live-policy"
          data-testid="live-policy"
          class="text-input"
          list="live-policies"
          maxLength={200}
          spellcheck={false}
          autocomplete="off"
          value={policy}
          onInput={(event) => set("policy")(event.currentTarget.value)}
        />
        <datalist id="live-policies">
          {offer.policies.map((spec) => (
            <option key={spec} value={spec} />
          ))}
        </datalist>
      </div>
      <Select id="live-storage" label="Storage" value={storage} options={offer.storages} set={set("storage")} />
      <Select id="live-source" label="Text" value={source} options={[...Object.keys(offer.texts), PASTED]} set={set("source")} />
      {own && (
        <div class="control">
          <label for="live-text">Your text</label>
          <textarea id="live-text" data-testid="live-text" class="text-input" rows={5} value={text} onInput={(event) => set("text")(event.currentTarget.value)} />
        </div>
      )}
      <div class="control">
        <label for="live-limit">Tokens at most</label>
        <input id="live-limit" data-testid="live-limit" class="text-input" inputMode="numeric" value={limit} onInput={(event) => set("limit")(event.currentTarget.value)} />
      </div>
      {running ? (
        <button key="stop" type="button" class="button" data-testid="live-stop" onClick={stop}>
          Stop
        </button>
      ) : (
        <button key="start" type="submit" class="button" data-testid="live-start" disabled={bad !== ""}>
          Run
        </button>
      )}
      <p class="note" role="status" data-testid="live-says">
        {running ? says : bad || says}
      </p>
      {wrong && (
        <p class="wrong" role="alert" data-testid="live-wrong">
          {wrong}
        </p>
      )}
    </form>
  );
}
