import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import type { ViewProps } from "../app";
import { around, type Axis } from "../chart/scale";
import { useWidth } from "../chart/frame";
import { AsText, Check, Choice, Num, Select, Slider, StepButtons } from "../controls";
import type { Page } from "../data";
import { fixed, grouped, shown } from "../format";
import { oneOf, whole, type Params, type Patch } from "../route";
import { blank, LiveForm } from "./LiveForm";
import { letter, life, named } from "./life";
import { Lines, type Series } from "./lines";
import { watch, type Ask } from "./live";
import {
  drawStrip,
  drawText,
  FULL,
  inkOf,
  layStrip,
  layText,
  stripAt,
  textAt,
  textColumns,
  type Ink,
} from "./paint";
import { fetchRecording, type LiveOffer, type Recording, type RecordingHead, type Run } from "./recording";
import "./stream.css";

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const SPAN = 2048;
const TEXT_HEIGHT = 240;
const POINTS = 360;
const SPEEDS = ["10", "100", "1000", "10000"] as const;

/** The latest live recording and what it was asked of: it outlasts the view, for who looks at another and comes back. */
const kept: { live: Recording | null; text: string } = { live: null, text: "" };

/** A mark of a run: its letter, and the colour of what tells it apart. */
interface Mark {
  letter: string;
  colour: "ink" | "blue" | "amber" | "pink" | "green";
  dashed: boolean;
}

export function StreamView({ page, params, set }: ViewProps) {
  const heads = page.recordings as RecordingHead[];
  const offer = (page as Page & { live?: LiveOffer }).live ?? null;
  const [live, setLive] = useState(kept.live);
  const [held, setHeld] = useState<Recording | null>(null);
  const [broken, setBroken] = useState("");
  const names = [...heads.map((head) => head.name), ...(live ? ["live"] : [])];
  const name = oneOf(params.rec, names, live && !params.rec ? "live" : names[0]);
  const missing = params.rec && params.rec !== name ? params.rec : null;

  useEffect(() => {
    const head = heads.find((each) => each.name === name);
    if (!head) return;
    let wanted = true;
    fetchRecording(head).then(
      (found) => wanted && setHeld(found),
      (error: unknown) => wanted && setBroken(error instanceof Error ? error.message : String(error)),
    );
    return () => {
      wanted = false;
    };
  }, [name, heads]);

  const running = useRef<AbortController | null>(null);
  const [going, setGoing] = useState({ on: false, says: "", wrong: "" });
  const [, setSteps] = useState(0);
  const follow = useRef(true);
  const looked = useRef(name);
  looked.current = name;
  useEffect(() => () => running.current?.abort(), []);
  const [fields, change] = useState(() => offer && blank(offer));
  const start = (ask: Ask, title: string) => {
    const control = new AbortController();
    running.current = control;
    const text = JSON.stringify([ask.source, ask.limit, ask.text]);
    const into = text === kept.text ? kept.live : null;
    let begun = false;
    follow.current = true;
    setGoing({ on: true, says: "The model loads …", wrong: "" });
    watch(ask, title, into, control.signal, (recording, run) => {
      // What had come before the stop is still read, maybe under another view's address.
      if (control.signal.aborted) return;
      kept.live = recording;
      kept.text = text;
      setLive(recording);
      setSteps((count) => count + 1);
      if (!begun) {
        begun = true;
        looked.current = "live";
        set({ rec: "live", run: recording.runs.indexOf(run), hide: null });
      } else if (follow.current && looked.current === "live" && run.tokens) set({ at: run.last });
      setGoing({ on: !run.ended, says: `${grouped(run.tokens)} of ${grouped(run.about.tokens)} tokens${run.ended ? ": done" : ""}`, wrong: "" });
    }).catch((error: unknown) => {
      const aborted = control.signal.aborted;
      setGoing((was) => ({ on: false, says: aborted ? `Stopped. ${was.says}` : "", wrong: aborted ? "" : `${(error as Error).message}` }));
    });
  };
  const form = offer && fields && (
    <LiveForm offer={offer} fields={fields} change={change} running={going.on} says={going.says} wrong={going.wrong} start={start} stop={() => running.current?.abort()} />
  );

  const recording = name === "live" ? live : held?.name === name ? held : null;
  const recordings = [
    ...heads.map((head) => ({ value: head.name, text: head.title })),
    ...(live ? [{ value: "live", text: `Run here: ${live.title}` }] : []),
  ];
  return (
    <section class="view stream" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">A stream, watched</h1>
        <p>
          A small model reads a text of any length with a cache of bounded size. Each policy decides what stays: look
          what it holds, what it has let go, and what that costs in surprise at the next letter.
        </p>
      </header>
      {missing !== null && (
        <p class="wrong" role="status" data-testid="stream-missing">
          {missing === "live"
            ? "The address asks for a run made here, which ended with its page"
            : `The address asks for the recording “${missing}”, which isn’t here`}
          {names.length ? "; another one is shown." : "."}
        </p>
      )}
      {recording && recording.runs.some((run) => run.tokens > 1) ? (
        <Watched
          key={name}
          recording={recording}
          size={recording.runs.reduce((sum, run) => sum + run.tokens, 0)}
          params={missing === null ? params : { ...params, at: "", run: "", hide: "" }}
          set={missing === null ? set : (patch) => set({ rec: null, at: null, run: null, hide: null, ...patch })}
          touched={() => (follow.current = false)}
          choose={
            recordings.length > 1 ? (
              <Select id="stream-recording" label="Text" value={name} options={recordings} set={(rec) => set({ rec, at: null, run: null, hide: null })} />
            ) : null
          }
          form={form}
        />
      ) : (
        <div class="desk">
          <p role="status">
            {broken ? `The recording did not come: ${broken}.` : names.length ? "The recording comes …" : "This page has no recording."}
          </p>
          <aside class="panel">{form}</aside>
        </div>
      )}
    </section>
  );
}

interface WatchedProps {
  recording: Recording;
  /** Grows as a live run does. */
  size: number;
  params: Params;
  set: (patch: Patch) => void;
  touched: () => void;
  choose: preact.ComponentChildren;
  form: preact.ComponentChildren;
}

function Watched({ recording, size, params, set, touched, choose, form }: WatchedProps) {
  const last = recording.last;
  const asked = whole(params.at, Math.min(last, 20_000), 0, last);
  const [at, setAt] = useState(asked);
  const [hovered, hover] = useState(-1);
  const [playing, play] = useState(false);
  const speed = oneOf(params.speed, SPEEDS, "100");
  const log = oneOf(params.axis, ["log", "linear"]) === "log";
  const all = oneOf(params.perplexity, ["all", "last"]) === "all";
  const hidden = new Set((params.hide ?? "").split(".").filter((part) => part !== ""));
  const { runs } = recording;
  const chosen = whole(params.run, Math.min(2, runs.length - 1), 0, runs.length - 1);
  const run = runs[chosen];
  const marks = useMemo(() => marksOf(runs), [runs]);
  const visible = runs.map((_, k) => k).filter((k) => !hidden.has(String(k)));

  // The place lives here while it moves; the address has it once it rests.
  const place = useRef(at);
  const told = useRef(asked);
  const settle = useRef<number | undefined>(undefined);
  place.current = at;
  const go = useCallback(
    (to: number) => {
      const next = Math.max(0, Math.min(last, Math.round(to)));
      place.current = next;
      setAt(next);
      clearTimeout(settle.current);
      settle.current = window.setTimeout(() => {
        told.current = place.current;
        set({ at: place.current });
      }, 250);
    },
    [last, set],
  );
  useEffect(() => () => clearTimeout(settle.current), []);
  const take = () => {
    told.current = asked;
    clearTimeout(settle.current);
    setAt(asked);
  };
  useEffect(() => {
    if (asked !== told.current) take();
  }, [asked]);
  // Another address may ask for the place that was asked for before this one moved.
  useEffect(() => {
    addEventListener("hashchange", take);
    return () => removeEventListener("hashchange", take);
  }, [asked]);
  const move = useCallback(
    (to: number) => {
      play(false);
      touched();
      go(to);
    },
    [go, touched],
  );

  useEffect(() => {
    if (!playing) return;
    let before = performance.now();
    let exact = place.current;
    let frame = 0;
    const turn = (now: number) => {
      exact += (Number(speed) * Math.min(100, now - before)) / 1000;
      before = now;
      if (Math.floor(exact) !== place.current) go(Math.floor(exact));
      if (exact >= last) play(false);
      else frame = requestAnimationFrame(turn);
    };
    frame = requestAnimationFrame(turn);
    return () => cancelAnimationFrame(frame);
  }, [playing, speed, go, last]);
  const toggle = useCallback(() => {
    if (!playing && place.current >= last) go(0);
    touched();
    play(!playing);
  }, [playing, last, go, touched]);

  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const target = event.target as HTMLElement;
      // What scrolls takes these keys itself.
      if (target instanceof Element && target.closest(".scroll")) return;
      const types = target instanceof HTMLInputElement ? target.type : target.tagName;
      if (/^(text|TEXTAREA|SELECT)$/.test(types)) return;
      if (event.key === " ") {
        if (/^(BUTTON|A|SUMMARY|radio|checkbox)$/.test(types)) return;
        toggle();
      } else if (/^(range|radio)$/.test(types)) return;
      else if (event.key === "ArrowLeft") move(place.current - (event.shiftKey ? 64 : 1));
      else if (event.key === "ArrowRight") move(place.current + (event.shiftKey ? 64 : 1));
      else if (event.key === "PageUp") move(place.current - 1024);
      else if (event.key === "PageDown") move(place.current + 1024);
      else if (event.key === "Home") move(0);
      else if (event.key === "End") move(last);
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, [move, toggle, last]);

  useTestHelpers(recording, place, at, go);
  const [ref, width] = useWidth<HTMLDivElement>(860);
  const ink = useInk(ref);
  const token = hovered >= 0 && hovered <= last ? hovered : at;

  const series = useMemo(() => samples(runs, last, log), [runs, size, last, log]);
  const x: Axis = { from: log ? 16 : 0, to: Math.max(32, last), log, kind: "plain" };
  const [bytes, perplexity] = useMemo(() => {
    const made = (value: (run: Run, p: number) => number): Series[] =>
      visible.map((k) => ({
        ...marks[k],
        name: runs[k].name,
        points: series[k].map((p) => [p, value(runs[k], p)] as const),
      }));
    return [
      made((each, p) => each.heldBytes(crest(each, p, last, log))),
      made((each, p) => (all ? each.perplexity(p) : each.recent(p, SPAN))),
    ];
  }, [series, all, marks, params.hide]);
  const most = Math.max(2, ...perplexity.flatMap((each) => each.points.filter(([p]) => p > 200).map(([, y]) => y)));
  const bytesAxis = around(bytes.flatMap((each) => each.points.map(([, y]) => y)).concat(1), false, "bytes");

  return (
    <div class="desk">
      <div ref={ref}>
        <Transport at={at} last={last} playing={playing} toggle={toggle} move={move} />
        {ink && (
          <>
            <TextFigure recording={recording} size={size} run={run} mark={marks[chosen]} at={at} width={width} ink={ink} token={hovered} hover={hover} pick={move} />
            <div class="strips" data-testid="stream-strips">
              {visible.map((k) => (
                <Strip
                  key={runs[k].key}
                  id={`stream-${k}`}
                  recording={recording}
                  run={runs[k]}
                  size={size}
                  mark={marks[k]}
                  chosen={k === chosen}
                  choose={() => set({ run: k })}
                  at={at}
                  width={width}
                  ink={ink}
                  token={hovered}
                  hover={hover}
                  pick={move}
                />
              ))}
            </div>
          </>
        )}
        <LifeTable recording={recording} runs={visible.map((k) => runs[k])} marks={visible.map((k) => marks[k])} token={token} hovered={hovered >= 0} />
        <div class="figures">
          <Lines
            id="stream-bytes"
            title="Bytes held, all layers"
            says={`Bytes held against tokens seen. At ${grouped(at)}: ${visible.map((k) => `${runs[k].name} ${shown(Math.round(runs[k].heldBytes(at)))}`).join(", ")}.`}
            x={x}
            y={bytesAxis}
            series={bytes}
            at={at}
            pick={move}
          />
          <Lines
            id="stream-perplexity"
            title={all ? "Perplexity of all bytes so far" : `Perplexity of the last ${grouped(SPAN)} bytes`}
            says={`Perplexity a byte against tokens seen. At ${grouped(at)}: ${visible.map((k) => `${runs[k].name} ${number(of(runs[k], at, all))}`).join(", ")}.`}
            x={x}
            y={{ from: 1, to: 1 + (most - 1) * 1.06, log: false, kind: "count" }}
            series={perplexity}
            at={at}
            pick={move}
          />
        </div>
        <AsText summary="What the caches hold now, as text">
          <table data-testid="stream-table">
            <thead>
              <tr>
                {["", "policy", "slots", "bytes held", "allocated", "tokens gone", "perplexity"].map((title) => (
                  <th key={title} scope="col">
                    {title}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {visible.map((k) => (
                <tr key={runs[k].key}>
                  <td>{marks[k].letter}</td>
                  <td>{runs[k].name}</td>
                  <td>{grouped(runs[k].held(at))}</td>
                  <td>{shown(runs[k].heldBytes(at))}</td>
                  <td>{shown(runs[k].allocated(at))}</td>
                  <td>{grouped(runs[k].lastGone(at, last).length)}</td>
                  <td>{number(of(runs[k], at, all))}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </AsText>
      </div>
      <aside class="panel" aria-label="What is shown">
        {choose}
        <Select
          id="stream-run"
          label="Surprise in the text under"
          value={String(chosen)}
          options={runs.map((each, k) => ({ value: String(k), text: `${marks[k].letter}  ${each.name}` }))}
          set={(value) => set({ run: value })}
        />
        <Choice
          id="stream-speed"
          label="Play, tokens a second"
          value={speed}
          options={SPEEDS.map((value) => ({ value, text: value === "10000" ? "10K" : value === "1000" ? "1K" : value }))}
          set={(value) => set({ speed: value })}
        />
        <Choice
          id="stream-perplexity-of"
          label="Perplexity of"
          value={all ? "all" : "last"}
          options={[
            { value: "all", text: "all so far" },
            { value: "last", text: `last ${grouped(SPAN)}` },
          ]}
          set={(value) => set({ perplexity: value })}
        />
        <Choice
          id="stream-axis"
          label="Tokens’ axis"
          value={log ? "log" : "linear"}
          options={[
            { value: "log", text: "log" },
            { value: "linear", text: "linear" },
          ]}
          set={(value) => set({ axis: value })}
        />
        <fieldset class="control">
          <legend>Shown</legend>
          {runs.map((each, k) => (
            <Check
              key={each.key}
              id={`stream-show-${k}`}
              label={breaking(`${marks[k].letter}\u00a0\u00a0${each.name}`)}
              value={!hidden.has(String(k))}
              set={(value) => {
                const next = new Set(hidden);
                if (value) next.delete(String(k));
                else next.add(String(k));
                set({ hide: next.size && next.size < runs.length ? [...next].join(".") : null });
              }}
            />
          ))}
        </fieldset>
        <Legend />
        {form && <hr />}
        {form}
        <p class="source">
          Slots of layer {recording.layer}, KV head {recording.head}, counted from 0, of the bundled model, whose tokens
          are bytes.
          {recording.meta &&
            ` Recorded ${recording.meta.date.slice(0, 10)} on a ${recording.meta.device.toUpperCase()} with attnspan ${recording.meta.versions.attnspan} and torch ${recording.meta.versions.torch}.`}
        </p>
      </aside>
    </div>
  );
}

function Transport({ at, last, playing, toggle, move }: { at: number; last: number; playing: boolean; toggle: () => void; move: (to: number) => void }) {
  return (
    <div class="transport steps">
      <StepButtons
        id="stream"
        names={{ back: "One token back", play: "Play", pause: "Pause", on: "One token on" }}
        value={at}
        most={last}
        playing={playing}
        toggle={toggle}
        move={move}
      />
      <Slider
        id="stream-at"
        label="Tokens seen"
        stops={last}
        value={at}
        show={grouped}
        says={(count) => `${grouped(count)} of ${grouped(last)} tokens`}
        read={parsePlace}
        inputMode="numeric"
        set={move}
      />
    </div>
  );
}

/** Unlike a number of tokens a place may be 0. */
function parsePlace(text: string): number | null {
  const digits = text.replace(/[\s,_]/g, "");
  return digits !== "" && Number.isInteger(Number(digits)) ? Number(digits) : null;
}

interface Shown {
  recording: Recording;
  run: Run;
  size: number;
  mark: Mark;
  at: number;
  width: number;
  ink: Ink;
  /** The token that the pointer is over; -1: none. */
  token: number;
  hover: (token: number) => void;
  pick: (place: number) => void;
}

function TextFigure({ recording, run, size, mark, at, width, ink, token, hover, pick }: Shown) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [columns, setColumns] = useState(0);
  useLayoutEffect(() => {
    if (canvas.current) setColumns(textColumns(canvas.current, width, ink));
  }, [width, ink]);
  const layout = useMemo(() => (columns ? layText(recording.text, recording.length, columns) : null), [recording, size, columns]);
  useLayoutEffect(() => {
    if (canvas.current && layout) drawText(canvas.current, width, TEXT_HEIGHT, recording, run, at, layout, ink, token);
  }, [recording, run, size, at, width, ink, layout, token]);
  const under = (event: PointerEvent) => {
    if (!layout || !canvas.current) return -1;
    const box = canvas.current.getBoundingClientRect();
    const found = textAt(canvas.current, event.clientX - box.left, event.clientY - box.top, TEXT_HEIGHT, at, layout, ink);
    return found <= recording.last ? found : -1;
  };
  return (
    <figure class="figure text-figure">
      <canvas
        ref={canvas}
        data-testid="stream-text"
        role="img"
        aria-label={`The text around token ${grouped(at)}, each letter coloured by its surprise under ${run.name}: ${excerpt(recording, at)}`}
        style={{ width: "100%", height: `${TEXT_HEIGHT}px` }}
        onPointerMove={(event) => hover(under(event))}
        onPointerLeave={() => hover(-1)}
        onClick={(event) => {
          const found = under(event as unknown as PointerEvent);
          if (found >= 0) pick(found);
        }}
      />
      <figcaption>
        <span class={`chip mark-${mark.colour}`}>{mark.letter}</span> Letters in full ink are in the cache of{" "}
        <code>{run.name}</code>, faint ones are gone; underlined are sinks, heavy hitters and what is pooled. The ground
        is the letter’s surprise:
        <span class="measure">
          <span class="scale" aria-hidden="true">
            <i />
          </span>
          <span class="ends">0 to {FULL} nats and more</span>
        </span>
      </figcaption>
    </figure>
  );
}

function Strip({ id, recording, run, size, mark, chosen, choose, at, width, ink, token, hover, pick }: Shown & { id: string; chosen: boolean; choose: () => void }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const layout = useMemo(() => layStrip(run, width, run.about.capacity ?? Math.max(512, run.tokens)), [run, width, size]);
  const over = at > run.last && run.ended;
  const seen = useSeen(canvas, over);
  useLayoutEffect(() => {
    const draw = () => canvas.current && drawStrip(canvas.current, width, recording, run, at, layout, ink, token);
    if (seen) {
      draw();
      return;
    }
    // What is out of sight waits until the place rests.
    const later = setTimeout(draw, 150);
    return () => clearTimeout(later);
  }, [recording, run, size, at, width, ink, layout, token, seen, over]);
  const under = (event: PointerEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    return stripAt(run, recording, at, layout, width, event.clientX - box.left, event.clientY - box.top);
  };
  const held = run.held(at);
  const perplexity = run.perplexity(Math.min(at, run.last));
  return (
    <section class={`strip${chosen ? " chosen" : ""}`} aria-label={run.name} data-testid={id}>
      <header>
        <button type="button" class="pick-run" aria-pressed={chosen} data-testid={`${id}-choose`} onClick={choose} title="Show its surprise in the text">
          <span class={`chip mark-${mark.colour}${mark.dashed ? " dash" : ""}`}>{mark.letter}</span>
          <code>{run.about.policy}</code>
          <span class="storage">{run.about.storage}</span>
        </button>
        <span class="numbers">
          <Num id={`${id}-held`} value={held}>
            {grouped(held)} slots
          </Num>
          <Num id={`${id}-bytes`} value={run.heldBytes(at)}>
            {shown(run.heldBytes(at))}
          </Num>
          <Num id={`${id}-perplexity`} value={Number.isNaN(perplexity) ? null : perplexity}>
            perplexity {number(perplexity)}
          </Num>
        </span>
      </header>
      {!over && <canvas
        ref={canvas}
        data-testid={`${id}-canvas`}
        role="img"
        aria-label={`${run.name}: a map of the stream with the tokens held, and the ${grouped(held)} slots held, oldest first`}
        style={{ width: "100%", height: `${layout.height}px` }}
        onPointerDown={(event) => {
          const found = under(event);
          if (found && "place" in found) {
            event.currentTarget.setPointerCapture(event.pointerId);
            pick(found.place);
          }
        }}
        onPointerMove={(event) => {
          const found = under(event);
          if (event.buttons & 1 && event.currentTarget.hasPointerCapture(event.pointerId)) {
            const box = event.currentTarget.getBoundingClientRect();
            const there = stripAt(run, recording, at, layout, width, event.clientX - box.left, 0);
            if (there && "place" in there) pick(there.place);
          }
          hover(found && "token" in found ? found.token : -1);
        }}
        onPointerLeave={() => hover(-1)}
      />}
      {over && (
        <p class="note">
          It ended after {grouped(run.tokens)} tokens
          {run.about.window === null ? ": keeping everything makes sense up to the length that the model was trained for" : ""}.{" "}
          <button type="button" class="link" data-testid={`${id}-end`} onClick={() => pick(run.last)}>
            Go there
          </button>
        </p>
      )}
    </section>
  );
}

function LifeTable({ recording, runs, marks, token, hovered }: { recording: Recording; runs: Run[]; marks: Mark[]; token: number; hovered: boolean }) {
  return (
    <div class="life" data-testid="stream-life" data-value={token}>
      <h2>
        {hovered ? "Under the pointer" : "The newest token"}: <span class="token">{named(recording.text, token)}</span> at {grouped(token)}
      </h2>
      <div class="scroll" tabIndex={0} role="group" aria-label="The token's life under each policy">
        <table>
          <thead>
            <tr>
              {["", "surprise, nats", "pooled at", "left at", "lived, tokens", "why"].map((title) => (
                <th key={title} scope="col">
                  {title || <span class="hidden">policy</span>}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {runs.map((run, k) => {
              const found = life(run, token);
              return (
                <tr key={run.key} data-testid={`stream-life-${marks[k].letter}`}>
                  <th scope="row">
                    <span class={`chip mark-${marks[k].colour}`}>{marks[k].letter}</span>
                    <span class="hidden">{run.name}</span>
                  </th>
                  <td>{found && token > 0 ? fixed(run.surprise(token - 1), 2) : "–"}</td>
                  <td data-value={found?.pooled ?? ""}>{found?.pooled ? grouped(found.pooled) : "–"}</td>
                  <td data-value={found?.left ?? ""}>{found?.left ? grouped(found.left) : "–"}</td>
                  <td>{found ? (found.left ? grouped(found.left - token) : `${grouped(run.tokens - token)} +`) : "–"}</td>
                  <td class="why">{found?.why ?? "the run had ended"}</td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
    </div>
  );
}

function Legend() {
  return (
    <ul class="kinds" aria-label="Slots' colours">
      <li>
        <i class="swatch sink" aria-hidden="true" /> sinks
      </li>
      <li>
        <i class="swatch recent" aria-hidden="true" /> window
      </li>
      <li>
        <i class="swatch heavy" aria-hidden="true" /> heavy hitters
      </li>
      <li>
        <i class="swatch pooled" aria-hidden="true" /> pooled
      </li>
      <li class="hints">
        <kbd>space</kbd> plays · <kbd>←</kbd> <kbd>→</kbd> one token, with <kbd>shift</kbd> 64 · <kbd>page</kbd> 1,024 ·{" "}
        <kbd>home</kbd> <kbd>end</kbd>
      </li>
      <li class="hints">§ is BOS, the first token; ¶ a line break, ¤ a byte of another character.</li>
    </ul>
  );
}

function of(run: Run, at: number, all: boolean): number {
  const count = Math.min(at, run.last);
  return all ? run.perplexity(count) : run.recent(count, SPAN);
}

function number(value: number): string {
  return Number.isNaN(value) ? "–" : value < 100 ? fixed(value, 3) : grouped(Math.round(value));
}

/** A policy's text, which may go on in another line after a comma or a colon. */
function breaking(text: string): preact.ComponentChildren {
  return text.split(/(?<=[,:])/).flatMap((part, k) => (k ? [<wbr key={k} />, part] : [part]));
}

function excerpt(recording: Recording, at: number): string {
  let words = "";
  for (let p = Math.max(1, at - 60); p <= at; p++) words += letter(recording.text, p).replace("¶", " ");
  return words;
}

/** Each run's letter, and the colour of the slots that are its own. */
function marksOf(runs: Run[]): Mark[] {
  const used = new Set<string>();
  return runs.map((run, k) => {
    const { window, heavy, rate, sinks } = run.about;
    const colour = window === null ? "ink" : heavy ? "pink" : rate > 1 ? "green" : sinks ? "amber" : "blue";
    const dashed = used.has(colour);
    used.add(colour);
    return { letter: LETTERS[k % 26], colour, dashed };
  });
}

/** Where a block that is too short to be drawn holds most: right before the policy decides. */
function crest(run: Run, p: number, last: number, log: boolean): number {
  const { block } = run.about;
  const apart = (log ? p * Math.log(Math.max(32, last) / 16) : last) / POINTS;
  return apart > block / 2 ? Math.min(run.last, p - (p % block) + block - 1) : p;
}

/** The positions at which each run's lines have points. */
function samples(runs: Run[], last: number, log: boolean): number[][] {
  return runs.map((run) => {
    const found = new Set<number>();
    for (let k = 0; k <= POINTS; k++) {
      const p = log ? Math.round(16 * (Math.max(32, last) / 16) ** (k / POINTS)) : Math.round((last * k) / POINTS);
      if (p >= 1 && p <= run.last) found.add(p);
    }
    if (run.last >= 1) found.add(run.last);
    return [...found].sort((a, b) => a - b);
  });
}

function useInk(ref: { current: Element | null }): Ink | null {
  const [ink, setInk] = useState<Ink | null>(null);
  useLayoutEffect(() => {
    const read = () => ref.current && setInk(inkOf(document.documentElement));
    read();
    const observer = new MutationObserver(read);
    observer.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    const query = matchMedia("(prefers-color-scheme: dark)");
    query.addEventListener("change", read);
    return () => {
      observer.disconnect();
      query.removeEventListener("change", read);
    };
  }, [ref]);
  return ink;
}

/** Whether an element is in sight, or nearly. */
function useSeen(ref: { current: Element | null }, gone: boolean): boolean {
  const [seen, setSeen] = useState(true);
  useEffect(() => {
    if (!ref.current) return;
    const observer = new IntersectionObserver(([entry]) => setSeen(entry.isIntersecting), { rootMargin: "60px" });
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, [ref, gone]);
  return seen;
}

/** `attnspan.stream`: what tests read and drive without guessing at pixels. */
function useTestHelpers(recording: Recording, place: { current: number }, at: number, go: (to: number) => void): void {
  const drawn = useRef<((p: number) => void) | null>(null);
  useLayoutEffect(() => {
    drawn.current?.(at);
  });
  useEffect(() => {
    const scrub = async ({ from = 0, to = recording.last, frames = 90 } = {}) => {
      const work: number[] = [];
      const gaps: number[] = [];
      let before = 0;
      for (let k = 0; k < frames; k++) {
        const now = await new Promise<number>((done) => requestAnimationFrame(done));
        if (k) gaps.push(now - before);
        before = now;
        const began = performance.now();
        const painted = new Promise<void>((done) => {
          drawn.current = () => done();
        });
        const target = Math.round(from + ((to - from) * k) / Math.max(1, frames - 1));
        if (target !== place.current) {
          go(target);
          await painted;
        }
        work.push(performance.now() - began);
      }
      drawn.current = null;
      gaps.sort((a, b) => a - b);
      work.sort((a, b) => a - b);
      const total = gaps.reduce((sum, gap) => sum + gap, 0);
      return {
        frames,
        frames_per_second: (1000 * gaps.length) / total,
        median_gap_ms: gaps[gaps.length >> 1],
        worst_gap_ms: gaps[gaps.length - 1],
        median_work_ms: work[work.length >> 1],
        worst_work_ms: work[work.length - 1],
      };
    };
    const helpers = {
      recording,
      scrub,
      go,
      at: () => place.current,
      /** The tokens whose slots the query at `p` sees under run `k`, and their kinds. */
      slots: (k: number, p: number) => {
        const found = recording.runs[k].slots(p);
        return {
          first: [...found.first.subarray(0, found.count)],
          size: [...found.size.subarray(0, found.count)],
          kind: [...found.kind.subarray(0, found.count)],
        };
      },
      life: (k: number, token: number) => life(recording.runs[k], token),
    };
    const home = window.attnspan as Record<string, unknown> | undefined;
    if (!home) return;
    home.stream = helpers;
    return () => {
      if (home.stream === helpers) delete home.stream;
    };
  }, [recording, go]);
}
