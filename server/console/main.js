/** The console: connects to the server, and runs a prompt at full depth and under the policy. */

import { Api, ApiError } from "./api.js";
import { Column } from "./column.js";
import { compare } from "./comparison.js";
import { Heartbeat } from "./heartbeat.js";
import { Maps } from "./maps.js";
import { Policy } from "./policy.js";
import { chatBody, formFields } from "./request.js";

const IN_TURN = "Each has the server to itself.";
const AT_ONCE = "Both share the steps of one batch, and with them the speed.";

const at = (id) => document.getElementById(id);
const form = at("request");
const api = new Api();

const full = new Column(at("columns"), "Full depth");
const chosen = new Column(at("columns"), "Under the policy");
const maps = new Maps(api, (error) => {
  if (error) {
    say(`No look at what runs: ${error.message}`, true);
    heartbeat.check();
  } else if (at("connection").dataset.problem) say("Connected.");
});
const policy = new Policy(form, offer);
const heartbeat = new Heartbeat(api, serverChanged);
let supported = true;
/** What the controls were set up for, as text. */
let described = null;
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
    const answers = await Promise.all(
      ["routing/capabilities", "routing/presets", "models"].map((path) => api.get(path)),
    );
    setUp(...answers);
    offer();
    await maps.connect();
    say("Connected.");
  } catch (error) {
    if (error.status !== 401) say(error.message, true);
    else if (api.keyed) say(`The server does not know this key (${error.message}).`, true);
    else say(`This server needs a key: enter it here (${error.message}).`, true);
    if (!(error instanceof ApiError)) throw error;
  }
}

function setUp(capabilities, presets, models) {
  supported = capabilities.supported;
  const named = new Set(presets.data.map((preset) => preset.model));
  const ids = models.data.map((card) => card.id).filter((id) => !named.has(id));
  const text = JSON.stringify([capabilities, presets, ids]);
  // The same server, back again: what was chosen stays.
  if (text === described) return;
  described = text;
  form.elements.model.replaceChildren(...ids.map((id) => new Option(id)));
  at("model-field").hidden = ids.length === 1;
  at("facts").textContent = factsOf(capabilities);
  offerExamples(capabilities.examples);
  policy.offer(capabilities, presets.data);
}

function factsOf({ model, layers, experts_routing: { experts_per_layer: experts, top_k: topK } }) {
  return `${model}: ${layers} layers${experts ? `, ${experts} experts a layer, ${topK} per token` : ", no experts"}`;
}

function offerExamples(examples) {
  const buttons = Object.entries(examples).map(([name, prompt]) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: name, title: prompt });
    button.addEventListener("click", () => write(prompt));
    return button;
  });
  at("examples").replaceChildren(...buttons);
  if (form.elements.prompt.value === "") write(Object.values(examples)[0]);
}

function write(prompt) {
  form.elements.prompt.value = prompt;
  offer();
}

/** The server went, or is back. */
function serverChanged(since, error) {
  const gone = since !== null;
  at("policy").disabled = at("actions").disabled = form.elements.model.disabled = gone;
  at("gone").textContent = gone
    ? `No server since ${since.toLocaleTimeString()}: ${error.message} This page looks for it every few seconds.`
    : "";
  // The bar says it.
  at("connection").hidden = gone;
  if (!gone) connect();
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
  at("comparison").replaceChildren();
  const together = form.elements.order.value === "once";
  const rounds = together ? 1 : Number(form.elements.rounds.value);
  const columns = [full, chosen];
  columns.forEach((column, n) => column.begin(bodies[n], api.keyed, rounds));
  await maps.during(() => (together ? sendAll(columns, mine) : sendInTurn(columns, rounds, mine)));
  if (stop !== mine) return;
  at("stop").setAttribute("aria-disabled", "true");
  compare(at("comparison"), full, chosen, { rounds, together });
}

function sendAll(columns, { signal }) {
  return Promise.all(columns.map((column) => column.send(api, 0, signal)));
}

/** Rounds of one request after the other, so that what slows the machine slows both. */
async function sendInTurn(columns, rounds, mine) {
  const failed = new Set();
  for (let round = 0; round < rounds; round += 1) {
    for (const column of columns) {
      if (stop !== mine) return;
      if (failed.has(column)) continue;
      if (!(await column.send(api, round, mine.signal))) failed.add(column);
    }
  }
}

function showOrder() {
  const together = form.elements.order.value === "once";
  form.elements.rounds.disabled = together;
  at("order-note").textContent = together ? AT_ONCE : IN_TURN;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("input", offer);
for (const radio of form.elements.order) radio.addEventListener("change", showOrder);
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (!at("actions").disabled) form.requestSubmit();
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

showOrder();
connect();
