import { Choice, Select, Slider } from "../controls";
import type { Page } from "../data";
import { grouped } from "../format";
import { STORAGES, type Storage } from "../model/plan";
import type { Device, Link, Spec } from "../model/spec";
import { oneOf, whole, type Params, type Patch } from "../route";

const BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256];

interface Desk {
  spec: Spec;
  device: Device;
  link: Link;
  batch: number;
  storage: Storage;
}

/** What the address asks for, of what the page has. */
export function deskOf(page: Page, params: Params, usual: Storage = "dense"): Desk {
  const named = <T extends { name: string }>(all: T[], name: string | undefined, otherwise: string) =>
    all.find((each) => each.name === name) ?? all.find((each) => each.name === otherwise) ?? all[0];
  const spec = named(page.presets, params.preset, "mistral-7b");
  return {
    spec,
    device: named(page.devices, params.device, "h100"),
    link: named(page.links, params.link, "ib"),
    batch: whole(params.batch, 1, 1, 256),
    storage: spec.latent ? "dense" : oneOf(params.storage, STORAGES, usual),
  };
}

interface Sets {
  set: (patch: Patch) => void;
}

export function ModelSelect({ page, spec, label = "Model", set }: Sets & { page: Page; spec: Spec; label?: string }) {
  return <Select id="preset" label={label} value={spec.name} options={page.presets.map((each) => each.name)} set={(preset) => set({ preset })} />;
}

export function BatchSlider({ batch, set }: Sets & { batch: number }) {
  return <Slider id="batch" label="Batch, sequences" stops={BATCHES} value={batch} show={grouped} set={(n) => set({ batch: n })} />;
}

export function StorageChoice({ spec, storage, set }: Sets & { spec: Spec; storage: Storage }) {
  const held = spec.latent ? (["dense"] as const) : STORAGES;
  return (
    <Choice
      id="storage"
      label="Cache held as"
      value={storage}
      options={held.map((value) => ({ value, text: value === "dense" ? "bf16" : value }))}
      set={(value) => set({ storage: value })}
    />
  );
}

export function DeviceSelect({ page, device, set }: Sets & { page: Page; device: Device }) {
  const options = page.devices.map((each) => ({ value: each.name, text: deviceText(each) }));
  return <Select id="device" label="Device" value={device.name} options={options} set={(value) => set({ device: value })} />;
}

export function LinkChoice({ page, link, set }: Sets & { page: Page; link: Link }) {
  return <Choice id="link" label="Link" value={link.name} options={page.links.map((each) => ({ value: each.name, text: each.name }))} set={(value) => set({ link: value })} />;
}

/** What a function gives, or the sentence with which it refuses. */
export function refused<T>(make: () => T): { value: T; why: "" } | { value: null; why: string } {
  try {
    return { value: make(), why: "" };
  } catch (error) {
    if (error instanceof TypeError || error instanceof RangeError) throw error;
    return { value: null, why: error instanceof Error ? error.message : String(error) };
  }
}

export function Refused({ why }: { why: string }) {
  return (
    <p class="wrong" role="status" data-testid="refused">
      {why}.
    </p>
  );
}

function deviceText(device: Device): string {
  const tera = device.linear >= 1e12 ? `${Math.round(device.linear / 1e12)} TFLOP/s` : `${Math.round(device.linear / 1e9)} GFLOP/s`;
  const memory = device.memory === null ? "" : `${Math.round(device.memory / 1e9)} GB, `;
  return `${device.name} (${memory}${tera})`;
}
