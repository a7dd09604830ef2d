// Markdown within a paragraph: text -> DOM nodes. One pass from left to right; time is linear, depth is bounded.

import { append, el } from "./dom.js";
import { maths } from "./maths.js";

const OPEN_AT_ONCE = 48;
const LONGEST_LINK = 2048;
const NESTED_PARENTHESES = 32;
const LONGEST_MATHS = 4000;
const SPECIAL = /[\\`*_~[\]!<&$\nh]/g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const SPACE = /\s/u;
const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u3000-\u303F\uFF00-\uFFEF]/u;
const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00A0", copy: "©", reg: "®", hellip: "…", mdash: "—", ndash: "–",
  times: "×", divide: "÷", middot: "·", bull: "•", deg: "°", plusmn: "±", larr: "←", rarr: "→", le: "≤", ge: "≥", ne: "≠",
};

/** An address that may be followed, or null: whole, and http, https or mailto. */
export function safeAddress(text) {
  if (text.length > LONGEST_LINK) return null;
  let url;
  try {
    url = new URL(text);
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

/** A link to another site. It tells nobody where it was found, and its tip says where it leads. */
export function link(address, children, props = {}) {
  return append(el("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow", ...props }), children);
}

/** Nodes of a paragraph's text. */
export function inline(text, linked = false) {
  return new Inline(text, linked).run();
}

class Inline {
  constructor(text, linked) {
    this.text = text;
    this.linked = linked; // inside a link there are no links
    this.children = [];
    this.frames = []; // emphasis that is open: its sign, how many, and what it holds so far
    this.counts = { "*": 0, _: 0, "~": 0 };
    this.next = new Map();
    this.brackets = null;
    this.ticks = null;
  }

  get into() {
    return this.frames.length ? this.frames.at(-1).children : this.children;
  }

  run() {
    const { text } = this;
    let at = 0;
    let plain = 0;
    while (at < text.length) {
      SPECIAL.lastIndex = at;
      const found = SPECIAL.exec(text);
      if (!found) break;
      at = found.index;
      const end = this.special(at, text[at], plain);
      if (end === at) at += 1;
      else at = plain = end;
    }
    this.say(plain, text.length);
    while (this.frames.length) this.unwind();
    return this.children;
  }

  say(from, to) {
    if (to > from) this.into.push(this.text.slice(from, to));
  }

  /** Put nodes for the text [at, end) after the plain text that waits; returns `end`. */
  put(plain, at, end, ...nodes) {
    this.say(plain, at);
    this.into.push(...nodes);
    return end;
  }

  /** Read what begins at `at`; returns where it ends, or `at` if it is nothing but text. */
  special(at, char, plain) {
    const { text } = this;
    switch (char) {
      case "\\":
        return this.backslash(at, plain);
      case "\n":
        return this.put(plain, Math.max(plain, trimmed(text, at)), at + 1, el("br"));
      case "`":
        return this.code(at, plain);
      case "*":
      case "_":
      case "~":
        return this.emphasis(at, char, plain);
      case "[":
        return this.linkAt(at, at, plain);
      case "!":
        return text[at + 1] === "[" ? this.linkAt(at, at + 1, plain) : at;
      case "$":
        return this.dollar(at, plain);
      case "&":
        return this.entity(at, plain);
      case "<":
        return this.angle(at, plain);
      case "h":
        return this.bare(at, plain);
      default:
        return at;
    }
  }

  /** Where `what` is found next at or after `from`; remembered, so that asking again costs nothing. */
  find(what, from) {
    const known = this.next.get(what);
    if (known !== undefined && (known < 0 || known >= from)) return known;
    const found = this.text.indexOf(what, from);
    this.next.set(what, found);
    return found;
  }

  backslash(at, plain) {
    const { text } = this;
    const after = text[at + 1];
    if (after === "(" || after === "[") {
      const end = this.find(after === "(" ? "\\)" : "\\]", at + 2);
      if (end > 0 && end - at < LONGEST_MATHS) {
        return this.put(plain, at, end + 2, maths(text.slice(at + 2, end), after === "[", text.slice(at, end + 2)));
      }
    }
    if (after === "\n") return this.put(plain, at, at + 2, el("br"));
    return after && /[!-/:-@[-`{-~]/.test(after) ? this.put(plain, at, at + 2, after) : at;
  }

  dollar(at, plain) {
    const { text } = this;
    if (text[at + 1] === "$") {
      const end = this.find("$$", at + 2);
      if (end < 0 || end === at + 2 || end - at > LONGEST_MATHS) return this.put(plain, at, at + 2, "$$");
      return this.put(plain, at, end + 2, maths(text.slice(at + 2, end), true, text.slice(at, end + 2)));
    }
    // As Pandoc reads it, so that "$5 and $6" stays money: no space inside the dollars, no digit after the second.
    if (!text[at + 1] || SPACE.test(text[at + 1])) return at;
    let end = this.find("$", at + 1);
    while (end > 0 && text[end - 1] === "\\") end = this.find("$", end + 1);
    if (end < 0 || end - at > LONGEST_MATHS || SPACE.test(text[end - 1]) || /\d/.test(text[end + 1] ?? "")) return at;
    return this.put(plain, at, end + 1, maths(text.slice(at + 1, end), false, text.slice(at, end + 1)));
  }

  /** Code between runs of as many backticks. All runs are found once, by length. */
  code(at, plain) {
    if (!this.ticks) {
      this.ticks = new Map();
      for (const run of this.text.matchAll(/`+/g)) {
        const length = run[0].length;
        if (!this.ticks.has(length)) this.ticks.set(length, { at: 0, places: [] });
        this.ticks.get(length).places.push(run.index);
      }
    }
    const { text } = this;
    let end = at;
    while (text[end] === "`") end++;
    const runs = this.ticks.get(end - at);
    while (runs && runs.at < runs.places.length && runs.places[runs.at] < end) runs.at++;
    const close = runs?.places[runs.at];
    if (close === undefined) return this.put(plain, at, end, text.slice(at, end));
    let source = text.slice(end, close).replaceAll("\n", " ");
    if (source.startsWith(" ") && source.endsWith(" ") && source.trim()) source = source.slice(1, -1);
    return this.put(plain, at, close + (end - at), el("code", { text: source }));
  }

  emphasis(at, char, plain) {
    const { text } = this;
    let end = at;
    while (text[end] === char) end++;
    let count = end - at;
    if (char === "~" && count !== 2) return this.put(plain, at, end, text.slice(at, end));
    const [opens, closes] = this.flanks(at, end, char);
    this.say(plain, at);
    while (count && closes && this.counts[char]) {
      while (this.frames.at(-1).char !== char) this.unwind();
      const frame = this.frames.at(-1);
      const used = frame.count >= 2 && count >= 2 ? 2 : 1;
      const node = append(el(char === "~" ? "del" : used === 2 ? "strong" : "em"), frame.children);
      frame.count -= used;
      count -= used;
      if (frame.count) frame.children = [node];
      else {
        this.frames.pop();
        this.counts[char]--;
        this.into.push(node);
      }
    }
    if (count && opens && this.frames.length < OPEN_AT_ONCE) {
      this.frames.push({ char, count, children: [] });
      this.counts[char]++;
    } else if (count) this.into.push(char.repeat(count));
    return end;
  }

  /** Whether a run of signs may open and may close. Beside Chinese, Japanese and Korean, punctuation does not count:
   * those write no spaces, and `**注意：**内容` is meant to be bold. */
  flanks(from, to, char) {
    const before = from ? lastOf(this.text, from) : " ";
    const after = to < this.text.length ? String.fromCodePoint(this.text.codePointAt(to)) : " ";
    const [spaceBefore, spaceAfter] = [SPACE.test(before), SPACE.test(after)];
    const [signBefore, signAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    const left = !spaceAfter && (!signAfter || spaceBefore || signBefore || CJK.test(before));
    const right = !spaceBefore && (!signBefore || spaceAfter || signAfter || CJK.test(after));
    return char === "_" ? [left && (!right || signBefore), right && (!left || signAfter)] : [left, right];
  }

  /** The innermost open emphasis was none: its signs are text. */
  unwind() {
    const frame = this.frames.pop();
    this.counts[frame.char]--;
    this.into.push(frame.char.repeat(frame.count), frame.children);
  }

  linkAt(at, bracket, plain) {
    if (this.linked) return at;
    this.brackets ??= pairs(this.text);
    const close = this.brackets.get(bracket);
    if (close === undefined || this.text[close + 1] !== "(") return at;
    const target = destination(this.text, close + 2);
    const address = target && safeAddress(target.address);
    if (!address) return at; // a link that may not be followed is shown as it was written
    const words = inline(this.text.slice(bracket + 1, close), true);
    if (bracket === at) return this.put(plain, at, target.end, link(address, words.length ? words : [address]));
    // A picture elsewhere is never fetched by itself: that would tell its host who reads what.
    return this.put(plain, at, target.end, link(address, words.length ? words : [address], { class: "picture" }));
  }

  entity(at, plain) {
    const found = /^&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|(\w{2,8}));/.exec(this.text.slice(at, at + 12));
    if (!found) return at;
    const [whole, decimal, hex, name] = found;
    const point = name ? null : Number.parseInt(decimal ?? hex, decimal ? 10 : 16);
    const valid = point > 8 && point <= 0x10ffff && !(point >= 0xd800 && point < 0xe000);
    const said = name ? (Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : null) : valid ? String.fromCodePoint(point) : null;
    return said === null ? at : this.put(plain, at, at + whole.length, said);
  }

  angle(at, plain) {
    const part = this.text.slice(at, at + LONGEST_LINK);
    const line = /^<br[ \t]*\/?>/i.exec(part.slice(0, 16));
    if (line) return this.put(plain, at, at + line[0].length, el("br"));
    if (this.linked || !/^<(?:https?:|mailto:)/i.test(part.slice(0, 9))) return at;
    const found = /^<([^\s<>]+)>/.exec(part);
    const address = found && safeAddress(found[1]);
    return address ? this.put(plain, at, at + found[0].length, link(address, [found[1]])) : at;
  }

  bare(at, plain) {
    if (this.linked || !this.text.startsWith("http", at) || (at && /[A-Za-z0-9]/.test(this.text[at - 1]))) return at;
    const found = /^https?:\/\/[!-;=?-_a-z~]+/.exec(this.text.slice(at, at + LONGEST_LINK));
    if (!found) return at;
    const said = unclosed(found[0]);
    const address = /^https?:\/\/[^/]/.test(said) ? safeAddress(said) : null;
    return address ? this.put(plain, at, at + said.length, link(address, [said])) : at;
  }
}

function trimmed(text, at) {
  let end = at;
  while (end > 0 && text[end - 1] === " ") end--;
  return end;
}

/** An address as it stands in a sentence, without the sentence's own signs after it. */
function unclosed(address) {
  let extra = address.split(")").length - address.split("(").length;
  let end = address.length;
  for (; end > 0; end--) {
    const char = address[end - 1];
    if (char === ")" && extra > 0) extra--;
    else if (!".,;:!?'\"*_~]".includes(char)) break;
  }
  return address.slice(0, end);
}

/** The code point that ends before `at`. */
function lastOf(text, at) {
  const low = text.charCodeAt(at - 1);
  return low >= 0xdc00 && low < 0xe000 && at > 1 ? text.slice(at - 2, at) : text[at - 1];
}

/** Where each square bracket is closed; escaped ones and those inside code do not count. */
function pairs(text) {
  const out = new Map();
  const open = [];
  for (const { 0: sign, index } of text.matchAll(/\\.|`[^`\n]*`|[[\]]/gs)) {
    if (sign === "[") open.push(index);
    else if (sign === "]" && open.length) out.set(open.pop(), index);
  }
  return out;
}

/** What stands in a link's parentheses, from just behind the first: its address, and where the link ends. */
function destination(text, from) {
  const part = text.slice(from, from + LONGEST_LINK);
  const pointed = /^[ \n]*<([^<>\n]*)>/.exec(part);
  let at;
  let address;
  if (pointed) [at, address] = [pointed[0].length, pointed[1]];
  else {
    at = /^[ \n]*/.exec(part)[0].length;
    const begin = at;
    for (let depth = 0; at < part.length && !/\s/.test(part[at]); at++) {
      if (part[at] === "(" && ++depth > NESTED_PARENTHESES) return null;
      else if (part[at] === ")" && depth-- === 0) break;
    }
    address = part.slice(begin, at);
  }
  const rest = /^(?:\s+(?:"[^"]{0,500}"|'[^']{0,500}'|\([^()]{0,500}\)))?\s*\)/.exec(part.slice(at));
  return rest && address ? { address, end: from + at + rest[0].length } : null;
}
