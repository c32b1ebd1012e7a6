import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { grouped, parseTokens } from "./format";
import type { Patch } from "./route";

interface SliderProps {
  id: string;
  label: string;
  /** The values that it stops at, rising; of all whole numbers from 0, the last. */
  stops: readonly number[] | number;
  value: number;
  show: (value: number) => string;
  set: (value: number) => void;
  /** Reads what is typed in its box; without it there is none. */
  read?: (text: string) => number | null;
  inputMode?: "text" | "numeric";
  /** The value in words, where more is to be said than is shown. */
  says?: (value: number) => string;
  note?: string;
}

/** A slider over stops; its box takes any number between the first and the last. */
export function Slider({ id, label, stops, value, show, set, read, inputMode = "text", says = show, note }: SliderProps) {
  const all = typeof stops === "number";
  const place = all ? value : nearest(stops, value);
  const most = all ? stops : stops.length - 1;
  const of = (stop: number) => (all ? stop : stops[stop]);
  return (
    <div class="control slider">
      <div class="row">
        <label for={id}>{label}</label>
        {read ? (
          <Box id={`${id}-box`} label={`${label}, exact`} value={value} show={show} set={set} read={read} inputMode={inputMode} least={of(0)} most={of(most)} />
        ) : (
          <output for={id}>{show(value)}</output>
        )}
      </div>
      <input
        id={id}
        data-testid={id}
        data-value={value}
        type="range"
        min={0}
        max={most}
        step={1}
        value={place}
        aria-valuetext={says(value)}
        aria-describedby={note ? `${id}-note` : undefined}
        onInput={(event) => set(of(Number(event.currentTarget.value)))}
        style={{ "--share": most ? place / most : 0 }}
      />
      {note && (
        <small id={`${id}-note`} class="note">
          {note}
        </small>
      )}
    </div>
  );
}

interface BoxProps {
  id: string;
  label: string;
  value: number;
  least: number;
  most: number;
  show: (value: number) => string;
  set: (value: number) => void;
  read: (text: string) => number | null;
  inputMode: "text" | "numeric";
}

function Box({ id, label, value, least, most, show, set, read, inputMode }: BoxProps) {
  const [draft, setDraft] = useState<string | null>(null);
  const done = () => {
    if (draft === null) return;
    const found = read(draft);
    if (found !== null) set(Math.min(most, Math.max(least, found)));
    setDraft(null);
  };
  return (
    <input
      id={id}
      data-testid={id}
      class="box"
      type="text"
      inputMode={inputMode}
      autocomplete="off"
      spellcheck={false}
      aria-label={label}
      value={draft ?? show(value)}
      onInput={(event) => setDraft(event.currentTarget.value)}
      onBlur={done}
      onKeyDown={(event) => {
        if (event.key === "Enter") done();
        if (event.key === "Escape") setDraft(null);
      }}
    />
  );
}

function nearest(stops: readonly number[], value: number): number {
  let best = 0;
  for (let k = 1; k < stops.length; k++)
    if (Math.abs(stops[k] - value) < Math.abs(stops[best] - value)) best = k;
  return best;
}

export function range(least: number, most: number, step = 1): number[] {
  const values = [];
  for (let value = least; value <= most; value += step) values.push(value);
  return values;
}

/** Powers of two and what lies at a quarter, a half and three quarters between them. */
export function doublings(least: number, most: number): number[] {
  const values: number[] = [];
  for (let base = least; base <= most; base *= 2)
    for (const quarter of base >= 4 ? [4, 5, 6, 7] : [4]) {
      const value = (base * quarter) / 4;
      if (value <= most) values.push(value);
    }
  return values;
}

/** A slider over numbers of tokens, under their own name in the address. */
export function TokensSlider({ id, label, stops, value, set }: Pick<SliderProps, "id" | "label" | "stops" | "value"> & { set: (patch: Patch) => void }) {
  return <Slider id={id} label={label} stops={stops} value={value} show={grouped} read={parseTokens} set={(tokens) => set({ [id]: tokens })} />;
}

interface SelectProps {
  id: string;
  label: string;
  value: string;
  options: readonly (string | { value: string; text: string })[];
  set: (value: string) => void;
}

export function Select({ id, label, value, options, set }: SelectProps) {
  return (
    <div class="control select">
      <label for={id}>{label}</label>
      <span class="pick">
        <select id={id} data-testid={id} value={value} onChange={(event) => set(event.currentTarget.value)}>
          {options.map((option) => {
            const { value: key, text } = typeof option === "string" ? { value: option, text: option } : option;
            return (
              <option key={key} value={key} selected={key === value}>
                {text}
              </option>
            );
          })}
        </select>
      </span>
    </div>
  );
}

interface ChoiceProps<T extends string> {
  id: string;
  label: string;
  value: T;
  options: readonly { value: T; text: string }[];
  set: (value: T) => void;
}

/** A few words beside each other, one of them chosen: radio buttons. */
export function Choice<T extends string>({ id, label, value, options, set }: ChoiceProps<T>) {
  return (
    <fieldset class="control choice" id={id}>
      <legend>{label}</legend>
      <div class="segments">
        {options.map((option) => (
          <label key={option.value} class={option.value === value ? "on" : undefined}>
            <input
              type="radio"
              name={id}
              data-testid={`${id}-${option.value}`}
              checked={option.value === value}
              onChange={() => set(option.value)}
            />
            <span>{option.text}</span>
          </label>
        ))}
      </div>
    </fieldset>
  );
}

export function Check({ id, label, value, set }: { id: string; label: ComponentChildren; value: boolean; set: (value: boolean) => void }) {
  return (
    <label class="control check">
      <input id={id} data-testid={id} type="checkbox" checked={value} onChange={(event) => set(event.currentTarget.checked)} />
      <span>{label}</span>
    </label>
  );
}

/** A number on the page: what is read, and the same in full for who compares. */
export function Num({ id, value, children }: { id: string; value: number | bigint | string | null; children: ComponentChildren }) {
  return (
    <span class="num" data-testid={id} data-value={value === null ? "" : String(value)}>
      {children}
    </span>
  );
}

export function Stat({
  id,
  label,
  value,
  children,
  note,
  mark,
}: {
  id: string;
  label: string;
  value: number | bigint | string | null;
  children: ComponentChildren;
  note?: ComponentChildren;
  mark?: string;
}) {
  return (
    <div class="stat" data-mark={mark}>
      <dt>{label}</dt>
      <dd>
        <Num id={id} value={value}>
          {children}
        </Num>
        {note && <small>{note}</small>}
      </dd>
    </div>
  );
}

/** A text that a click puts on the clipboard, or selects where there is none. */
export function Copy({ id, label, text }: { id: string; label: string; text: string }) {
  const [done, setDone] = useState(false);
  const code = useRef<HTMLElement>(null);
  useEffect(() => setDone(false), [text]);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setDone(true);
    } catch {
      if (code.current) getSelection()?.selectAllChildren(code.current);
    }
  };
  return (
    <div class="copy">
      <span class="copy-label" id={`${id}-label`}>
        {label}
      </span>
      <div class="copy-box">
        <code ref={code} data-testid={id} tabIndex={0} role="group" aria-labelledby={`${id}-label`}>
          {text}
        </code>
        <button type="button" data-testid={`${id}-copy`} onClick={copy} aria-label={`Copy: ${label}`}>
          {done ? "Copied" : "Copy"}
        </button>
      </div>
    </div>
  );
}

/** Step back, play or pause, step on; the arrow keys do it on its slider. */
export function Steps({
  id,
  label,
  value,
  most,
  set,
  show,
  pace = 700,
}: {
  id: string;
  label: string;
  value: number;
  most: number;
  set: (value: number) => void;
  show: (value: number) => string;
  pace?: number;
}) {
  const [playing, play] = useState(false);
  const now = useRef({ value, most, set });
  now.current = { value, most, set };
  useEffect(() => {
    if (!playing) return;
    const timer = setInterval(() => {
      const { value: at, most: last, set: to } = now.current;
      to(at >= last ? 0 : at + 1);
    }, pace);
    return () => clearInterval(timer);
  }, [playing, pace]);
  const move = (to: number) => {
    play(false);
    set(Math.min(most, Math.max(0, to)));
  };
  return (
    <div class="steps">
      <StepButtons
        id={id}
        names={{ back: `${label}: one back`, play: `${label}: play`, pause: `${label}: pause`, on: `${label}: one on` }}
        value={value}
        most={most}
        playing={playing}
        toggle={() => play(!playing)}
        move={move}
      />
      <Slider id={id} label={label} stops={Math.max(most, 0)} value={value} show={show} set={move} />
    </div>
  );
}

interface StepButtonsProps {
  id: string;
  names: Record<"back" | "play" | "pause" | "on", string>;
  value: number;
  most: number;
  playing: boolean;
  toggle: () => void;
  move: (to: number) => void;
}

export function StepButtons({ id, names, value, most, playing, toggle, move }: StepButtonsProps) {
  return (
    <div class="buttons">
      <button type="button" data-testid={`${id}-back`} aria-label={names.back} disabled={value <= 0} onClick={() => move(value - 1)}>
        <Icon path="M11 3 5 8l6 5z" />
      </button>
      <button type="button" data-testid={`${id}-play`} aria-label={playing ? names.pause : names.play} onClick={toggle}>
        <Icon path={playing ? "M4 3h3v10H4zM9 3h3v10H9z" : "M4 2.5 13 8l-9 5.5z"} />
      </button>
      <button type="button" data-testid={`${id}-on`} aria-label={names.on} disabled={value >= most} onClick={() => move(value + 1)}>
        <Icon path="M5 3l6 5-6 5z" />
      </button>
    </div>
  );
}

function Icon({ path }: { path: string }) {
  return (
    <svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">
      <path d={path} />
    </svg>
  );
}

/** A view's controls. On a phone they fold away, so that the figures above have the screen. */
export function Panel({ label, children }: { label: string; children: ComponentChildren }) {
  const [open, setOpen] = useState(false);
  return (
    <form class={open ? "panel open" : "panel"} aria-label={label} onSubmit={(event) => event.preventDefault()}>
      <button type="button" class="fold" data-testid="fold" aria-expanded={open} onClick={() => setOpen(!open)}>
        Controls
      </button>
      {children}
    </form>
  );
}

/** The figure as a table, for who can't see it or wants the digits. */
export function AsText({ summary = "The figure as text", children }: { summary?: string; children: ComponentChildren }) {
  return (
    <details class="as-text">
      <summary>{summary}</summary>
      <div class="scroll" tabIndex={0} role="group" aria-label={summary}>
        {children}
      </div>
    </details>
  );
}
