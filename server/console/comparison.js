/** What the two columns have in common and what they do not, in one line above them. */

import { differences, words, wordsIn } from "./difference.js";

/** The middle of some numbers; null of none. */
export function median(numbers) {
  if (numbers.length === 0) return null;
  const ordered = [...numbers].sort((left, right) => left - right);
  const half = Math.floor(ordered.length / 2);
  return ordered.length % 2 ? ordered[half] : (ordered[half - 1] + ordered[half]) / 2;
}

/**
 * Show how the second column's answer relates to the first's, and mark where they differ.
 *
 * @param {HTMLElement} parent
 * @param {import("./column.js").Column} full
 * @param {import("./column.js").Column} chosen
 * @param {{rounds: number, together: boolean}} order in which they ran.
 */
export function compare(parent, full, chosen, order) {
  const [left, right] = [full.result, chosen.result];
  if (left === null || right === null) {
    parent.replaceChildren();
    return;
  }
  const marks = differences(left.text, right.text);
  full.mark(marks[0]);
  chosen.mark(marks[1]);
  const same = left.text === right.text && left.reasoning === right.reasoning;
  const verdict = part("verdict", same ? "Same answer" : "Answers differ");
  verdict.dataset.same = String(same);
  parent.replaceChildren(verdict, ...parts(left, right, marks, same, order));
}

function parts(left, right, marks, same, { rounds, together }) {
  const said = [];
  if (!same) said.push(part("soft", amount(left, right, marks)));
  const rate = ratio(median(right.rates), median(left.rates));
  if (rate !== null) said.push(figure(`${rate.toFixed(2)}×`, "the tokens/s"));
  const first = ratio(median(right.firsts), median(left.firsts));
  if (first !== null) said.push(figure(`${first.toFixed(2)}×`, "the time to the first token"));
  const compute = right.report?.generated?.compute_fraction;
  if (compute !== undefined) said.push(figure(percent(compute), "compute for the answer"));
  const unsteady = [left, right].some(({ texts }) => new Set(texts).size > 1);
  if (unsteady) said.push(part("soft", "Repeated runs gave other texts; the first is shown."));
  const how = together
    ? "Both ran at once: they shared the steps of a batch, and with them the speed."
    : rounds > 1
      ? `Medians of ${rounds} runs each, in turn.`
      : "One run each, in turn.";
  return [...said, part("soft", how)];
}

/** How much of the texts differs: the marked words of the one that has more of them. */
function amount(left, right, marks) {
  const [a, b] = [left, right].map(({ text }, side) => [wordsIn(text, marks[side]), words(text)]);
  const [marked, all] = b[0] >= a[0] ? b : a;
  if (!marked) return "in spaces or in the reasoning";
  return `${marked} of ${all} words ${marked === 1 ? "differs" : "differ"}`;
}

function ratio(over, base) {
  return over === null || !base ? null : over / base;
}

function percent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

function figure(value, words) {
  const shown = part("figure", ` ${words}`);
  const strong = document.createElement("b");
  strong.textContent = value;
  shown.prepend(strong);
  return shown;
}

function part(name, text) {
  const made = document.createElement("span");
  made.className = name;
  made.textContent = text;
  return made;
}
