// All conversations of this browser: in memory, kept in the store, and the same in every tab.

import { isFull } from "./store.js";

/** Events: "change" (detail: id) when another tab changed one; "trouble" (detail: an Error, `full`) when one cannot be kept. */
export class Chats extends EventTarget {
  constructor(store, conversations) {
    super();
    this.store = store;
    this.all = new Map(conversations.map((conversation) => [conversation.id, conversation]));
    this.last = Promise.resolve();
    this.busy = () => false; // whether a reply is being written into a conversation, here
    if (typeof BroadcastChannel === "function") {
      this.channel = new BroadcastChannel("hanlin");
      this.channel.onmessage = ({ data }) => this.heard(String(data.id), data.gone === true);
    }
  }

  static async load(store) {
    const conversations = await store.all();
    for (const { nodes } of conversations) {
      for (const node of Object.values(nodes)) if (node.state === "running") node.state = "stopped"; // the page was closed
    }
    return new Chats(store, conversations);
  }

  get(id) {
    return this.all.get(id);
  }

  /** Newest first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  /** Keep a conversation as it is now; `touch` says that something was said in it. */
  async save(conversation, touch = false) {
    if (touch) conversation.updated = Date.now();
    this.all.set(conversation.id, conversation);
    return this.write(() => this.all.get(conversation.id) === conversation && this.store.put(conversation), conversation.id);
  }

  async remove(id) {
    this.all.delete(id);
    this.channel?.postMessage({ id, gone: true }); // at once: the page may be about to close
    return this.write(() => this.store.remove(id), id);
  }

  /** One after the other, so that the last word is the last. */
  write(work, id) {
    this.last = this.last.then(work).then(
      () => {
        this.channel?.postMessage({ id });
        this.dispatchEvent(new CustomEvent("kept"));
      },
      (error) => {
        error.full = isFull(error);
        this.dispatchEvent(new CustomEvent("trouble", { detail: error }));
      },
    );
    return this.last;
  }

  async heard(id, gone) {
    if (this.busy(id)) return;
    const found = gone ? undefined : await this.store.get(id);
    if (found) this.all.set(id, found);
    else this.all.delete(id);
    this.dispatchEvent(new CustomEvent("change", { detail: id }));
  }
}
