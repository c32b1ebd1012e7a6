/** The planner's figures in JavaScript, which tests hold to Python's to the last digit. */

export { cheapest, longest } from "./fit";
export { LAYOUTS, work } from "./forms";
export { toJson } from "./numbers";
export { pairs, parse as parsePattern, sees, text as patternText, why } from "./patterns";
export { cacheBytes, plan, prefill, STORAGES } from "./plan";
export { parsePolicy, policyText } from "./policies";
export { grouped, shown } from "./quantities";
export { atOnce, chunksOf, cost, imbalance, received, rounds, sent } from "./ring";
export { bound, unbounded } from "./spec";
export { distinct } from "./weights";
