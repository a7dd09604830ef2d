// Markdown -> DOM, whole or as it streams in. A reply is untrusted: every node is made here, none is parsed from HTML.

import { blank, clean, parseBlocks } from "./blocks.js";
import { append, el } from "./dom.js";
import { t } from "./i18n.js";
import { inline } from "./inline.js";
import { maths } from "./maths.js";
import { coloured, languageName } from "./syntax.js";

/** All of a text at once. */
export function markdown(text) {
  const source = clean(text);
  const out = document.createDocumentFragment();
  for (const block of parseBlocks(source.split("\n"))) out.append(blockNode(block));
  return out;
}

/** A text that grows. Only its last blocks are built anew: the cost of a step does not depend on what stands before. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.blocks = []; // { start, source, node } of each, by offset in the text
  }

  update(text) {
    const source = clean(text);
    if (source === this.text) return;
    let keep = 0;
    if (this.text && source.startsWith(this.text)) {
      // What follows can still change the last two blocks, and maths may span whatever has no blank line before it.
      keep = Math.max(0, this.blocks.length - 2);
      while (keep > 0 && !this.blocks[keep].apart) keep--;
    }
    const start = keep > 0 ? this.blocks[keep].start : 0;
    this.text = source;
    const lines = source.slice(start).split("\n");
    const offsets = [start];
    for (const line of lines) offsets.push(offsets.at(-1) + line.length + 1);
    const before = this.blocks.splice(keep);
    for (const block of parseBlocks(lines)) {
      const said = lines.slice(block.from, block.to).join("\n");
      const old = before[0]?.source === said && before[0].type === block.type ? before.shift() : null;
      // Code that grows keeps its element, and with it the reader's focus and place.
      const growing = !old && grows(before[0], block) ? before.shift().node : null;
      growing?.querySelector("code").replaceChildren(...coloured(block.text, block.language));
      if (!old) for (const gone of before.splice(0)) gone.node.remove();
      const node = old?.node ?? growing ?? blockNode(block);
      if (!old && !growing) this.root.append(node);
      const apart = block.from === 0 ? keep > 0 : blank(lines[block.from - 1]);
      this.blocks.push({ start: offsets[block.from], source: said, apart, type: block.type, language: block.language, node });
    }
    for (const gone of before) gone.node.remove();
  }
}

const grows = (old, block) => old?.type === "code" && block.type === "code" && old.language === block.language;

function blockNode(block) {
  switch (block.type) {
    case "heading":
      // The page's title is level 1 and each message's is level 2.
      return worded(el(`h${Math.min(6, block.level + 2)}`), block.text);
    case "rule":
      return el("hr");
    case "code":
      return codeNode(block);
    case "maths":
      return el("div", { class: "display", tabindex: "0", role: "group", "aria-label": t("formula") }, maths(block.source, true, block.raw), block.after);
    case "quote":
      return append(el("blockquote"), block.blocks.map(blockNode));
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block);
    default:
      return worded(el("p"), block.text);
  }
}

/** Fill an element with a paragraph's text. Its direction is set last: a browser works it out anew with every node added. */
function worded(node, text) {
  append(node, inline(text));
  node.dir = "auto";
  return node;
}

function listNode({ start, items, loose }) {
  const list = el(start === null ? "ul" : "ol", start === null || start === 1 ? {} : { start });
  for (const { blocks, task } of items) {
    const item = el("li", task === null ? {} : { class: "task" });
    if (task !== null) item.append(el("span", { class: "tick", role: "img", "aria-label": t(task ? "done" : "open"), text: task ? "☑" : "☐" }));
    for (const block of blocks) {
      if (block.type === "paragraph" && !loose) append(item, inline(block.text));
      else item.append(blockNode(block));
    }
    list.append(item);
  }
  return list;
}

function tableNode({ head, align, rows }) {
  const cell = (tag, text, n) => worded(el(tag, { class: align[n] ? `align-${align[n]}` : null, scope: tag === "th" ? "col" : null }), text);
  const table = el(
    "table",
    {},
    el("thead", {}, el("tr", {}, head.map((text, n) => cell(text ? "th" : "td", text, n)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((text, n) => cell("td", text, n))))),
  );
  return el("div", { class: "wide", tabindex: "0", role: "group", "aria-label": t("table") }, table);
}

/** A block of code with its language and a button that copies it (the transcript listens for its click). */
export function codeNode({ language, text }) {
  const name = languageName(language);
  const code = el("code", {}, coloured(text, language));
  return el(
    "div",
    { class: "code" },
    el("div", { class: "code-bar" }, el("span", { class: "code-language", text: name || t("code") }),
      el("button", { type: "button", class: "copy-code", text: t("copy"), "aria-label": t("copyCode") })),
    el("pre", { tabindex: "0", role: "group", "aria-label": name ? t("codeIn", { name }) : t("code") }, code),
  );
}
