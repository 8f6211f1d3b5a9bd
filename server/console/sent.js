/** The request of a column, as text to copy. */

import { BASE_URL } from "./api.js";
import { asCurl, asPython } from "./snippets.js";

const SNIPPETS = { curl: asCurl, python: asPython };

export class Sent {
  #element;
  #announce;

  /**
   * @param {HTMLElement} element `.sent` of a column.
   * @param {string} title of the column.
   * @param {(text: string) => void} announce says something to screen readers.
   */
  constructor(element, title, announce) {
    this.#element = element;
    this.#announce = announce;
    for (const button of element.querySelectorAll("[data-copy]")) {
      button.setAttribute("aria-label", `${button.textContent}: ${title}`);
      button.addEventListener("click", () => this.#copy(button.dataset.copy));
    }
  }

  /**
   * @param {object} body of a chat completion.
   * @param {boolean} keyed whether it carries a key.
   * @param {string} note when it is sent.
   */
  show(body, keyed, note) {
    this.#element.querySelector(".note").textContent =
      `${note}${keyed ? " The key is read from OPENAI_API_KEY." : ""}`;
    for (const [name, write] of Object.entries(SNIPPETS)) {
      this.#snippet(name).textContent = write(BASE_URL, body, keyed);
    }
  }

  async #copy(name) {
    const pre = this.#snippet(name);
    let said = `Copied as ${name}.`;
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      // Without HTTPS, browsers give pages of other hosts no clipboard.
      getSelection().selectAllChildren(pre);
      pre.focus();
      said = "Selected: press Ctrl+C to copy.";
    }
    this.#announce(said);
    this.#element.querySelector(".note").textContent = said;
  }

  #snippet(name) {
    return this.#element.querySelector(`[data-snippet="${name}"]`);
  }
}
