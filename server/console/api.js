/** The public API of the server that this page came from, asked with the key of whoever is here. */

import { events } from "./events.js";

const V1 = new URL("../v1/", import.meta.url);
const HEALTH = new URL("../health", import.meta.url);

/** Where clients find the API. */
export const BASE_URL = V1.href.replace(/\/$/, "");

/** Something that the server refused, or that kept us from its answer. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, param?: string | null}} [more] HTTP status, 0 if there was none, and
   *   the dotted field that the server named.
   */
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export class Api {
  #key = "";

  /** Use a key from now on; an empty one is none. It stays in this object. */
  set key(key) {
    if (!/^[!-~]*$/.test(key)) {
      throw new ApiError("A key is visible ASCII without spaces.");
    }
    this.#key = key;
  }

  /** Whether requests carry a key. */
  get keyed() {
    return this.#key !== "";
  }

  /** Ask whether the server and its engine run; throws an ApiError if they do not. */
  async health(signal) {
    try {
      await this.#fetch(HEALTH, { signal });
    } catch (error) {
      if (!error.status) throw error;
      throw new ApiError(`The server is there, but its engine is not (${error.status}).`);
    }
  }

  /** JSON of a path below `/v1/`. */
  async get(path, signal) {
    const response = await this.#fetch(path, { signal });
    return response.json();
  }

  /**
   * Chunks of a streamed chat completion, as they come.
   *
   * Throws an ApiError if the server refuses, reports an error in the stream, or breaks off.
   */
  async *chat(body, signal) {
    const response = await this.#fetch("chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    try {
      for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw refusal(chunk.error, response.status);
        yield chunk;
      }
    } catch (error) {
      if (error instanceof ApiError || error.name === "AbortError") throw error;
      throw new ApiError(`The connection broke before the answer was complete (${error.message}).`);
    }
    throw new ApiError("The server ended the answer before it was complete.");
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.keyed) headers.Authorization = `Bearer ${this.#key}`;
    const settings = { ...options, headers, credentials: "omit", cache: "no-store" };
    let response;
    try {
      response = await fetch(new URL(path, V1), settings);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(`The server cannot be reached (${error.message}).`);
    }
    if (!response.ok) throw await refusalOf(response);
    return response;
  }
}

/** An error body, OpenAI's shape or vLLM's bare strings, as an ApiError. */
async function refusalOf(response) {
  const text = await response.text();
  let error = text || response.statusText;
  try {
    error = JSON.parse(text).error ?? error;
  } catch {
    // Not JSON: the text itself says what is wrong.
  }
  const found = refusal(error, response.status);
  const wait = response.headers.get("Retry-After");
  if (wait !== null) found.message += ` Retry after ${wait} s.`;
  return found;
}

function refusal(error, status) {
  const { message, param } = typeof error === "string" ? { message: error } : error;
  return new ApiError(message ?? JSON.stringify(error), { status, param });
}
