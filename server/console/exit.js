/** The controls of `routing.depth.exit`: a method, its numbers, and where a token may leave. */

import { shortened, Slider } from "./slider.js";

export class ExitControls {
  #select;
  #calibrated;
  #changed;
  #methods = {};
  #layers = 0;
  #numbers = new Map();
  #layer = null;

  /**
   * @param {HTMLFormElement} form
   * @param {() => void} changed
   */
  constructor(form, changed) {
    this.#select = form.elements["exit-method"];
    this.#calibrated = form.elements.calibrated;
    this.#changed = changed;
    this.#select.addEventListener("change", () => {
      this.#build();
      changed();
    });
    this.#calibrated.addEventListener("change", () => {
      this.#enable();
      changed();
    });
  }

  /**
   * Set up for what the server lists.
   *
   * @param {object} methods by name, as `/v1/routing/capabilities` has them.
   * @param {number} layers of the model.
   */
  offer(methods, layers) {
    this.#methods = methods;
    this.#layers = layers;
    this.#select.replaceChildren();
    for (const [name, method] of Object.entries(methods)) {
      const words = method.available ? method.description : `not here: ${method.reason}`;
      const option = new Option(`${name}: ${words}`, name);
      option.disabled = !method.available;
      this.#select.append(option);
    }
    this.#select.value = Object.keys(methods).find((name) => methods[name].available) ?? "";
    this.#build();
  }

  /** The object that goes into a request. */
  value() {
    const method = this.#select.value;
    if (!this.#methods[method].per_token) return { method, ...this.#given(), layers: [this.#layer.value] };
    if (this.#calibrated.checked) return { method };
    return {
      method,
      ...this.#given(),
      ...(this.#layer.value > 0 ? { min_layer: this.#layer.value } : {}),
    };
  }

  #given() {
    return Object.fromEntries([...this.#numbers].map(([name, slider]) => [name, slider.value]));
  }

  #build() {
    const parent = document.getElementById("exit-sliders");
    parent.replaceChildren();
    this.#numbers.clear();
    this.#layer = null;
    this.#calibrated.checked = false;
    const method = this.#methods[this.#select.value];
    document.getElementById("calibrated-field").hidden = !method?.calibrated.length;
    document.getElementById("exit-note").textContent = method ? noteOf(method) : "";
    if (!method) return;
    this.#calibrated.checked = method.calibrated.length > 0;
    const last = this.#layers - 2;
    for (const [name, range] of Object.entries(method.parameters)) {
      this.#numbers.set(name, new Slider(parent, sliderOf(name, range, last + 1), this.#changed));
    }
    const [label, value] = method.per_token
      ? ["first layer to leave after", 0]
      : ["leave after layer", last];
    this.#layer = new Slider(
      parent,
      { label, low: 0, high: last, value, integer: true },
      this.#changed,
    );
    this.#enable();
  }

  #enable() {
    for (const slider of [...this.#numbers.values(), this.#layer])
      slider.disabled = this.#calibrated.checked;
  }
}

/**
 * @param {string} name of the number.
 * @param {{low: number, high: number, default: number | null, integer: boolean}} range as the
 *   server lists it.
 * @param {number} exits that the model has.
 */
function sliderOf(name, { low, high, default: given, integer }, exits) {
  if (!integer) return { label: name, low, high, value: given ?? (low + high) / 2 };
  // A whole number counts exits, so that more than there are mean nothing.
  const most = Math.min(high, Math.max(low, exits));
  return { label: name, low, high: most, value: given ?? low, integer };
}

function noteOf({ description, source, calibrated: [entry], parameters }) {
  const open = Object.entries(parameters).filter(([, range]) => range.default === null);
  const named = open.map(([name]) => name).join(", ");
  return [
    `A token leaves ${description}. Source: ${source}.`,
    ...(entry
      ? [
          `Calibrated: threshold ${shortened(entry.threshold)} after layers ${entry.layers.join(", ")}.`,
        ]
      : open.length
        ? [`The server has no default for ${named}: choose one.`]
        : []),
  ].join(" ");
}
