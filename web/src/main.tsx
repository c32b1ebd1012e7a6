import { render } from "preact";
import { App } from "./app";
import { load } from "./data";
import * as twin from "./model";
import "./styles.css";

async function start(root: HTMLElement): Promise<void> {
  try {
    const page = await load();
    render(<App page={page} />, root);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    render(<p class="broken">The explorer's data did not come: {why}.</p>, root);
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
