/** A table of data, the first column of which names its row. */

/**
 * @param {string} caption
 * @param {string[]} heads
 * @param {(string | number)[][]} rows
 */
export function dataTable(caption, heads, rows) {
  const table = document.createElement("table");
  table.createCaption().textContent = caption;
  fill(table.createTHead().insertRow(), heads, () => "col");
  const body = table.createTBody();
  for (const row of rows) fill(body.insertRow(), row, (place) => (place === 0 ? "row" : null));
  return table;
}

/** Cells of a row; those with a scope are headers. */
function fill(row, values, scopeOf) {
  values.forEach((value, place) => {
    const scope = scopeOf(place);
    const cell = document.createElement(scope ? "th" : "td");
    if (scope) cell.scope = scope;
    cell.textContent = value;
    row.append(cell);
  });
}
