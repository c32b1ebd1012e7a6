import { useMemo } from "preact/hooks";
import { scale, type Axis } from "../chart/scale";
import { useWidth } from "../chart/plot";

export interface Series {
  letter: string;
  name: string;
  colour: string;
  dashed: boolean;
  points: (readonly [number, number])[];
}

interface LinesProps {
  id: string;
  says: string;
  title: string;
  x: Axis;
  y: Axis;
  series: Series[];
  at: number;
  pick: (x: number) => void;
}

const [LEFT, TOP, RIGHT, BOTTOM, HEIGHT] = [58, 30, 26, 40, 230];

/** Lines that have grown up to `at`; what is still to come is faint. */
export function Lines({ id, says, title, x, y, series, at, pick }: LinesProps) {
  const [ref, width] = useWidth<HTMLDivElement>(420);
  const [x0, x1, y0, y1] = [LEFT, Math.max(LEFT + 60, width - RIGHT), HEIGHT - BOTTOM, TOP];
  const toX = useMemo(() => scale(x, x0, x1, 70), [x.from, x.to, x.log, x0, x1]);
  const toY = useMemo(() => scale(y, y0, y1, 34), [y.from, y.to, y.log, y0, y1]);
  const paths = useMemo(
    () =>
      series.map((each) =>
        each.points
          .map(([a, b], k) => `${k ? "L" : "M"}${toX(a).toFixed(1)} ${toY(Math.min(b, y.to)).toFixed(1)}`)
          .join(""),
      ),
    [series, toX, toY],
  );
  const ends = useMemo(() => apart(series.map((each) => toY(Math.min(y.to, each.points[each.points.length - 1]?.[1] ?? y.from)))), [series, toY]);
  const now = toX(Math.min(x.to, Math.max(x.from, at)));
  const move = (event: PointerEvent) => {
    if (!(event.buttons & 1)) return;
    const box = (event.currentTarget as Element).getBoundingClientRect();
    pick(Math.round(toX.back(Math.min(x1, Math.max(x0, event.clientX - box.left)))));
  };
  return (
    <div ref={ref} class="plot">
      <svg
        class="chart"
        data-testid={id}
        role="img"
        aria-label={says}
        width={width}
        height={HEIGHT}
        viewBox={`0 0 ${width} ${HEIGHT}`}
        onPointerDown={move}
        onPointerMove={move}
        style={{ cursor: "ew-resize", touchAction: "pan-y" }}
      >
        <clipPath id={`${id}-past`}>
          <rect x={0} y={0} width={now} height={HEIGHT} />
        </clipPath>
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
          <text x={(x0 + x1) / 2} y={HEIGHT - 4} text-anchor="middle">
            tokens seen
          </text>
        </g>
        <g class="to-come">
          {series.map((each, k) => (
            <path key={each.name} class={`line-${each.colour}${each.dashed ? " dashed" : ""}`} d={paths[k]} />
          ))}
        </g>
        <g clip-path={`url(#${id}-past)`}>
          {series.map((each, k) => (
            <path key={each.name} class={`line-${each.colour}${each.dashed ? " dashed" : ""}`} d={paths[k]} />
          ))}
        </g>
        <line class="now" x1={now} x2={now} y1={y0} y2={y1 - 6} />
        {series.map((each, k) => (
          <text key={each.name} class={`label halo ${each.colour === "ink" ? "title" : `text-${each.colour}`}`} x={x1 + 7} y={ends[k]} dy="0.35em">
            {each.letter}
          </text>
        ))}
      </svg>
    </div>
  );
}

/** Places moved so far that no letter covers another. */
function apart(places: number[]): number[] {
  const order = places.map((_, k) => k).sort((a, b) => places[a] - places[b]);
  const found = [...places];
  for (let k = 1; k < order.length; k++)
    found[order[k]] = Math.max(found[order[k]], found[order[k - 1]] + 14);
  const over = Math.max(0, ...found.map((place) => place - (HEIGHT - BOTTOM)));
  return found.map((place) => place - over);
}
