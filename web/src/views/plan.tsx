import type { ViewProps } from "../app";

export function PlanView(_: ViewProps) {
  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">Plan</h1>
      </header>
    </section>
  );
}
