// LaTeX's maths -> MathML, as far as chat models commonly use it. What cannot be read is shown as its source.

import { el } from "./dom.js";
import { ACCENTS, FENCES, FUNCTIONS, LARGE, LETTERS, LIMITS, OPERATORS, SPACES, STRETCHY, styled, UNDER, UPRIGHT } from "./symbols.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
const LONGEST = 4000;
const DEPTH = 60;
const STYLES = {
  mathbf: "bold", textbf: "bold", bm: "bold-italic", boldsymbol: "bold-italic", mathbb: "double", mathcal: "script", mathscr: "script",
  mathfrak: "fraktur", mathsf: "sans", mathtt: "mono", mathrm: "upright", mathit: "italic", mathnormal: "italic",
};
const TEXTS = new Set(["text", "textrm", "textnormal", "mbox", "textit", "texttt", "textsf", "operatorname", "operatorname*"]);
const FENCED = { matrix: "", smallmatrix: "", pmatrix: "()", bmatrix: "[]", Bmatrix: "{}", vmatrix: "||", Vmatrix: "‖‖" };
const ROWS = new Set(["aligned", "align", "alignat", "split", "gathered", "gather", "equation", "multline", "array", "cases", "eqnarray"]);
const SPELLED = { limsup: "lim sup", liminf: "lim inf", argmax: "arg max", argmin: "arg min" };
const SIZES = /^(?:[bB]igg?[lrm]?)$/;
const QUIET = new Set(["displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "nonumber", "notag", "hline", "centering"]);

class Unreadable extends Error {}

/** An element of MathML. */
function m(tag, attributes = {}, ...children) {
  const node = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const row = (nodes) => (nodes.length === 1 ? nodes[0] : m("mrow", {}, ...nodes));
const sign = (text, attributes = {}) => m("mo", attributes, text);
const own = (map, name) => (Object.hasOwn(map, name) ? map[name] : undefined);

/** The formula; or, where it cannot be read, `raw` as code. */
export function maths(source, display, raw) {
  try {
    if (source.length > LONGEST) throw new Unreadable("too long");
    const parser = new Parser(source, display);
    const content = parser.all();
    const note = m("annotation", { encoding: "application/x-tex" }, source);
    const attributes = { display: display ? "block" : "inline", alttext: source.trim() };
    return m("math", attributes, m("semantics", {}, m("mrow", {}, ...content), note));
  } catch (error) {
    if (!(error instanceof Unreadable)) throw error;
    return el("code", { class: "maths-source", text: raw });
  }
}

function tokensOf(source) {
  const out = source.replace(/(?<!\\)%[^\n]*/g, "").match(/\\(?:(?:operatorname|tag)\*|[A-Za-z]+|[\s\S])|\d+(?:[.,]\d+)*|\s+|[\s\S]/gu) ?? [];
  return out.map((token) => (/^\s+$/.test(token) ? " " : token));
}

class Parser {
  constructor(source, display) {
    this.tokens = tokensOf(source);
    this.at = 0;
    this.display = display;
    this.depth = 0;
  }

  get token() {
    return this.tokens[this.at];
  }

  skip() {
    while (this.token === " ") this.at++;
    return this.token;
  }

  take(wanted) {
    if (this.skip() !== wanted) throw new Unreadable(wanted);
    this.at++;
  }

  /** Everything; several lines without an environment become rows. */
  all() {
    const rows = this.rows(() => this.token === undefined);
    return rows.length === 1 && rows[0].length === 1 ? rows[0][0] : [grid(rows, "aligned")];
  }

  /** Terms until `ends`, with what is above and below them. */
  terms(ends, style) {
    if (++this.depth > DEPTH) throw new Unreadable("too deep");
    const out = [];
    while (this.skip() !== undefined && !ends(this.token)) {
      if (this.token === "\\color") {
        this.at++;
        this.raw(); // a colour's name: not shown
        continue;
      }
      if (/^\\(?:over|choose|atop)$/.test(this.token)) {
        const kind = this.token;
        this.at++;
        const below = this.terms(ends, style);
        const fraction = m("mfrac", kind === "\\over" ? {} : { linethickness: "0" }, row(out.splice(0)), row(below));
        out.push(...(kind === "\\choose" ? [sign("("), fraction, sign(")")] : [fraction]));
        break;
      }
      const node = this.scripted(style);
      if (node) out.push(node);
    }
    this.depth--;
    return out;
  }

  /** One term with its primes, subscript and superscript. */
  scripted(style) {
    const base = "^_'".includes(this.token) ? { node: m("mrow") } : this.atom(style);
    if (!base) return null;
    let sub = null;
    let sup = null;
    let around = base.limits && this.display;
    for (;;) {
      const next = this.skip();
      if (next === "\\limits" || next === "\\nolimits") {
        around = next === "\\limits";
        this.at++;
      } else if (next === "'") {
        let primes = "";
        for (; this.token === "'"; this.at++) primes += "′";
        sup = sup ? m("mrow", {}, sup, sign(primes)) : sign(primes);
      } else if (next === "^") {
        this.at++;
        const above = this.argument(style);
        sup = sup ? m("mrow", {}, sup, above) : above;
      } else if (next === "_" && !sub) {
        this.at++;
        sub = this.argument(style);
      } else if (next === "_") throw new Unreadable("two subscripts");
      else break;
    }
    const { node } = base;
    const [both, below, above] = around || base.labels ? ["munderover", "munder", "mover"] : ["msubsup", "msub", "msup"];
    let out = node;
    if (sub && sup) out = m(both, {}, node, sub, sup);
    else if (sub) out = m(below, {}, node, sub);
    else if (sup) out = m(above, {}, node, sup);
    // sin x, but sin(x)
    const apart = base.named && this.token !== undefined && !/^(?:[()[\]{}&,.;:|]|\\(?:left|right|big.*|\\|end))$/i.test(this.token);
    return apart ? m("mrow", {}, out, m("mspace", { width: "0.167em" })) : out;
  }

  /** A command's argument: a group, or one term. */
  argument(style) {
    const next = this.skip();
    if (next === undefined || next === "}" || next === "&") throw new Unreadable("argument");
    if (next === "{") return row(this.group(style));
    if (/^\d/.test(next) && next.length > 1) {
      this.tokens.splice(this.at, 1, ...next); // \frac12 and x^12 take one digit
    }
    if (++this.depth > DEPTH) throw new Unreadable("too deep");
    const atom = this.atom(style);
    this.depth--;
    if (!atom) throw new Unreadable("argument");
    return atom.node;
  }

  group(style) {
    this.take("{");
    const inside = this.terms((token) => token === "}", style);
    this.take("}");
    return inside;
  }

  /** A group's source. */
  raw(open = "{", close = "}") {
    this.take(open);
    let depth = 1;
    let text = "";
    for (; this.token !== undefined; this.at++) {
      if (this.token === open) depth++;
      if (this.token === close && --depth === 0) {
        this.at++;
        return text;
      }
      text += this.token;
    }
    throw new Unreadable(close);
  }

  atom(style) {
    const token = this.token;
    this.at++;
    if (token === "{") {
      this.at--;
      return { node: m("mrow", {}, ...this.group(style)) };
    }
    if (token === "}" || token === "&" || token === "$") throw new Unreadable(token);
    if (token.startsWith("\\") && token.length > 1) return this.command(token.slice(1), style);
    if (/^\d/.test(token)) return { node: m("mn", {}, styled(token, style)) };
    if (/^\p{L}/u.test(token)) return { node: this.letter(token, style) };
    if (token === "~") return { node: m("mspace", { width: "0.25em" }) };
    if (token === "-") return { node: sign("−") };
    if (token === "*") return { node: sign("∗") };
    if (token === "|") return { node: sign("|", { stretchy: "false" }) };
    return { node: sign(token, "()[]/".includes(token) ? { stretchy: "false" } : {}) };
  }

  letter(char, style) {
    if (!style || style === "italic") return m("mi", {}, char);
    const said = styled(char, style);
    return said === char ? m("mi", { mathvariant: "normal" }, char) : m("mi", {}, said);
  }

  command(name, style) {
    const letter = own(LETTERS, name);
    if (letter) return { node: this.letter(letter, style) };
    const upright = own(UPRIGHT, name);
    if (upright) return { node: m("mi", { mathvariant: "normal" }, styled(upright, style)) };
    const operator = own(OPERATORS, name);
    if (operator) return { node: sign(operator) };
    const bracket = own(FENCES, name);
    if (bracket) return { node: sign(bracket, { stretchy: "false" }) };
    const large = own(LARGE, name);
    if (large) return { node: sign(large, { largeop: String(this.display), movablelimits: "false" }), limits: !name.endsWith("int") };
    if (FUNCTIONS.has(name)) return { node: named(SPELLED[name] ?? name), named: true, limits: LIMITS.has(name) };
    const space = own(SPACES, name);
    if (space) return { node: m("mspace", { width: space }) };
    if (own(ACCENTS, name)) return this.over(name, ACCENTS[name], "mover", style);
    if (own(UNDER, name)) return this.over(name, UNDER[name], "munder", style);
    if (own(STYLES, name)) return { node: this.argument(STYLES[name]) };
    if (TEXTS.has(name)) return this.words(name);
    if (QUIET.has(name)) return null;
    if (SIZES.test(name)) return { node: this.delimiter({ minsize: name.toLowerCase().startsWith("bigg") ? "2.4em" : "1.6em" }) };
    return this.structure(name, style);
  }

  over(name, char, tag, style) {
    const stretchy = String(STRETCHY.has(name));
    const inside = this.argument(style);
    return { node: m(tag, { accent: "true" }, inside, sign(char, { stretchy })), labels: name.endsWith("brace") };
  }

  words(name) {
    const text = this.raw().replace(/\\([\s\S])/g, "$1").replaceAll("$", "");
    if (name.startsWith("operatorname")) return { node: named(text), named: true, limits: name.endsWith("*") };
    return { node: m("mtext", {}, text.replaceAll(" ", "\u00A0")) };
  }

  structure(name, style) {
    switch (name) {
      case "frac": case "dfrac": case "tfrac": case "cfrac": {
        const attributes = name === "dfrac" || name === "cfrac" ? { displaystyle: "true" } : name === "tfrac" ? { displaystyle: "false" } : {};
        return { node: m("mfrac", attributes, this.argument(style), this.argument(style)) };
      }
      case "binom": case "dbinom": case "tbinom":
        return { node: m("mrow", {}, sign("("), m("mfrac", { linethickness: "0" }, this.argument(style), this.argument(style)), sign(")")) };
      case "sqrt": {
        const index = this.skip() === "[" ? this.inside(this.raw("[", "]")) : null;
        return { node: index ? m("mroot", {}, this.argument(style), row(index)) : m("msqrt", {}, this.argument(style)) };
      }
      case "overset": case "stackrel": {
        const above = this.argument(style);
        return { node: m("mover", {}, this.argument(style), above) };
      }
      case "underset": {
        const below = this.argument(style);
        return { node: m("munder", {}, this.argument(style), below) };
      }
      case "xrightarrow": case "xleftarrow":
        return { node: m("mover", {}, sign(name === "xrightarrow" ? "⟶" : "⟵", { stretchy: "true" }), this.argument(style)) };
      case "not": {
        const next = this.argument(style);
        next.textContent += "\u0338";
        return { node: next };
      }
      case "boxed": case "fbox":
        return { node: m("mrow", { class: "boxed" }, this.argument(style)) };
      case "cancel": case "phantom":
        return { node: m(name === "phantom" ? "mphantom" : "mrow", { class: name }, this.argument(style)) };
      case "tag": case "tag*":
        return { node: m("mtext", { class: "tag" }, `\u2003(${this.raw()})`) };
      case "label":
        this.raw();
        return null;
      case "textcolor":
        this.raw();
        return { node: this.argument(style) };
      case "bmod": case "mod":
        return { node: m("mrow", {}, m("mspace", { width: "0.3em" }), named("mod"), m("mspace", { width: "0.3em" })) };
      case "pmod":
        return { node: m("mrow", {}, m("mspace", { width: "0.5em" }), sign("("), named("mod"), m("mspace", { width: "0.3em" }), this.argument(style), sign(")")) };
      case "left":
        return { node: this.leftRight(style) };
      case "begin":
        return { node: this.environment(style) };
      default:
        throw new Unreadable(name);
    }
  }

  /** Terms of a source that was cut out. */
  inside(source) {
    const parser = new Parser(source, false);
    parser.depth = this.depth + 1;
    return parser.all();
  }

  delimiter(attributes) {
    const token = this.skip();
    if (token === undefined) throw new Unreadable("delimiter");
    this.at++;
    if (token === ".") return m("mrow");
    const said = token.startsWith("\\") ? own(FENCES, token.slice(1)) ?? own(OPERATORS, token.slice(1)) : token === "<" ? "⟨" : token === ">" ? "⟩" : token;
    if (!said || !/^[()[\]{}|/\\⟨⟩⌊⌋⌈⌉‖⟮⟯↑↓⇑⇓]$/u.test(said)) throw new Unreadable(token);
    return sign(said, { fence: "true", stretchy: "true", symmetric: "true", ...attributes });
  }

  leftRight(style) {
    const out = [this.delimiter({ form: "prefix" })];
    for (;;) {
      out.push(...this.terms((token) => token === "\\right" || token === "\\middle", style));
      const end = this.skip();
      if (end === undefined) throw new Unreadable("\\right");
      this.at++;
      if (end === "\\right") break;
      out.push(this.delimiter({}));
    }
    out.push(this.delimiter({ form: "postfix" }));
    return m("mrow", {}, ...out);
  }

  environment(style) {
    const name = this.raw();
    const kind = name.replace("*", "");
    const matrix = own(FENCED, kind);
    if (matrix === undefined && !ROWS.has(kind)) throw new Unreadable(name);
    let columns = "";
    if (kind === "array" || kind === "alignat") columns = this.raw();
    const rows = this.rows((token) => token === "\\end", style);
    this.take("\\end");
    if (this.raw() !== name) throw new Unreadable("\\end");
    if (kind === "cases") return m("mrow", {}, sign("{", { fence: "true", stretchy: "true", symmetric: "true", form: "prefix" }), grid(rows, "cases"));
    if (matrix === undefined) return grid(rows, kind === "array" ? columns : "aligned");
    const fence = (char, form) => sign(char, { fence: "true", stretchy: "true", symmetric: "true", form });
    const [open, close] = [...matrix];
    return matrix ? m("mrow", {}, fence(open, "prefix"), grid(rows, ""), fence(close, "postfix")) : grid(rows, "");
  }

  /** Rows of cells, parted by `\\` and `&`, until `ends`. */
  rows(ends, style) {
    const rows = [[]];
    for (;;) {
      const cell = this.terms((token) => token === "&" || token === "\\\\" || token === "\\newline" || token === "\\cr" || ends(token), style);
      rows.at(-1).push(cell);
      const end = this.skip();
      if (end === undefined || ends(end)) break;
      this.at++;
      if (end === "&") continue;
      if (this.token === "[") this.raw("[", "]"); // space between lines
      rows.push([]);
    }
    const last = rows.at(-1);
    if (rows.length > 1 && last.length === 1 && last[0].length === 0) rows.pop();
    return rows;
  }
}

/** A named function, upright. */
function named(text) {
  return m("mi", { mathvariant: "normal" }, text);
}

/** A table; `kind` is "aligned" (columns right, left, right, ...), "cases" (left) or LaTeX's letters l, c, r. */
function grid(rows, kind) {
  const letters = kind.replace(/[^lcr]/g, "");
  const named = kind === "aligned" || kind === "cases";
  const classOf = (n) => {
    if (kind === "aligned") return n % 2 ? "left" : "right";
    if (kind === "cases") return "left";
    return { l: "left", r: "right" }[letters[n]] ?? "middle";
  };
  const wide = kind === "aligned" && rows.every((cells) => cells.length === 1);
  const lines = rows.map((cells) =>
    m("mtr", {}, ...cells.map((cell, n) => m("mtd", { class: wide ? "middle" : classOf(n), ...(kind === "aligned" ? { displaystyle: "true" } : {}) }, ...cell))),
  );
  return m("mtable", { class: named ? kind : "matrix" }, ...lines);
}
