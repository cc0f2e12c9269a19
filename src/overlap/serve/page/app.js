// The page's only script. Text of the model and of the user reaches the document through textContent alone.

const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

let model = "";
let messages = []; // what was said, without the system prompt
let running = null; // the AbortController of the answer that is being made

// ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────

function headers() {
  const key = $("key").value.trim(); // kept in this field, and nowhere else
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Yield the data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      for (const line of part.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function asked() {
  const system = $("system").value.trim();
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const [id, name] of [["temperature", "temperature"], ["limit", "max_tokens"], ["seed", "seed"]]) {
    if ($(id).value !== "") body[name] = Number($(id).value);
  }
  return body;
}

// ── turns ───────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Show text with its code blocks. Only what is new is touched, so a long answer costs no more than a short one. */
class Text {
  constructor(node) {
    this.node = node;
    this.shown = [];
  }

  show(text) {
    const parts = text.split(/^```.*\n?/m); // plain and code in turn
    parts.forEach((part, index) => {
      const code = index % 2 === 1;
      if (!this.shown[index]) {
        this.shown[index] = { node: this.node.appendChild(make(code ? "pre" : "p")), part: "" };
        if (code) this.shown[index].node.tabIndex = 0; // it may scroll
      }
      const shown = this.shown[index];
      if (shown.part === part) return;
      shown.part = part;
      shown.node.textContent = code ? part.replace(/\n$/, "") : index ? part.replace(/^\n+/, "") : part;
      shown.node.hidden = part === "" && index !== parts.length - 1;
    });
  }
}

function turn(role, name) {
  const article = make("article", role);
  const text = make("div", "text");
  article.append(make("h2", "", name), text);
  $("log").append(article);
  $("empty").hidden = true;
  return { article, text: new Text(text) };
}

/** Keep the end in view, unless the reader has scrolled away from it. */
function following(change) {
  const box = $("conversation");
  const near = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  change();
  if (near) box.scrollTop = box.scrollHeight;
}

function told(timing, how) {
  const { began, first, last, tokens } = timing;
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (first !== null) parts.push(`${number((first - began) / 1000, 3)} s to the first`);
  if (tokens > 1 && last > first) parts.push(`${number(((tokens - 1) * 1000) / (last - first))} tokens/s`);
  if (how) parts.push(how);
  return parts.join(" · ");
}

async function answer() {
  const { article, text } = turn("answer", model || "Answer");
  const meta = article.appendChild(make("p", "meta"));
  const timing = { began: performance.now(), first: null, last: null, tokens: 0 };
  let whole = "";
  let how = "";
  let frame = 0;
  const show = () => {
    frame = 0;
    following(() => {
      text.show(whole);
      meta.textContent = told(timing, how);
    });
  };
  article.classList.add("making");
  text.show("");
  following(() => {});
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(asked()),
      signal: running.signal,
    });
    if (response.status === 401) $("keyrow").hidden = false;
    if (!response.ok) throw new Error(await problem(response));
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (event.usage) timing.tokens = event.usage.completion_tokens;
      if (choice?.delta?.content) {
        timing.last = performance.now();
        timing.first ??= timing.last;
        whole += choice.delta.content;
      }
      if (choice?.finish_reason) how = choice.finish_reason === "length" ? "cut at the limit" : "";
      frame ||= requestAnimationFrame(show);
    }
  } catch (error) {
    how = running.signal.aborted ? "stopped" : error.message;
    meta.classList.toggle("wrong", !running.signal.aborted);
  } finally {
    cancelAnimationFrame(frame);
    article.classList.remove("making");
    show();
  }
  return whole;
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (running || !prompt || !$("composer").reportValidity()) return;
  running = new AbortController();
  $("prompt").value = "";
  grow();
  $("send").hidden = true;
  $("stop").hidden = false;
  const mine = messages;
  mine.push({ role: "user", content: prompt });
  turn("question", "You").text.show(prompt);
  $("conversation").scrollTop = $("conversation").scrollHeight;
  try {
    const whole = await answer();
    if (whole) mine.push({ role: "assistant", content: whole });
    else mine.pop(); // nothing came: the next message does not stand behind an unanswered one
  } finally {
    running = null;
    $("stop").hidden = true;
    $("send").hidden = false;
    $("prompt").focus();
  }
}

const stop = () => running?.abort();

function forget() {
  stop();
  messages = [];
  $("log").replaceChildren();
  $("empty").hidden = false;
  $("prompt").focus();
}

// ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

const SECONDS = 60; // that a sparkline shows
const number = (value, digits = value < 10 ? 1 : 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value) => [number(value * 100), "%"];
const share = (part, whole) => (whole > 0 ? part / whole : null);

// What is shown of two moments, the earlier and the later: [number to draw, ...text], or null where nothing happened between.
const FIGURES = [
  ["Tokens a second", (a, b) => {
    const rate = (b.generation_tokens - a.generation_tokens) / (b.seconds - a.seconds);
    return [rate, number(rate, 0)];
  }],
  ["Running · waiting", (_, b) => [b.running + b.waiting, `${b.running} · ${b.waiting}`]],
  ["Bubble", (a, b) => {
    const bubble = b.bubble_seconds - a.bubble_seconds;
    const value = share(bubble, bubble + b.busy_seconds - a.busy_seconds);
    return value === null ? null : [value, ...percent(value)];
  }],
  ["Second lane", (a, b) => {
    const side = b.side_busy_seconds - a.side_busy_seconds;
    const value = share(side, side + b.busy_seconds - a.busy_seconds);
    return value === null ? null : [value, ...percent(value)];
  }],
  ["Drafts accepted", (a, b) => {
    if (b.drafted_tokens === null) return [null, "off"];
    const value = share(b.accepted_tokens - a.accepted_tokens, b.drafted_tokens - a.drafted_tokens);
    return value === null ? null : [value, ...percent(value)];
  }],
  ["Prompt from cache", (_, b) => {
    const value = share(b.cached_tokens, b.prompt_tokens);
    return value === null ? null : [value, ...percent(value)];
  }],
  ["KV in use", (_, b) => [b.kv_usage, ...percent(b.kv_usage)]],
];

const SVG = "http://www.w3.org/2000/svg";

class Figure {
  constructor([name, read]) {
    this.read = read;
    this.past = [];
    this.value = make("dd", "none", "–");
    this.line = document.createElementNS(SVG, "polyline");
    this.area = document.createElementNS(SVG, "polygon");
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", `0 0 ${SECONDS - 1} 1`);
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("aria-hidden", "true");
    drawing.append(this.area, this.line);
    const row = make("div");
    row.append(make("dt", "", name), this.value, drawing);
    $("figures").append(row);
  }

  take(earlier, later) {
    const [value, text, unit] = this.read(earlier, later) ?? [null, "–"];
    this.value.textContent = text;
    this.value.classList.toggle("none", value === null);
    if (unit) this.value.append(make("small", "", unit));
    this.past.push(value);
    if (this.past.length > SECONDS) this.past.shift();
    if (this.past.every((one) => one === null)) return;
    const top = Math.max(...this.past) || 1;
    const start = SECONDS - this.past.length;
    const points = this.past.map((one, index) => `${start + index},${1 - one / top}`).join(" ");
    this.line.setAttribute("points", points);
    this.area.setAttribute("points", `${start},1 ${points} ${SECONDS - 1},1`);
  }
}

const figures = FIGURES.map((figure) => new Figure(figure));
let before = null;

function say(text, wrong) {
  $("status").firstElementChild.textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function look() {
  const response = await fetch("live", { headers: headers() });
  if (response.status === 401) {
    $("keyrow").hidden = false;
    say($("key").value ? "The key is wrong" : "Waiting for a key", true);
    return;
  }
  if (!response.ok) throw new Error(await problem(response));
  const now = await response.json();
  model = now.model;
  $("model").textContent = model;
  $("model").title = model;
  say(now.serving ? "Serving" : "The engine has ended", !now.serving);
  if (now.serving && before && now.seconds > before.seconds) for (const one of figures) one.take(before, now);
  before = now.serving ? now : null;
}

async function watch() {
  for (;;) {
    if (!document.hidden) {
      try {
        await look();
      } catch {
        before = null;
        say("No answer from the server", true);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

// ── hands ───────────────────────────────────────────────────────────────────────────────────────────────────────────

function grow() {
  const field = $("prompt");
  field.rows = Math.min(10, Math.max(1, field.value.split("\n").length));
}

function summarise() {
  const seed = $("seed").value;
  const parts = [`temperature ${$("temperature").value || "default"}`, `${$("limit").value || "all"} tokens`];
  if (seed !== "") parts.push(`seed ${seed}`);
  if ($("system").value.trim()) parts.push("system prompt");
  $("summary").textContent = parts.join(", ");
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("composer").addEventListener("input", summarise);
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", forget);
$("theme").addEventListener("click", () => {
  const next = { "": "light", light: "dark", dark: "" }[document.documentElement.dataset.theme ?? ""];
  document.documentElement.dataset.theme = next;
  $("theme").textContent = { "": "Auto", light: "Light", dark: "Dark" }[next];
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

summarise();
$("prompt").focus();
watch();
