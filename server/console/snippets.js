/** A request as text to run elsewhere: a shell command, a Python program. Keys are never in it. */

const KEY_VARIABLE = "OPENAI_API_KEY";

/** Fields that the OpenAI client has arguments for; the others go through its `extra_body`. */
const ARGUMENTS = new Set([
  "model",
  "messages",
  "max_tokens",
  "temperature",
  "stream",
  "stream_options",
]);

/**
 * A command for a POSIX shell.
 *
 * @param {string} baseUrl of the API, without a slash at the end.
 * @param {object} body of the chat completion.
 * @param {boolean} keyed whether the server needs a key.
 */
export function asCurl(baseUrl, body, keyed) {
  return [
    `curl --no-buffer ${quoted(`${baseUrl}/chat/completions`)}`,
    `-H ${quoted("Content-Type: application/json")}`,
    ...(keyed ? [`-H "Authorization: Bearer $${KEY_VARIABLE}"`] : []),
    `--data-raw ${quoted(JSON.stringify(body, null, 2))}`,
  ].join(" \\\n  ");
}

/** A program for the OpenAI client that prints the answer and, if one was asked for, the report. */
export function asPython(baseUrl, body, keyed) {
  const given = Object.entries(body).filter(([name]) => ARGUMENTS.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !ARGUMENTS.has(name)));
  if (Object.keys(extra).length) given.push(["extra_body", extra]);
  const key = keyed ? `os.environ[${literal(KEY_VARIABLE)}]` : literal("none");
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(baseUrl)}, api_key=${key})`,
    "stream = client.chat.completions.create(",
    ...given.map(([name, value]) => `    ${name}=${literal(value, 1)},`),
    ")",
    "report = None",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
    '    report = getattr(chunk, "routing", report)',
    "print()",
    "if report is not None:",
    "    print(report)",
    "",
  ].join("\n");
}

/** Text as one word of a POSIX shell. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A JSON value as a Python literal; objects and lists of objects go over several lines. */
function literal(value, depth = 0) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  // What JSON escapes in a string, Python reads alike.
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const parts = isList
    ? value.map((item) => literal(item, depth + 1))
    : Object.entries(value).map(
        ([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`,
      );
  const [open, close] = isList ? "[]" : "{}";
  const short = `${open}${parts.join(", ")}${close}`;
  if (short.length < 72 && !short.includes("\n")) return short;
  const indent = "    ".repeat(depth + 1);
  return `${open}\n${parts.map((part) => `${indent}${part},\n`).join("")}${"    ".repeat(depth)}${close}`;
}
