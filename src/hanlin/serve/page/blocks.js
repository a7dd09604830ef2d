// Markdown's blocks: text -> a tree of plain objects. CommonMark and GitHub's tables, read as chat models write them.
//
// Left out on purpose: HTML (it is shown as text) and link reference definitions (a later line would change earlier blocks,
// and a reply that streams in could not be shown piece by piece). Time is linear in the text, depth is bounded.

const DEPTH = 12;
// No pattern here may try one stretch of text in two ways: a line can be a megabyte of spaces.
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/s;
const HEADING = /^ {0,3}(#{1,6})(?![^ \t])/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const MARKER = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|)$/s;
const UNDERLINE = /^ {0,3}(=+|-{2,})[ \t]*$/;
const DELIMITERS = /^[ \t|:-]+$/;
const MATHS = [
  [/^ {0,3}\$\$/, "$$"],
  [/^ {0,3}\\\[/, "\\]"],
];
const ENVIRONMENT = /^ {0,3}\\begin\{((?:equation|align|gather|multline|aligned|cases|[pbvBV]?matrix)\*?)\}/;

/** What no text node should hold: lone halves of surrogate pairs and NUL become the replacement character. */
export function clean(text) {
  const whole = text.toWellFormed
    ? text.toWellFormed()
    : text.replace(/[\uD800-\uDBFF](?![\uDC00-\uDFFF])|(?<![\uD800-\uDBFF])[\uDC00-\uDFFF]/g, "\uFFFD");
  return whole.replace(/\r\n?/g, "\n").replaceAll("\0", "\uFFFD");
}

export const blank = (line) => /^[ \t]*$/.test(line);

/** Columns of white space before the text; a tab reaches to the next multiple of four. */
function indent(line) {
  let column = 0;
  for (const char of line) {
    if (char === " ") column += 1;
    else if (char === "\t") column += 4 - (column % 4);
    else break;
  }
  return column;
}

/** The line less that many columns of white space. */
function dedent(line, columns) {
  let column = 0;
  let i = 0;
  while (i < line.length && column < columns && (line[i] === " " || line[i] === "\t")) {
    column += line[i] === " " ? 1 : 4 - (column % 4);
    i++;
  }
  return " ".repeat(Math.max(0, column - columns)) + line.slice(i);
}

/** A list item's beginning, or null. `width` is the column where its text begins. */
function marker(line) {
  const found = MARKER.exec(line);
  if (!found || RULE.test(line)) return null;
  const [, before, sign, gap = " ", rest = ""] = found;
  const from = indent(before + "x");
  const spaces = gap.length > 4 ? 1 : indent(gap + "x");
  const ordered = sign.length > 1;
  return {
    indent: from,
    kind: sign.at(-1),
    number: ordered ? Number.parseInt(sign, 10) : null,
    width: from + sign.length + spaces,
    rest: gap.length > 4 ? gap.slice(1) + rest : rest,
  };
}

/** Cells of a table's row: parted at bars that are neither escaped nor inside code. */
export function cells(line) {
  const text = line.trim();
  const out = [];
  let cell = "";
  let code = "";
  for (let i = text.startsWith("|") ? 1 : 0; i < text.length; i++) {
    const char = text[i];
    if (char === "\\" && text[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (char === "`") {
      let run = i;
      while (text[run] === "`") run++;
      const ticks = text.slice(i, run);
      if (!code && text.indexOf(ticks, run) > 0) code = ticks;
      else if (ticks === code) code = "";
      cell += ticks;
      i = run - 1;
    } else if (char === "|" && !code) {
      out.push(cell.trim());
      cell = "";
    } else cell += char;
  }
  if (cell.trim() || !text.endsWith("|")) out.push(cell.trim());
  return out;
}

function tableAt(lines, i) {
  if (i + 1 >= lines.length || !lines[i].includes("|") || !/[|:]/.test(lines[i + 1])) return null;
  if (!DELIMITERS.test(lines[i + 1]) || indent(lines[i]) > 3) return null;
  const marks = cells(lines[i + 1]);
  if (!marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
  const head = cells(lines[i]);
  if (head.length !== marks.length) return null;
  const align = marks.map((m) => (m.endsWith(":") ? (m.startsWith(":") ? "center" : "right") : m.startsWith(":") ? "left" : ""));
  return { head, align };
}

function mathsAt(line) {
  for (const [opening, closing] of MATHS) if (opening.test(line)) return closing;
  const environment = ENVIRONMENT.exec(line);
  return environment ? `\\end{${environment[1]}}` : null;
}

function fenceAt(line) {
  const found = FENCE.exec(line);
  return found && !(found[1][0] === "`" && found[2].includes("`")) ? found : null;
}

/** Whether a line ends the paragraph before it. */
function interrupts(lines, i) {
  const line = lines[i];
  if (fenceAt(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || mathsAt(line) || tableAt(lines, i)) return true;
  const item = marker(line);
  return item !== null && item.indent < 4 && item.rest.trim() !== "" && (item.number === null || item.number === 1);
}

/** Blocks of `lines`, each with its lines `from` (inclusive) and `to` (exclusive). */
export function parseBlocks(lines, depth = 0) {
  const out = [];
  let i = 0;
  while (i < lines.length) {
    if (blank(lines[i])) {
      i++;
      continue;
    }
    const block = depth < DEPTH ? blockAt(lines, i, depth) : paragraphAt(lines, i, true);
    block.from = i;
    out.push(block);
    i = block.to;
  }
  return out;
}

function blockAt(lines, i, depth) {
  const line = lines[i];
  const fence = fenceAt(line);
  if (fence) return codeAt(lines, i, fence);
  if (indent(line) >= 4) return indentedAt(lines, i);
  const heading = HEADING.exec(line);
  if (heading) return { type: "heading", level: heading[1].length, text: title(line.slice(heading[0].length)), to: i + 1 };
  if (RULE.test(line)) return { type: "rule", to: i + 1 };
  if (QUOTE.test(line)) return quoteAt(lines, i, depth);
  const closing = mathsAt(line);
  if (closing) {
    const maths = displayAt(lines, i, closing);
    if (maths) return maths;
  }
  const table = tableAt(lines, i);
  if (table) return rowsAt(lines, i, table);
  if (marker(line)) return listAt(lines, i, depth);
  return paragraphAt(lines, i, false);
}

/** A heading's text without the hashes that may close it. */
function title(rest) {
  const text = rest.trim();
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end--;
  return end === 0 || /[ \t]/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

function codeAt(lines, i, [, ticks, info]) {
  const strip = indent(lines[i]);
  const end = new RegExp(`^ {0,3}${ticks[0] === "`" ? "`" : "~"}{${ticks.length},}[ \\t]*$`);
  let to = i + 1;
  while (to < lines.length && !end.test(lines[to])) to++;
  const text = lines.slice(i + 1, to).map((line) => dedent(line, strip));
  const closed = to < lines.length;
  return { type: "code", language: info.trim().split(/[\s{,]/, 1)[0], text: text.join("\n"), closed, to: closed ? to + 1 : to };
}

function indentedAt(lines, i) {
  let to = i;
  while (to < lines.length && (blank(lines[to]) || indent(lines[to]) >= 4)) to++;
  while (blank(lines[to - 1])) to--;
  return { type: "code", language: "", text: lines.slice(i, to).map((line) => dedent(line, 4)).join("\n"), closed: true, to };
}

function quoteAt(lines, i, depth) {
  const own = [];
  let to = i;
  for (; to < lines.length; to++) {
    if (QUOTE.test(lines[to])) own.push(lines[to].replace(QUOTE, ""));
    else if (blank(lines[to]) || blank(own.at(-1)) || marker(lines[to]) || interrupts(lines, to)) break;
    else own.push(lines[to]);
  }
  return { type: "quote", blocks: parseBlocks(own, depth + 1), to };
}

function displayAt(lines, i, closing) {
  const environment = closing.startsWith("\\end");
  const first = lines[i].trimStart().slice(environment ? 0 : 2);
  const text = [];
  for (let to = i; to < lines.length && to < i + 200; to++) {
    const line = to === i ? first : lines[to];
    const end = line.indexOf(closing);
    if (end >= 0) {
      const after = line.slice(end + closing.length).trim();
      if (after && !/^[.,;:。，；]$/.test(after)) return null; // more text follows: it is maths within a paragraph
      text.push(line.slice(0, end));
      const source = text.join("\n") + (environment ? closing : "");
      return { type: "maths", source, raw: lines.slice(i, to + 1).join("\n"), after, to: to + 1 };
    }
    if (to > i && blank(line)) return null;
    text.push(line);
  }
  return null;
}

function rowsAt(lines, i, { head, align }) {
  const rows = [];
  let to = i + 2;
  for (; to < lines.length && !blank(lines[to]) && lines[to].includes("|") && !QUOTE.test(lines[to]); to++) {
    const row = cells(lines[to]).slice(0, head.length);
    while (row.length < head.length) row.push("");
    rows.push(row);
  }
  return { type: "table", head, align, rows, to };
}

function listAt(lines, i, depth) {
  const first = marker(lines[i]);
  const items = [];
  let loose = false;
  let to = i;
  let at = i;
  while (at < lines.length) {
    const item = marker(lines[at]);
    if (!item || item.kind !== first.kind || Math.abs(item.indent - first.indent) > 3) break;
    if (items.length && item.indent >= 4 && item.indent > first.indent) break;
    if (at > to) loose = true; // blank lines before this item
    const own = [item.rest];
    let gap = false;
    let fence = fenceAt(item.rest)?.[1] ?? null;
    let end = at + 1;
    for (at += 1; at < lines.length; at++) {
      const line = lines[at];
      if (blank(line)) {
        own.push("");
        gap = true;
        continue;
      }
      const inner = indent(line);
      const deeper = marker(line);
      // Models often indent by two where the marker needs three.
      const belongs = inner >= item.width || (deeper && inner >= item.indent + 2);
      if (!belongs && (gap || fence || deeper || interrupts(lines, at))) break;
      own.push(dedent(line, belongs ? item.width : inner));
      if (fence ? own.at(-1).trim().startsWith(fence) : fenceAt(own.at(-1))) fence = fence ? null : fenceAt(own.at(-1))[1];
      gap = false;
      end = at + 1;
    }
    own.length = end - (at - own.length);
    to = end;
    const task = /^\[([ xX])\][ \t]+/.exec(own[0]);
    if (task) own[0] = own[0].slice(task[0].length);
    const blocks = parseBlocks(own, depth + 1);
    loose ||= blocks.some((block, n) => n > 0 && block.from > blocks[n - 1].to);
    items.push({ blocks, task: task ? task[1] !== " " : null });
  }
  return { type: "list", start: first.number, items, loose, to };
}

function paragraphAt(lines, i, plain) {
  let to = i + 1;
  let level = 0;
  for (; to < lines.length && !blank(lines[to]); to++) {
    if (plain) continue;
    const under = UNDERLINE.exec(lines[to]);
    if (under) {
      level = under[1][0] === "=" ? 1 : 2;
      break;
    }
    if (interrupts(lines, to)) break;
  }
  const text = lines.slice(i, to).map((line) => line.trimStart()).join("\n").trimEnd();
  return level ? { type: "heading", level, text, to: to + 1 } : { type: "paragraph", text, to };
}
