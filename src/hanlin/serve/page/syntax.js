// Light colouring of code: comments, strings, numbers, keywords, calls. One pass; a wrong guess only costs a colour.

import { el } from "./dom.js";

const LONGEST = 60000;

const words = (text) => new Set(text.split(" "));
const C_WORDS = "break case const continue default do else enum extern for goto if inline return sizeof static struct switch typedef union void volatile while bool char double float int long short signed unsigned auto true false NULL";
const JS_WORDS = "async await break case catch class const continue debugger default delete do else export extends false finally for from function get if import in instanceof let new null of return set static super switch this throw true try typeof undefined var void while with yield";

const SLASHES = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
const HASH = String.raw`#[^\n]*`;
const DASHES = String.raw`--[^\n]*`;
const QUOTES = String.raw`"(?:[^"\\\n]|\\[\s\S])*"?|'(?:[^'\\\n]|\\[\s\S])*'?`;
const BACKTICKS = "|`(?:[^`\\\\]|\\\\[\\s\\S])*`?";
const TRIPLE = String.raw`[rbfuRBFU]{0,2}(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$))|[rbfuRBFU]{0,2}(?:` + QUOTES + ")";

const c = (more) => ({ comment: SLASHES, string: QUOTES, words: words(`${C_WORDS} ${more}`) });
const LANGUAGES = {
  python: {
    comment: HASH,
    string: TRIPLE,
    words: words("and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return self True try while with yield"),
  },
  javascript: { comment: SLASHES, string: QUOTES + BACKTICKS, words: words(JS_WORDS) },
  typescript: { comment: SLASHES, string: QUOTES + BACKTICKS, words: words(`${JS_WORDS} abstract any as boolean declare enum implements interface keyof namespace never number private protected public readonly string type unknown`) },
  c: c(""),
  "c++": c("catch class concept constexpr delete explicit export friend mutable namespace new noexcept nullptr operator override private protected public requires template this throw try typename using virtual"),
  "c#": c("abstract async await base catch class delegate event finally foreach get in interface internal is lock namespace new null object out override params private protected public readonly ref sealed set string this throw try using var virtual yield"),
  java: c("abstract boolean byte catch class extends final finally implements import instanceof interface new null package private protected public record super synchronized this throw throws transient try var"),
  kotlin: c("as by class companion data fun in init interface internal is lateinit null object open override package private protected public sealed super this throw try typealias val var when"),
  swift: c("as class deinit extension false fileprivate func guard import in init internal is let nil open operator override private protocol public rethrows self some super throw throws try var where"),
  go: { ...c("chan defer error fallthrough func import interface iota map nil package range rune select string type var"), string: QUOTES + BACKTICKS },
  rust: { ...c("as async await crate dyn fn impl in let loop match mod move mut pub ref Self self super trait type unsafe use where i8 i16 i32 i64 u8 u16 u32 u64 usize isize f32 f64 str String Vec Option Some None Result Ok Err"), string: String.raw`"(?:[^"\\]|\\[\s\S])*"?|'(?:[^'\\\n]|\\.)'` },
  php: { ...c("abstract array as catch class echo extends final finally fn foreach function global implements interface namespace new null private protected public require throw try use var"), comment: `${SLASHES}|${HASH}` },
  shell: { comment: String.raw`(?<![^\s;])#[^\n]*`, string: QUOTES, words: words("case cd do done echo elif else esac exit export fi for function if in local read return set sudo then until while apt pip conda git curl python") },
  sql: { comment: `${DASHES}|${SLASHES}`, string: QUOTES, any: true, words: words("add all alter and as asc between by case create cross database delete desc distinct drop else end exists foreign from full group having if in index inner insert into is join key left like limit not null offset on or order outer primary references right select set table then union unique update values view when where with") },
  ruby: { comment: HASH, string: QUOTES, words: words("alias and begin break case class def do else elsif end ensure false for if in module next nil not or redo rescue retry return self super then true undef unless until when while yield puts require") },
  lua: { comment: DASHES, string: QUOTES, words: words("and break do else elseif end false for function goto if in local nil not or repeat return then true until while") },
  r: { comment: HASH, string: QUOTES, words: words("break else FALSE for function if in Inf library NA NaN next NULL repeat return TRUE while") },
  json: { comment: SLASHES, string: QUOTES, words: words("true false null") },
  yaml: { comment: String.raw`(?<!\S)#[^\n]*`, string: QUOTES, words: words("true false null yes no on off") },
  toml: { comment: `${HASH}|(?<=^|\\n);[^\\n]*`, string: TRIPLE, words: words("true false") },
  css: { comment: String.raw`\/\*[\s\S]*?(?:\*\/|$)`, string: QUOTES, words: words("important inherit initial none auto") },
  html: { comment: String.raw`<!--[\s\S]*?(?:-->|$)`, string: QUOTES, tags: true, words: words("") },
  diff: { lines: true },
};
const NAMES = {
  py: "python", python3: "python", pycon: "python", js: "javascript", jsx: "javascript", mjs: "javascript", node: "javascript",
  ts: "typescript", tsx: "typescript", cpp: "c++", cc: "c++", cxx: "c++", h: "c", hpp: "c++", cs: "c#", csharp: "c#", kt: "kotlin",
  golang: "go", rs: "rust", sh: "shell", bash: "shell", zsh: "shell", console: "shell", shellscript: "shell", dockerfile: "shell",
  makefile: "shell", mysql: "sql", sqlite: "sql", postgresql: "sql", rb: "ruby", jsonc: "json", json5: "json", yml: "yaml",
  ini: "toml", conf: "toml", scss: "css", less: "css", xml: "html", svg: "html", vue: "html", patch: "diff",
};

const known = (name) => (Object.hasOwn(NAMES, name) ? NAMES[name] : name);

/** What a block of code is labelled with. */
export function languageName(info) {
  const name = info.toLowerCase().slice(0, 30);
  return /^[a-z0-9+#._-]+$/.test(name) ? known(name) : "";
}

/** Nodes and strings that show the code. */
export function coloured(text, info) {
  const name = languageName(info);
  if (text.length > LONGEST || !Object.hasOwn(LANGUAGES, name)) return [text];
  const language = LANGUAGES[name];
  return language.lines ? changes(text) : tokens(text, language);
}

function tokens(text, language) {
  const tags = language.tags ? String.raw`|(?<tag><\/?[A-Za-z][\w:-]*|\/?>)` : "";
  const pattern = new RegExp(
    `(?<comment>${language.comment})${tags}|(?<string>${language.string})` +
      String.raw`|(?<number>\b(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b)|(?<word>[\p{L}_$][\p{L}\p{N}_$]*)`,
    "gu",
  );
  const out = [];
  let at = 0;
  for (const found of text.matchAll(pattern)) {
    const kind = kindOf(found, text, language);
    if (!kind) continue;
    if (found.index > at) out.push(text.slice(at, found.index));
    out.push(el("span", { class: `code-${kind}`, text: found[0] }));
    at = found.index + found[0].length;
  }
  out.push(text.slice(at));
  return out;
}

function kindOf(found, text, language) {
  const [kind, said] = Object.entries(found.groups).find(([, value]) => value !== undefined);
  if (kind !== "word") return kind;
  if (language.words.has(language.any ? said.toLowerCase() : said)) return "keyword";
  return text[found.index + said.length] === "(" ? "call" : null;
}

function changes(text) {
  const kinds = { "+": "code-added", "-": "code-removed", "@": "code-comment" };
  return text.split(/(?<=\n)/).map((line) => (kinds[line[0]] ? el("span", { class: kinds[line[0]], text: line }) : line));
}
