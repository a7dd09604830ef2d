// The side panels. Where there is room they stand beside the conversation; else one lies over it and holds the focus.

import { byId } from "./dom.js";
import { recall, remember } from "./store.js";

class Panel {
  constructor(name, narrow, others) {
    this.panel = byId(name);
    this.opener = byId(`${name}-open`);
    this.closer = byId(`${name}-close`);
    this.narrow = matchMedia(narrow);
    this.others = others;
    this.name = name;
    this.open = !this.narrow.matches && (recall(`panel.${name}`) ?? name === "side");
    this.opener.addEventListener("click", () => this.set(!this.open));
    this.closer.addEventListener("click", () => this.set(false));
    this.narrow.addEventListener("change", () => this.set(!this.narrow.matches && (recall(`panel.${name}`) ?? name === "side"), false));
  }

  get covers() {
    return this.open && this.narrow.matches;
  }

  set(open, focus = true) {
    this.open = open;
    if (focus && !this.narrow.matches) remember(`panel.${this.name}`, open);
    if (focus && open) for (const other of this.others()) if (other !== this && other.covers) other.set(false, false);
    this.draw();
    if (focus) (open ? this.closer : this.opener).focus();
  }

  draw() {
    if (this.name === "side") byId("app").classList.toggle("no-side", !this.open);
    else this.panel.hidden = !this.open;
    this.opener.setAttribute("aria-expanded", String(this.open));
    const covering = this.others().find((panel) => panel.covers);
    byId("shade").hidden = !covering;
    byId("main").inert = Boolean(covering);
    for (const panel of this.others()) panel.panel.inert = Boolean(covering) && panel !== covering;
  }
}

/** Both panels, and a way to close the one that lies over the page. */
export function panels() {
  const all = [];
  const others = () => all;
  all.push(new Panel("side", "(max-width: 820px)", others), new Panel("settings", "(max-width: 1180px)", others));
  const closeCover = (focus = true) => {
    const found = all.find((panel) => panel.covers);
    found?.set(false, focus);
    return Boolean(found);
  };
  byId("shade").addEventListener("click", () => closeCover());
  for (const panel of all) panel.draw();
  return { closeCover };
}
