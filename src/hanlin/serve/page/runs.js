// Replies that are being written: at most one a conversation, several conversations at once.

import { ApiError, chat } from "./api.js";
import { addNode, messagesFor, removeLeaf } from "./tree.js";

const KEEP_EVERY = 3000;

/** Events, each with detail { conversation, node }: "begin", "piece", "end". */
export class Runs extends EventTarget {
  /** `askKey()` resolves to whether there is a new key to try. */
  constructor(chats, askKey) {
    super();
    this.chats = chats;
    this.askKey = askKey;
    this.running = new Map();
    chats.busy = (id) => this.running.has(id);
  }

  of(id) {
    return this.running.get(id);
  }

  stop(id) {
    this.running.get(id)?.controller.abort();
  }

  /** Ask the model to go on below the message `parent`. */
  async start(conversation, parent, model) {
    if (this.running.has(conversation.id)) return;
    const body = requestBody(conversation, parent, model);
    const node = addNode(conversation, parent, { role: "assistant", model, state: "running" });
    const run = { controller: new AbortController(), node, began: performance.now() };
    this.running.set(conversation.id, run);
    this.tell("begin", conversation, node);
    this.chats.save(conversation, true);
    try {
      for (;;) {
        try {
          await this.read(conversation, node, run, body);
          break;
        } catch (error) {
          if (error.kind !== "key" || !(await this.askKey(error))) throw error;
          run.began = performance.now();
        }
      }
    } catch (error) {
      if (error.name === "AbortError") node.state = "stopped";
      else {
        node.state = "error";
        node.error = { kind: error instanceof ApiError ? error.kind : "broken", message: error.message, wait: error.retryAfter ?? undefined };
      }
    }
    this.running.delete(conversation.id);
    if (!this.chats.get(conversation.id)) return; // deleted meanwhile
    this.tell("end", conversation, node);
    await this.chats.save(conversation, true);
  }

  async read(conversation, node, run, body) {
    let kept = performance.now();
    let finish = "stop";
    for await (const piece of chat(body, run.controller.signal)) {
      const now = performance.now();
      if (piece.content !== undefined || piece.calls) {
        const seconds = (now - run.began) / 1000;
        node.timing = { first: node.timing?.first ?? seconds, last: seconds };
      }
      if (piece.content !== undefined) node.content += piece.content;
      if (piece.calls) addCalls(node, piece.calls);
      if (piece.usage) node.usage = { prompt_tokens: piece.usage.prompt_tokens ?? 0, completion_tokens: piece.usage.completion_tokens ?? 0 };
      if (piece.finish) finish = piece.finish;
      this.tell("piece", conversation, node);
      if (now - kept > KEEP_EVERY) {
        kept = now;
        this.chats.save(conversation);
      }
    }
    node.state = finish === "length" ? "length" : "done";
  }

  tell(name, conversation, node) {
    this.dispatchEvent(new CustomEvent(name, { detail: { conversation, node } }));
  }

  /** Drop a reply that failed before its first word, so that trying again does not pile them up. */
  static forget(conversation, node) {
    const below = Object.values(conversation.nodes).some((other) => other.parent === node.id);
    if (node.state === "error" && !node.content && !node.tool_calls?.length && !below) removeLeaf(conversation, node.id);
  }
}

/** The request that continues below a message. Settings left empty are the server's. */
export function requestBody(conversation, parent, model) {
  const { temperature, top_p, max_tokens, seed, stop } = conversation.settings;
  const body = { model, messages: messagesFor(conversation, parent), temperature, top_p, max_tokens, seed };
  if (stop?.length) body.stop = stop;
  if (conversation.tools.trim()) body.tools = JSON.parse(conversation.tools);
  return body;
}

/** Put pieces of tool calls together: each names its call by index, its arguments come in parts. */
export function addCalls(node, pieces) {
  node.tool_calls ??= [];
  for (const piece of pieces) {
    const index = Number.isInteger(piece.index) ? piece.index : node.tool_calls.length;
    if (index < 0 || index > 127) continue;
    while (node.tool_calls.length <= index) node.tool_calls.push({ id: "", type: "function", function: { name: "", arguments: "" } });
    const call = node.tool_calls[index];
    if (typeof piece.id === "string" && piece.id) call.id = piece.id;
    if (typeof piece.function?.name === "string") call.function.name += piece.function.name;
    if (typeof piece.function?.arguments === "string") call.function.arguments += piece.function.arguments;
  }
}

/** Tokens a second while a reply was written, or null. The first token is the prompt's work. */
export function rate({ usage, timing }) {
  if (!usage || !timing || usage.completion_tokens < 2) return null;
  const seconds = timing.last - timing.first;
  return seconds > 0.001 ? (usage.completion_tokens - 1) / seconds : null;
}
