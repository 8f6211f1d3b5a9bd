/** From what the form holds to the body of a chat completion. */

/**
 * @param {{model: string, system: string, prompt: string, maxTokens: number | null,
 *   temperature: number | null}} fields null is not given.
 * @param {unknown} routing undefined is not given.
 */
export function chatBody(fields, routing) {
  const messages = [{ role: "user", content: fields.prompt }];
  if (fields.system) messages.unshift({ role: "system", content: fields.system });
  return {
    model: fields.model,
    messages,
    ...(fields.maxTokens === null ? {} : { max_tokens: fields.maxTokens }),
    ...(fields.temperature === null ? {} : { temperature: fields.temperature }),
    stream: true,
    // The second makes the number of tokens exact while it streams: a chunk may hold several.
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(routing === undefined ? {} : { routing }),
  };
}

/** What the form's fields hold. */
export function formFields(form) {
  const number = (id) => (form.elements[id].value === "" ? null : Number(form.elements[id].value));
  return {
    model: form.elements.model.value,
    system: form.elements.system.value,
    prompt: form.elements.prompt.value,
    maxTokens: number("max-tokens"),
    temperature: number("temperature"),
  };
}
