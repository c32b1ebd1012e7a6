import { render } from "preact";
import { App } from "./app";
import { load } from "./data";
import * as twin from "./model";
import "./styles.css";

async function start(root: HTMLElement): Promise<void> {
  const broken = (what: string) => (error: unknown) => {
    const why = error instanceof Error ? error.message : String(error);
    render(
      <p class="broken">
        {what}: {why}.
      </p>,
      root,
    );
  };
  const page = await load().catch(broken("The explorer's data did not come"));
  if (!page) return;
  try {
    render(<App page={page} />, root);
  } catch (error) {
    broken("The explorer could not be drawn")(error);
  }
}

// Tests compare these functions with the planner, in a browser and, without a document, in node.
globalThis.attnspan = { ...twin };
if (typeof document !== "undefined") {
  const root = document.getElementById("app");
  if (root) void start(root);
}

declare global {
  var attnspan: unknown;
}
