import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig } from "vite";

const OUT = "../src/attnspan/explorer/static";

/** What the built files were made from, so that a test without npm sees when they are out of date. */
function sources(): string {
  const files = readdirSync("src", { recursive: true, withFileTypes: true })
    .filter((each) => each.isFile())
    .map((each) => join(each.parentPath, each.name).replaceAll("\\", "/"));
  const hash = createHash("sha256");
  for (const file of [...files, "index.html", "package-lock.json", "vite.config.ts"].sort()) {
    hash.update(`${file}\0`);
    hash.update(readFileSync(file));
  }
  return hash.digest("hex");
}

// One script and one style sheet under fixed names: the server lists them, the exported page inlines
// them. Fonts are inside the style sheet, so that the page asks for nothing else.
export default defineConfig({
  base: "./",
  esbuild: { jsx: "automatic", jsxImportSource: "preact", legalComments: "none" },
  plugins: [
    {
      name: "sources",
      closeBundle: () => writeFileSync(`${OUT}/sources.txt`, `${sources()}\n`),
    },
  ],
  build: {
    outDir: OUT,
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 200_000,
    modulePreload: false,
    cssCodeSplit: false,
    rollupOptions: {
      output: {
        format: "iife",
        entryFileNames: "app.js",
        assetFileNames: "app[extname]",
      },
    },
  },
});
