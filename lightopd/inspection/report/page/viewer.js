"use strict";
// The rollout viewer. Text from rollouts is only ever set as textContent; the page's policy lets no other script run.
(() => {
  const $ = (id) => document.getElementById(id);
  const ROW = 76, UNKNOWN = -32768, CHUNK = 3000, PREVIEW = 160;
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const SHORT = { "\n": "\u21b5", "\r": "\\r", "\t": "\u21e5" };
  const visible = (text) => text.replace(HIDDEN, (c) => SHORT[c] || "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const array = (text, Kind) => { const b = bytes(text); return new Kind(b.buffer, 0, b.length / Kind.BYTES_PER_ELEMENT); };
  const el = (name, properties = {}, ...children) => { const e = Object.assign(document.createElement(name), properties); e.append(...children); return e; };
  const nats = (x) => (x === null || Number.isNaN(x) ? "-" : (x >= 0 ? "+" : "\u2212") + Math.abs(x).toFixed(2));
  const share = (x) => (x === null ? "-" : x >= 0.0001 || x === 0 ? x.toFixed(4) : x.toExponential(1));

  let data, all = [], shown = [], selected = -1, place = -1, signal = "", spans = [], drawn = 0;

  const texts = (id) => data.texts[id] ?? "#" + id;
  const value = (raw) => (raw === UNKNOWN ? null : raw / data.units);

  function unpack(r) {
    if (r.open) return r;
    r.open = true;
    r.tokens = array(r.ids, Int32Array); r.trained = array(r.mask, Uint8Array);
    r.own = r.student && array(r.student, Int16Array); r.spread = r.entropy && array(r.entropy, Int16Array);
    for (const s of Object.values(r.signals)) {
      s.values = array(s.logprobs, Int16Array); s.tails = array(s.tail, Int16Array);
      s.sizes = array(s.counts, Uint16Array); s.ids = array(s.top_ids, Int32Array); s.best = array(s.top, Int16Array);
      s.begins = new Uint32Array(s.sizes.length + 1);
      for (let i = 0; i < s.sizes.length; i++) s.begins[i + 1] = s.begins[i] + s.sizes[i];
    }
    return r;
  }

  // log T - log s of a token, nats; null where one of the two is not known.
  function difference(r, i) {
    const s = r.signals[signal];
    if (!s || !r.own || r.own[i] === UNKNOWN || s.values[i] === UNKNOWN) return null;
    return (s.values[i] - r.own[i]) / data.units;
  }

  function measure() {
    const clip = Math.abs(+$("clip").value) || Infinity;
    for (const r of all) {
      unpack(r);
      let sum = 0, clipped = 0, count = 0, worst = 0, spread = 0;
      for (let i = 0; i < r.tokens.length; i++) {
        if (!r.trained[i]) continue;
        const d = difference(r, i);
        if (d === null) continue;
        count++; sum -= d; clipped += Math.max(-clip, Math.min(clip, d)); worst = Math.max(worst, Math.abs(d));
        if (r.spread) spread += value(r.spread[i]) ?? 0;
      }
      r.gap = count ? sum / count : null; r.advantage = count ? clipped / count : null;
      r.worst = count ? worst : null; r.meanEntropy = count && r.spread ? spread / count : null;
    }
  }

  const SORTS = {
    "in the order of the page": null,
    "largest mean gap": (r) => -r.gap, "smallest mean gap": (r) => r.gap, "largest single difference": (r) => -r.worst,
    "lowest clipped advantage": (r) => r.advantage, "highest clipped advantage": (r) => -r.advantage,
    "lowest reward": (r) => r.reward, "highest reward": (r) => -r.reward,
    "longest": (r) => -r.length, "shortest": (r) => r.length, "highest entropy": (r) => -r.meanEntropy,
  };

  function body(r) {
    if (r.body === undefined) { let t = ""; for (let i = 0; i < r.tokens.length && t.length < 200000; i++) t += texts(r.tokens[i]); r.body = t; }
    return r.body;
  }

  function within(name, x) {
    const from = $(name + "-from").value, to = $(name + "-to").value;
    return (from === "" || (x !== null && x >= +from)) && (to === "" || (x !== null && x <= +to));
  }

  function filter() {
    const wanted = $("search").value.toLowerCase(), domain = $("domain").value, finish = $("finish").value, key = SORTS[$("sort").value];
    const before = shown[selected];
    shown = all.filter((r) => (domain === "" || (r.domain ?? "") === domain.slice(1)) && (finish === "" || r.finish === finish.slice(1)) &&
      within("reward", r.reward) && within("gap", r.gap) && within("advantage", r.advantage) &&
      (wanted === "" || body(r).toLowerCase().includes(wanted) || r.prompt.toLowerCase().includes(wanted) || r.id.startsWith(wanted)));
    if (key) shown.sort((a, b) => (key(a) ?? Infinity) - (key(b) ?? Infinity) || (a.id < b.id ? -1 : 1));
    $("count").textContent = `${shown.length.toLocaleString("en")} of ${all.length.toLocaleString("en")}`;
    $("rows").style.height = `${shown.length * ROW}px`;
    selected = Math.max(0, shown.indexOf(before));
    paint();
    show(selected, wanted !== "" || shown[selected] !== before);
  }

  function paint() {
    const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4), last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 9);
    const rows = [];
    for (let i = first; i < last; i++) {
      const r = shown[i];
      const row = el("div", { className: "row" });
      row.setAttribute("role", "option"); row.setAttribute("aria-selected", String(i === selected)); row.dataset.at = i; row.style.top = `${i * ROW}px`;
      row.append(el("div", { className: "text", textContent: visible(r.prompt.slice(-PREVIEW)) }), el("div", { className: "text", textContent: visible(body(r).slice(0, PREVIEW)) }),
        el("div", { className: "facts", textContent: `gap ${nats(r.gap)}  reward ${r.reward ?? "-"}  ${r.length} tokens  ${r.finish}${r.domain ? "  " + r.domain : ""}` }));
      rows.push(row);
    }
    $("rows").replaceChildren(...rows);
  }

  function colour(d) {
    if (d === null) return "";
    const strength = Math.min(Math.abs(d) / (+$("full").value || 4), 1);
    return strength < 0.02 ? "" : `rgba(var(${d > 0 ? "--more" : "--less"}),calc(var(--peak)*${strength.toFixed(3)}))`;
  }

  function span(r, i) {
    const text = texts(r.tokens[i]), e = el("span");
    if (!r.trained[i]) e.className = "off";
    e.style.background = colour(difference(r, i)); e.dataset.at = i;
    const shownText = visible(text);
    if (shownText !== text || text === "" || /^(\\x[0-9A-F]{2})+$/.test(text)) { e.append(el("em", { textContent: shownText || "\u2205" })); if (text.includes("\n")) e.append("\n"); }
    else if (/^ +$/.test(text)) e.append(el("em", { textContent: "\u00b7".repeat(text.length) }));
    else e.textContent = text;
    return e;
  }

  function more(response, r) {
    const end = Math.min(r.tokens.length, drawn + CHUNK), fresh = [];
    for (let i = drawn; i < end; i++) { const e = span(r, i); fresh.push(e); spans.push(e); }
    drawn = end;
    response.append(...fresh);
  }

  function show(index, jump = true) {
    selected = index; place = -1; spans = []; drawn = 0;
    const detail = $("detail"), r = shown[index];
    for (const row of $("rows").children) row.setAttribute("aria-selected", String(+row.dataset.at === index));
    if (!r) { detail.replaceChildren(el("p", { className: "muted", textContent: "No rollout passes these filters." })); return; }
    unpack(r);
    const response = el("div", { className: "response", id: "response" });
    more(response, r);
    const facts = `rollout ${r.id}, sample ${r.sample} of prompt ${r.prompt_id}; ${r.length.toLocaleString("en")} tokens, ${r.finish}; reward ${r.reward ?? "-"}, answer ${r.answer ?? "-"}; mean gap ${nats(r.gap)}, clipped advantage ${nats(r.advantage)}`;
    detail.replaceChildren(el("p", { className: "facts", textContent: visible(facts) }), el("div", { className: "prompt", textContent: r.prompt.replace(HIDDEN, (c) => (c === "\n" || c === "\t" ? c : visible(c))) }), response);
    if (r.tokens.length < r.length) detail.append(el("p", { className: "muted", textContent: `The file holds the first ${r.tokens.length.toLocaleString("en")} of ${r.length.toLocaleString("en")} tokens.` }));
    if (drawn < r.tokens.length) {
      const button = el("button", { type: "button", id: "more", textContent: "show more" });
      button.onclick = () => { more(response, r); if (drawn >= r.tokens.length) button.remove(); };
      detail.append(button);
    }
    if (jump) {
      const list = $("list");
      if (index * ROW < list.scrollTop) list.scrollTop = index * ROW;
      else if ((index + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (index + 1) * ROW - list.clientHeight;
      detail.scrollTop = 0;
    }
  }

  // A student's own top-k is there where a signal of role `self` was scored.
  function table(r, i) {
    const names = Object.keys(r.signals).filter((name) => r.signals[name].sizes.length), ids = new Map();
    const ordered = [signal, ...names.filter((name) => name !== signal)].filter((name) => names.includes(name));
    for (const name of ordered) {
      const s = r.signals[name];
      for (let e = s.begins[i]; e < s.begins[i + 1]; e++) { if (!ids.has(s.ids[e])) ids.set(s.ids[e], {}); ids.get(s.ids[e])[name] = Math.exp(s.best[e] / data.units); }
    }
    const own = r.tokens[i];
    if (!ids.has(own)) ids.set(own, {});
    for (const name of ordered) if (ids.get(own)[name] === undefined && value(r.signals[name].values[i]) !== null) ids.get(own)[name] = Math.exp(value(r.signals[name].values[i]));
    const student = r.own && r.own[i] !== UNKNOWN ? Math.exp(value(r.own[i])) : null, self = names.find((name) => data.roles[name] === "self");
    const columns = ordered.filter((name) => name !== self);
    const head = el("tr", {}, el("th", { textContent: "token" }), ...columns.map((n) => el("th", { textContent: n })), el("th", { textContent: "student" }));
    const rows = [...ids].map(([id, found]) => {
      const mine = id === own ? student : self ? found[self] ?? null : null;
      const row = el("tr", { className: id === own ? "drawn" : "" }, el("td", { className: "text", textContent: visible(texts(id)).replace(/ /g, "\u00b7"), title: `id ${id}` }),
        ...columns.map((n) => el("td", { textContent: share(found[n] ?? null) })), el("td", { textContent: share(mine) }));
      return row;
    });
    return el("table", { id: "topk" }, el("thead", {}, head), el("tbody", {}, ...rows));
  }

  function inspect(i, scroll = false) {
    const r = shown[selected];
    if (!r || i < 0 || i >= r.tokens.length) return;
    while (i >= drawn) more($("response"), r);
    if (place >= 0) spans[place]?.removeAttribute("aria-current");
    place = i;
    spans[i].setAttribute("aria-current", "true");
    if (scroll) spans[i].scrollIntoView({ block: "nearest" });
    const d = difference(r, i), s = r.signals[signal], tail = s && value(s.tails[i]), entropy = r.spread && value(r.spread[i]);
    const self = Object.keys(r.signals).some((name) => data.roles[name] === "self");
    $("inspector").replaceChildren(
      el("h4", { textContent: visible(texts(r.tokens[i])).replace(/ /g, "\u00b7") || "\u2205" }),
      el("p", { className: "muted", textContent: `position ${i}, id ${r.tokens[i]}${r.trained[i] ? "" : ", not trained on"}` }),
      el("p", { textContent: `log T \u2212 log s ${nats(d)} nats${entropy === null ? "" : `, student's entropy ${entropy.toFixed(3)}`}` }),
      table(r, i),
      el("p", { className: "muted", textContent: `${tail === null || tail === undefined ? "" : `outside the top-k: ${share(Math.exp(tail))}. `}${self ? "" : "The student's other probabilities are known where a signal of role self was precomputed."}` }));
  }

  function leap(step) {
    const r = shown[selected], limit = (+$("full").value || 4) / 2;
    for (let i = place + step; r && i >= 0 && i < r.tokens.length; i += step) if (Math.abs(difference(r, i) ?? 0) >= limit) return inspect(i, true);
  }

  const KEYS = { j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1), ArrowRight: () => inspect(place + 1, true), ArrowLeft: () => inspect(place - 1, true), n: () => leap(1), p: () => leap(-1), "/": () => $("search").focus() };
  function move(step) { const to = Math.max(0, Math.min(shown.length - 1, selected + step)); if (to !== selected) { show(to); paint(); } }

  function options(id, values) { $(id).replaceChildren(...values.map(([v, text]) => el("option", { value: v, textContent: text }))); }

  function scale() {
    const full = +$("full").value || 4;
    $("scale").replaceChildren(...[-1, -0.5, -0.25, 0, 0.25, 0.5, 1].map((x) => { const e = el("span", { textContent: x ? nats(x * full) : "0" }); e.style.background = colour(x * full); return e; }));
  }

  function listen() {
    $("list").addEventListener("scroll", paint, { passive: true });
    $("rows").addEventListener("click", (event) => { const row = event.target.closest(".row"); if (row) show(+row.dataset.at, false); });
    $("detail").addEventListener("mouseover", (event) => { const e = event.target.closest(".response span"); if (e) inspect(+e.dataset.at); });
    document.addEventListener("keydown", (event) => {
      if (event.target.matches("input, select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
      if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
      const inViewer = event.target.closest(".viewer") || !event.key.startsWith("Arrow");
      if (inViewer) { event.preventDefault(); KEYS[event.key](); }
    });
    let timer;
    for (const input of document.querySelectorAll(".filters input, .filters select")) input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 80); });
    for (const id of ["clip", "signal"]) $(id).addEventListener("input", () => { signal = $("signal").value; measure(); filter(); });
    $("full").addEventListener("input", () => { scale(); show(selected, false); });
    window.addEventListener("resize", paint);
  }

  function hints() {
    const hint = $("hint");
    document.addEventListener("mousemove", (event) => {
      const mark = event.target.closest?.("figure svg [aria-label]:not([aria-hidden] *)"), label = mark?.getAttribute("aria-label");
      hint.hidden = !label || !mark.getAttribute("aria-roledescription");
      if (!hint.hidden) { hint.textContent = label; hint.style.left = `${Math.min(event.clientX + 12, innerWidth - 300)}px`; hint.style.top = `${event.clientY + 14}px`; }
    });
    $("theme").onclick = () => { const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches; root.dataset.theme = dark ? "light" : "dark"; };
  }

  // Served, the training charts are asked for again while a run goes on; they come from the page's own server.
  async function follow() {
    try {
      const answer = await fetch("/training");
      if (answer.status === 200) {
        const old = $("training"), fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("section");
        if (fresh && old) old.replaceWith(fresh); else if (fresh) document.querySelector("#rollouts").before(fresh);
        document.body.dataset.followed = String(+(document.body.dataset.followed ?? 0) + 1);
      }
    } catch { document.body.dataset.lost = "true"; }
  }

  async function load() {
    const stream = new Blob([bytes($("data").textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  async function start() {
    hints();
    data = await load();
    all = data.rollouts;
    const others = data.signals.filter((name) => data.roles[name] !== "self");
    signal = others[0] ?? data.signals[0] ?? "";
    options("signal", [...others, ...data.signals.filter((name) => data.roles[name] === "self")].map((name) => [name, name]));
    options("sort", Object.keys(SORTS).map((name) => [name, name]));
    const distinct = (key) => [...new Set(all.map((r) => r[key] ?? ""))].sort().map((v) => ["=" + v, visible(v) || "none"]);
    options("domain", [["", "all"], ...distinct("domain")]); options("finish", [["", "all"], ...distinct("finish")]);
    measure(); scale(); listen(); filter();
    if (document.body.dataset.live) setInterval(follow, 1000 * +document.body.dataset.live);
    document.body.dataset.ready = "true";
  }

  start().catch((error) => { $("detail").textContent = `The viewer could not start: ${error.message}`; document.body.dataset.failed = "true"; throw error; });
})();
