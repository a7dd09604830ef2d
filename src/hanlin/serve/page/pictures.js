// Images that go with a message: chosen, pasted or dropped, made small enough to send, shown before they are sent.

import { byId, el, iconButton } from "./dom.js";
import { t } from "./i18n.js";

const KINDS = /^data:image\/(png|jpeg|webp|gif|bmp);base64,[A-Za-z0-9+/]+={0,2}$/;
const LONGEST = 4 << 20; // characters of an image as it is sent
const SIDE = 1024; // pixels of one that had to be made smaller
const LARGEST = 50 << 20; // bytes of a file that is looked at

/** Whether a text is an image that may be shown and sent. */
export const isPicture = (value) => typeof value === "string" && value.length <= LONGEST && KINDS.test(value);

/** A file as a data URI; as it is, if it is small and of a kind that models read, else smaller, as a JPEG. */
async function pictureFrom(file) {
  if (file.size > LARGEST) throw new Error("large");
  const asIs = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  const drawn = await createImageBitmap(file); // what the browser cannot draw is no image
  if (isPicture(asIs) && file.type !== "image/gif") return asIs;
  const scale = Math.min(1, SIDE / Math.max(drawn.width, drawn.height));
  const canvas = el("canvas", { width: Math.max(1, Math.round(drawn.width * scale)), height: Math.max(1, Math.round(drawn.height * scale)) });
  canvas.getContext("2d").drawImage(drawn, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

/** The image beside the box one writes in. Only models that see get one. `changed()` is called when it comes or goes. */
export class Pictures {
  constructor(changed) {
    this.changed = changed;
    this.picture = "";
    this.sees = false;
    this.button = byId("attach");
    this.file = byId("attach-file");
    this.button.addEventListener("click", () => this.file.click());
    this.file.addEventListener("change", () => {
      this.take(this.file.files);
      this.file.value = "";
    });
    byId("message").addEventListener("paste", (event) => {
      if (this.take(event.clipboardData?.files)) event.preventDefault();
    });
    for (const name of ["dragover", "drop"]) {
      byId("main").addEventListener(name, (event) => {
        if (!this.sees || !event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        if (name === "drop") this.take(event.dataTransfer.files);
      });
    }
  }

  /** Whether the model sees. */
  allow(sees) {
    this.sees = sees;
    this.button.hidden = !sees;
    if (!sees) this.set("");
  }

  /** The first image among some files; returns whether there is one. */
  take(files) {
    const file = [...(files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!this.sees || !file) return false;
    pictureFrom(file).then((picture) => this.set(picture), () => this.wrong());
    return true;
  }

  wrong() {
    byId("attached").replaceChildren(el("p", { class: "wrong", role: "alert", text: t("imageWrong") }));
    byId("attached").hidden = false;
  }

  set(picture) {
    if (picture === this.picture && byId("attached").hidden === !picture) return;
    this.picture = picture;
    const remove = iconButton("close", t("imageRemove"), () => {
      this.set("");
      byId("message").focus();
    });
    byId("attached").replaceChildren(...(picture ? [el("img", { src: picture, alt: t("image") }), remove] : []));
    byId("attached").hidden = !picture;
    this.changed();
  }
}
