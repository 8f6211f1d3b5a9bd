/** One column: an answer as it comes, what it took, and the request that it answers. */

import { ApiError, BASE_URL } from "./api.js";
import { Heatmap } from "./heatmap.js";
import { readable } from "./json.js";
import { Run } from "./run.js";
import { asCurl, asPython } from "./snippets.js";

const NOT_YET = "–";
const SNIPPETS = { curl: asCurl, python: asPython };
const MODULES = ["attention", "mlp"];

export class Column {
  #title;
  #element;
  #strip;
  #run = null;
  #drawn = 0;
  #timer = null;

  /**
   * @param {HTMLElement} parent
   * @param {string} title
   */
  constructor(parent, title) {
    this.#title = title;
    const content = document.getElementById("column").content.cloneNode(true);
    this.#element = content.firstElementChild;
    const heading = this.#find("h3");
    heading.textContent = title;
    heading.id = `column-${title.toLowerCase().replaceAll(" ", "-")}`;
    this.#element.setAttribute("aria-labelledby", heading.id);
    this.#find(".answer").setAttribute("aria-label", `Answer, ${title}`);
    for (const button of this.#element.querySelectorAll("[data-copy]")) {
      button.setAttribute("aria-label", `${button.textContent}: ${title}`);
      button.addEventListener("click", () => this.#copy(button.dataset.copy));
    }
    parent.append(content);
    this.#strip = new Heatmap(this.#find(".strip canvas"), null);
    this.#meters();
  }

  /** Show a request that could be sent; once one was, its own stays until the next. */
  offer(body, keyed) {
    if (this.#run === null) this.#snippets(body, keyed, "As Run would send it now.");
  }

  /** Make room for the answer to a request that is about to be sent. */
  begin(body, keyed) {
    this.#run = new Run(body);
    this.#snippets(body, keyed, "As it was sent for this answer.");
    this.#problem(null);
    this.#state("waiting", "waiting");
    this.#draw();
    return this.#run;
  }

  /** Send a request that was begun and show its answer until it ends, however it does. */
  async send(api, run, signal) {
    if (this.#run === run) {
      this.#state("running", "running");
      this.#announce(`${this.#title}: running`);
    }
    let state = "done";
    let problem = null;
    try {
      await run.send(api, signal, () => this.#drawSoon());
    } catch (error) {
      state = error.name === "AbortError" ? "stopped" : "failed";
      problem = state === "failed" ? error : null;
    }
    // Another one may have been begun meanwhile.
    if (this.#run !== run) return;
    this.#problem(problem);
    this.#draw();
    this.#end(state, run);
  }

  #end(state, run) {
    const why = run.finish === "length" ? ", cut off at max tokens" : "";
    const text = `${state}${state === "done" ? why : ""}`;
    this.#state(state, text);
    // An error is announced by its own alert.
    if (state !== "failed")
      this.#announce(`${this.#title}: ${text}, ${run.tokens} tokens. ${run.text}`);
  }

  #drawSoon() {
    const interval = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 80;
    const wait = this.#drawn + interval - performance.now();
    this.#timer ??= setTimeout(() => this.#draw(), Math.max(0, wait));
  }

  #draw() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#drawn = performance.now();
    this.#find(".text").textContent = this.#run.text;
    this.#find(".reasoning").textContent = this.#run.reasoning;
    this.#meters();
    const report = this.#run.report;
    this.#find(".warnings").replaceChildren(
      ...(report?.warnings ?? []).map((text) => element("li", text)),
    );
    this.#find(".ran").hidden = !report;
    this.#find(".ran pre").textContent = report ? readable(report.policy) : "";
    this.#find(".strip").hidden = !report?.layers;
    if (report?.layers) this.#layers(report.layers);
  }

  #meters() {
    const { tokens = 0, rate = null, firstToken = null, report = null } = this.#run ?? {};
    const percent = (value) => (value === undefined ? null : `${(100 * value).toFixed(1)} %`);
    const depth = report?.generated?.mean_layers;
    const values = {
      rate: rate?.toFixed(1),
      first: firstToken === null ? null : `${firstToken.toFixed(0)} ms`,
      tokens: tokens || null,
      layers: typeof depth === "number" ? `${depth.toFixed(2)} of ${report.layers.length}` : null,
      generated: percent(report?.generated?.compute_fraction),
      compute: percent(report?.compute_fraction),
    };
    for (const [name, value] of Object.entries(values)) {
      const text = String(value ?? NOT_YET);
      const meter = this.#find(`[data-meter="${name}"]`);
      if (meter.textContent !== text) meter.textContent = text;
    }
  }

  #layers(layers) {
    const shares = layers.map((layer) => {
      const rows = MODULES.map((module) =>
        Object.values(layer[module]).reduce((sum, n) => sum + n, 0),
      );
      const ran = MODULES.map((module) => layer[module].executed);
      return (ran[0] + ran[1]) / (rows[0] + rows[1] || 1);
    });
    const named = (share, n) => `layer ${layers[n].layer} ${(100 * share).toFixed(0)} %`;
    this.#strip.show({
      rows: [""],
      columns: layers.map(({ layer }) => String(layer)),
      value: (_, column) => shares[column],
      label: `Share of token rows that each layer ran: ${shares.map(named).join(", ")}`,
    });
  }

  #snippets(body, keyed, note) {
    this.#find(".sent .note").textContent =
      `${note}${keyed ? " The key is read from OPENAI_API_KEY." : ""}`;
    for (const [name, write] of Object.entries(SNIPPETS)) {
      this.#find(`[data-snippet="${name}"]`).textContent = write(BASE_URL, body, keyed);
    }
  }

  async #copy(name) {
    const pre = this.#find(`[data-snippet="${name}"]`);
    try {
      await navigator.clipboard.writeText(pre.textContent);
      this.#announce(`Copied as ${name}.`);
      this.#find(".sent .note").textContent = `Copied as ${name}.`;
    } catch {
      // Without HTTPS, browsers give pages of other hosts no clipboard.
      getSelection().selectAllChildren(pre);
      pre.focus();
      this.#announce("Selected: press Ctrl+C to copy.");
      this.#find(".sent .note").textContent = "Selected: press Ctrl+C to copy.";
    }
  }

  /** Say something to screen readers, politely. */
  #announce(text) {
    this.#find("[role=status]").textContent = text;
  }

  #problem(error) {
    const place = this.#find(".problem");
    place.hidden = error === null;
    place.replaceChildren();
    if (error === null) return;
    if (!(error instanceof ApiError)) console.error(error);
    place.append(error.status ? `${error.status}: ${error.message}` : error.message);
    if (!error.param) return;
    const where = element("span", "param: ");
    where.className = "where";
    where.append(element("code", error.param));
    place.append(where);
  }

  #state(state, text) {
    this.#element.dataset.state = state;
    this.#find(".state").textContent = text;
  }

  #find(selector) {
    return this.#element.querySelector(selector);
  }
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
