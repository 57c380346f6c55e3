"use strict";
// Behavior of every page: theme, export of figures and numbers, sliders over pictures.

function toCsv(rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function tableRows(table) {
  return [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveCsv(name, rows) {
  save(name + ".csv", new Blob([toCsv(rows)], { type: "text/csv" }));
}

// Draws what a figure shows onto a new canvas; svg takes the page's colors along.
async function toCanvas(figure) {
  const shown = figure.querySelector("canvas, svg, img");
  if (shown instanceof HTMLCanvasElement) return shown;
  let source = shown.src, width = shown.naturalWidth, height = shown.naturalHeight;
  if (!(shown instanceof HTMLImageElement)) {
    const style = getComputedStyle(document.body), copy = shown.cloneNode(true);
    [width, height] = shown.getAttribute("viewBox").split(" ").slice(2).map((x) => 2 * Number(x));
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    copy.setAttribute("style", `color:${style.color};background:${style.backgroundColor}`);
    source = "data:image/svg+xml;charset=utf-8," +
      encodeURIComponent(new XMLSerializer().serializeToString(copy));
  }
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return canvas;
}

async function savePng(figure) {
  const canvas = await toCanvas(figure);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  save((figure.id || "figure") + ".png", blob);
  return blob.size;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new Event("themechange"));
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// A range input with data-steps shows one of the pictures of its figure at a time.
function showStep(input) {
  const figure = input.closest("figure");
  figure.querySelectorAll("img").forEach((image, index) => {
    image.hidden = index !== Number(input.value);
    if (!image.hidden) figure.querySelector("output").textContent = image.alt;
  });
}

// A range input with data-compare uncovers the second of two pictures from the left.
function uncover(input) {
  const second = input.closest("figure").querySelectorAll(".compare img")[1];
  second.style.clipPath = `inset(0 0 0 ${input.value}%)`;
}

function start() {
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-save]");
    if (!button) return;
    const figure = button.closest("figure");
    if (button.dataset.save === "png") savePng(figure);
    else if (figure.querySelector("table")) {
      saveCsv(figure.id, tableRows(figure.querySelector("table")));
    } else saveCsv(figure.id, JSON.parse(figure.querySelector("script").textContent));
  });
  for (const input of document.querySelectorAll("input[data-steps]")) {
    input.addEventListener("input", () => showStep(input));
    showStep(input);
  }
  for (const input of document.querySelectorAll("input[data-compare]")) {
    input.addEventListener("input", () => uncover(input));
    uncover(input);
  }
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { toCsv };
