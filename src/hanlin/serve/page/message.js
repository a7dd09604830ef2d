// One message on the page.

import { append, copyText, el, icon, iconButton } from "./dom.js";
import { numeral, t } from "./i18n.js";
import { codeNode, MarkdownView } from "./markdown.js";
import { rate } from "./runs.js";

const FASTEST = 40; // milliseconds between two steps of a reply that streams in
const SHARE = 3; // and at least this many times what the last step took, so that the page always answers

/** A message as a list item. `act` has what its buttons do: retry, edit, show, results. */
export class MessageView {
  constructor(node, act) {
    this.node = node;
    this.act = act;
    this.root = el("li", { class: `message ${node.role}`, data: { node: node.id } });
    this.timer = 0;
    this.build();
  }

  /** Lay it out anew: what is around the words has changed. */
  build() {
    const { node, root } = this;
    clearTimeout(this.timer);
    this.timer = 0;
    root.classList.remove("editing");
    root.replaceChildren();
    if (node.role === "assistant") this.reply();
    else if (node.role === "tool") this.result();
    else this.words();
  }

  words() {
    const { node, root, act } = this;
    const shown = (node.images ?? []).map((src) => el("img", { class: "shown", src, alt: t("image") }));
    root.append(el("h2", { class: "visually-hidden", text: t("you") }), ...shown);
    if (node.content || !shown.length) root.append(el("div", { class: "words", dir: "auto", text: node.content }));
    const edit = iconButton("edit", t("edit"), () => this.edit(), { class: "icon-button edit" });
    root.append(el("div", { class: "tools-below" }, this.copyButton(), act.busy() ? null : edit, this.versions()));
  }

  result() {
    const { node, root } = this;
    root.append(el("h2", { class: "who", text: t("toolResult", { name: node.name ?? t("tool") }) }), el("div", { class: "prose" }, json(node.content)));
    root.append(el("div", { class: "tools-below" }, this.copyButton(), this.versions()));
  }

  reply() {
    const { node, root } = this;
    this.prose = el("div", { class: "prose" });
    this.view = new MarkdownView(this.prose);
    this.calls = el("div", { class: "calls" });
    this.said = [];
    this.foot = el("div");
    root.append(el("h2", { class: "who", text: node.model || t("assistant") }), this.prose, this.calls, this.foot);
    this.draw();
  }

  /** More of the reply has come: draw it soon. */
  touch() {
    this.timer ||= setTimeout(() => this.draw(), Math.max(FASTEST, SHARE * (this.cost ?? 0)));
  }

  draw() {
    const before = performance.now();
    clearTimeout(this.timer);
    this.timer = 0;
    const { node } = this;
    this.view.update(node.content);
    this.drawCalls();
    this.drawFoot();
    this.act.drawn();
    this.cost = performance.now() - before;
  }

  drawCalls() {
    (this.node.tool_calls ?? []).forEach((call, n) => {
      const said = call.function.name + call.function.arguments;
      if (said === this.said[n]) return;
      this.said[n] = said;
      if (this.calls.children[n]) this.calls.children[n].replaceWith(callNode(call));
      else this.calls.append(callNode(call));
    });
  }

  drawFoot() {
    const { node, foot, act } = this;
    const running = node.state === "running";
    this.prose.setAttribute("aria-busy", String(running));
    if (running) {
      // The line that counts is made once and then only changes its text.
      if (!this.live) {
        this.live = el("span", { class: "numbers" });
        this.dots = el("span", { class: "waiting", role: "img", "aria-label": t("thinking") }, el("i"), el("i"), el("i"));
        foot.replaceChildren(el("div", { class: "tools-below" }, this.dots, this.live));
      }
      this.live.textContent = numbers(node);
      return;
    }
    this.live = null;
    orderHeadings(this.prose);
    foot.replaceChildren();
    if (node.state === "error") foot.append(failure(node));
    else if (node.state === "stopped") foot.append(el("p", { class: "state", text: t("stateStopped") }));
    else if (node.state === "length") foot.append(el("p", { class: "state", text: t("stateLength") }));
    else if (!node.content && !node.tool_calls?.length) foot.append(el("p", { class: "state", text: t("emptyReply") }));
    if (act.isLast(node) && node.tool_calls?.length && !act.busy()) foot.append(this.resultForm());
    const retry = act.busy() ? null : iconButton("retry", t("retry"), () => act.retry(node), { class: "icon-button retry" });
    foot.append(el("div", { class: "tools-below" }, this.copyButton(), retry, this.versions(), el("span", { class: "numbers", text: numbers(node) })));
  }

  copyButton() {
    const button = iconButton("copy", t("copyMessage"), async () => {
      const copied = await copyText(this.node.content);
      button.replaceChildren(icon(copied ? "done" : "close"));
      this.act.announce(t(copied ? "copied" : "notCopied"));
      setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    });
    button.classList.add("copy");
    return button;
  }

  /** Which of several versions this is, and ways to the others. */
  versions() {
    const all = this.act.siblings(this.node);
    if (all.length < 2) return null;
    const at = all.indexOf(this.node);
    const go = (name, label, to) => iconButton(name, t(label), () => this.act.show(all[to], label), { disabled: to < 0 || to >= all.length || this.act.busy(), class: `icon-button ${label}` });
    const words = t("version", { at: at + 1, count: all.length });
    const where = el("span", {}, el("span", { class: "visually-hidden", text: words }), el("span", { "aria-hidden": "true", text: `${numeral(at + 1)}/${numeral(all.length)}` }));
    return el("span", { class: "versions" }, go("earlier", "earlier", at - 1), where, go("later", "later", at + 1));
  }

  /** Change the words of a message that was sent; sending them begins a new branch. */
  edit() {
    const { root, node, act } = this;
    const area = el("textarea", { "aria-label": t("editMessage"), dir: "auto", rows: Math.min(12, node.content.split("\n").length + 1) });
    area.value = node.content;
    const cancel = () => {
      this.build();
      root.querySelector(".edit")?.focus();
    };
    const send = () => (area.value.trim() || node.images ? act.edit(node, area.value) : cancel());
    area.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    const buttons = el("div", { class: "buttons" },
      el("button", { type: "button", class: "button", text: t("cancel"), on: { click: cancel } }),
      el("button", { type: "button", class: "button main-button", text: t("saveSend"), on: { click: send } }));
    root.classList.add("editing");
    root.replaceChildren(el("h2", { class: "visually-hidden", text: t("you") }), el("div", { class: "words" }, area, buttons));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  /** Where a person answers for the tools. */
  resultForm() {
    const areas = [];
    const form = el("form", { class: "results", on: { submit: (event) => {
      event.preventDefault();
      this.act.results(this.node, areas.map((area) => area.value));
    } } });
    for (const call of this.node.tool_calls) {
      const id = `result-${this.node.id}-${areas.length}`;
      areas.push(el("textarea", { id, rows: 2, class: "mono", spellcheck: "false" }));
      form.append(el("div", {}, el("label", { for: id, text: t("giveResult", { name: call.function.name }) }), areas.at(-1)));
    }
    form.append(el("div", { class: "buttons" }, el("button", { type: "submit", class: "button", text: t("sendResults") })));
    return form;
  }
}

/** A reply may begin with a third-level heading; for screen readers no level is left out below the message's own, 2. */
function orderHeadings(prose) {
  let above = 2;
  for (const heading of prose.querySelectorAll("h3, h4, h5, h6")) {
    above = Math.min(Number(heading.localName[1]), above + 1);
    heading.ariaLevel = String(above);
  }
}

function numbers(node) {
  const { usage, timing, state } = node;
  const said = [];
  const speed = rate(node);
  if (usage?.completion_tokens) said.push(t("tokens", { count: usage.completion_tokens }));
  if (speed) said.push(t("rate", { rate: numeral(speed, speed < 10 ? 1 : 0) }));
  if (timing && state !== "running") said.push(t("firstToken", { seconds: numeral(timing.first, 2) }));
  if (usage?.prompt_tokens && state !== "running") said.push(t("promptTokens", { count: usage.prompt_tokens }));
  return said.join(" · ");
}

function failure({ error = {} }) {
  const kind = String(error.kind ?? "");
  const key = `error${kind.charAt(0).toUpperCase()}${kind.slice(1)}`;
  const known = ["errorKey", "errorBusy", "errorRefused", "errorServer", "errorUnreachable", "errorBroken"].includes(key);
  const said = el("div", { class: "failure" }, el("p", { text: t(known ? key : "errorServer") }));
  if (error.message) said.append(el("p", { text: error.message }));
  if (error.wait) said.append(el("p", { text: t("wait", { seconds: error.wait }) }));
  return said;
}

/** A tool call: its name, and its arguments readably. */
function callNode({ function: called }) {
  const words = el("span");
  append(words, t("callOf", { name: "\u0001" }).split("\u0001").flatMap((part, n) => (n ? [el("code", { text: called.name || "…" }), part] : [part])));
  return el("details", { class: "call", open: true }, el("summary", {}, icon("tool"), words), json(called.arguments || "{}"));
}

function json(text) {
  let said = text;
  let language = "";
  try {
    said = JSON.stringify(JSON.parse(text), null, 2);
    language = "json";
  } catch {
    // shown as it is: it may still be coming in
  }
  return codeNode({ language, text: said });
}
