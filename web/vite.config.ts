import { defineConfig } from "vite";

// One script and one style sheet under fixed names: the server lists them, the exported page inlines
// them. Fonts are inside the style sheet, so that the page asks for nothing else.
export default defineConfig({
  base: "./",
  esbuild: { jsx: "automatic", jsxImportSource: "preact", legalComments: "none" },
  build: {
    outDir: "../src/attnspan/explorer/static",
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
