import { useEffect, useState } from "preact/hooks";
import type { Page } from "./data";
import { address, useRoute, VIEWS, type Params, type Patch, type View } from "./route";
import { StreamView } from "./stream/StreamView";
import { MemoryView } from "./views/memory";
import { PatternView } from "./views/pattern";
import { PlanView } from "./views/plan";
import { ReachView } from "./views/reach";
import { RingView } from "./views/ring";
import { StackView } from "./views/stack";

export interface ViewProps {
  page: Page;
  params: Params;
  set: (patch: Patch) => void;
}

const NAMES: Record<View, string> = {
  memory: "Memory",
  pattern: "Pattern",
  reach: "Reach",
  ring: "Ring",
  stack: "Stack",
  stream: "Stream",
  plan: "Plan",
};

/** What a view takes over from the one before it: the model that is looked at, and how. */
const SHARED: Partial<Record<View, string[]>> = {
  memory: ["preset", "context", "batch", "storage", "device"],
  stack: ["preset", "context", "batch", "storage"],
  plan: ["preset", "context", "batch", "storage", "device"],
  ring: ["preset", "device"],
};

function carried(view: View, from: Params): Params {
  const names = SHARED[view] ?? [];
  return Object.fromEntries(names.filter((name) => name in from).map((name) => [name, from[name]]));
}

function shown(view: View, props: ViewProps) {
  switch (view) {
    case "memory":
      return <MemoryView {...props} />;
    case "pattern":
      return <PatternView {...props} />;
    case "reach":
      return <ReachView {...props} />;
    case "ring":
      return <RingView {...props} />;
    case "stack":
      return <StackView {...props} />;
    case "stream":
      return <StreamView {...props} />;
    case "plan":
      return <PlanView {...props} />;
  }
}

export function App({ page }: { page: Page }) {
  const { route, set, go } = useRoute();
  const theme = useTheme();

  useEffect(() => {
    document.title = `${NAMES[route.view]} · attnspan`;
    // On a phone the views' names don't all fit.
    document.querySelector("nav [aria-current]")?.scrollIntoView({ inline: "center", block: "nearest" });
  }, [route.view]);

  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey || writes(event.target)) return;
      const view = VIEWS[Number(event.key) - 1];
      if (view) go(view, carried(view, route.params));
      else if (event.key === "t") theme.turn();
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, [go, theme, route.params]);

  return (
    <>
      <header class="bar">
        <a class="skip" href={address(route.view, route.params)} onClick={toMain}>
          Skip to the figure
        </a>
        <a class="brand" href="#/memory" aria-label="attnspan explorer">
          <Mark />
          <span>attnspan</span>
        </a>
        <nav aria-label="Views">
          <ul>
            {VIEWS.map((view, k) => (
              <li key={view}>
                <a
                  href={address(view, view === route.view ? {} : carried(view, route.params))}
                  aria-current={view === route.view ? "page" : undefined}
                  data-testid={`nav-${view}`}
                >
                  <kbd aria-hidden="true">{k + 1}</kbd>
                  {NAMES[view]}
                </a>
              </li>
            ))}
          </ul>
        </nav>
        <button type="button" class="theme" data-testid="theme" onClick={theme.turn}>
          <span aria-hidden="true">{theme.dark ? "☀" : "☾"}</span>
          <span class="hidden">{theme.dark ? "Light colours" : "Dark colours"}</span>
        </button>
      </header>
      <main id="main" tabIndex={-1} key={route.view}>
        {shown(route.view, { page, params: route.params, set })}
      </main>
      <footer class="foot">
        <p>
          Every number is the planner’s, in closed form, or was measured and says where. KiB, MiB and
          GiB count in 1,024s. The address holds what you see: copy it to share a view.
        </p>
        <p>
          <kbd>1</kbd>–<kbd>7</kbd> views · <kbd>←</kbd> <kbd>→</kbd> sliders · <kbd>t</kbd> light or
          dark · attnspan {page.version}
        </p>
      </footer>
    </>
  );
}

function toMain(event: Event): void {
  event.preventDefault();
  document.getElementById("main")?.focus();
}

function writes(target: EventTarget | null): boolean {
  if (!(target instanceof HTMLElement)) return false;
  if (target instanceof HTMLInputElement) return !["range", "checkbox", "radio"].includes(target.type);
  return target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement;
}

/** What the system asks for, until the reader chooses; the choice is kept where that is allowed. */
function useTheme(): { dark: boolean; turn: () => void } {
  const [chosen, choose] = useState<string | null>(() => kept("attnspan-theme"));
  const [system, setSystem] = useState(() => matchMedia("(prefers-color-scheme: dark)").matches);
  useEffect(() => {
    const query = matchMedia("(prefers-color-scheme: dark)");
    const read = () => setSystem(query.matches);
    query.addEventListener("change", read);
    return () => query.removeEventListener("change", read);
  }, []);
  useEffect(() => {
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
  }, [chosen]);
  const dark = chosen ? chosen === "dark" : system;
  const turn = () => {
    const next = dark ? "light" : "dark";
    choose(next);
    try {
      localStorage.setItem("attnspan-theme", next);
    } catch {
      // A file opened from disk may have no storage: the choice then lasts as long as the page.
    }
  };
  return { dark, turn };
}

function kept(key: string): string | null {
  try {
    const value = localStorage.getItem(key);
    return value === "dark" || value === "light" ? value : null;
  } catch {
    return null;
  }
}

function Mark() {
  const cells = [];
  for (let i = 0; i < 4; i++)
    for (let j = 0; j <= i; j++)
      cells.push(
        <rect key={`${i}${j}`} x={j * 6} y={i * 6} width={5} height={5} class={i - j < 2 ? "on" : "off"} />,
      );
  return (
    <svg viewBox="0 0 23 23" width="22" height="22" aria-hidden="true">
      {cells}
    </svg>
  );
}
