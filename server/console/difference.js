/** Where two texts differ, by words. */

/** Words, signs, and what lies between them. */
const PARTS = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;

/** Pairs of words that are compared at most; behind that, all of the rest counts as different. */
const MOST_PAIRS = 4_000_000;

/** @typedef {[number, number]} Range offsets in a text, from and behind */

/**
 * Parts of either text that are not in the longest common sequence of both.
 *
 * @param {string} left
 * @param {string} right
 * @returns {[Range[], Range[]]} ascending, for each text.
 */
export function differences(left, right) {
  const texts = [left, right].map((text) => text.match(PARTS) ?? []);
  const [a, b] = texts;
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start += 1;
  let tail = 0;
  const room = Math.min(a.length, b.length) - start;
  while (tail < room && a.at(-1 - tail) === b.at(-1 - tail)) tail += 1;
  const middles = texts.map((parts) => parts.slice(start, parts.length - tail));
  const common = commonParts(...middles);
  return texts.map((parts, side) => {
    const same = new Set(common.map((pair) => pair[side] + start));
    const inMiddle = (place) => place >= start && place < parts.length - tail;
    return ranges(parts, (place) => inMiddle(place) && !same.has(place));
  });
}

/** Words in some ranges of a text. */
export function wordsIn(text, marks) {
  return marks.reduce((sum, [from, to]) => sum + words(text.slice(from, to)), 0);
}

/** Words and signs of a text. */
export function words(text) {
  return (text.match(PARTS) ?? []).filter((part) => part.trim()).length;
}

/** Places, in `a` and in `b`, of a longest common sequence. */
function commonParts(a, b) {
  if (a.length * b.length > MOST_PAIRS) return [];
  const width = b.length + 1;
  // Length of the longest common sequence of what is behind each pair of places.
  const longest = new Uint32Array((a.length + 1) * width);
  for (let n = a.length - 1; n >= 0; n -= 1) {
    for (let m = b.length - 1; m >= 0; m -= 1) {
      longest[n * width + m] =
        a[n] === b[m]
          ? longest[(n + 1) * width + m + 1] + 1
          : Math.max(longest[(n + 1) * width + m], longest[n * width + m + 1]);
    }
  }
  const pairs = [];
  for (let n = 0, m = 0; n < a.length && m < b.length;) {
    if (a[n] === b[m]) {
      pairs.push([n, m]);
      n += 1;
      m += 1;
    } else if (longest[(n + 1) * width + m] >= longest[n * width + m + 1]) n += 1;
    else m += 1;
  }
  return pairs;
}

/** Ranges of the parts for which something holds, neighbours joined. */
function ranges(parts, holds) {
  const joined = [];
  let offset = 0;
  parts.forEach((part, place) => {
    const end = offset + part.length;
    if (holds(place)) {
      if (joined.at(-1)?.[1] === offset) joined.at(-1)[1] = end;
      else joined.push([offset, end]);
    }
    offset = end;
  });
  return joined;
}
