import type { Page } from "../data";
import type { Params, Patch } from "../route";

export interface StreamProps {
  page: Page;
  params: Params;
  set: (patch: Patch) => void;
}

export function StreamView({ page }: StreamProps) {
  return (
    <section class="view" aria-labelledby="title">
      <header class="lead">
        <h1 id="title">The stream, watched</h1>
        <p>{page.recordings.length} recordings.</p>
      </header>
    </section>
  );
}
