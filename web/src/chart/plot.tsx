import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { scale, type Axis, type Scale } from "./scale";

export type Colour = "blue" | "orange" | "green" | "amber" | "pink" | "sky";

export interface Line {
  name: string;
  colour: Exclude<Colour, "sky" | "amber">;
  dashed?: boolean;
  points: (readonly [number, number])[];
}

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

interface PlotProps {
  id: string;
  /** What the figure shows and says, for who can't see it. */
  says: string;
  title: string;
  x: Axis;
  y: Axis;
  xTitle: string;
  lines: Line[];
  now?: number;
  height?: number;
  /** Takes a place on the horizontal axis that was clicked or dragged to. */
  pick?: (x: number) => void;
  children?: (x: Scale, y: Scale) => ComponentChildren;
}

const LEFT = 62;
const TOP = 34;
const BOTTOM = 42;

export function Plot({ id, says, title, x, y, xTitle, lines, now, height = 330, pick, children }: PlotProps) {
  const [ref, width] = useWidth<HTMLDivElement>(460);
  const right = Math.min(112, 22 + 7 * Math.max(...lines.map((line) => line.name.length), 0));
  const [x0, x1, y0, y1] = [LEFT, Math.max(LEFT + 60, width - right), height - BOTTOM, TOP];
  const toX = scale(x, x0, x1, 62);
  const toY = scale(y, y0, y1, 44);
  const move = (event: PointerEvent) => {
    if (!pick || !(event.buttons & 1)) return;
    const box = (event.currentTarget as Element).getBoundingClientRect();
    const place = Math.min(x1, Math.max(x0, event.clientX - box.left));
    pick(toX.back(place));
  };
  const names = apart(
    lines.flatMap((line) => {
      const last = line.points[line.points.length - 1];
      return last ? [{ line, at: toY(last[1]) }] : [];
    }),
  );
  return (
    <div ref={ref} class="plot">
      <svg
        class="chart"
        data-testid={id}
        role="img"
        aria-label={says}
        width={width}
        height={height}
        viewBox={`0 0 ${width} ${height}`}
        onPointerDown={move}
        onPointerMove={move}
        style={pick ? { cursor: "ew-resize", touchAction: "pan-y" } : undefined}
      >
        <text class="title" x={0} y={12}>
          {title}
        </text>
        <g class="grid">
          {toY.ticks.map((tick) => (
            <line key={tick.value} x1={x0} x2={x1} y1={toY(tick.value)} y2={toY(tick.value)} />
          ))}
        </g>
        <g class="axis">
          <line x1={x0} x2={x1} y1={y0} y2={y0} />
          {toX.ticks.map((tick) => (
            <g key={tick.value} transform={`translate(${toX(tick.value)} ${y0})`}>
              <line y2={5} />
              <text y={18} text-anchor="middle">
                {tick.text}
              </text>
            </g>
          ))}
          {toY.ticks.map((tick) => (
            <text key={tick.value} x={x0 - 8} y={toY(tick.value)} dy="0.35em" text-anchor="end">
              {tick.text}
            </text>
          ))}
          <text x={(x0 + x1) / 2} y={height - 4} text-anchor="middle">
            {xTitle}
          </text>
        </g>
        {children?.(toX, toY)}
        {lines.map((line) => (
          <path
            key={line.name}
            class={`line-${line.colour}${line.dashed ? " dashed" : ""}`}
            d={path(line.points, toX, toY)}
          />
        ))}
        {now !== undefined && (
          <g>
            <line class="now" x1={toX(now)} x2={toX(now)} y1={y0} y2={y1 - 6} />
            {lines.map((line) => {
              const value = at(line.points, now);
              return (
                value !== null && (
                  <circle key={line.name} class={`fill-${line.colour} dot`} cx={toX(now)} cy={toY(value)} r={4.5} />
                )
              );
            })}
          </g>
        )}
        {names.map(({ line, at: place }) => (
          <text key={line.name} class={`label halo text-${line.colour}`} x={x1 + 8} y={place} dy="0.35em">
            {line.name}
          </text>
        ))}
      </svg>
    </div>
  );
}

function path(points: Line["points"], x: Scale, y: Scale): string {
  return points.map(([a, b], k) => `${k ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
}

function at(points: Line["points"], x: number): number | null {
  const found = points.find(([a]) => a === x);
  return found ? found[1] : null;
}

/** Names at the lines' ends, moved so far that none covers another. */
function apart<T extends { at: number }>(names: T[]): T[] {
  const sorted = [...names].sort((a, b) => a.at - b.at).map((each) => ({ ...each }));
  for (let k = 1; k < sorted.length; k++) sorted[k].at = Math.max(sorted[k].at, sorted[k - 1].at + 15);
  return sorted;
}
