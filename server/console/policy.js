/** The policy: controls as far as this server has them, and the `routing` object that they make.

The object's text is what is sent. It follows the controls, and may be edited; the next control that
is moved writes it again. */

import { ExitControls } from "./exit.js";
import { readable } from "./json.js";
import { Presets } from "./presets.js";
import { shortened, Slider } from "./slider.js";

const FOLLOWS = "Follows the controls above. Edit it to ask for anything else that the API takes.";
const EDITED = "Edited by hand: this text is sent. Moving a control replaces it.";

/** The field of `routing` that each choice of depth writes. */
const DEPTH_FIELDS = { effort: "effort", exit: "depth.exit" };

const SOURCES = {
  frontier: "Read from the profile's measured frontier.",
  importance: "Share of the blocks, least important first, as the profile ranks them.",
};

export class Policy {
  #form;
  #changed;
  #text;
  #edited = false;
  #effort = null;
  #exit;
  #topK = null;
  #presets;
  #routable = false;
  #topKRefusal = null;

  /**
   * @param {HTMLFormElement} form
   * @param {() => void} changed called after each change of what would be sent.
   */
  constructor(form, changed) {
    this.#form = form;
    this.#changed = changed;
    this.#text = form.elements.routing;
    this.#exit = new ExitControls(form, () => this.#write());
    this.#presets = new Presets(at("presets"), () => this.#write());
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
    this.#presets.offer(presets);
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

  #offerDepth({ supported, reason, layers, depth, effort }) {
    this.#routable = supported;
    this.#refuse("depth-refused", supported ? null : reason);
    const parent = at("effort-slider");
    parent.replaceChildren();
    this.#effort = null;
    this.#form.elements.depth[0].checked = true;
    this.#refuse("effort-refused", supported && !effort.available ? `effort: ${effort.reason}` : null);
    if (supported && effort.available) {
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
    this.#topKRefusal = refusal;
    this.#refuse("top-k-refused", refusal);
    if (refusal === null) {
      const { low, high, default: value } = control.parameters.top_k;
      const range = { label: "Experts per token", low, high, value, integer: true };
      this.#topK = new Slider(parent, range, () => this.#write());
    }
  }

  /** Switch off what does not go together with the chosen preset, and say so. */
  #exclude() {
    const { depth, "top-k-on": topKOn } = this.#form.elements;
    const preset = this.#presets.chosen;
    const clashes = (field) => preset !== undefined && !preset.combines_with.includes(field);
    const choices = [...depth].filter((radio) => radio.value !== "");
    const clashing = choices.filter((radio) => clashes(DEPTH_FIELDS[radio.value]));
    for (const radio of choices) {
      const missing = radio.value === "effort" && this.#effort === null;
      radio.disabled = !this.#routable || missing || clashing.includes(radio);
      // Assigning "" to the list's own `value` chooses nothing.
      if (radio.disabled && radio.checked) depth[0].checked = true;
    }
    const names = clashing.map((radio) => radio.parentElement.textContent.trim());
    at("depth-clash").hidden = !this.#routable || names.length === 0;
    at("depth-clash").textContent =
      `Preset ${preset?.id} cannot be combined with ${names.join(" or ")}.`;
    const topKClashes = this.#topKRefusal === null && clashes("experts.top_k");
    at("top-k-clash").hidden = !topKClashes;
    at("top-k-clash").textContent = `Preset ${preset?.id} cannot be combined with it.`;
    topKOn.disabled = this.#topKRefusal !== null || topKClashes;
    if (topKOn.disabled) topKOn.checked = false;
  }

  /** The text from the controls. */
  #write() {
    this.#exclude();
    const { depth } = this.#form.elements;
    const preset = this.#presets.value;
    const topKOn = this.#form.elements["top-k-on"].checked;
    at("effort-controls").hidden = depth.value !== "effort";
    at("exit-controls").hidden = depth.value !== "exit";
    at("top-k-slider").hidden = !topKOn;
    at("preset-note").textContent = described(this.#presets.chosen);
    const routing = {
      ...(preset ? { preset } : {}),
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
    `${description}. Measured on ${measured.items} items: ${measured.quality.measure} ${percent(measured.quality.value)}, ` +
    `${measured.speed.value.toFixed(2)} times full depth's tokens/s (batch ${measured.batch}, ${measured.device}), ` +
    `${percent(measured.compute_fraction)} of its compute.`
  );
}
