// The box one writes in.

import { byId } from "./dom.js";
import { t } from "./i18n.js";
import { Pictures } from "./pictures.js";

export class Composer {
  /** `act`: send(text, image) -> whether it was taken, stop(), editLast(). */
  constructor(act) {
    this.act = act;
    this.pictures = new Pictures(() => this.fit());
    this.area = byId("message");
    this.drafts = new Map();
    // On a telephone's keyboard the return key begins a new line, as people expect there.
    this.touch = matchMedia("(pointer: coarse) and (hover: none)");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => act.stop());
    this.area.addEventListener("input", () => this.fit());
    this.area.addEventListener("keydown", (event) => this.key(event));
    this.translate();
  }

  translate() {
    byId("hint").textContent = t(this.touch.matches ? "hintTouch" : "hintKeys");
    this.area.enterKeyHint = this.touch.matches ? "enter" : "send";
  }

  key(event) {
    // While Chinese or Japanese is being composed, the return key chooses a word; 229 is how Safari says so.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey && !(this.touch.matches && !event.ctrlKey && !event.metaKey)) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.area.value) {
      event.preventDefault();
      this.act.editLast();
    }
  }

  send() {
    const text = this.area.value;
    const { picture } = this.pictures;
    if (!(text.trim() || picture) || this.busy || !this.act.send(text, picture)) return;
    this.area.value = "";
    this.pictures.set("");
    this.fit();
  }

  /** As tall as what is written. */
  fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    byId("send").disabled = !this.area.value.trim() && !this.pictures.picture;
  }

  /** Each conversation has a draft of its own, for as long as the page is open. */
  show(id) {
    if (this.id !== undefined) this.drafts.set(this.id, this.area.value);
    this.id = id;
    this.pictures.set("");
    this.area.value = this.drafts.get(id) ?? "";
    this.fit();
  }

  setBusy(busy) {
    const focused = document.activeElement === byId("stop") || document.activeElement === byId("send");
    this.busy = busy;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (focused) this.area.focus();
  }

  focus() {
    this.area.focus();
  }
}
