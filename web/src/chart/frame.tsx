import type { ComponentChildren, ComponentProps } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Scale } from "./scale";

/** The width that an element has, so that text is never scaled. */
export function useWidth<T extends Element>(otherwise: number): [{ current: T | null }, number] {
  const ref = useRef<T>(null);
  const [width, setWidth] = useState(otherwise);
  useEffect(() => {
    if (!ref.current) return;
    setWidth(Math.round(ref.current.getBoundingClientRect().width) || otherwise);
    const observer = new ResizeObserver(([entry]) => setWidth(Math.round(entry.contentRect.width) || otherwise));
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, [otherwise]);
  return [ref, width];
}

interface DrawingProps extends Omit<ComponentProps<"svg">, "id" | "class" | "width" | "height"> {
  id: string;
  /** What the figure shows and says, for who can't see it. */
  says: string;
  width: number;
  height: number;
  kind?: "matrix" | "wheel";
}

/** A figure, a unit of which is a pixel. */
export function Drawing({ id, says, width, height, kind, children, ...more }: DrawingProps) {
  return (
    <svg
      class={kind ? `chart ${kind}` : "chart"}
      data-testid={id}
      role="img"
      aria-label={says}
      width={width}
      height={height}
      viewBox={`0 0 ${width} ${height}`}
      {...more}
    >
      {children}
    </svg>
  );
}

interface FrameProps {
  id: string;
  says: string;
  title: string;
  x: Scale;
  y: Scale;
  xTitle: string;
  width: number;
  height: number;
  /** Takes a place on the horizontal axis that was clicked or dragged to. */
  pick?: (x: number) => void;
  children: ComponentChildren;
}

/** A grid and axes, and the lines that are drawn between them. */
export function Frame({ id, says, title, x, y, xTitle, width, height, pick, children }: FrameProps) {
  const move = (event: PointerEvent) => {
    if (!pick || !(event.buttons & 1)) return;
    const box = (event.currentTarget as Element).getBoundingClientRect();
    pick(x.back(Math.min(x.end, Math.max(x.start, event.clientX - box.left))));
  };
  return (
    <Drawing
      id={id}
      says={says}
      width={width}
      height={height}
      onPointerDown={move}
      onPointerMove={move}
      style={pick ? { cursor: "ew-resize", touchAction: "pan-y" } : undefined}
    >
      <text class="title" x={0} y={12}>
        {title}
      </text>
      <g class="grid">
        {y.ticks.map((tick) => (
          <line key={tick.value} x1={x.start} x2={x.end} y1={y(tick.value)} y2={y(tick.value)} />
        ))}
      </g>
      <g class="axis">
        <line x1={x.start} x2={x.end} y1={y.start} y2={y.start} />
        {x.ticks.map((tick) => (
          <g key={tick.value} transform={`translate(${x(tick.value)} ${y.start})`}>
            <line y2={5} />
            <text y={18} text-anchor="middle">
              {tick.text}
            </text>
          </g>
        ))}
        {y.ticks.map((tick) => (
          <text key={tick.value} x={x.start - 8} y={y(tick.value)} dy="0.35em" text-anchor="end">
            {tick.text}
          </text>
        ))}
        <text x={(x.start + x.end) / 2} y={height - 4} text-anchor="middle">
          {xTitle}
        </text>
      </g>
      {children}
    </Drawing>
  );
}

/** Where the reader is. */
export function Now({ at, y }: { at: number; y: Scale }) {
  return <line class="now" x1={at} x2={at} y1={y.start} y2={y.end - 6} />;
}

type Place = (value: number) => number;

export function path(points: readonly (readonly [number, number])[], x: Place, y: Place): string {
  return points.map(([a, b], k) => `${k ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
}

/** Places of names at the lines' ends, moved so far that none covers another, and none goes below `bottom`. */
export function apart(places: number[], gap: number, bottom = Infinity): number[] {
  const order = places.map((_, k) => k).sort((a, b) => places[a] - places[b]);
  const found = [...places];
  for (let k = 1; k < order.length; k++) found[order[k]] = Math.max(found[order[k]], found[order[k - 1]] + gap);
  const over = Math.max(0, ...found.map((place) => place - bottom));
  return found.map((place) => place - over);
}
