// Conversations in the browser's own database (IndexedDB); small preferences in localStorage. Nothing is sent anywhere.

const NAME = "hanlin";
const CONVERSATIONS = "conversations";

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Where conversations are kept. Without a database (some private windows) they live as long as the page: `lasting` is false. */
export class Store {
  constructor(database) {
    this.database = database;
    this.lasting = database !== null;
  }

  static async open() {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
      const database = await done(request);
      database.onversionchange = () => database.close();
      return new Store(database);
    } catch {
      return new Store(null);
    }
  }

  async all() {
    return this.lasting ? done(this.database.transaction(CONVERSATIONS).objectStore(CONVERSATIONS).getAll()) : [];
  }

  async get(id) {
    return this.lasting ? done(this.database.transaction(CONVERSATIONS).objectStore(CONVERSATIONS).get(id)) : undefined;
  }

  /** Keep a conversation. Throws a QuotaExceededError where the browser gives no more room. */
  async put(conversation) {
    return this.change((store) => store.put(conversation));
  }

  async remove(id) {
    return this.change((store) => store.delete(id));
  }

  async change(work) {
    if (!this.lasting) return;
    const transaction = this.database.transaction(CONVERSATIONS, "readwrite");
    work(transaction.objectStore(CONVERSATIONS));
    transaction.commit(); // at once: the page may be about to close
    await new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error ?? new DOMException("aborted", "AbortError"));
    });
  }
}

/** Whether an error means that there is no room left. */
export const isFull = (error) => error?.name === "QuotaExceededError" || error?.inner?.name === "QuotaExceededError";

/** A remembered preference, or undefined. */
export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(`hanlin.${name}`) ?? "null") ?? undefined;
  } catch {
    return undefined;
  }
}

/** Remember a preference; not being able to is no reason to stop. */
export function remember(name, value) {
  try {
    if (value === undefined) localStorage.removeItem(`hanlin.${name}`);
    else localStorage.setItem(`hanlin.${name}`, JSON.stringify(value));
  } catch {
    // full or forbidden: it holds until the page is closed
  }
}

/** The API key: for this tab only, and forgotten with it. */
export const secret = {
  get() {
    try {
      return sessionStorage.getItem("hanlin.key") ?? this.value ?? "";
    } catch {
      return this.value ?? "";
    }
  },
  set(key) {
    try {
      sessionStorage.setItem("hanlin.key", key);
    } catch {
      this.value = key; // for as long as the page is open
    }
  },
};
