import type { Page } from "../data";
import type { Device, Spec } from "../model/spec";
import type { Params } from "../route";

/** The model and the device of the address, and what there is to choose from. */
export function useDesk(
  page: Page,
  params: Params,
): { spec: Spec; device: Device; names: string[]; devices: { value: string; text: string }[] } {
  const find = (name: string) => page.presets.find((each) => each.name === name);
  const spec = find(params.preset ?? "") ?? find("mistral-7b") ?? page.presets[0];
  const device =
    page.devices.find((each) => each.name === params.device) ??
    page.devices.find((each) => each.name === "h100") ??
    page.devices[0];
  return {
    spec,
    device,
    names: page.presets.map((each) => each.name),
    devices: page.devices.map((each) => ({ value: each.name, text: deviceText(each) })),
  };
}

function deviceText(device: Device): string {
  const tera = device.linear >= 1e12 ? `${Math.round(device.linear / 1e12)} TFLOP/s` : `${Math.round(device.linear / 1e9)} GFLOP/s`;
  const memory = device.memory === null ? "" : `${Math.round(device.memory / 1e9)} GB, `;
  return `${device.name} (${memory}${tera})`;
}
