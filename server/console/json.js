/** JSON for people to read: indented, lists of numbers on one line. */
export function readable(value) {
  const text = JSON.stringify(value, null, 2);
  // A line feed behind the bracket: inside a string there is none.
  return text.replace(
    /\[\n([^[\]{}"]*)\]/g,
    (_, items) => `[${items.trim().replace(/\s+/g, " ")}]`,
  );
}
