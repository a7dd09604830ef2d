// The server, through OpenAI's API at this page's own address.

import { secret } from "./store.js";

const LONGEST_EVENT = 64 << 20;
const STREAMED = { include_usage: true, continuous_usage_stats: true };

/** Anything that went wrong between here and the model. `kind`: key, busy, refused, server, unreachable, broken. */
export class ApiError extends Error {
  constructor(kind, message, { status = 0, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, retryAfter });
  }
}

async function request(path, { body, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (secret.get()) headers.Authorization = `Bearer ${secret.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  let answer;
  try {
    answer = await fetch(new URL(path, location.origin + location.pathname), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", error.message);
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

async function failure(answer) {
  const text = (await answer.text().catch(() => "")).slice(0, 20000);
  let message = "";
  try {
    const { error, detail } = JSON.parse(text);
    message = error?.message ?? (typeof error === "string" ? error : "") ?? "";
    message ||= typeof detail === "string" ? detail : "";
  } catch {
    // not JSON: a proxy's page, say
  }
  const { status } = answer;
  const kind = status === 401 ? "key" : status === 429 || status === 503 ? "busy" : status >= 500 ? "server" : "refused";
  const wait = Number.parseFloat(answer.headers.get("Retry-After") ?? "");
  return new ApiError(kind, String(message || `HTTP ${status} ${answer.statusText}`), { status, retryAfter: Number.isFinite(wait) ? wait : null });
}

/** The models served: [{ id, max_model_len?, input_modalities? }]. */
export async function listModels() {
  const { data } = await (await request("v1/models")).json();
  return (Array.isArray(data) ? data : []).filter((model) => typeof model?.id === "string");
}

/** One reply, as it comes: { content }, { calls: [...] }, { finish }, { usage }. Aborting `signal` stops the model, too. */
export async function* chat(body, signal) {
  const answer = await request("v1/chat/completions", { body: { ...body, stream: true, stream_options: STREAMED }, signal });
  let finished = false;
  try {
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") return;
      const chunk = parsed(data);
      if (chunk.error) throw new ApiError("server", String(chunk.error.message ?? chunk.error));
      const choice = chunk.choices?.[0];
      if (typeof choice?.delta?.content === "string" && choice.delta.content) yield { content: choice.delta.content };
      if (Array.isArray(choice?.delta?.tool_calls)) yield { calls: choice.delta.tool_calls };
      if (choice?.finish_reason) {
        finished = true;
        yield { finish: choice.finish_reason };
      }
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("broken", error.message);
  }
  if (!finished) throw new ApiError("broken", "");
}

function parsed(data) {
  try {
    return Object(JSON.parse(data));
  } catch {
    throw new ApiError("broken", data.slice(0, 200));
  }
}

/** The `data` of each server-sent event in a stream of bytes. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let waiting = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      waiting += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = waiting.split(/\r\n|\n|\r(?!$)/);
      waiting = lines.pop();
      if (waiting.length > LONGEST_EVENT) throw new ApiError("broken", "an event without an end");
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) yield data.splice(0).join("\n");
      }
      if (done) break;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
