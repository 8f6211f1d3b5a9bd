/** A slider over a range that the server names. */

const TICKS = 200;

let made = 0;

export class Slider {
  #range;
  #output;
  #low;
  #high;
  #integer;
  #value;

  /**
   * @param {HTMLElement} parent takes the slider as its last child.
   * @param {{label: string, low: number, high: number, value: number, integer?: boolean}} options
   * @param {() => void} changed
   */
  constructor(parent, { label, low, high, value, integer = false }, changed) {
    const id = `slider-${(made += 1)}`;
    [this.#low, this.#high, this.#integer, this.#value] = [low, high, integer, value];
    this.element = document.createElement("div");
    this.element.className = "slider";
    const name = document.createElement("label");
    name.htmlFor = id;
    name.textContent = label;
    this.#output = document.createElement("output");
    this.#output.htmlFor = id;
    // The slider itself says its value; told twice it is noise.
    this.#output.setAttribute("aria-hidden", "true");
    this.#range = document.createElement("input");
    Object.assign(this.#range, {
      id,
      type: "range",
      min: 0,
      max: integer ? high - low : TICKS,
      step: 1,
    });
    this.#range.value = Math.round(((value - low) / (high - low || 1)) * this.#range.max);
    this.element.append(name, this.#output, this.#range, end(low), end(high));
    parent.append(this.element);
    this.#range.addEventListener("input", () => {
      this.#value = this.#chosen();
      this.#told();
      changed();
    });
    this.#told();
  }

  /** Where it stands: what it was made with until it is moved. */
  get value() {
    return this.#value;
  }

  set disabled(disabled) {
    this.#range.disabled = disabled;
  }

  /** Of the tick: the ends of the range exactly, three decimals in between. */
  #chosen() {
    const tick = Number(this.#range.value);
    if (this.#integer) return this.#low + tick;
    if (tick === 0) return this.#low;
    if (tick === TICKS) return this.#high;
    const value = this.#low + ((this.#high - this.#low) * tick) / TICKS;
    return Math.max(this.#low, Math.min(this.#high, Number(value.toFixed(3))));
  }

  #told() {
    const text = shortened(this.value);
    this.#output.textContent = text;
    this.#range.setAttribute("aria-valuetext", text);
  }
}

/** A number to four decimals at most. */
export function shortened(value) {
  return String(Number(value.toFixed(4)));
}

function end(value) {
  const span = document.createElement("span");
  span.className = "end soft";
  span.setAttribute("aria-hidden", "true");
  span.textContent = shortened(value);
  return span;
}
