// The server's page: a talk, streamed, and what the cache remembers of it after each answer.
// All that is kept here is this page's own: messages, and which compaction took what.
"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const view = new kvret.View(by("view"));
  let messages = [], known = null, salt = fresh(), running = null, model = null;

  // Nobody else's prefixes are used, and nobody can tell what was read here.
  function fresh() {
    return [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
  }

  function headers() {
    const key = sessionStorage.getItem("key");
    return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  }

  function trouble(text) {
    by("trouble").textContent = text;
  }

  // ---------------------------------------------------------------- who may ask

  async function greet() {
    try {
      const found = await fetch("v1/models", { headers: headers() });
      if (found.status === 401) {
        trouble(sessionStorage.getItem("key") ? "That is not this server's key." : "");
        by("door").hidden = false;
        by("key").focus();
        return;
      }
      const told = await found.json();
      if (!found.ok) throw new Error(told.error.message);
      model = told.data[0].id;
    } catch (error) {
      trouble(`The server does not answer (${error.message}).`);
      return;
    }
    trouble("");
    by("door").hidden = true;
    by("title").textContent = `${model}, in bounded memory`;
    document.title = model;
    document.body.dataset.ready = "";
    by("text").focus();
  }

  by("door").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("key", by("key").value.trim());
    by("key").value = "";
    greet();
  });

  // ---------------------------------------------------------------- the talk

  function line(kind, text) {
    const made = kvret.element("p", { className: kind, textContent: text });
    by("said").append(made);
    return made;
  }

  function asked(history) {
    const body = { messages: [...messages], stream: true, cache_salt: salt, ...(history ? { kv_history: true } : {}) };
    if (by("system").value.trim()) body.messages.unshift({ role: "system", content: by("system").value });
    for (const [id, name] of [["most", "max_tokens"], ["temperature", "temperature"], ["budget", "kv_budget"]]) {
      if (by(id).value !== "") body[name] = Number(by(id).value);
    }
    return body;
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
      }
    }
  }

  async function request(history, signal) {
    const given = { method: "POST", headers: headers(), body: JSON.stringify(asked(history)), signal };
    const response = await fetch("v1/chat/completions", given);
    if (response.ok) return response;
    const told = await response.json();
    // a talk may be longer than the server takes notes of
    if (history && told.error.param === "kv_history") {
      by("memory").hidden = true;
      return request(false, signal);
    }
    if (response.status === 401) {
      by("door").hidden = false;
    }
    throw new Error(told.error.message);
  }

  async function say() {
    const text = by("text").value;
    if (!text.trim() || running) return;
    trouble("");
    running = new AbortController();
    busy(true);
    messages.push({ role: "user", content: text });
    const own = line("user", text), reply = { role: "assistant", content: "" };
    let shown = null, thought = null, over = false, history = null;
    try {
      const response = await request(true, running.signal);
      by("text").value = "";
      for await (const told of events(response)) {
        if (told.error) throw new Error(told.error.message);
        if (told.kv_history) history = told.kv_history;
        for (const { delta, finish_reason } of told.choices) {
          if (delta.reasoning_content) {
            thought = thought || line("thought", "");
            thought.textContent += delta.reasoning_content;
            reply.reasoning_content = (reply.reasoning_content || "") + delta.reasoning_content;
          }
          if (delta.content) {
            shown = shown || line("assistant", "");
            shown.textContent += delta.content;
            reply.content += delta.content;
          }
          over = over || finish_reason !== null;
        }
      }
      if (!over) throw new Error("the answer was cut off");
    } catch (error) {
      if (error.name !== "AbortError") trouble(error.message);
    }
    running = null;
    busy(false);
    if (over || shown) {
      messages.push(reply);
      if (!shown && !thought) line("assistant", "(nothing)");
    } else {
      // as if it had not been said
      messages.pop();
      own.remove();
      by("text").value = by("text").value || text;
    }
    if (history) await remember(history);
    document.body.dataset.turns = messages.length;
  }

  async function remember(told) {
    try {
      known = kvret.joined(known, await kvret.decoded(told));
    } catch (error) {
      trouble(`What it remembers cannot be drawn here (${error.message}).`);
      return;
    }
    by("memory").hidden = false;
    view.show(known);
  }

  function busy(now) {
    by("send").disabled = now;
    by("stop").disabled = !now;
  }

  by("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    say();
  });
  by("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      say();
    }
  });
  by("stop").addEventListener("click", () => running && running.abort());
  by("new").addEventListener("click", () => {
    if (running) running.abort();
    [messages, known, salt] = [[], null, fresh()];
    by("said").replaceChildren();
    by("memory").hidden = true;
    trouble("");
  });
  greet();
})();
