import { useMemo } from "preact/hooks";
import { apart, Frame, Now, path, useWidth } from "../chart/frame";
import { scale, type Axis } from "../chart/scale";

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
  const right = Math.max(LEFT + 60, width - RIGHT);
  const toX = useMemo(() => scale(x, LEFT, right, 70), [x.from, x.to, x.log, right]);
  const toY = useMemo(() => scale(y, HEIGHT - BOTTOM, TOP, 34), [y.from, y.to, y.log]);
  const within = (value: number) => toY(Math.min(value, y.to));
  const paths = useMemo(() => series.map(({ points }) => path(points, toX, within)), [series, toX, toY]);
  const ends = useMemo(
    () => apart(series.map(({ points }) => within(points[points.length - 1]?.[1] ?? y.from)), 14, toY.start),
    [series, toY],
  );
  const now = toX(Math.min(x.to, Math.max(x.from, at)));
  const lines = () =>
    series.map((each, k) => (
      <path key={each.name} class={`line-${each.colour}${each.dashed ? " dashed" : ""}`} d={paths[k]} />
    ));
  return (
    <div ref={ref} class="plot">
      <Frame id={id} says={says} title={title} x={toX} y={toY} xTitle="tokens seen" width={width} height={HEIGHT} pick={pick}>
        <clipPath id={`${id}-past`}>
          <rect x={0} y={0} width={now} height={HEIGHT} />
        </clipPath>
        <g class="to-come">{lines()}</g>
        <g clip-path={`url(#${id}-past)`}>{lines()}</g>
        <Now at={now} y={toY} />
        {series.map((each, k) => (
          <text key={each.name} class={`label halo ${each.colour === "ink" ? "title" : `text-${each.colour}`}`} x={toX.end + 7} y={ends[k]} dy="0.35em">
            {each.letter}
          </text>
        ))}
      </Frame>
    </div>
  );
}
