/** An answer's text: each token in the colour of the layer it left after, differences marked. */

/** Pieces that are shown one by one; of longer answers, neighbours of one layer are joined. */
const MOST_PIECES = 2000;

/**
 * The nodes of a text.
 *
 * @param {import("./run.js").Run} run
 * @param {[number, number][]} marked ranges of its text, ascending.
 * @returns {Node[]} whose texts together are the run's.
 */
export function answerNodes(run, marked) {
  const layers = run.report?.token_layers;
  const pieces = layers ? colouredPieces(run.pieces, layers) : [{ text: run.text }];
  const last = (run.report?.layers?.length ?? 1) - 1;
  const nodes = [];
  let offset = 0;
  for (const piece of pieces) {
    for (const [text, differs] of cut(piece.text, offset, marked)) {
      nodes.push(node(text, differs, piece, last));
    }
    offset += piece.text.length;
  }
  return nodes;
}

/** How many tokens of an answer left after which layer, in words; the deepest last. */
export function exitCounts(layers) {
  const counts = new Map();
  for (const layer of layers) counts.set(layer, (counts.get(layer) ?? 0) + 1);
  const ordered = [...counts].sort(([left], [right]) => left - right);
  return ordered.map(([layer, count]) => `${count} after ${layer}`).join(", ");
}

/** Pieces with the layers of their tokens; a piece of several tokens has several. */
function colouredPieces(pieces, layers) {
  const each = pieces.map((piece) => ({ ...piece, layers: layers.slice(piece.first, piece.end) }));
  if (each.length <= MOST_PIECES) return each;
  const joined = [];
  for (const piece of each) {
    const before = joined.at(-1);
    if (before && Math.max(...before.layers) === Math.max(...piece.layers)) {
      before.text += piece.text;
      before.end = piece.end;
    } else joined.push(piece);
  }
  return joined;
}

/** A text in parts that are in one of the ranges, or in none. */
function* cut(text, offset, marked) {
  let at = 0;
  for (const [from, to] of marked) {
    const [start, end] = [from - offset, to - offset].map((n) =>
      Math.max(at, Math.min(text.length, n)),
    );
    if (start > at) yield [text.slice(at, start), false];
    if (end > start) yield [text.slice(start, end), true];
    at = end;
  }
  if (at < text.length) yield [text.slice(at), false];
}

function node(text, differs, { layers, first, end }, last) {
  if (!layers?.length && !differs) return document.createTextNode(text);
  const shown = document.createElement(differs ? "mark" : "span");
  shown.textContent = text;
  if (!layers?.length) return shown;
  // Several tokens that came in one chunk have the colour of the one that went deepest.
  const deepest = Math.max(...layers);
  shown.className = "token";
  shown.dataset.layer = String(deepest);
  paint(shown.style, last ? deepest / last : 1);
  const tokens = end - first > 1 ? `tokens ${first + 1} to ${end}` : `token ${first + 1}`;
  shown.title = `${tokens}, left after layer ${[...new Set(layers)].join(", ")}`;
  return shown;
}

/** Two neighbouring stops of the ramp and the way between them, for `.token` to mix. */
function paint(style, share) {
  const place = Math.max(0, Math.min(1, share)) * 4;
  const stop = Math.min(Math.floor(place), 3);
  style.setProperty("--low", `var(--ramp-${stop})`);
  style.setProperty("--high", `var(--ramp-${stop + 1})`);
  style.setProperty("--part", `${(100 * (place - stop)).toFixed(0)}%`);
}
