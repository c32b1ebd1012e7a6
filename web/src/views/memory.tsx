import type { ViewProps } from "../app";

export function MemoryView(_: ViewProps) {
  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">Memory</h1>
      </header>
    </section>
  );
}
