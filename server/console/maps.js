/** The two maps of what the server ran, fed by polls while a request of this page runs. */

import { Heatmap } from "./heatmap.js";
import { dataTable } from "./table.js";
import { anyRows, difference, expertShares, MODULES, shareRun, sum } from "./utilization.js";

/** Milliseconds between polls while something runs here, and while only others may. */
const INTERVAL = 250;
const IDLE_INTERVAL = 2000;

/** Milliseconds after which a poll is given up. */
const LIMIT = 5000;

const TABLES = ["time-table", "expert-table"];

const TITLES = { attention: "attention", mlp: "MLP" };

/** Columns of the map over time. */
const HISTORY = 60;

export class Maps {
  #api;
  #failed;
  #time = new Heatmap(at("time-map"), at("time-readout"));
  #experts = new Heatmap(at("expert-map"), at("expert-readout"));
  #latest = null;
  #began = null;
  /** Each `{seconds, since}`; `since` is null for a while in which nothing ran. */
  #history = [];
  #running = 0;
  #loop = null;
  #wake = () => {};

  /**
   * @param {import("./api.js").Api} api
   * @param {(error: Error | null) => void} failed called when polling fails, and when it goes on.
   */
  constructor(api, failed) {
    this.#api = api;
    this.#failed = failed;
    for (const id of ["module", "since"]) at(id).addEventListener("change", () => this.#show());
    at("watch").addEventListener("change", () => this.#poll());
    for (const id of TABLES) {
      at(id)
        .closest("details")
        .addEventListener("toggle", () => this.#show());
    }
  }

  /** Take a first look, so that there is something to count from. */
  async connect() {
    this.#latest = this.#began = null;
    this.#history = [];
    this.#latest = await this.#api.get("routing/utilization");
    this.#show();
    if (this.#wanted) this.#poll();
  }

  /**
   * Watch while something runs, and once more when it has ended.
   *
   * @param {() => Promise<unknown>} start
   */
  async during(start) {
    // What others ran until now is not of this run.
    await this.#look();
    this.#began = this.#latest;
    this.#running += 1;
    this.#poll();
    try {
      await start();
    } finally {
      this.#running -= 1;
      this.#wake();
    }
  }

  get #wanted() {
    return this.#running > 0 || at("watch").checked;
  }

  #poll() {
    this.#wake();
    this.#loop ??= this.#watch().finally(() => {
      this.#loop = null;
    });
  }

  async #watch() {
    for (let last = false; !last;) {
      last = !this.#wanted;
      await this.#look();
      // Asked anew: what was to be watched may have ended during the look.
      await this.#pause(!this.#wanted ? 0 : this.#running ? INTERVAL : IDLE_INTERVAL);
    }
  }

  #pause(milliseconds) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  async #look() {
    let now;
    try {
      now = await this.#api.get("routing/utilization", AbortSignal.timeout(LIMIT));
    } catch (error) {
      this.#failed(error);
      return;
    }
    this.#failed(null);
    const since = this.#latest && difference(this.#latest, now);
    if (since === null) this.#began = null;
    this.#latest = now;
    this.#remember(since);
    this.#show();
  }

  #remember(since) {
    const ran = since !== null && anyRows(since);
    if (!ran && this.#history.at(-1)?.since === null) return;
    if (!ran && this.#history.length === 0) return;
    this.#history.push({ at: new Date(), since: ran ? since : null });
    this.#history.splice(0, this.#history.length - HISTORY);
  }

  #show() {
    if (this.#latest === null) return;
    this.#showTime();
    this.#showExperts();
  }

  #showTime() {
    const module = at("module").value;
    const layers = this.#latest.layers.map(({ layer }) => layer);
    const missing = HISTORY - this.#history.length;
    const share = (row, column) => {
      const entry = this.#history[column - missing];
      return entry?.since ? shareRun(entry.since.layers[row], module) : null;
    };
    const newest = this.#history.findLast((entry) => entry.since);
    const named = (layer) => `layer ${layer.layer} ${percent(shareRun(layer, module))}`;
    const words = newest ? newest.since.layers.map(named).join(", ") : "nothing yet";
    at("time-note").textContent = newest
      ? `A column per look in which tokens ran, ${INTERVAL} ms apart while a request runs; newest on the right.`
      : "Nothing has run since this page was opened.";
    this.#time.show({
      rows: layers.map(String),
      columns: Array.from({ length: HISTORY }, (_, column) =>
        column === HISTORY - 1 ? "now" : "",
      ),
      value: share,
      label: `Share of token rows that each layer ran, over time. Last look: ${words}.`,
      describe: (row, column) => {
        const entry = this.#history[column - missing];
        if (!entry) return "";
        const cell = `layer ${layers[row]}: ${percent(share(row, column))} of token rows`;
        return `${entry.at.toLocaleTimeString()}, ${cell}`;
      },
    });
    if (at("time-table").closest("details").open) this.#timeTable();
  }

  #timeTable() {
    const since = this.#latest && difference(this.#began, this.#latest);
    const outcomes = (module) => ["ran", ...Object.keys(since?.layers[0]?.[module] ?? {})];
    const headsOf = (module) => outcomes(module).map((name) => `${TITLES[module]} ${name}`);
    const heads = ["layer", ...MODULES.flatMap(headsOf)];
    const rows = (since?.layers ?? []).map((layer) => [
      layer.layer,
      ...MODULES.flatMap((module) => [
        percent(shareRun(layer, module)),
        ...Object.values(layer[module]),
      ]),
    ]);
    const caption = `Token rows since ${this.#began ? "the last run began" : "the server started"}`;
    at("time-table").replaceChildren(dataTable(caption, heads, rows));
  }

  #showExperts() {
    const since = difference(at("since").value === "run" ? this.#began : null, this.#latest);
    const experts = since?.experts;
    const fromRun = at("since").value === "run" && this.#began !== null;
    const span = fromRun ? "the last run began" : "the server started";
    at("expert-note").textContent = experts ? `Since ${span}.` : "This engine counts no experts.";
    at("expert-map").closest("section").toggleAttribute("data-empty", !experts);
    if (!experts) return;
    const shares = experts.selections.map(expertShares);
    const most = Math.max(0, ...shares.flat());
    at("expert-most").textContent = percent(most);
    const busiest = shares.map((row, n) => {
      const top = Math.max(0, ...row);
      const found = top ? `expert ${row.indexOf(top)} with ${percent(top)}` : "none";
      return `layer ${experts.layers[n]}: ${found}`;
    });
    this.#experts.show({
      rows: experts.layers.map(String),
      columns: (experts.selections[0] ?? []).map((_, expert) => String(expert)),
      value: (row, column) =>
        shares[row][column] === null ? null : shares[row][column] / (most || 1),
      label: `Experts by layer, share of selections since ${span}. Busiest: ${busiest.join("; ")}.`,
      describe: (row, column) => {
        const cell = `layer ${experts.layers[row]}, expert ${column}`;
        return `${cell}: ${percent(shares[row][column])}, ${experts.selections[row][column]} selections`;
      },
    });
    if (at("expert-table").closest("details").open) {
      const heads = [
        "layer",
        "masked",
        ...experts.selections[0].map((_, expert) => `expert ${expert}`),
      ];
      const rows = experts.selections.map((row, n) => [
        experts.layers[n],
        experts.masked[n],
        ...row,
      ]);
      const caption = `Selections since ${span}, ${sum(experts.selections.flat())} in all`;
      at("expert-table").replaceChildren(dataTable(caption, heads, rows));
    }
  }
}

function at(id) {
  return document.getElementById(id);
}

function percent(share) {
  return share === null ? "no tokens" : `${(100 * share).toFixed(1)} %`;
}
