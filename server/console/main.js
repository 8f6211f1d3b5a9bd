/** The console: connects to the server, and runs a prompt at full depth and under the policy. */

import { Api, ApiError } from "./api.js";
import { Column } from "./column.js";
import { Maps } from "./maps.js";
import { Policy } from "./policy.js";
import { chatBody, formFields } from "./request.js";

const at = (id) => document.getElementById(id);
const form = at("request");
const api = new Api();

const full = new Column(at("columns"), "Full depth");
const chosen = new Column(at("columns"), "Under the policy");
const maps = new Maps(api, (error) => {
  if (error) say(`No look at what runs: ${error.message}`, true);
  else if (at("connection").dataset.problem) say("Connected.");
});
const policy = new Policy(form, offer);
let supported = true;
let stop = new AbortController();

/** Say how things are with the server. */
function say(text, problem = false) {
  if (at("connection").textContent !== text) at("connection").textContent = text;
  if (problem) at("connection").dataset.problem = "yes";
  else delete at("connection").dataset.problem;
}

/** Ask the server what it serves and what it can do, and set the controls up. */
async function connect() {
  say("Connecting.");
  try {
    const [capabilities, presets, models] = await Promise.all(
      ["routing/capabilities", "routing/presets", "models"].map((path) => api.get(path)),
    );
    supported = capabilities.supported;
    const named = new Set(presets.data.map((preset) => preset.model));
    const ids = models.data.map((card) => card.id).filter((id) => !named.has(id));
    form.elements.model.replaceChildren(...ids.map((id) => new Option(id)));
    at("model-field").hidden = ids.length === 1;
    at("facts").textContent = factsOf(capabilities);
    policy.offer(capabilities, presets.data);
    await maps.connect();
    say("Connected.");
  } catch (error) {
    if (error.status !== 401) say(error.message, true);
    else if (api.keyed) say(`The server does not know this key (${error.message}).`, true);
    else say(`This server needs a key: enter it here (${error.message}).`, true);
    if (!(error instanceof ApiError)) throw error;
  }
}

function factsOf({ model, layers, experts_routing: { experts_per_layer: experts, top_k: topK } }) {
  return `${model}: ${layers} layers${experts ? `, ${experts} experts a layer, ${topK} per token` : ", no experts"}`;
}

/** The two requests that the form stands for; throws a SyntaxError if `routing` is not JSON. */
function requests() {
  const fields = formFields(form);
  return [
    chatBody(fields, supported ? { report: true } : undefined),
    chatBody(fields, policy.routing()),
  ];
}

/** Show the requests beside the columns before anything was sent. */
function offer() {
  try {
    const [depth, routed] = requests();
    full.offer(depth, api.keyed);
    chosen.offer(routed, api.keyed);
  } catch (error) {
    // The editor says what is wrong with its text.
    if (!(error instanceof SyntaxError)) throw error;
  }
}

async function run() {
  let bodies;
  try {
    bodies = requests();
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    form.elements.routing.focus();
    return;
  }
  stop.abort();
  const mine = (stop = new AbortController());
  at("stop").setAttribute("aria-disabled", "false");
  const columns = [full, chosen];
  const runs = columns.map((column, n) => column.begin(bodies[n], api.keyed));
  const send = (column, n) => column.send(api, runs[n], mine.signal);
  await maps.during(async () => {
    if (!form.elements["in-turn"].checked) return Promise.all(columns.map(send));
    for (const [n, column] of columns.entries()) await send(column, n);
  });
  if (stop === mine) at("stop").setAttribute("aria-disabled", "true");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("input", offer);
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  form.requestSubmit();
});
at("stop").addEventListener("click", () => stop.abort());
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    api.key = at("key").value;
  } catch (error) {
    say(error.message, true);
    return;
  }
  connect();
});

connect();
