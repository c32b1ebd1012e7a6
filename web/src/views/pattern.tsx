import type { ViewProps } from "../app";

export function PatternView(_: ViewProps) {
  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">Pattern</h1>
      </header>
    </section>
  );
}
