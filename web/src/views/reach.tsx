import type { ViewProps } from "../app";

export function ReachView(_: ViewProps) {
  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">Reach</h1>
      </header>
    </section>
  );
}
