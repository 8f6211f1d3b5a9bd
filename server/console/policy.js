/** The policy: controls as far as this server has them, and the `routing` object that they make.

The object's text is what is sent. It follows the controls, and may be edited; the next control that
is moved writes it again. */

import { ExitControls } from "./exit.js";
import { readable } from "./json.js";
import { shortened, Slider } from "./slider.js";

const FOLLOWS = "Follows the controls above. Edit it to ask for anything else that the API takes.";
const EDITED = "Edited by hand: this text is sent. Moving a control replaces it.";

const SOURCES = {
  frontier: "Read from the profile's measured frontier.",
  importance: "Share of the blocks, least important first, as the profile ranks them.",
  default: "Share of the blocks; nothing was measured for this model.",
};

export class Policy {
  #form;
  #changed;
  #text;
  #edited = false;
  #effort = null;
  #exit;
  #topK = null;
  #presets = new Map();

  /**
   * @param {HTMLFormElement} form
   * @param {() => void} changed called after each change of what would be sent.
   */
  constructor(form, changed) {
    this.#form = form;
    this.#changed = changed;
    this.#text = form.elements.routing;
    this.#exit = new ExitControls(form, () => this.#write());
    form.elements.preset.addEventListener("change", () => this.#write());
    form.elements["top-k-on"].addEventListener("change", () => this.#write());
    for (const radio of form.elements.depth) radio.addEventListener("change", () => this.#write());
    this.#text.addEventListener("input", () => {
      this.#edited = true;
      this.#check();
      this.#changed();
    });
  }

  /** Set the controls up as the server describes them. */
  offer(capabilities, presets) {
    this.#refuse("policy-refused", capabilities.supported ? null : capabilities.reason);
    this.#offerPresets(presets);
    this.#offerDepth(capabilities);
    this.#offerTopK(capabilities.experts_routing);
    // With another key the same text may go through.
    if (!this.#edited) this.#write();
  }

  /**
   * What the text says: undefined if it is empty.
   *
   * Throws a SyntaxError if it is not JSON.
   */
  routing() {
    return this.#text.value.trim() === "" ? undefined : JSON.parse(this.#text.value);
  }

  #offerPresets(presets) {
    const select = this.#form.elements.preset;
    this.#presets = new Map(presets.map((preset) => [preset.id, preset]));
    select.replaceChildren(new Option("none", ""));
    for (const preset of presets) {
      const option = new Option(
        preset.available ? preset.id : `${preset.id} (not here: ${preset.reason})`,
        preset.id,
      );
      option.disabled = !preset.available;
      select.append(option);
    }
    select.value = presets.find((preset) => preset.available)?.id ?? "";
  }

  #offerDepth({ supported, reason, layers, depth, effort }) {
    for (const radio of this.#form.elements.depth)
      radio.disabled = !supported && radio.value !== "";
    this.#refuse("depth-refused", supported ? null : reason);
    const parent = at("effort-slider");
    parent.replaceChildren();
    this.#effort = null;
    this.#form.elements.depth.value = "";
    if (supported) {
      const range = { label: "Effort", low: effort.lowest, high: 1, value: 1 };
      this.#effort = new Slider(parent, range, () => this.#write());
      at("effort-note").textContent =
        `${SOURCES[effort.source] ?? effort.source} Lowest: ${shortened(effort.lowest)}.`;
    }
    this.#exit.offer(supported ? depth.exit : {}, layers);
  }

  #offerTopK({ supported, reason, enabled, controls }) {
    const box = this.#form.elements["top-k-on"];
    const parent = at("top-k-slider");
    parent.replaceChildren();
    this.#topK = null;
    const control = controls.top_k;
    let refusal = control?.available
      ? null
      : (control?.reason ?? reason ?? "this server lists no such control");
    if (supported && !enabled)
      refusal = "expert routing is off on this server (--expert-routing turns it on)";
    box.checked = false;
    box.disabled = refusal !== null;
    this.#refuse("top-k-refused", refusal);
    if (refusal === null) {
      const { low, high, default: value } = control.parameters.top_k;
      const range = { label: "Experts per token", low, high, value, integer: true };
      this.#topK = new Slider(parent, range, () => this.#write());
    }
  }

  /** The text from the controls. */
  #write() {
    const { preset, depth } = this.#form.elements;
    const topKOn = this.#form.elements["top-k-on"].checked;
    at("effort-controls").hidden = depth.value !== "effort";
    at("exit-controls").hidden = depth.value !== "exit";
    at("top-k-slider").hidden = !topKOn;
    at("preset-note").textContent = described(this.#presets.get(preset.value));
    const routing = {
      ...(preset.value ? { preset: preset.value } : {}),
      ...(depth.value === "effort" ? { effort: this.#effort.value } : {}),
      ...(depth.value === "exit" ? { depth: { exit: this.#exit.value() } } : {}),
      ...(topKOn ? { experts: { top_k: this.#topK.value } } : {}),
      report: true,
    };
    this.#text.value = readable(routing);
    this.#edited = false;
    this.#check();
    this.#changed();
  }

  /** Say where the text comes from, and what is wrong with it. */
  #check() {
    at("routing-note").textContent = this.#edited ? EDITED : FOLLOWS;
    let problem = "";
    try {
      this.routing();
    } catch (error) {
      problem = `Not JSON: ${error.message}.`;
    }
    this.#text.setAttribute("aria-invalid", String(problem !== ""));
    if (at("routing-error").textContent !== problem) at("routing-error").textContent = problem;
  }

  #refuse(id, reason) {
    at(id).hidden = reason === null;
    at(id).textContent = reason === null ? "" : `Not on this server: ${reason}.`;
  }
}

function at(id) {
  return document.getElementById(id);
}

/** A preset in words, with what was measured of it. */
function described(preset) {
  if (!preset) return "";
  const { description, measured } = preset;
  if (!measured) return description;
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  return (
    `${description}. ${measured.quality.measure} ${percent(measured.quality.value)} on ${measured.items} items, ` +
    `${measured.speed.value.toFixed(2)} times full depth's tokens/s (batch ${measured.batch}, ${measured.device}), ` +
    `${percent(measured.compute_fraction)} of its compute.`
  );
}
