import type { ViewProps } from "../app";

export function RingView(_: ViewProps) {
  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">Ring</h1>
      </header>
    </section>
  );
}
