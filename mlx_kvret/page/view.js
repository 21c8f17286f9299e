// The drawing: a text with each token shaded by how much of it is kept, the gauge, compactions and heads.
// Texts are only ever set as text, never read as HTML.
"use strict";
const kvret = (() => {
  const KEPT = 0x7fffffff;
  // Shares up to which a shade reaches, doubling: a token that half of the heads hold is rare in a small budget.
  const SHARES = [0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4], LEVELS = SHARES.length + 1;

  // ---------------------------------------------------------------- data

  // What mlx_kvret.core.history.described wrote, with gone (L·H·n): the compaction that took an entry, or KEPT.
  async function decoded(told) {
    const size = told.bytes, n = told.now[0];
    const packed = Uint8Array.from(atob(told.gone), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const heads = told.layers * told.kv_heads;
    if (bytes.length !== heads * n * size) throw new Error("its data is cut");
    const first = firsts(told.compactions, n), most = 256 ** size - 1, gone = new Int32Array(heads * n);
    for (let h = 0, i = 0; h < heads; h++) {
      for (let t = 0; t < n; t++, i++) {
        let age = 0;
        for (let b = size - 1; b >= 0; b--) age = age * 256 + bytes[i * size + b];
        gone[i] = age === most ? KEPT : age + first[t];
      }
    }
    return { ...told, n, gone };
  }

  // The first compaction after each of n tokens was read.
  function firsts(compactions, n) {
    const first = new Int32Array(n);
    for (let t = 0, c = 0; t < n; t++) {
      while (c < compactions.length && compactions[c][0] <= t) c++;
      first[t] = c;
    }
    return first;
  }

  // One more turn of a conversation behind what was known of it. A turn tells only that something was gone
  // when it began; when that went is known from before, as far as both begin with the same tokens.
  function joined(old, turn) {
    if (!old || old.layers !== turn.layers || old.kv_heads !== turn.kv_heads) return turn;
    let same = 0;
    const most = Math.min(old.n, turn.n, turn.cached || 0);
    while (same < most && old.texts[same] === turn.texts[same]) same++;
    if (!same) return turn;
    const past = old.compactions.filter((moment) => moment[0] <= same);
    // the first of the turn's compactions is its beginning, if something was gone by then
    const start = turn.compactions.length && turn.compactions[0][0] === turn.cached ? 1 : 0;
    const heads = turn.layers * turn.kv_heads, gone = new Int32Array(heads * turn.n);
    let unknown = false;
    for (let h = 0; h < heads; h++) {
      for (let t = 0; t < turn.n; t++) {
        const own = turn.gone[h * turn.n + t], before = t < same ? old.gone[h * old.n + t] : KEPT;
        let value = own;
        if (own !== KEPT) {
          const early = own < start;
          if (early && before < past.length) value = before;
          else {
            unknown = unknown || early;
            value = own + past.length;
          }
        }
        gone[h * turn.n + t] = value;
      }
    }
    if (start && !unknown) for (let i = 0; i < gone.length; i++) {
      if (gone[i] !== KEPT && gone[i] > past.length) gone[i] -= 1;
    }
    const own = start && !unknown ? turn.compactions.slice(1) : turn.compactions;
    return { ...turn, compactions: [...past, ...own], gone };
  }

  // How many heads of the rows [from, to) hold each token after compaction `at`, and lost it then.
  function counted(data, at, from, to) {
    const { n, gone } = data, seen = moment(data, at)[0];
    const held = new Int32Array(n), lost = new Int32Array(n);
    for (let h = from; h < to; h++) {
      for (let t = 0, i = h * n; t < seen; t++, i++) {
        if (gone[i] > at) held[t]++;
        else if (gone[i] === at) lost[t]++;
      }
    }
    return { held, lost, seen };
  }

  const moment = (data, at) => (at < data.compactions.length ? data.compactions[at] : data.now);

  // ---------------------------------------------------------------- elements

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in made && key !== "list") made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function bytes(count) {
    for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
      if (count >= size) return `${(count / size).toFixed(count < 10 * size ? 2 : 1)} ${unit}`;
    }
    return `${count} B`;
  }

  const number = (count) => count.toLocaleString("en");
  const percent = (share) => `${share > 0 && share < 0.01 ? "<1" : Math.round(100 * share)} %`;
  const level = (share) => (share >= 1 ? LEVELS : SHARES.filter((limit) => limit < share).length);

  // ---------------------------------------------------------------- the view

  class View {
    constructor(root) {
      this.root = root;
      root.replaceChildren();
      this.said = element("p", { className: "said" });
      this.gauge = this.#gauge();
      this.slider = element("input", { type: "range", min: 0, value: 0, id: "compaction", "aria-label": "compaction" });
      this.slider.addEventListener("input", () => this.draw());
      this.when = element("output", { htmlFor: "compaction" });
      this.layer = this.#choice("layer", () => { this.head.value = "-1"; this.draw(); });
      this.head = this.#choice("head", () => this.draw());
      this.text = element("div", { className: "text", tabIndex: 0, role: "application",
        "aria-label": "the text; arrow keys go from token to token" });
      this.text.addEventListener("click", (event) => this.#pick(event.target));
      this.text.addEventListener("keydown", (event) => this.#key(event));
      this.detail = element("div", { className: "detail", "aria-live": "polite" });
      this.grid = element("div", { className: "grid" });
      this.grid.addEventListener("click", (event) => this.#scope(event.target));
      root.append(
        this.said, this.gauge,
        element("div", { className: "controls" },
          element("label", { className: "wide" }, "after compaction ", this.when, this.slider),
          element("label", {}, "layer ", this.layer), element("label", {}, "KV head ", this.head)),
        this.#legend(), this.text, this.detail,
        element("details", { className: "heads" },
          element("summary", {}, "layers and heads: how many entries each holds"), this.grid));
      this.picked = -1;
    }

    // Show data from decoded() or joined(), at its end.
    show(data) {
      this.data = data;
      this.spans = data.texts.map((text, at) => {
        const span = element("span", { textContent: text });
        span.dataset.at = at;
        if (/^[ \t]*\n+$/.test(text)) span.dataset.line = "";
        return span;
      });
      this.classes = new Array(this.spans.length).fill("");
      this.text.replaceChildren(...this.#laid());
      this.picked = -1;
      this.detail.replaceChildren();
      this.slider.max = data.compactions.length;
      this.slider.value = data.compactions.length;
      this.slider.disabled = data.compactions.length === 0;
      this.#options(this.layer, "all layers", data.layer_numbers || [...Array(data.layers).keys()]);
      this.#options(this.head, "all heads", [...Array(data.kv_heads).keys()]);
      this.#cells();
      this.root.dataset.ready = data.n;
      this.draw();
    }

    // The tokens in a row, but those of a picture as the patches they are.
    #laid() {
      const laid = [];
      let next = 0;
      for (const [start, end, columns] of this.data.pictures || []) {
        laid.push(...this.spans.slice(next, start));
        const patches = this.spans.slice(start, end);
        patches.forEach((span, at) => {
          span.textContent = "";
          span.title = `row ${Math.floor(at / columns)}, column ${at % columns}`;
        });
        const picture = element("div", { className: "picture", role: "img", "aria-label": `a picture of ${end - start} patches` }, ...patches);
        picture.style.gridTemplateColumns = `repeat(${columns}, 1.3rem)`;
        laid.push(picture);
        next = end;
      }
      return [...laid, ...this.spans.slice(next)];
    }

    draw() {
      const data = this.data, at = Number(this.slider.value), layer = Number(this.layer.value);
      this.head.disabled = layer < 0;
      const head = layer < 0 ? -1 : Number(this.head.value), H = data.kv_heads;
      const [from, to] = layer < 0 ? [0, data.layers * H]
        : head < 0 ? [layer * H, (layer + 1) * H] : [layer * H + head, layer * H + head + 1];
      this.count = counted(data, at, from, to);
      this.heads = to - from;
      const { held, lost, seen } = this.count;
      for (let t = 0; t < this.spans.length; t++) {
        let name = t >= seen ? "ahead" : `l${level(held[t] / this.heads)}`;
        if (lost[t]) name += " lost";
        if (t === this.picked) name += " picked";
        if (name !== this.classes[t]) {
          this.classes[t] = name;
          this.spans[t].className = name;
        }
      }
      this.#tell(at);
      this.#shadeCells(at);
      this.#detail();
    }

    #tell(at) {
      const data = this.data, [seen, entries, held] = moment(data, at), last = at === data.compactions.length;
      const full = seen * data.full_bytes_per_token, most = data.n * data.full_bytes_per_token;
      const lost = this.count.lost.reduce((sum, one) => sum + one, 0);
      this.when.textContent = last ? `${at} of ${data.compactions.length} (now)`
        : `${at + 1} of ${data.compactions.length}: ${number(lost)} entries went`;
      this.said.textContent = `${data.model}, ${data.policy} eviction, budget ${number(data.budget)} tokens per KV head: `
        + `${number(seen)} tokens read, ${number(entries)} of ${number(seen * data.layers * data.kv_heads)} entries kept`;
      const scale = Math.max(most, ...data.compactions.map((one) => one[2]), data.now[2], 1);
      for (const [bar, value] of [[this.bounded, held], [this.full, full]]) {
        bar.value = value / scale;
        bar.nextSibling.textContent = bytes(value);
      }
      this.gauge.dataset.bounded = held;
      this.gauge.dataset.full = full;
      this.#line(scale, at);
    }

    // ---------------------------------------------------------------- gauge

    #gauge() {
      const row = (name, title) => {
        this[name] = element("meter", { min: 0, max: 1, value: 0, className: name, "aria-label": title });
        return element("div", { className: "row" }, element("span", {}, title), this[name], element("b"));
      };
      this.lines = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      this.lines.setAttribute("viewBox", "0 0 100 30");
      this.lines.setAttribute("preserveAspectRatio", "none");
      this.lines.setAttribute("role", "img");
      this.lines.setAttribute("aria-label", "memory over the text: a full cache grows, this one does not");
      return element("section", { className: "gauge", "aria-label": "KV memory" },
        row("bounded", "this cache"), row("full", "a full cache"), this.lines);
    }

    #line(scale, at) {
      const data = this.data, x = (seen) => (100 * seen / Math.max(data.n, 1)).toFixed(2);
      const y = (size) => (29 - 28 * size / scale).toFixed(2);
      const steps = [[0, 0, 0], ...data.compactions, data.now];
      const draw = (name, points) => {
        const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
        line.setAttribute("class", name);
        line.setAttribute("points", points.map(([a, b]) => `${a},${b}`).join(" "));
        return line;
      };
      const here = moment(data, at)[0];
      this.lines.replaceChildren(
        draw("full", [[0, y(0)], [100, y(data.n * data.full_bytes_per_token)]]),
        draw("bounded", steps.map((one) => [x(one[0]), y(one[2])])),
        draw("here", [[x(here), 0], [x(here), 30]]));
    }

    // ---------------------------------------------------------------- layers and heads

    #choice(name, changed) {
      const made = element("select", { "aria-label": name });
      made.addEventListener("change", changed);
      return made;
    }

    #options(select, all, numbers) {
      select.replaceChildren(element("option", { value: "-1", textContent: all }),
        ...numbers.map((shown, at) => element("option", { value: String(at), textContent: String(shown) })));
      select.value = "-1";
    }

    #cells() {
      const { layers, kv_heads } = this.data;
      this.cells = [];
      const rows = [];
      for (let layer = 0; layer < layers; layer++) {
        const shown = (this.data.layer_numbers || [])[layer] ?? layer;
        const row = element("div", { className: "row" });
        const label = element("button", { type: "button", textContent: shown, title: `layer ${shown}` });
        label.dataset.layer = layer;
        label.dataset.head = -1;
        row.append(label);
        for (let head = 0; head < kv_heads; head++) {
          const cell = element("button", { type: "button" });
          cell.dataset.layer = layer;
          cell.dataset.head = head;
          row.append(cell);
          this.cells.push(cell);
        }
        rows.push(row);
      }
      this.grid.replaceChildren(...rows);
    }

    #shadeCells(at) {
      const { n, gone } = this.data, seen = this.count.seen;
      const held = this.cells.map((_, h) => {
        let count = 0;
        for (let t = 0, i = h * n; t < seen; t++, i++) if (gone[i] > at) count++;
        return count;
      });
      const most = Math.max(1, ...held);
      this.cells.forEach((cell, h) => {
        const said = `layer ${this.layer.options[Number(cell.dataset.layer) + 1].textContent}, `
          + `head ${cell.dataset.head}: ${number(held[h])} entries`;
        cell.className = `l${Math.ceil(LEVELS * held[h] / most)}`;
        cell.title = said;
        cell.setAttribute("aria-label", said);
      });
    }

    #scope(target) {
      if (target.dataset.layer === undefined) return;
      const same = this.layer.value === target.dataset.layer && this.head.value === target.dataset.head;
      this.layer.value = same ? "-1" : target.dataset.layer;
      this.head.value = same ? "-1" : target.dataset.head;
      this.draw();
    }

    // ---------------------------------------------------------------- one token

    #pick(target) {
      if (target.dataset.at === undefined) return;
      this.picked = Number(target.dataset.at);
      this.draw();
    }

    #key(event) {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.picked = Math.min(Math.max(this.picked + step, 0), this.spans.length - 1);
      this.draw();
      this.spans[this.picked].scrollIntoView({ block: "nearest" });
    }

    #detail() {
      const data = this.data, t = this.picked;
      if (t < 0) return;
      const at = Number(this.slider.value), { held, lost, seen } = this.count;
      const layers = [];
      for (let layer = 0; layer < data.layers; layer++) {
        let count = 0;
        for (let head = 0; head < data.kv_heads; head++) {
          if (t < seen && data.gone[(layer * data.kv_heads + head) * data.n + t] > at) count++;
        }
        const shown = this.layer.options[layer + 1].textContent;
        layers.push(element("li", { className: `l${level(count / data.kv_heads)}`,
          title: `layer ${shown}: ${count} of ${data.kv_heads} heads`, textContent: shown }));
      }
      const said = t >= seen ? "not read yet"
        : `kept by ${number(held[t])} of ${number(this.heads)} heads (${percent(held[t] / this.heads)})`
          + (lost[t] ? `, ${number(lost[t])} lost it at this compaction` : "");
      this.detail.replaceChildren(
        element("p", {}, element("q", { textContent: data.texts[t] }), ` token ${number(t)}: ${said}; by layer:`),
        element("ol", {}, ...layers));
    }

    #legend() {
      const names = ["gone", ...SHARES.slice(1).map((share) => `≤${Math.floor(100 * share)}`), "<100", "all"];
      const shades = names.map((name, at) => element("span", { className: `l${at}`, textContent: name }));
      return element("p", { className: "legend" }, "kept by\u00a0", ...shades, "\u00a0% of heads",
        element("span", { className: "l4 lost", textContent: "lost some just now" }));
    }
  }

  return { View, decoded, joined, counted, element, bytes, KEPT };
})();
