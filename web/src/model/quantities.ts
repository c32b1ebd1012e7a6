/** Numbers as the command line prints them (`attnspan.planner.quantities`). */

type Count = number | bigint;

/** As Python's `:,.2f`: exact halves go to the even digit. */
export function fixed(value: number, digits: number): string {
  const whole = value.toFixed(60);
  const point = whole.indexOf(".") + 1;
  const tie = /^50*$/.test(whole.slice(point + digits));
  const cut = whole.slice(0, digits ? point + digits : point - 1);
  const text = tie && Number(cut[cut.length - 1]) % 2 === 0 ? cut : value.toFixed(digits);
  return text.replace(/\B(?=(\d{3})+(?!\d))(?<!\.\d*)/g, ",");
}

/** With commas; `toLocaleString` takes a hundred times as long. */
export function grouped(count: Count): string {
  return String(count).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
}

export function shown(count: Count): string {
  const size = Number(count);
  const units: [string, number, number][] = [["GiB", 2 ** 30, 2], ["MiB", 2 ** 20, 1], ["KiB", 2 ** 10, 1]];
  for (const [unit, scale, digits] of units)
    if (Math.abs(size) >= scale) return `${fixed(size / scale, digits)} ${unit}`;
  return `${fixed(size, 0)} B`;
}
