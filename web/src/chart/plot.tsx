import type { ComponentChildren } from "preact";
import { apart, Frame, Now, path, useWidth } from "./frame";
import { scale, type Axis, type Scale } from "./scale";

export interface Line {
  name: string;
  colour: "blue" | "orange" | "green";
  dashed?: boolean;
  points: (readonly [number, number])[];
}

interface PlotProps {
  id: string;
  says: string;
  title: string;
  x: Axis;
  y: Axis;
  xTitle: string;
  lines: Line[];
  now?: number;
  height?: number;
  pick?: (x: number) => void;
  children?: (x: Scale, y: Scale) => ComponentChildren;
}

const [LEFT, TOP, BOTTOM] = [62, 34, 42];

/** Lines with their names at their ends. */
export function Plot({ id, says, title, x, y, xTitle, lines, now, height = 330, pick, children }: PlotProps) {
  const [ref, width] = useWidth<HTMLDivElement>(460);
  const right = Math.min(112, 22 + 7 * Math.max(...lines.map((line) => line.name.length), 0));
  const toX = scale(x, LEFT, Math.max(LEFT + 60, width - right), 62);
  const toY = scale(y, height - BOTTOM, TOP, 44);
  const drawn = lines.filter((line) => line.points.length);
  const names = apart(drawn.map(({ points }) => toY(points[points.length - 1][1])), 15);
  return (
    <div ref={ref} class="plot">
      <Frame id={id} says={says} title={title} x={toX} y={toY} xTitle={xTitle} width={width} height={height} pick={pick}>
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
            <Now at={toX(now)} y={toY} />
            {lines.map((line) => {
              const value = at(line.points, now);
              return (
                value !== null && (
                  <circle key={line.name} class={`fill-${line.colour}`} cx={toX(now)} cy={toY(value)} r={4.5} />
                )
              );
            })}
          </g>
        )}
        {drawn.map((line, k) => (
          <text key={line.name} class={`label halo text-${line.colour}`} x={toX.end + 8} y={names[k]} dy="0.35em">
            {line.name}
          </text>
        ))}
      </Frame>
    </div>
  );
}

function at(points: Line["points"], x: number): number | null {
  const found = points.find(([a]) => a === x);
  return found ? found[1] : null;
}
