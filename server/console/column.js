/** One column: an answer as it comes, what it took, and the request that it answers. */

import { answerNodes, exitCounts } from "./answer.js";
import { ApiError } from "./api.js";
import { median } from "./comparison.js";
import { readable } from "./json.js";
import { RequestMap } from "./request-map.js";
import { Run } from "./run.js";
import { Sent } from "./sent.js";

const NOT_YET = "–";

/**
 * @typedef {object} Result what a column's requests came to
 * @property {string} text of the first one, as shown.
 * @property {string} reasoning of the first one.
 * @property {object | null} report of the first one.
 * @property {string[]} texts of all of them.
 * @property {number[]} rates tokens/s of those that have a rate.
 * @property {number[]} firsts milliseconds to the first token.
 */

export class Column {
  #title;
  #element;
  #map;
  #sent;
  #body = null;
  /** The run that is shown: the first one. */
  #run = null;
  #ended = [];
  #rounds = 1;
  #marked = [];
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
    parent.append(content);
    this.#map = new RequestMap(this.#find(".request-map"));
    this.#sent = new Sent(this.#find(".sent"), title, (text) => this.#announce(text));
    this.#meters();
  }

  /** Show a request that could be sent; once one was, its own stays until the next. */
  offer(body, keyed) {
    if (this.#run === null) this.#sent.show(body, keyed, "As Run would send it now.");
  }

  /**
   * Make room for the answer to a request that is about to be sent.
   *
   * @param {object} body of a chat completion.
   * @param {boolean} keyed whether it carries a key.
   * @param {number} rounds how often it is sent.
   */
  begin(body, keyed, rounds) {
    this.#body = body;
    this.#rounds = rounds;
    this.#run = new Run(body);
    this.#ended = [];
    this.#marked = [];
    this.#sent.show(body, keyed, "As it was sent for this answer.");
    this.#problem(null);
    this.#map.hide();
    this.#state("waiting", "waiting");
    this.#draw();
  }

  /**
   * Send the request that was begun and show its answer until it ends, however it does.
   *
   * @param {import("./api.js").Api} api
   * @param {number} round from 0; the answer of the first one is shown.
   * @param {AbortSignal} signal
   * @returns {Promise<boolean>} whether it ended well.
   */
  async send(api, round, signal) {
    const shown = this.#run;
    const run = round === 0 ? shown : new Run(this.#body);
    const number = this.#rounds > 1 ? `, run ${round + 1} of ${this.#rounds}` : "";
    this.#state("running", `running${number}`);
    if (round === 0) this.#announce(`${this.#title}: running`);
    const before = round === 0 ? await counters(api, signal) : null;
    let state = round + 1 < this.#rounds ? "waiting" : "done";
    let problem = null;
    try {
      await run.send(api, signal, () => run === this.#run && this.#drawSoon());
    } catch (error) {
      state = error.name === "AbortError" ? "stopped" : "failed";
      problem = state === "failed" ? error : null;
    }
    // Another one may have been begun meanwhile.
    if (this.#run !== shown) return false;
    const ended = state === "done" || state === "waiting";
    if (ended) this.#ended.push(run);
    if (round === 0) await this.#showMap(api, run, before, signal);
    if (this.#run !== shown) return false;
    this.#problem(problem);
    this.#draw();
    this.#end(state);
    return ended;
  }

  /** What the requests came to; null unless all of them ended well. */
  get result() {
    if (this.#run === null || this.#ended.length < this.#rounds) return null;
    return {
      text: this.#run.text,
      reasoning: this.#run.reasoning,
      report: this.#run.report,
      texts: this.#ended.map((run) => run.text),
      rates: this.#rates,
      firsts: this.#firsts,
    };
  }

  /** Mark parts of the answer that the other one has not. `ranges`: as of `differences`. */
  mark(ranges) {
    this.#marked = ranges;
    this.#draw();
  }

  get #rates() {
    return this.#ended.map((run) => run.rate).filter((rate) => rate !== null);
  }

  get #firsts() {
    return this.#ended.map((run) => run.firstToken).filter((time) => time !== null);
  }

  #end(state) {
    const run = this.#run;
    const why = run.finish === "length" ? ", cut off at max tokens" : "";
    const text = `${state}${state === "done" ? why : ""}`;
    this.#state(state, text);
    // An error is announced by its own alert, and the end of a round by nobody.
    if (state === "done" || state === "stopped")
      this.#announce(`${this.#title}: ${text}, ${run.tokens} tokens. ${run.text}`);
  }

  async #showMap(api, run, before, signal) {
    if (!run.report?.layers) return;
    const after = before && (await counters(api, signal));
    if (this.#run === run) this.#map.show(run.report.layers, before, after);
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
    const { report, reasoning } = this.#run;
    this.#find(".text").replaceChildren(...answerNodes(this.#run, this.#marked));
    this.#find(".reasoning").textContent = reasoning;
    this.#meters();
    this.#find(".warnings").replaceChildren(
      ...(report?.warnings ?? []).map((text) => element("li", text)),
    );
    this.#find(".ran").hidden = !report;
    this.#find(".ran pre").textContent = report ? readable(report.policy) : "";
    const layers = report?.token_layers;
    this.#find(".left").hidden = !layers;
    if (!layers) return;
    this.#find(".left .last").textContent = String(report.layers.length - 1);
    this.#find(".left .counts").textContent = `Tokens: ${exitCounts(layers)}`;
  }

  #meters() {
    const { tokens = 0, rate = null, firstToken = null, report = null } = this.#run ?? {};
    const percent = (value) => (value === undefined ? null : `${(100 * value).toFixed(1)} %`);
    const depth = report?.generated?.mean_layers;
    const rates = this.#rates;
    const firsts = this.#firsts;
    const first = median(firsts) ?? firstToken;
    const values = {
      rate: (median(rates) ?? rate)?.toFixed(1),
      first: first === null ? null : `${first.toFixed(0)} ms`,
      tokens: tokens || null,
      layers: typeof depth === "number" ? `${depth.toFixed(2)} of ${report.layers.length}` : null,
      generated: percent(report?.generated?.compute_fraction),
      compute: percent(report?.compute_fraction),
    };
    for (const [name, value] of Object.entries(values))
      this.#say(`[data-meter="${name}"]`, String(value ?? NOT_YET));
    for (const [name, all] of Object.entries({ rate: rates, first: firsts })) {
      const ends = [Math.min(...all), Math.max(...all)].map((end) => end.toFixed(0));
      this.#say(`[data-spread="${name}"]`, all.length > 1 ? `${ends[0]} to ${ends[1]}` : "");
    }
  }

  #say(selector, text) {
    const place = this.#find(selector);
    if (place.textContent !== text) place.textContent = text;
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

/** The server's counters, or null if they cannot be had: the answer matters more. */
async function counters(api, signal) {
  try {
    return await api.get("routing/utilization", signal);
  } catch {
    return null;
  }
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
