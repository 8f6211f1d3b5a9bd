/** Answers of `/v1/routing/utilization` and what lies between two of them. */

/** Wire names of a layer's modules. */
export const MODULES = ["attention", "mlp"];

/**
 * Counts between two answers, in their shape; null if the counters began anew in between.
 *
 * @param {object | null} before null counts from the server's start.
 * @param {object} after
 */
export function difference(before, after) {
  const since = {
    layers: after.layers.map((layer, n) => ({
      layer: layer.layer,
      ...Object.fromEntries(
        MODULES.map((module) => [module, less(layer[module], before?.layers[n]?.[module])]),
      ),
    })),
    experts: after.experts && {
      layers: after.experts.layers,
      selections: after.experts.selections.map((row, n) =>
        less(row, before?.experts?.selections[n]),
      ),
      masked: less(after.experts.masked, before?.experts?.masked),
    },
  };
  const counts = [
    ...since.layers.flatMap((layer) => MODULES.flatMap((module) => Object.values(layer[module]))),
    ...(since.experts ? [...since.experts.selections.flat(), ...since.experts.masked] : []),
  ];
  return counts.some((count) => count < 0) ? null : since;
}

/**
 * Share of a layer's token rows that ran, of one module or of both; null if there were none.
 *
 * @param {object} layer of a difference.
 * @param {string} module empty for both.
 */
export function shareRun(layer, module) {
  const counted = module ? [layer[module]] : MODULES.map((name) => layer[name]);
  const rows = sum(counted.flatMap((outcomes) => Object.values(outcomes)));
  return rows ? sum(counted.map((outcomes) => outcomes.executed)) / rows : null;
}

/** Whether anything ran. */
export function anyRows(since) {
  return since.layers.some((layer) => shareRun(layer, "") !== null);
}

/** Each of a layer's selections as a share of them all; null each if there were none. */
export function expertShares(row) {
  const all = sum(row);
  return row.map((count) => (all ? count / all : null));
}

export function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

/** Numbers less others of the same names or places; others that are not there are 0. */
function less(after, before) {
  if (Array.isArray(after)) return after.map((count, n) => count - (before?.[n] ?? 0));
  return Object.fromEntries(
    Object.entries(after).map(([name, count]) => [name, count - (before?.[name] ?? 0)]),
  );
}
