// The settings panel: what is asked along with every message of a conversation, and how the page looks.

import { byId } from "./dom.js";
import { numeral, t } from "./i18n.js";
import { remember, recall } from "./store.js";
import { settingsFrom } from "./tree.js";

const NUMBERS = { temperature: [0, 2, false], top_p: [0, 1, false], max_tokens: [1, 1e7, true], seed: [0, Number.MAX_SAFE_INTEGER, true] };
const MOST_STOPS = 16;

export class Settings {
  /** `changed(conversation)` is called after every valid change. */
  constructor(changed) {
    this.changed = changed;
    for (const name of Object.keys(NUMBERS)) byId(name).addEventListener("input", () => this.number(name));
    byId("system").addEventListener("input", (event) => this.set((c) => (c.system = event.target.value)));
    byId("stop-words").addEventListener("input", () => this.stops());
    byId("tools").addEventListener("input", () => this.tools());
    byId("reset").addEventListener("click", () => this.reset());
    byId("fields").addEventListener("submit", (event) => event.preventDefault());
  }

  /** What a new conversation begins with: the settings used last. */
  static defaults() {
    return { settings: settingsFrom(recall("settings")) };
  }

  show(conversation) {
    this.conversation = conversation;
    byId("system").value = conversation.system;
    byId("tools").value = conversation.tools;
    byId("stop-words").value = (conversation.settings.stop ?? []).map((text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n")).join("\n");
    for (const name of Object.keys(NUMBERS)) byId(name).value = conversation.settings[name] ?? "";
    for (const name of [...Object.keys(NUMBERS), "stop-words", "tools"]) this.wrong(name, "");
  }

  set(change) {
    change(this.conversation);
    remember("settings", this.conversation.settings);
    this.changed(this.conversation);
  }

  number(name) {
    const input = byId(name);
    const [least, most, whole] = NUMBERS[name];
    const empty = input.value === "" && !input.validity.badInput;
    const value = Number(input.value);
    const good = empty || (!input.validity.badInput && value >= least && value <= most && (!whole || Number.isInteger(value)));
    this.wrong(name, good ? "" : t(whole ? "whole" : "between", { least: numeral(least), most: numeral(most) }));
    if (!good) return;
    this.set(({ settings }) => {
      if (empty) delete settings[name];
      else settings[name] = value;
    });
  }

  stops() {
    const texts = byId("stop-words").value.split("\n").filter(Boolean);
    const said = texts.map((text) => text.replace(/\\(n|\\)/g, (_, char) => (char === "n" ? "\n" : "\\")));
    this.wrong("stop-words", said.length > MOST_STOPS ? t("tooManyStops") : "");
    if (said.length <= MOST_STOPS) this.set(({ settings }) => (settings.stop = said));
  }

  tools() {
    const text = byId("tools").value;
    const good = !text.trim() || areTools(text);
    this.wrong("tools", good ? "" : t("toolsWrong"));
    if (good) this.set((conversation) => (conversation.tools = text));
  }

  reset() {
    const { model } = this.conversation.settings;
    this.set((conversation) => (conversation.settings = model ? { model } : {}));
    this.show(this.conversation);
  }

  wrong(name, text) {
    byId(`${name}-error`).textContent = text;
    byId(name).setAttribute("aria-invalid", String(Boolean(text)));
  }
}

function areTools(text) {
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) && tools.every((tool) => tool !== null && typeof tool === "object" && !Array.isArray(tool));
  } catch {
    return false;
  }
}
