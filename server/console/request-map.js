/** What one request ran: its layers from its report, its experts if it ran alone. */

import { Heatmap } from "./heatmap.js";
import { difference, expertShares, MODULES, shareRun } from "./utilization.js";

const TITLES = { attention: "attention", mlp: "MLP" };

const SHARED =
  "Its experts cannot be told apart: others ran beside it. One after the other gives each request the server to itself.";

export class RequestMap {
  #element;
  #layers;
  #experts;

  /** @param {HTMLElement} element `.request-map` of a column. */
  constructor(element) {
    this.#element = element;
    const readout = element.querySelector(".readout");
    this.#layers = new Heatmap(element.querySelector("canvas.layers"), readout);
    this.#experts = new Heatmap(element.querySelector(".experts canvas"), readout);
  }

  hide() {
    this.#element.hidden = true;
  }

  /**
   * @param {object[]} layers of the report.
   * @param {object | null} before answer of `/v1/routing/utilization` before the request.
   * @param {object | null} after the same behind it.
   */
  show(layers, before, after) {
    this.#element.hidden = false;
    this.#showLayers(layers);
    const since = before && after && difference(before, after);
    const experts = this.#element.querySelector(".experts");
    experts.hidden = !(after?.experts ?? before?.experts);
    if (experts.hidden) return;
    const alone = since !== null && ranAlone(layers, since);
    experts.querySelector("canvas").hidden = !alone;
    experts.querySelector(".note").textContent = alone
      ? "Share of each layer's selections that went to each expert"
      : SHARED;
    if (alone) this.#showExperts(since.experts);
  }

  #showLayers(layers) {
    const named = (layer) => `layer ${layer.layer} ${percent(shareRun(layer, ""), 0)}`;
    this.#layers.show({
      rows: MODULES.map((module) => TITLES[module]),
      columns: layers.map(({ layer }) => String(layer)),
      value: (row, column) => shareRun(layers[column], MODULES[row]),
      label: `Share of token rows that each layer ran: ${layers.map(named).join(", ")}`,
      describe: (row, column) => {
        const outcomes = layers[column][MODULES[row]];
        const counts = Object.entries(outcomes).map(([outcome, rows]) => `${rows} ${outcome}`);
        return `layer ${layers[column].layer}, ${TITLES[MODULES[row]]}: rows ${counts.join(", ")}`;
      },
    });
  }

  #showExperts({ layers, selections }) {
    const shares = selections.map(expertShares);
    const most = Math.max(0, ...shares.flat()) || 1;
    const busiest = shares.map((row, n) => {
      const top = Math.max(0, ...row);
      return `layer ${layers[n]}: ${top ? `expert ${row.indexOf(top)} with ${percent(top, 1)}` : "none"}`;
    });
    this.#experts.show({
      rows: layers.map(String),
      columns: selections[0].map((_, expert) => String(expert)),
      value: (row, column) => (shares[row][column] === null ? null : shares[row][column] / most),
      label: `Experts by layer, share of this request's selections. Busiest: ${busiest.join("; ")}`,
      describe: (row, column) =>
        `layer ${layers[row]}, expert ${column}: ${percent(shares[row][column], 1)}, ${selections[row][column]} selections`,
    });
  }
}

/** Whether the server's counters grew by just what a request's report says. */
function ranAlone(layers, since) {
  return layers.every((layer, n) =>
    MODULES.every((module) =>
      Object.entries(since.layers[n]?.[module] ?? {}).every(
        ([outcome, rows]) => rows === layer[module][outcome],
      ),
    ),
  );
}

function percent(share, digits) {
  return share === null ? "no tokens" : `${(100 * share).toFixed(digits)} %`;
}
