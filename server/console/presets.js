/** The presets: one row for each policy, with what was measured of it. */

/**
 * @typedef {object} Group presets that are the same policy
 * @property {string} value the first one's id, which stands for all of them.
 * @property {string[]} names
 * @property {object} preset as the server lists the first one, with what was measured of any.
 */

const HEADS = ["", "", "quality", "speed", "compute"];
const NOT_MEASURED = "–";

export class Presets {
  #parent;
  #groups = [];

  /**
   * @param {HTMLElement} parent
   * @param {() => void} changed called when another one is chosen.
   */
  constructor(parent, changed) {
    this.#parent = parent;
    parent.addEventListener("change", changed);
  }

  /**
   * Offer what the server lists, and choose the first one that it can do.
   *
   * @param {object[]} presets
   */
  offer(presets) {
    this.#groups = grouped(presets);
    const first = this.#groups.find(({ preset }) => preset.available)?.value ?? "";
    const none = row("", ["none"], [], null);
    const rows = this.#groups.map((group) =>
      row(group.value, group.names, figures(group.preset), reasonOf(group.preset)),
    );
    this.#parent.replaceChildren(...(presets.length ? [heads()] : []), none, ...rows);
    this.#parent.querySelector(`[value="${CSS.escape(first)}"]`).checked = true;
  }

  /** Id of the chosen one, empty for none. */
  get value() {
    return this.#parent.querySelector(":checked")?.value ?? "";
  }

  /** The chosen one as the server lists it, or undefined. */
  get chosen() {
    return this.#groups.find(({ value }) => value === this.value)?.preset;
  }
}

/** Presets by policy, in the order of the list. */
function grouped(presets) {
  const groups = new Map();
  for (const preset of presets) {
    const key = preset.available ? JSON.stringify(preset.policy) : preset.id;
    const group = groups.get(key);
    if (group) {
      group.names.push(preset.id);
      group.preset.measured ??= preset.measured;
    } else groups.set(key, { value: preset.id, names: [preset.id], preset: { ...preset } });
  }
  return [...groups.values()];
}

function figures({ measured }) {
  if (!measured) return [NOT_MEASURED, NOT_MEASURED, NOT_MEASURED];
  return [
    `${(100 * measured.quality.value).toFixed(1)} %`,
    `${measured.speed.value.toFixed(2)}×`,
    `${(100 * measured.compute_fraction).toFixed(0)} %`,
  ];
}

function reasonOf(preset) {
  return preset.available ? null : `not here: ${preset.reason}`;
}

function heads() {
  const line = document.createElement("p");
  line.className = "preset heads soft";
  // Each row says its numbers in full.
  line.setAttribute("aria-hidden", "true");
  line.append(...HEADS.map((text) => cell(text)));
  return line;
}

function row(value, names, numbers, reason) {
  const line = document.createElement("label");
  line.className = "preset";
  const radio = document.createElement("input");
  Object.assign(radio, { type: "radio", name: "preset", value, disabled: reason !== null });
  const title = cell(names.join(", "));
  title.className = "name";
  if (reason) {
    const why = document.createElement("small");
    why.textContent = reason;
    title.append(why);
  }
  line.append(radio, title, ...numbers.map((text) => cell(text)));
  if (numbers.some((text) => text !== NOT_MEASURED)) {
    const [quality, speed, compute] = numbers;
    radio.setAttribute(
      "aria-label",
      `${names.join(", ")}: quality ${quality}, speed ${speed}, compute ${compute}`,
    );
  } else radio.setAttribute("aria-label", [names.join(", "), reason].filter(Boolean).join(", "));
  return line;
}

function cell(text) {
  const made = document.createElement("span");
  made.textContent = text;
  return made;
}
