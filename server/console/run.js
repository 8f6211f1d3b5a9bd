/** One request while it runs: its text, its clock, and what the server reports of it at the end. */

/**
 * Milliseconds that tokens must span to have a speed. A page that is busy gets chunks in bursts, long
 * after they came.
 */
const SHORTEST = 50;

/**
 * @typedef {object} Piece a part of the answer's text, as it came
 * @property {string} text
 * @property {number} first index of its first token among those generated.
 * @property {number} end index behind its last token.
 */

export class Run {
  /** Text so far, and that of the model's reasoning where the server tells them apart. */
  text = "";
  reasoning = "";
  /** @type {Piece[]} the text in the chunks that it came in. */
  pieces = [];
  /** Generated tokens so far. */
  tokens = 0;
  /** `routing` of the closing chunk, or null. */
  report = null;
  /** Why the model stopped, as the server names it; null before that. */
  finish = null;

  #body;
  #start = 0;
  #first = null;
  #last = null;
  #firstTokens = 0;
  /** Tokens that have text by now: one may wait for the rest of its letter. */
  #written = 0;

  /** @param {object} body of a chat completion. */
  constructor(body) {
    this.#body = body;
  }

  /**
   * Send the request and read its answer to the end.
   *
   * @param {import("./api.js").Api} api
   * @param {AbortSignal} signal
   * @param {() => void} changed called after each chunk.
   */
  async send(api, signal, changed) {
    this.#start = performance.now();
    for await (const chunk of api.chat(this.#body, signal)) {
      this.#take(chunk);
      changed();
    }
  }

  /** Milliseconds until the first token, or null. */
  get firstToken() {
    return this.#first === null ? null : this.#first - this.#start;
  }

  /** Tokens per second behind the first chunk of them; null while that says nothing. */
  get rate() {
    const span = this.#last - this.#first;
    return span >= SHORTEST ? (1000 * (this.tokens - this.#firstTokens)) / span : null;
  }

  #take(chunk) {
    const choice = chunk.choices?.[0];
    this.finish = choice?.finish_reason ?? this.finish;
    this.report = chunk.routing ?? this.report;
    const tokens = chunk.usage?.completion_tokens ?? this.tokens;
    if (tokens > this.tokens) {
      this.tokens = tokens;
      this.#last = performance.now();
      if (this.#first === null) {
        this.#first = this.#last;
        this.#firstTokens = tokens;
      }
    }
    this.#write(choice?.delta?.content ?? "", choice?.delta?.reasoning ?? "");
  }

  #write(text, reasoning) {
    this.text += text;
    this.reasoning += reasoning;
    if (!text && !reasoning) return;
    const first = Math.max(0, Math.min(this.#written, this.tokens - 1));
    if (text) this.pieces.push({ text, first, end: Math.max(this.tokens, first + 1) });
    this.#written = this.tokens;
  }
}
