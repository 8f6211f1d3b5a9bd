/** Whether the server is there, asked for as long as the page is looked at. */

/** Milliseconds between two questions, and after which one is given up. */
const INTERVAL = 3000;
const LIMIT = 15000;

export class Heartbeat {
  #api;
  #changed;
  #gone = null;
  #timer = null;

  /**
   * @param {import("./api.js").Api} api
   * @param {(since: Date | null, error: Error | null) => void} changed called when the server goes,
   *   with the time, and when it is back, with null.
   */
  constructor(api, changed) {
    this.#api = api;
    this.#changed = changed;
    document.addEventListener("visibilitychange", () => this.check());
    this.#wait();
  }

  /** Ask now. */
  async check() {
    clearTimeout(this.#timer);
    this.#timer = null;
    let problem = null;
    try {
      await this.#api.health(AbortSignal.timeout(LIMIT));
    } catch (error) {
      problem = error;
    }
    if ((problem === null) !== (this.#gone === null)) {
      this.#gone = problem && new Date();
      this.#changed(this.#gone, problem);
    }
    this.#wait();
  }

  #wait() {
    clearTimeout(this.#timer);
    if (document.visibilityState === "visible")
      this.#timer = setTimeout(() => this.check(), INTERVAL);
  }
}
