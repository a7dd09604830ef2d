// The page: which conversation is shown, and what its parts do together.

import { listModels } from "./api.js";
import { Chats } from "./chats.js";
import { Composer } from "./composer.js";
import { byId, el } from "./dom.js";
import { currentLanguage, setLanguage, t, translate } from "./i18n.js";
import { announce, askKey, notice, toast, unnotice } from "./notices.js";
import { panels } from "./panels.js";
import { Runs } from "./runs.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { recall, remember, Store } from "./store.js";
import { Transcript } from "./transcript.js";
import { addNode, newConversation, path, show, siblings, titleOf } from "./tree.js";

const SPOKEN = 1500; // characters of a reply that are read out when it is finished

class App {
  constructor(chats) {
    this.chats = chats;
    this.models = [];
    this.panels = panels();
    this.runs = new Runs(chats, askKey);
    this.settings = new Settings((conversation) => chats.get(conversation.id) && this.saveSoon(conversation));
    this.composer = new Composer({ send: (text, image) => this.send(text, image), stop: () => this.stop(), editLast: () => this.editLast() });
    this.transcript = new Transcript(
      {
        announce,
        busy: () => this.busy,
        retry: (node) => this.retry(node),
        edit: (node, text) => this.edit(node, text),
        show: (node, label) => this.branch(node, label),
        siblings: (node) => siblings(this.current, node),
        results: (node, texts) => this.results(node, texts),
      },
      announce,
    );
    this.sidebar = new Sidebar(chats, {
      current: () => this.current.id,
      running: (id) => Boolean(this.runs.of(id)),
      open: () => this.panels.closeCover(false),
      renamed: () => this.head(),
      remove: (conversation) => this.remove(conversation),
      toast: (text) => toast(text),
      imported: (conversations) => this.take(conversations),
    });
    this.listen();
    this.route();
    this.loadModels();
  }

  get busy() {
    return Boolean(this.current && this.runs.of(this.current.id));
  }

  listen() {
    byId("new").addEventListener("click", () => this.startNew());
    byId("skip").addEventListener("click", (event) => {
      event.preventDefault();
      this.panels.closeCover(false);
      this.composer.focus();
    });
    byId("model").addEventListener("change", (event) => this.settings.set(({ settings }) => (settings.model = event.target.value)));
    byId("model").addEventListener("change", () => this.context());
    byId("model").addEventListener("change", () => this.senses());
    byId("theme").value = recall("theme") ?? "";
    byId("theme").addEventListener("change", (event) => this.theme(event.target.value));
    byId("language").value = currentLanguage();
    byId("language").addEventListener("change", (event) => this.speak(event.target.value));
    window.addEventListener("hashchange", () => this.route());
    window.addEventListener("pagehide", () => this.leave());
    document.addEventListener("keydown", (event) => this.key(event));
    this.runs.addEventListener("begin", ({ detail }) => this.changed(detail));
    this.runs.addEventListener("piece", ({ detail }) => this.transcript.view(detail.node.id)?.touch());
    this.runs.addEventListener("end", ({ detail }) => this.ended(detail));
    this.chats.addEventListener("change", ({ detail }) => this.otherTab(detail));
    this.chats.addEventListener("kept", () => unnotice("storage"));
    this.chats.addEventListener("trouble", ({ detail }) => notice("storage", detail.full ? t("full") : t("notKept", { message: detail.message })));
    if (!this.chats.store.lasting) notice("storage", t("notLasting"));
  }

  key(event) {
    if (event.isComposing || event.keyCode === 229 || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && !this.panels.closeCover() && this.busy) this.stop();
    if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.startNew();
    }
  }

  // Which conversation is shown -----------------------------------------------------------------------------------

  route() {
    const id = /^#\/([\w-]+)$/.exec(location.hash)?.[1];
    const found = id && this.chats.get(id);
    if (found) this.open(found);
    else if (!this.current || id || this.chats.get(this.current.id)) this.open(newConversation(Settings.defaults()));
  }

  open(conversation) {
    this.current = conversation;
    this.composer.show(this.chats.get(conversation.id) ? conversation.id : "");
    this.settings.show(conversation);
    this.draw();
  }

  startNew() {
    this.panels.closeCover(false);
    history.pushState(null, "", location.pathname + location.search);
    this.open(newConversation(Settings.defaults()));
    this.composer.focus();
  }

  draw(anew = false) {
    this.composer.setBusy(this.busy);
    this.transcript.show(this.current, anew);
    this.sidebar.draw();
    this.head();
    this.drawModels();
  }

  head() {
    const title = titleOf(this.current);
    byId("title").textContent = title || t("untitled");
    document.title = title ? `${title} · Hanlin` : "Hanlin";
    this.context();
  }

  /** Which kinds of input the model takes: text, and, if it sees, images. */
  senses() {
    this.composer.pictures.allow(Boolean(this.models.find((model) => model.id === this.model)?.input_modalities?.includes("image")));
  }

  /** How much of the model's context the conversation has filled. */
  context() {
    const last = path(this.current).findLast((node) => node.usage);
    const most = this.models.find((model) => model.id === this.model)?.max_model_len;
    const used = last && last.usage.prompt_tokens + last.usage.completion_tokens;
    byId("context").textContent = used && most ? t("contextUse", { used, most }) : "";
  }

  saveSoon(conversation) {
    if (this.waiting !== conversation) this.saveNow();
    clearTimeout(this.timer);
    this.waiting = conversation;
    this.timer = setTimeout(() => this.saveNow(), 400);
  }

  saveNow() {
    clearTimeout(this.timer);
    if (this.waiting && this.chats.get(this.waiting.id)) this.chats.save(this.waiting);
    this.waiting = null;
  }

  /** The page closes: nothing that waits its turn would still run, so what is to be kept is written directly. */
  leave() {
    if (this.waiting && this.chats.get(this.waiting.id)) this.chats.store.put(this.waiting);
  }

  otherTab(id) {
    if (id !== this.current.id) this.sidebar.draw();
    else if (this.chats.get(id)) this.open(this.chats.get(id));
    else this.startNew();
  }

  remove(conversation) {
    this.runs.stop(conversation.id);
    const shown = conversation.id === this.current.id;
    this.chats.remove(conversation.id);
    if (shown) {
      history.replaceState(null, "", location.pathname + location.search);
      this.open(newConversation(Settings.defaults()));
    } else this.sidebar.draw();
    toast(t("removed", { title: titleOf(conversation) || t("untitled") }), t("undo"), () => {
      for (const node of Object.values(conversation.nodes)) if (node.state === "running") node.state = "stopped";
      this.chats.save(conversation);
      if (shown) location.hash = `#/${conversation.id}`;
      this.sidebar.draw();
      this.sidebar.list.querySelector(`[data-id="${CSS.escape(conversation.id)}"] a`)?.focus();
    });
  }

  /** Conversations from a file. One that is here already is replaced only by a newer version of itself. */
  async take(conversations) {
    for (const conversation of conversations) {
      const known = this.chats.get(conversation.id);
      if (!known || (known.updated < conversation.updated && !this.runs.of(known.id))) await this.chats.save(conversation);
    }
    if (this.chats.get(this.current.id)) this.open(this.chats.get(this.current.id));
  }

  // Saying something ----------------------------------------------------------------------------------------------

  send(text, image) {
    if (this.busy || !this.model) return false;
    const first = !this.chats.get(this.current.id);
    const shown = image ? { images: [image] } : {};
    const node = addNode(this.current, this.current.leaf, { role: "user", content: text, ...shown });
    if (first) {
      this.composer.id = this.current.id;
      history.pushState(null, "", `#/${this.current.id}`);
    }
    this.ask(node.id);
    return true;
  }

  ask(parent) {
    this.transcript.pinned = true;
    this.chats.all.set(this.current.id, this.current);
    this.runs.start(this.current, parent, this.model);
  }

  retry(node) {
    if (this.busy) return;
    Runs.forget(this.current, node);
    this.ask(node.parent);
    this.composer.focus();
  }

  edit(node, text) {
    if (this.busy) return;
    const shown = node.images ? { images: node.images } : {};
    const { id } = addNode(this.current, node.parent, { role: "user", content: text, ...shown });
    this.ask(id);
    this.composer.focus();
  }

  editLast() {
    const node = path(this.current).findLast(({ role }) => role === "user");
    if (node && !this.busy) this.transcript.view(node.id)?.edit();
  }

  branch(node, label) {
    show(this.current, node.id);
    this.chats.save(this.current);
    this.draw();
    const buttons = this.transcript.view(node.id)?.root;
    (buttons?.querySelector(`.versions .${label}:not(:disabled)`) ?? buttons?.querySelector(".versions button:not(:disabled)"))?.focus();
  }

  results(node, texts) {
    if (this.busy) return;
    let parent = node.id;
    node.tool_calls.forEach((call, n) => {
      parent = addNode(this.current, parent, { role: "tool", content: texts[n], tool_call_id: call.id, name: call.function.name }).id;
    });
    this.ask(parent);
    this.composer.focus();
  }

  stop() {
    this.runs.stop(this.current.id);
  }

  changed({ conversation }) {
    if (conversation.id === this.current.id) this.draw();
    else this.sidebar.draw();
  }

  ended({ conversation, node }) {
    this.changed({ conversation });
    if (conversation.id !== this.current.id) return;
    const words = this.transcript.view(node.id)?.prose?.innerText ?? "";
    const said = { error: "failedSaid", stopped: "stoppedSaid" }[node.state] ?? "finished";
    const failed = this.transcript.view(node.id)?.root.querySelector(".failure")?.innerText ?? "";
    announce(`${t(said, { text: words.slice(0, SPOKEN) })} ${failed}`.trim());
  }

  // Models, looks -------------------------------------------------------------------------------------------------

  get model() {
    return this.current.settings.model ?? this.models[0]?.id ?? "";
  }

  async loadModels() {
    try {
      this.models = await listModels();
      this.drawModels();
      this.context();
    } catch (error) {
      if (error.kind === "key" && (await askKey())) return this.loadModels();
      notice("models", `${t("noModels")} ${error.message}`, t("again"), () => this.loadModels());
    }
  }

  drawModels() {
    const names = this.models.map((model) => model.id);
    // A conversation's model may be served no more: then the first that is takes over, unless there is none.
    const { settings } = this.current;
    if (names.length && settings.model && !names.includes(settings.model)) delete settings.model;
    const options = names.map((name) => el("option", { value: name, text: name, selected: name === this.model }));
    byId("model").replaceChildren(...(options.length ? options : [el("option", { value: "", text: t("noModel") })]));
    byId("model").disabled = !options.length;
    this.senses();
  }

  theme(name) {
    remember("theme", name || undefined);
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
  }

  speak(name) {
    setLanguage(name);
    this.composer.translate();
    this.settings.show(this.current);
    drawTries(this);
    this.draw(true);
  }
}

function drawTries(app) {
  const tries = ["tryOne", "tryTwo", "tryThree", "tryFour"].map((key) => {
    const press = () => {
      app.composer.area.value = t(key);
      app.composer.fit();
      app.composer.focus();
    };
    return el("li", {}, el("button", { type: "button", text: t(key), on: { click: press } }));
  });
  byId("tries").replaceChildren(...tries);
}

translate(document);
const app = new App(await Chats.load(await Store.open()));
drawTries(app);
if (!matchMedia("(pointer: coarse)").matches) app.composer.focus();
document.documentElement.dataset.ready = "";
