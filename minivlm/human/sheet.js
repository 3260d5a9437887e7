"use strict";
// A rating sheet. What it asks about is JSON in #data; ratings are kept in the browser until they are saved to a file.
const data = JSON.parse(document.getElementById("data").textContent);
const { sheet, items, images } = data;
const compared = sheet.systems.length === 2;
const $ = (id) => document.getElementById(id);
const place = (rater) => `minivlm-human/${sheet.fingerprint}/${rater}`;
const KEYS = compared ? { 1: "left", 2: "right", 0: "tie" } : { 1: 1, 2: 2, 3: 3, 4: 4, 5: 5 };
let rater = "", ratings = new Map(), at = 0, saved = true;

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    $("unkept").hidden = false;
    return null;
  }
}

function store(name, text) {
  try {
    localStorage.setItem(name, text);
  } catch {
    $("unkept").hidden = false;
  }
}

function begin(name) {
  rater = name;
  store(`minivlm-human/${sheet.fingerprint}`, rater);
  const known = new Set(items.map((item) => item.id));
  ratings = new Map(JSON.parse(stored(place(rater)) || "[]").filter(([id]) => known.has(id)));
  saved = ratings.size === 0;
  const first = items.findIndex((item) => !ratings.has(item.id));
  show(first < 0 ? items.length : first);
}

function show(index) {
  at = Math.max(0, Math.min(items.length, index));
  const done = at === items.length;
  $("start").hidden = true;
  $("rating").hidden = done;
  $("end").hidden = !done;
  $("bar").hidden = false;
  $("who").textContent = rater;
  $("progress").max = items.length;
  $("progress").value = ratings.size;
  $("count").textContent = `${ratings.size} of ${items.length} rated` + (done ? "" : `, this is number ${at + 1}`);
  if (done) {
    const missing = items.length - ratings.size;
    $("summary").textContent = missing ? `${missing} are not rated yet.` : "All are rated. Thank you!";
    $("save-end").focus();
    return;
  }
  const item = items[at];
  $("images").replaceChildren(...(images[item.image] || []).map(picture));
  $("question").textContent = item.question;
  $("question").hidden = !item.question;
  item.texts.forEach((text, i) => {
    $(`text-${i}`).textContent = text || "(no text)";
    $(`text-${i}`).classList.toggle("note", !text);
  });
  for (const [key, value] of Object.entries(KEYS)) {
    $(`key-${key}`).setAttribute("aria-pressed", String(ratings.get(item.id) === value));
  }
  $("back").disabled = at === 0;
}

function picture(source, i) {
  const image = document.createElement("img");
  image.src = source;
  image.alt = `image ${i + 1}`;
  return image;
}

function rate(value) {
  if (at >= items.length) return;
  ratings.set(items[at].id, value);
  saved = false;
  store(place(rater), JSON.stringify([...ratings]));
  show(at + 1);
}

function save() {
  const result = { sheet, rater, ratings: Object.fromEntries(ratings) };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 1)], { type: "application/json" }));
  link.download = `ratings-${rater.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "") || "rater"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  saved = true;
}

$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (name) begin(name);
});
for (const [key, value] of Object.entries(KEYS)) $(`key-${key}`).addEventListener("click", () => rate(value));
$("back").addEventListener("click", () => show(at - 1));
$("forward").addEventListener("click", () => show(at + 1));
$("save").addEventListener("click", save);
$("save-end").addEventListener("click", save);
$("again").addEventListener("click", () => {
  const first = items.findIndex((item) => !ratings.has(item.id));
  show(first < 0 ? 0 : first);
});
$("other").addEventListener("click", () => {
  for (const id of ["rating", "end", "bar"]) $(id).hidden = true;
  $("start").hidden = false;
  $("name").value = "";
  $("name").focus();
});
document.addEventListener("keydown", (event) => {
  if (!$("start").hidden || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.key === "ArrowLeft") show(at - 1);
  else if (event.key === "ArrowRight") show(at + 1);
  else if (event.key in KEYS && at < items.length) rate(KEYS[event.key]);
  else return;
  event.preventDefault();
});
window.addEventListener("beforeunload", (event) => {
  if (!saved && !$("unkept").hidden) event.preventDefault(); // what the browser keeps is there after a reload
});
const before = stored(`minivlm-human/${sheet.fingerprint}`);
if (before) begin(before);
else $("name").focus();
