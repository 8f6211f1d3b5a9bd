/** A map of cells on a canvas, in the page's colours. */

const STOPS = 5;
const GUTTER = 28;
const AXIS = 16;

/**
 * @typedef {object} Map
 * @property {string[]} rows their names, the first one on top.
 * @property {string[]} columns their names.
 * @property {(row: number, column: number) => number | null} value 0 to 1; null has no colour.
 * @property {string} label what the map shows, in words.
 * @property {(row: number, column: number) => string} [describe] a cell in words.
 */

export class Heatmap {
  #canvas;
  #readout;
  #map = null;
  #over = null;
  /** Room that the names of the rows take, in pixels. */
  #gutter = 0;

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {HTMLElement | null} readout says what the pointer is over.
   */
  constructor(canvas, readout) {
    this.#canvas = canvas;
    this.#readout = readout;
    new ResizeObserver(() => this.#draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    if (readout === null) return;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => {
      this.#over = null;
      this.#read();
    });
  }

  /** @param {Map} map */
  show(map) {
    this.#map = map;
    this.#canvas.setAttribute("aria-label", map.label);
    // Rows have one height each, whatever the width: a deep model gets a taller map.
    const height = map.rows.length === 1 ? 18 : Math.max(7, Math.min(18, 420 / map.rows.length));
    this.#canvas.style.setProperty("height", `${Math.ceil(height * map.rows.length) + AXIS}px`);
    this.#draw();
    this.#read();
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (this.#map === null || width === 0) return;
    const scale = window.devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * scale);
    this.#canvas.height = Math.round(height * scale);
    const pen = this.#canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(this.#canvas);
    const ramp = Array.from({ length: STOPS }, (_, stop) =>
      channels(style.getPropertyValue(`--ramp-${stop}`)),
    );
    const { rows, columns, value } = this.#map;
    pen.font = `11px ${style.fontFamily}`;
    this.#gutter = Math.max(0, ...rows.map((name) => pen.measureText(name).width + 8));
    const cell = this.#cell();
    const gap = cell.width >= 5 ? 1 : 0;
    for (let row = 0; row < rows.length; row += 1) {
      for (let column = 0; column < columns.length; column += 1) {
        const share = value(row, column);
        if (share === null) continue;
        pen.fillStyle = colour(ramp, share);
        const x = cell.left + column * cell.width;
        pen.fillRect(
          x,
          row * cell.height,
          cell.width - gap,
          cell.height - (cell.height >= 5 ? 1 : 0),
        );
      }
    }
    pen.fillStyle = style.getPropertyValue("--soft");
    this.#names(pen, cell);
  }

  #names(pen, cell) {
    const { rows, columns } = this.#map;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (let row = 0; row < rows.length; row += Math.ceil(12 / cell.height)) {
      pen.fillText(rows[row], cell.left - 6, (row + 0.5) * cell.height);
    }
    pen.textAlign = "center";
    const named = columns.filter(Boolean);
    const widest = Math.max(0, ...named.map((name) => pen.measureText(name).width));
    // Every one of them, or every second, third and so on, as there is room.
    const step = named.length > 1 ? Math.ceil((widest + 4) / cell.width) : 1;
    columns.forEach((name, column) => {
      if (!name || column % step) return;
      const right = this.#canvas.clientWidth - pen.measureText(name).width / 2;
      const x = Math.min(cell.left + (column + 0.5) * cell.width, right);
      pen.fillText(name, x, rows.length * cell.height + AXIS / 2 + 1);
    });
  }

  #cell() {
    const { rows, columns } = this.#map;
    const left = rows.some(Boolean) ? Math.max(GUTTER, this.#gutter) : 0;
    return {
      left,
      width: (this.#canvas.clientWidth - left) / columns.length,
      height: (this.#canvas.clientHeight - AXIS) / rows.length,
    };
  }

  #point(event) {
    if (this.#map === null) return;
    const cell = this.#cell();
    const row = Math.floor(event.offsetY / cell.height);
    const column = Math.floor((event.offsetX - cell.left) / cell.width);
    const inside =
      row >= 0 && row < this.#map.rows.length && column >= 0 && column < this.#map.columns.length;
    this.#over = inside ? [row, column] : null;
    this.#read();
  }

  #read() {
    if (this.#readout === null) return;
    this.#readout.textContent = this.#over && this.#map ? this.#map.describe(...this.#over) : "";
  }
}

/** Red, green and blue of `#rrggbb`. */
function channels(hex) {
  const number = parseInt(hex.trim().slice(1), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

function colour(ramp, share) {
  const place = Math.max(0, Math.min(1, share)) * (ramp.length - 1);
  const stop = Math.min(Math.floor(place), ramp.length - 2);
  const mixed = ramp[stop].map((low, n) =>
    Math.round(low + (ramp[stop + 1][n] - low) * (place - stop)),
  );
  return `rgb(${mixed.join(" ")})`;
}
