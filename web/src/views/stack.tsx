import type { ViewProps } from "../app";

export function StackView(_: ViewProps) {
  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">Stack</h1>
      </header>
    </section>
  );
}
