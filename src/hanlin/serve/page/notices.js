// What the page says beside the conversation: to screen readers, in a toast, in a notice above, in the dialog for a key.

import { byId, el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { secret } from "./store.js";

const TOAST_SECONDS = 15;

/** Say it to screen readers, once what they are saying is said. */
export function announce(text) {
  const region = byId("announce");
  region.textContent = "";
  setTimeout(() => (region.textContent = text), 60);
}

let timer = 0;

/** A short message, with something that can be done about it. It stays while it is pointed at or has the focus. */
export function toast(text, action = "", act = null) {
  const close = () => byId("toast").replaceChildren();
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(close, TOAST_SECONDS * 1000);
  };
  const box = el("div", { on: { mouseenter: () => clearTimeout(timer), mouseleave: wait, focusin: () => clearTimeout(timer), focusout: wait } }, el("span", { text }));
  if (act) box.append(el("button", { type: "button", text: action, on: { click: () => { close(); act(); } } }));
  box.append(iconButton("close", t("dismiss"), close));
  byId("toast").replaceChildren(box);
  wait();
}

/** A notice that stays until it is dismissed, or until `unnotice`; one of each kind. */
export function notice(kind, text, action = "", act = null) {
  unnotice(kind);
  const box = el("div", { class: "notice", data: { kind } }, el("span", { text }));
  if (act) box.append(el("button", { type: "button", class: "button", text: action, on: { click: () => { box.remove(); act(); } } }));
  box.append(iconButton("close", t("dismiss"), () => box.remove()));
  byId("notices").append(box);
}

export function unnotice(kind) {
  byId("notices").querySelector(`[data-kind="${kind}"]`)?.remove();
}

let asking = null;

/** Ask for an API key; resolves to whether one was given. Several askers share one dialog. */
export function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    byId("key-wrong").textContent = secret.get() ? t("keyWrong") : "";
    input.value = "";
    let given = false;
    byId("key-form").onsubmit = () => {
      given = true;
      secret.set(input.value.trim());
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      asking = null;
      resolve(given);
    };
    dialog.showModal();
    input.focus();
  });
  return asking;
}
