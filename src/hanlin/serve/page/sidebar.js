// The list of conversations: find, name, delete, take out, bring in.

import { byId, el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { exported, holds, imported, titleOf } from "./tree.js";

const LARGEST_IMPORT = 200e6;
const SHOWN = 500;

export class Sidebar {
  /** `act`: current(), running(id), open(id), renamed(), remove(conversation), toast(text), imported(conversations). */
  constructor(chats, act) {
    Object.assign(this, { chats, act, list: byId("list"), search: byId("search") });
    this.search.addEventListener("input", () => this.draw());
    byId("export").addEventListener("click", () => this.save());
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.load(event.target));
    this.list.addEventListener("keydown", (event) => this.arrows(event));
  }

  draw() {
    if (this.renaming) return;
    const focused = this.list.contains(document.activeElement) ? document.activeElement : null;
    const [id, kind] = [focused?.closest("li")?.dataset.id, focused?.dataset.kind];
    const words = this.search.value;
    const found = this.chats.list().filter((conversation) => holds(conversation, words));
    this.list.replaceChildren(...found.slice(0, SHOWN).map((conversation) => this.item(conversation)));
    const empty = byId("list-empty");
    empty.hidden = found.length > 0;
    empty.textContent = t(words ? "noneFound" : "none");
    if (id) this.list.querySelector(`[data-id="${CSS.escape(id)}"] [data-kind="${kind}"]`)?.focus();
  }

  item(conversation) {
    const title = titleOf(conversation) || t("untitled");
    const current = conversation.id === this.act.current();
    const running = this.act.running(conversation.id);
    const link = el("a", { href: `#/${conversation.id}`, dir: "auto", text: title, title, data: { kind: "open" }, "aria-current": current ? "page" : null });
    if (running) link.append(el("span", { class: "visually-hidden", text: ` (${t("running")})` }));
    link.addEventListener("click", () => this.act.open(conversation.id));
    return el("li", { class: `item${current ? " current" : ""}${running ? " running" : ""}`, data: { id: conversation.id } }, link,
      iconButton("edit", t("rename", { title }), () => this.rename(conversation), { data: { kind: "rename" } }),
      iconButton("remove", t("remove", { title }), () => this.remove(conversation), { data: { kind: "remove" } }));
  }

  rename(conversation) {
    const item = this.list.querySelector(`[data-id="${CSS.escape(conversation.id)}"]`);
    const input = el("input", { type: "text", maxlength: "200", "aria-label": t("title") });
    input.value = titleOf(conversation);
    this.renaming = true;
    let over = false;
    const end = (keep, focus) => {
      if (over) return;
      over = true;
      this.renaming = false;
      const title = input.value.trim().replace(/\s+/g, " ");
      if (keep && title && title !== titleOf(conversation)) {
        conversation.title = title;
        this.chats.save(conversation);
        this.act.renamed(conversation);
      }
      this.draw();
      if (focus) this.list.querySelector(`[data-id="${CSS.escape(conversation.id)}"] [data-kind="rename"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter", true);
    });
    input.addEventListener("blur", () => end(true, false));
    item.replaceChildren(input);
    input.select();
  }

  remove(conversation) {
    const item = this.list.querySelector(`[data-id="${CSS.escape(conversation.id)}"]`);
    const next = (item?.nextElementSibling ?? item?.previousElementSibling)?.dataset.id;
    this.act.remove(conversation);
    const link = next && this.list.querySelector(`[data-id="${CSS.escape(next)}"] a`);
    (link || byId("new")).focus();
  }

  /** Up and down go from one conversation to the next. */
  arrows(event) {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    const item = event.target.closest("li");
    const to = event.key === "ArrowDown" ? item?.nextElementSibling : item?.previousElementSibling;
    if (!to || event.target.tagName === "INPUT") return;
    event.preventDefault();
    to.querySelector("a")?.focus();
  }

  save() {
    const url = URL.createObjectURL(new Blob([exported(this.chats.list())], { type: "application/json" }));
    const day = new Date().toISOString().slice(0, 10);
    el("a", { href: url, download: `hanlin-${day}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }

  async load(input) {
    const [file] = input.files;
    if (!file) return;
    try {
      if (file.size > LARGEST_IMPORT) throw new Error("large");
      const conversations = imported(await file.text());
      await this.act.imported(conversations);
      this.act.toast(t("imported", { count: conversations.length }));
    } catch (error) {
      this.act.toast(t({ json: "importJson", large: "importLarge" }[error.message] ?? "importFormat"));
    }
    input.value = "";
    this.draw();
  }
}
