// The messages of the conversation that is shown, and the place one reads at.

import { byId, copyText } from "./dom.js";
import { t } from "./i18n.js";
import { MessageView } from "./message.js";
import { path } from "./tree.js";

const NEAR = 80;

export class Transcript {
  constructor(act, announce) {
    this.list = byId("messages");
    this.scroll = byId("scroll");
    this.newest = byId("newest");
    this.views = new Map();
    this.pinned = true; // the newest words are followed, until the reader scrolls up
    this.act = { ...act, drawn: () => this.follow(), isLast: (node) => node.id === this.conversation?.leaf };
    this.announce = announce;
    this.scroll.addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.newest.addEventListener("click", () => this.toNewest());
    this.list.addEventListener("click", (event) => this.copyCode(event));
    new ResizeObserver(() => this.follow()).observe(this.scroll);
  }

  /** Show a conversation. Messages that stay keep their elements; `anew` builds all of them, as for another language. */
  show(conversation, anew = false) {
    const changed = conversation.id !== this.conversation?.id;
    if (changed || anew) this.views.clear();
    this.conversation = conversation;
    const nodes = path(conversation);
    const views = new Map();
    for (const node of nodes) {
      const old = this.views.get(node.id);
      if (old && old.node === node) old.build();
      views.set(node.id, old && old.node === node ? old : new MessageView(node, this.act));
    }
    this.views = views;
    this.list.replaceChildren(...[...views.values()].map((view) => view.root));
    byId("welcome").hidden = nodes.length > 0;
    this.list.hidden = nodes.length === 0;
    if (changed) this.pinned = true;
    this.follow();
  }

  view(id) {
    return this.views.get(id);
  }

  follow() {
    if (this.pinned) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.newest.hidden = this.pinned;
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    this.pinned = scrollHeight - scrollTop - clientHeight < NEAR;
    this.newest.hidden = this.pinned;
  }

  toNewest() {
    this.pinned = true;
    this.follow();
    byId("message").focus();
  }

  async copyCode(event) {
    const button = event.target.closest?.(".copy-code");
    if (!button) return;
    const copied = await copyText(button.closest(".code").querySelector("pre").textContent);
    button.textContent = t(copied ? "copied" : "notCopied");
    this.announce(button.textContent);
    setTimeout(() => (button.textContent = t("copy")), 1500);
  }
}
