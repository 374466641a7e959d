// The page's data, and the few ways in which everything else touches the document.
// Text goes in as text: nothing here or elsewhere parses HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SIGNS = { flows: "✓", blocked: "✗", none: "·", cut: "✂", frozen: "❄" };
const $ = (selector, from = document) => from.querySelector(selector);
const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];

/** Make an element: attributes by name, `on…` as listeners, false and null left out; the rest are children. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child || child === 0));
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Scroll there, softly where the reader's system does not ask for stillness. */
function bring(node, block = "start") {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  node.scrollIntoView({ block, inline: "nearest", behavior: still ? "auto" : "smooth" });
}

function flash(node) {
  node.classList.remove("flash");
  void node.offsetWidth; // begin again where it is still running
  node.classList.add("flash");
}

let saying = 0;
function say(text) {
  const toast = $("#said");
  toast.textContent = text;
  toast.classList.add("on");
  clearTimeout(saying);
  saying = setTimeout(() => toast.classList.remove("on"), 2200);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Not every browser gives a file or a frame its clipboard.
    const area = el("textarea", { "aria-hidden": "true", class: "offscreen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) return say("The browser did not allow it");
  }
  say("Copied");
}
