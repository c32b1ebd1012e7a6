import { useCallback, useEffect, useRef, useState } from "preact/hooks";

export const VIEWS = ["memory", "pattern", "reach", "ring", "stack", "stream", "plan"] as const;
export type View = (typeof VIEWS)[number];
export type Params = Readonly<Record<string, string>>;
export type Patch = Record<string, string | number | boolean | null>;

export interface Route {
  view: View;
  params: Params;
}

function parseRoute(hash: string): Route {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const view = VIEWS.find((each) => each === path) ?? "memory";
  const params: Record<string, string> = Object.create(null);
  for (const [key, value] of new URLSearchParams(query)) params[key] = value;
  return { view, params };
}

export function address(view: View, params: Params): string {
  const query = new URLSearchParams(params as Record<string, string>).toString();
  return `#/${view}${query ? `?${query}` : ""}`;
}

// Browsers refuse more than a few hundred writes of the address in half a minute.
const SETTLE = 200;

/** The view and its state, which live in the address. A drag writes it once it has settled. */
export function useRoute(): {
  route: Route;
  set: (patch: Patch) => void;
  go: (view: View, params?: Params) => void;
} {
  const [route, setRoute] = useState<Route>(() => parseRoute(location.hash));
  const latest = useRef(route);
  const timer = useRef<number | undefined>(undefined);
  // The hash that `latest` came from. Another one is of a navigation whose event is yet to come.
  const from = useRef(location.hash);

  const show = useCallback((next: Route) => {
    latest.current = next;
    setRoute(next);
  }, []);

  const write = useCallback(() => {
    clearTimeout(timer.current);
    if (location.hash !== from.current) return;
    history.replaceState(null, "", address(latest.current.view, latest.current.params));
    from.current = location.hash;
  }, []);

  useEffect(() => {
    const read = () => {
      clearTimeout(timer.current);
      from.current = location.hash;
      show(parseRoute(location.hash));
    };
    addEventListener("hashchange", read);
    return () => removeEventListener("hashchange", read);
  }, [show]);

  const set = useCallback(
    (patch: Patch) => {
      const params: Record<string, string> = { ...latest.current.params };
      for (const [key, value] of Object.entries(patch)) {
        if (value === null) delete params[key];
        else params[key] = String(value);
      }
      show({ view: latest.current.view, params });
      clearTimeout(timer.current);
      timer.current = window.setTimeout(write, SETTLE);
    },
    [show, write],
  );

  const go = useCallback(
    (view: View, params: Params = {}) => {
      write();
      location.hash = address(view, params);
    },
    [write],
  );
  return { route, set, go };
}

/** A whole number of the address, held within bounds. */
export function whole(text: string | undefined, otherwise: number, least: number, most: number): number {
  const value = text === undefined || !/^\d{1,10}$/.test(text) ? otherwise : Number(text);
  return Math.min(most, Math.max(least, value));
}

/** One of some words, or the first of them. */
export function oneOf<T extends string>(text: string | undefined, words: readonly T[], otherwise = words[0]): T {
  return words.find((each) => each === text) ?? otherwise;
}
