"use strict";
const CARDS_AT_FIRST = 60; // what follows the captions is then not too far down the page

const gallery = document.getElementById("gallery");
const controls = document.getElementById("controls");
const order = document.getElementById("order");
const selects = ["status", "likeness"].map((id) => document.getElementById(id)).filter(Boolean);
const search = document.getElementById("search");
const shown = document.getElementById("shown");
const nothing = document.getElementById("nothing");
const more = document.getElementById("more");
const ranges = ["score", "confidence"]
  .map((name) => ({ name, from: document.getElementById(`${name}-from`), to: document.getElementById(`${name}-to`) }))
  .filter((range) => range.from);

function number(text) {
  return text === undefined || text === "" ? null : Number(text);
}

let cards = Array.from(gallery.children, (element, position) => ({
  element,
  position,
  status: element.dataset.status,
  likeness: element.dataset.likeness,
  confidence: number(element.dataset.confidence),
  familiarity: number(element.dataset.familiarity),
  score: number(element.dataset.score),
  difference: number(element.dataset.difference),
  text: element.textContent.toLowerCase().replace(/\s+/g, " "),
}));
let limit = CARDS_AT_FIRST;

// Cards without the number, such as those of failed images, come last.
function by(name, direction) {
  return (a, b) => {
    if (a[name] === null || b[name] === null) {
      return (a[name] === null) - (b[name] === null) || a.position - b.position;
    }
    return direction * (a[name] - b[name]) || a.position - b.position;
  };
}

const statuses = ["failed", "duplicate", "ok"];
const orders = {
  image_id: (a, b) => a.position - b.position,
  lowest: by("confidence", 1),
  highest: by("confidence", -1),
  least_familiar: by("familiarity", 1),
  most_familiar: by("familiarity", -1),
  most_different: by("difference", -1),
  worst: by("score", 1),
  best: by("score", -1),
  status: (a, b) => statuses.indexOf(a.status) - statuses.indexOf(b.status) || a.position - b.position,
};

function sort() {
  cards = cards.slice().sort(orders[order.value]);
  gallery.append(...cards.map((card) => card.element));
  filter();
}

function isWithin(range, card) {
  const from = number(range.from.value);
  const to = number(range.to.value);
  if (from === null && to === null) return true;
  const value = card[range.name] === null ? null : Math.round(100 * card[range.name]) / 100; // as the card shows it
  return value !== null && (from === null || value >= from) && (to === null || value <= to);
}

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const card of cards) {
    const matches =
      selects.every((select) => select.value === "" || card[select.id] === select.value) &&
      ranges.every((range) => isWithin(range, card)) &&
      words.every((word) => card.text.includes(word));
    card.element.hidden = !matches || count >= limit;
    count += matches;
  }
  shown.textContent = `${count.toLocaleString("en")} of ${cards.length.toLocaleString("en")} cards`;
  nothing.hidden = count > 0;
  more.hidden = count <= limit;
  more.textContent = `Show all ${count.toLocaleString("en")} cards`;
}

function showAll() {
  limit = Infinity;
  filter();
}

// Paper shows all cards and everything that is folded.
function showForPrint() {
  showAll();
  for (const details of document.querySelectorAll("details")) details.open = true;
}

// A link to a folded section unfolds it.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}

for (const range of ranges) {
  range.from.addEventListener("input", filter);
  range.to.addEventListener("input", filter);
}
order.addEventListener("change", sort);
for (const select of selects) select.addEventListener("change", filter);
search.addEventListener("input", filter);
more.addEventListener("click", showAll);
window.addEventListener("beforeprint", showForPrint);
window.addEventListener("hashchange", unfold);
controls.addEventListener("submit", (event) => event.preventDefault());
controls.hidden = false;
// A reload may keep what was chosen and typed.
sort();
unfold();
