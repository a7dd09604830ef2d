// The page's words, in English and Chinese.

import { recall, remember } from "./store.js";

export const WORDS = {
  en: {
    skip: "Skip to the message box", conversations: "Conversations", newChat: "New conversation", search: "Search conversations",
    noneFound: "Nothing found", none: "No conversations yet", open: "open", done: "done", untitled: "New conversation",
    menu: "Show conversations", closeMenu: "Hide conversations", settings: "Settings", closeSettings: "Close settings",
    rename: "Rename “{title}”", remove: "Delete “{title}”", removed: "Deleted “{title}”.", undo: "Undo", dismiss: "Dismiss", title: "Title",
    exportAll: "Export", importAll: "Import", imported: { one: "Imported {count} conversation.", other: "Imported {count} conversations." },
    importJson: "This file is not JSON.", importFormat: "This file holds no conversations exported from here.", importLarge: "This file is larger than 200 MB.",
    model: "Model", models: "Models", notServed: "{model} (not served)", noModel: "No model",
    message: "Message", messages: "Messages", placeholder: "Write a message", send: "Send", stop: "Stop",
    hintKeys: "Enter sends, Shift+Enter begins a new line, Esc stops", hintTouch: "Replies can be wrong. Check what matters.",
    you: "You", assistant: "Assistant", tool: "Tool", toolResult: "Result of {name}",
    copy: "Copy", copied: "Copied", notCopied: "Could not copy", copyMessage: "Copy message", copyCode: "Copy code", retry: "Try again", edit: "Edit",
    cancel: "Cancel", saveSend: "Send", editMessage: "Edit the message", earlier: "Earlier version", later: "Later version", version: "{at} of {count}",
    code: "Code", codeIn: "Code: {name}", table: "Table", formula: "Formula", newest: "To the newest message",
    thinking: "Writing a reply", finished: "Reply finished. {text}", stoppedSaid: "Stopped.", failedSaid: "The reply failed.",
    tokens: "{count} tokens", rate: "{rate} tokens/s", firstToken: "first after {seconds} s", promptTokens: "prompt {count}",
    contextUse: "{used} of {most} tokens", stateLength: "The reply reached its max tokens, or the end of the model’s context.", stateStopped: "Stopped before its end.",
    errorKey: "The server wants an API key.", errorBusy: "The server is busy.", errorRefused: "The server refused the request.", errorServer: "The server failed.",
    errorUnreachable: "The server cannot be reached. Is it still running?", errorBroken: "The connection ended in the middle of the reply.",
    wait: "Try again in {seconds} s.", emptyReply: "The reply is empty.",
    callOf: "Call of {name}", arguments: "Arguments", giveResult: "Result of {name}, for the model", sendResults: "Send results",
    system: "System prompt", systemHint: "Said to the model before this conversation.", sampling: "Sampling", byServer: "server’s default",
    temperature: "Temperature", temperatureHint: "0 always takes the likeliest word; more is more varied.", topP: "Top p", topPHint: "Draws only from the likeliest words that make up this share.",
    maxTokens: "Max tokens", seed: "Seed", seedHint: "The same seed and the same question give the same reply.", stopWords: "Stop at", stopHint: "One text a line; \\n is a new line.",
    tools: "Tools", toolsHint: "A JSON list in OpenAI’s form. Calls are shown; you give the results.", toolsWrong: "This is not a JSON list of tools.",
    between: "A number from {least} to {most}.", whole: "A whole number from {least} to {most}.", tooManyStops: "At most 16.", reset: "Back to the server’s defaults",
    appearance: "Appearance", theme: "Theme", themeAuto: "As the system", themeLight: "Light", themeDark: "Dark", language: "Language",
    keyTitle: "API key", keyText: "This server answers only with a key. It is kept for this tab only.", keyWrong: "The server did not accept that key.", keyLabel: "Key", keyUse: "Use",
    welcome: "What would you like to know?", welcomeText: "Your conversations are kept in this browser only.",
    tryOne: "Explain why the sky is blue to a ten-year-old.", tryTwo: "Write a Python function that finds all primes below n.", tryThree: "Solve x² − 5x + 6 = 0 step by step.", tryFour: "翻译成英文：学而时习之，不亦说乎？",
    full: "The browser has no more room: what you write now is lost when the page closes. Export your conversations, then delete some.",
    notKept: "The browser could not keep this conversation: {message}", notLasting: "This browser keeps no data for this page: conversations are lost when it is closed. Export what you need.",
    noModels: "The list of models could not be read.", again: "Try again", shortcuts: "Keys", keyNew: "New conversation", keyEditLast: "Edit the last message (when the box is empty)", keyStop: "Stop the reply",
    keySend: "Send", keyLine: "New line", running: "a reply is being written",
    attach: "Attach an image", image: "Image", imageRemove: "Remove the image", imageWrong: "This image cannot be read.",
  },
  zh: {
    skip: "跳到输入框", conversations: "对话", newChat: "新对话", search: "搜索对话",
    noneFound: "没有找到", none: "还没有对话", open: "未完成", done: "已完成", untitled: "新对话",
    menu: "显示对话列表", closeMenu: "隐藏对话列表", settings: "设置", closeSettings: "关闭设置",
    rename: "重命名“{title}”", remove: "删除“{title}”", removed: "已删除“{title}”。", undo: "撤销", dismiss: "关闭", title: "标题",
    exportAll: "导出", importAll: "导入", imported: { one: "已导入 {count} 个对话。", other: "已导入 {count} 个对话。" },
    importJson: "这个文件不是 JSON。", importFormat: "这个文件里没有从这里导出的对话。", importLarge: "这个文件大于 200 MB。",
    model: "模型", models: "模型", notServed: "{model}（未提供）", noModel: "没有模型",
    message: "消息", messages: "消息", placeholder: "输入消息", send: "发送", stop: "停止",
    hintKeys: "回车发送，Shift+回车换行，Esc 停止", hintTouch: "回答可能有误，重要内容请核实。",
    you: "你", assistant: "助手", tool: "工具", toolResult: "{name} 的结果",
    copy: "复制", copied: "已复制", notCopied: "无法复制", copyMessage: "复制消息", copyCode: "复制代码", retry: "重试", edit: "编辑",
    cancel: "取消", saveSend: "发送", editMessage: "编辑消息", earlier: "上一个版本", later: "下一个版本", version: "第 {at} 个，共 {count} 个",
    code: "代码", codeIn: "代码：{name}", table: "表格", formula: "公式", newest: "到最新消息",
    thinking: "正在回答", finished: "回答完毕。{text}", stoppedSaid: "已停止。", failedSaid: "回答失败。",
    tokens: "{count} 个 token", rate: "{rate} token/秒", firstToken: "首个用时 {seconds} 秒", promptTokens: "提示 {count}",
    contextUse: "{used} / {most} token", stateLength: "回答达到了 token 上限，或到了模型上下文的末尾。", stateStopped: "回答未完即被停止。",
    errorKey: "服务器需要 API 密钥。", errorBusy: "服务器正忙。", errorRefused: "服务器拒绝了请求。", errorServer: "服务器出错了。",
    errorUnreachable: "无法连接服务器。它还在运行吗？", errorBroken: "连接在回答中途断开了。",
    wait: "请在 {seconds} 秒后重试。", emptyReply: "回答是空的。",
    callOf: "调用 {name}", arguments: "参数", giveResult: "{name} 的结果（交给模型）", sendResults: "发送结果",
    system: "系统提示", systemHint: "在本次对话之前告诉模型的话。", sampling: "采样", byServer: "服务器默认值",
    temperature: "温度", temperatureHint: "0 总取最可能的词；越大越多样。", topP: "Top p", topPHint: "只在合计占此比例的最可能的词中抽取。",
    maxTokens: "最多 token 数", seed: "随机种子", seedHint: "种子和问题相同，回答就相同。", stopWords: "停止词", stopHint: "每行一个；\\n 表示换行。",
    tools: "工具", toolsHint: "OpenAI 格式的 JSON 列表。调用会显示出来，结果由你给出。", toolsWrong: "这不是 JSON 格式的工具列表。",
    between: "请输入 {least} 到 {most} 之间的数。", whole: "请输入 {least} 到 {most} 之间的整数。", tooManyStops: "最多 16 个。", reset: "恢复服务器默认值",
    appearance: "外观", theme: "主题", themeAuto: "跟随系统", themeLight: "浅色", themeDark: "深色", language: "语言",
    keyTitle: "API 密钥", keyText: "这个服务器需要密钥。密钥只在此标签页内保存。", keyWrong: "服务器不接受这个密钥。", keyLabel: "密钥", keyUse: "使用",
    welcome: "想了解什么？", welcomeText: "对话只保存在这个浏览器里。",
    tryOne: "给十岁的孩子讲讲天空为什么是蓝色的。", tryTwo: "写一个 Python 函数，找出小于 n 的所有素数。", tryThree: "一步一步解方程 x² − 5x + 6 = 0。", tryFour: "Translate into Chinese: A journey of a thousand miles begins with a single step.",
    full: "浏览器的空间已满：现在写的内容会在关闭页面时丢失。请导出对话，然后删除一些。",
    notKept: "浏览器无法保存这个对话：{message}", notLasting: "这个浏览器不为本页保存数据：关闭页面后对话会丢失。请导出需要的内容。",
    noModels: "无法读取模型列表。", again: "重试", shortcuts: "快捷键", keyNew: "新对话", keyEditLast: "编辑上一条消息（输入框为空时）", keyStop: "停止回答",
    keySend: "发送", keyLine: "换行", running: "正在回答",
    attach: "添加图片", image: "图片", imageRemove: "移除图片", imageWrong: "无法读取这张图片。",
  },
};

const chosen = recall("language");
let language = Object.hasOwn(WORDS, chosen ?? "") ? chosen : (navigator.languages ?? [navigator.language]).find((name) => /^(zh|en)\b/i.test(name))?.slice(0, 2).toLowerCase() ?? "en";

export const currentLanguage = () => language;

/** The words for `key`, with {names} filled in; `count` chooses singular or plural. */
export function t(key, values = {}) {
  let words = WORDS[language][key];
  if (typeof words === "object") words = words[new Intl.PluralRules(language).select(values.count)] ?? words.other;
  return words.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? numeral(values[name]) : String(values[name])));
}

/** A number as people write it here. */
export function numeral(value, digits = 0) {
  return new Intl.NumberFormat(language === "zh" ? "zh-CN" : "en", { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);
}

/** Speak that language from now on. */
export function setLanguage(name) {
  language = name;
  remember("language", name);
  translate(document);
}

/** Put words in place: data-t is a text, data-t-label an aria-label and tip, data-t-placeholder a placeholder. */
export function translate(root) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll("[data-t-name]")) node.setAttribute("aria-label", t(node.dataset.tName));
  for (const node of root.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    node.title = t(node.dataset.tLabel);
  }
  for (const node of root.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
}
