// A conversation as plain data: a tree of messages, of which one path is shown. Editing or asking again adds a branch.
//
// conversation: { id, title, created, updated, system, settings, tools, nodes: { id: node }, leaf }
// node: { id, parent, role, content, at, ... }; a reply also has model, tool_calls, state, usage, timing, error; a
// question may have images, as data URIs

import { newId } from "./dom.js";
import { isPicture } from "./pictures.js";

export const FORMAT = "hanlin-conversations";
const MOST = { conversations: 10000, nodes: 20000, text: 8 << 20, calls: 128, images: 8 };
const STATES = ["running", "done", "length", "stopped", "error"];
const ROLES = ["user", "assistant", "tool"];

/** A new, empty conversation. */
export function newConversation({ system = "", settings = {}, tools = "" } = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system, settings: { ...settings }, tools, nodes: {}, leaf: null };
}

/** Add a message below `parent` (null: at the beginning) and show it. */
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, at: Date.now(), content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  return node;
}

/** The messages shown, first to last. */
export function path(conversation) {
  const out = [];
  const seen = new Set();
  for (let id = conversation.leaf; id && conversation.nodes[id] && !seen.has(id); id = conversation.nodes[id].parent) {
    seen.add(id);
    out.push(conversation.nodes[id]);
  }
  return out.reverse();
}

/** A message and its alternatives, oldest first. */
export function siblings(conversation, node) {
  const all = Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
  return all.sort((a, b) => a.at - b.at || (a.id < b.id ? -1 : 1));
}

/** Show that message, and below it whatever was said last. */
export function show(conversation, id) {
  let leaf = id;
  for (;;) {
    const below = Object.values(conversation.nodes).filter((node) => node.parent === leaf);
    if (!below.length) break;
    leaf = below.reduce((a, b) => (b.at >= a.at ? b : a)).id;
  }
  conversation.leaf = leaf;
}

/** Remove a message that has nothing below it. */
export function removeLeaf(conversation, id) {
  const { parent } = conversation.nodes[id];
  delete conversation.nodes[id];
  if (conversation.leaf === id) conversation.leaf = parent;
}

/** What the model is sent: the messages down to `id`, in OpenAI's form. */
export function messagesFor(conversation, id) {
  const out = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const node of path({ ...conversation, leaf: id })) {
    const calls = node.tool_calls?.length ? node.tool_calls : null;
    if (node.role === "assistant" && !node.content && !calls) continue; // a reply that failed
    if (node.role === "tool") out.push({ role: "tool", content: node.content, tool_call_id: node.tool_call_id });
    else out.push({ role: node.role, content: contentOf(node), ...(calls ? { tool_calls: calls } : {}) });
  }
  return out;
}

/** What was said, and what was shown with it. */
function contentOf({ content, images }) {
  if (!images?.length) return content;
  return [...images.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: content }];
}

/** What a conversation is called until somebody names it: its first words. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = Object.values(conversation.nodes).filter((node) => node.role === "user").sort((a, b) => a.at - b.at)[0];
  return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 80) : "";
}

/** Whether the title or any message holds the words. */
export function holds(conversation, words) {
  const wanted = words.trim().toLocaleLowerCase();
  if (!wanted) return true;
  const said = [titleOf(conversation), ...Object.values(conversation.nodes).map((node) => node.content)];
  return said.some((text) => text.toLocaleLowerCase().includes(wanted));
}

/** Conversations as a file's text. */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations }, null, 1);
}

/** Conversations read from a file's text. Whatever is not ours is left out; a text that is no export throws an Error. */
export function imported(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("json");
  }
  if (data?.format !== FORMAT || data.version !== 1 || !Array.isArray(data.conversations)) throw new Error("format");
  if (data.conversations.length > MOST.conversations) throw new Error("format");
  return data.conversations.map(conversationFrom);
}

const string = (value, most = MOST.text) => (typeof value === "string" ? value.slice(0, most) : "");
const number = (value, otherwise) => (Number.isFinite(value) ? value : otherwise);
const identifier = (value) => (typeof value === "string" && /^[\w-]{1,64}$/.test(value) && value !== "__proto__" ? value : null);

function conversationFrom(given) {
  if (given === null || typeof given !== "object") throw new Error("format");
  const conversation = newConversation({ system: string(given.system), tools: string(given.tools), settings: settingsFrom(given.settings) });
  conversation.id = identifier(given.id) ?? conversation.id;
  conversation.title = string(given.title, 200);
  conversation.created = number(given.created, conversation.created);
  conversation.updated = number(given.updated, conversation.updated);
  for (const item of Object.values(Object(given.nodes)).slice(0, MOST.nodes)) {
    const node = nodeFrom(item);
    if (node) conversation.nodes[node.id] = node;
  }
  for (const node of Object.values(conversation.nodes)) if (!conversation.nodes[node.parent]) node.parent = null;
  const leaf = identifier(given.leaf);
  conversation.leaf = leaf && conversation.nodes[leaf] ? leaf : (Object.keys(conversation.nodes).at(-1) ?? null);
  return conversation;
}

/** Sampling settings, those that are of the right kind. */
export function settingsFrom(given) {
  const out = {};
  const from = Object(given);
  if (typeof from.model === "string") out.model = from.model.slice(0, 300);
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (Number.isFinite(from[name])) out[name] = from[name];
  if (Array.isArray(from.stop)) out.stop = from.stop.filter((item) => typeof item === "string" && item).slice(0, 16);
  return out;
}

function nodeFrom(given) {
  const item = Object(given);
  const id = identifier(item.id);
  if (!id || !ROLES.includes(item.role)) return null;
  const node = { id, parent: identifier(item.parent), role: item.role, content: string(item.content), at: number(item.at, 0) };
  const images = item.role === "user" && Array.isArray(item.images) ? item.images.filter(isPicture).slice(0, MOST.images) : [];
  if (images.length) node.images = images;
  if (typeof item.model === "string") node.model = item.model.slice(0, 300);
  if (typeof item.tool_call_id === "string") node.tool_call_id = item.tool_call_id.slice(0, 300);
  if (typeof item.name === "string") node.name = item.name.slice(0, 300);
  if (item.role === "assistant") node.state = STATES.includes(item.state) && item.state !== "running" ? item.state : "stopped";
  if (Array.isArray(item.tool_calls)) node.tool_calls = item.tool_calls.slice(0, MOST.calls).map(callFrom);
  if (item.usage) node.usage = { prompt_tokens: number(item.usage.prompt_tokens, 0), completion_tokens: number(item.usage.completion_tokens, 0) };
  if (item.timing) node.timing = { first: number(item.timing.first, 0), last: number(item.timing.last, 0) };
  if (item.error) node.error = { kind: string(item.error.kind, 40), message: string(item.error.message, 4000) };
  return node;
}

function callFrom(given) {
  const { id, function: called } = Object(given);
  return { id: string(id, 300), type: "function", function: { name: string(Object(called).name, 300), arguments: string(Object(called).arguments) } };
}
