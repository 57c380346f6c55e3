"use strict";
// Viewer of token maps: variants side by side, by block, noise level, image and kind of map.

const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];

// Not a number is gray.
function color(fraction) {
  if (Number.isNaN(fraction)) return [128, 128, 128];
  const at = Math.min(Math.max(fraction, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.floor(at), high = Math.min(low + 1, VIRIDIS.length - 1);
  return VIRIDIS[low].map((value, i) => value + (at - low) * (VIRIDIS[high][i] - value));
}

// The smallest and the largest finite number; spreading many arguments would overflow the stack.
function limits(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low > high ? [0, 1] : [low, high];
}

// Decodes base64 of little-endian numbers.
function decode(text, kind) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return kind === "uint8" ? bytes : new Float32Array(bytes.buffer);
}

function quantile(sorted, q) {
  const at = q * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

// Counts numbers in equal intervals of their logarithm.
function histogram(values, low, high, bins) {
  const counts = new Array(bins).fill(0), span = Math.log(high / low) || 1;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    const bin = Math.floor((Math.log(value / low) / span) * bins);
    counts[Math.min(Math.max(bin, 0), bins - 1)] += 1;
  }
  return counts;
}

const viewer = {
  data: null,

  load() {
    this.data = JSON.parse(document.getElementById("outlier-data").textContent);
    for (const variant of this.data.variants) {
      for (const map of Object.values(variant.maps)) map.values = decode(map.data, map.kind);
    }
  },

  // The numbers of one image after one block.
  tokens(variant, kind, time, block, image) {
    const map = variant.maps[kind];
    if (!map || block >= variant.blocks) return null;
    const size = variant.grid[0] * variant.grid[1] * (kind === "pca" ? 3 : 1);
    const start = ((time * variant.blocks + block) * variant.images + image) * size;
    return map.values.subarray(start, start + size);
  },

  // The norms of all images after one block.
  norms(variant, time, block) {
    const size = variant.images * variant.grid[0] * variant.grid[1];
    const start = (time * variant.blocks + block) * size;
    return variant.maps.norms.values.subarray(start, start + size);
  },

  choice() {
    const value = (id) => document.getElementById(id).value;
    return { kind: value("map-kind"), block: Number(value("map-block")),
      time: Number(value("map-time")), image: Number(value("map-image")) };
  },

  // Numbers as drawn: norms on a logarithmic scale.
  shown(kind, values) {
    return kind === "norms" ? Float32Array.from(values, (x) => Math.log(Math.max(x, 1e-9))) : values;
  },

  paint(canvas, kind, values, grid, low, high) {
    const [rows, columns] = grid, pixels = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const rgb = kind === "pca" ? values.subarray(3 * i, 3 * i + 3)
        : color((values[i] - low) / (high - low || 1));
      pixels.data.set([...rgb, 255], 4 * i);
    }
    canvas.width = columns;
    canvas.height = rows;
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  },

  drawMaps() {
    const { kind, block, time, image } = this.choice();
    const found = this.data.variants.map((v) => this.tokens(v, kind, time, block, image));
    const drawn = found.map((values) => values && this.shown(kind, values));
    const all = drawn.flatMap((values) => (values ? [...values] : []));
    const [low, high] = limits(all);
    this.data.variants.forEach((variant, index) => {
      const canvas = document.querySelector(`#map-${index} canvas`);
      const caption = document.querySelector(`#map-${index} figcaption`);
      if (!found[index]) {
        canvas.width = canvas.height = 1;
        caption.textContent = `${variant.name}: no such map`;
        return;
      }
      const small = this.paint(document.createElement("canvas"), kind, drawn[index], variant.grid,
        low, high);
      const scale = Math.ceil(240 / small.width);
      canvas.width = small.width * scale;
      canvas.height = small.height * scale;
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(small, 0, 0, canvas.width, canvas.height);
      const outliers = this.outliers(variant, time, block, image);
      context.strokeStyle = "#ff4040";
      context.lineWidth = 2;
      if (document.getElementById("map-marks").checked) {
        for (const token of outliers) {
          const y = Math.floor(token / variant.grid[1]), x = token % variant.grid[1];
          context.strokeRect(x * scale + 1, y * scale + 1, scale - 2, scale - 2);
        }
      }
      const range = kind === "pca" ? "" :
        `; ${limits(found[index]).map((x) => x.toPrecision(3)).join(" to ")}`;
      caption.textContent = `${variant.name}: ${outliers.length} outliers${range}`;
    });
  },

  // Rows of the outliers of an image.
  outliers(variant, time, block, image) {
    const threshold = variant.statistics[time].threshold[block];
    const norms = this.tokens(variant, "norms", time, block, image);
    return [...norms.keys()].filter((i) => threshold !== null && norms[i] > threshold);
  },

  // All blocks from left to right, all noise levels from top to bottom.
  drawOverview() {
    const { kind, image } = this.choice();
    this.data.variants.forEach((variant, index) => {
      const canvas = document.querySelector(`#overview-${index} canvas`);
      const [rows, columns] = variant.grid, times = variant.statistics.length, gap = 1;
      const scale = Math.max(1, Math.round(48 / columns));
      canvas.width = variant.blocks * (columns * scale + gap);
      canvas.height = times * (rows * scale + gap);
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      for (let time = 0; time < times; time++) {
        for (let block = 0; block < variant.blocks; block++) {
          const values = this.tokens(variant, kind, time, block, image);
          if (!values) continue;
          let drawn = values, [low, high] = limits(values);
          if (kind === "norms") {
            // Relative to the median of the block: from a half to sixteen times.
            const median = quantile([...values].sort((a, b) => a - b), 0.5) || 1;
            drawn = Float32Array.from(values, (x) => Math.log2(Math.max(x / median, 1e-9)));
            [low, high] = [-1, 4];
          }
          const small = this.paint(document.createElement("canvas"), kind, drawn, variant.grid, low,
            high);
          context.drawImage(small, block * (columns * scale + gap), time * (rows * scale + gap),
            columns * scale, rows * scale);
        }
      }
    });
  },

  drawHistograms() {
    const { block, time } = this.choice(), style = getComputedStyle(document.body);
    const found = this.data.variants.map((v) => (block < v.blocks ? this.norms(v, time, block) : []));
    const all = found.flatMap((values) => [...values]);
    const [smallest, largest] = limits(all);
    const low = Math.max(smallest, 1e-9) * 0.95, high = Math.max(largest, 2e-9) * 1.05;
    this.data.variants.forEach((variant, index) => {
      const canvas = document.querySelector(`#histogram-${index} canvas`);
      const context = canvas.getContext("2d"), width = 480, height = 200, ground = height - 18;
      canvas.width = width;
      canvas.height = height;
      context.fillStyle = style.backgroundColor;
      context.fillRect(0, 0, width, height);
      const caption = document.querySelector(`#histogram-${index} figcaption`);
      if (block >= variant.blocks) {
        caption.textContent = `${variant.name}: no block ${block}`;
        return;
      }
      const counts = histogram(found[index], low, high, 60), top = Math.max(...counts);
      const place = (value) => (Math.log(value / low) / Math.log(high / low)) * width;
      context.fillStyle = "#4269d0";
      counts.forEach((count, bin) => {
        const tall = count ? (Math.log1p(count) / Math.log1p(top)) * (ground - 14) : 0;
        context.fillRect((bin * width) / 60, ground - tall, width / 60 - 1, tall);
      });
      context.fillStyle = style.color;
      context.font = "12px sans-serif";
      context.fillText(low.toPrecision(3), 2, height - 4);
      context.textAlign = "right";
      context.fillText(high.toPrecision(3), width - 2, height - 4);
      const threshold = variant.statistics[time].threshold[block];
      if (threshold !== null) {
        context.fillStyle = "#ff4040";
        context.fillRect(place(threshold), 0, 2, ground);
        context.fillText(`threshold ${threshold.toPrecision(3)}`, place(threshold) - 4, 12);
      }
      const share = variant.statistics[time].outlier_share[block];
      caption.textContent =
        `${variant.name}: norms after block ${block}, ${(100 * share).toFixed(2)} % outliers`;
    });
  },

  // One row per variant, noise level and block.
  numbers() {
    const names = Object.keys(this.data.titles);
    const rows = [["variant", "t", "block", ...names]];
    for (const variant of this.data.variants) {
      variant.statistics.forEach((statistics, time) => {
        for (let block = 0; block < variant.blocks; block++) {
          const t = this.data.times[time];
          rows.push([variant.name, t, block, ...names.map((name) => statistics[name][block])]);
        }
      });
    }
    return rows;
  },

  drawTable() {
    const { block, time } = this.choice(), body = document.querySelector("#chosen tbody");
    body.replaceChildren();
    for (const [name, title] of Object.entries(this.data.titles)) {
      const row = body.insertRow();
      row.insertCell().textContent = title;
      for (const variant of this.data.variants) {
        const value = block < variant.blocks ? variant.statistics[time][name][block] : null;
        row.insertCell().textContent = value === null ? "none" : value.toPrecision(4);
      }
    }
  },

  draw() {
    const { block, time } = this.choice();
    document.getElementById("map-block-output").textContent = block;
    const level = this.data.times[time];
    document.getElementById("map-time-output").textContent = level === null ? "none" : level;
    this.drawMaps();
    this.drawOverview();
    this.drawHistograms();
    this.drawTable();
  },

  start() {
    this.load();
    for (const control of document.querySelectorAll("#map-controls input, #map-controls select")) {
      control.addEventListener("input", () => this.draw());
    }
    document.addEventListener("themechange", () => this.draw());
    document.getElementById("save-numbers").addEventListener("click", () => {
      saveCsv("outlier-statistics", this.numbers());
    });
    for (const side of ["left", "right"]) {
      const choice = document.getElementById(`gallery-${side}`);
      if (choice) choice.addEventListener("input", () => this.drawGallery());
    }
    this.draw();
  },

  drawGallery() {
    const names = ["left", "right"].map((side, index) => {
      const variant = this.data.variants[document.getElementById(`gallery-${side}`).value];
      const image = document.querySelectorAll("#gallery .compare img")[index];
      image.src = variant.samples;
      image.alt = variant.name;
      return `${variant.name} (${side})`;
    });
    document.querySelector("#gallery label span").textContent = names.join(" and ");
  },
};

if (typeof document !== "undefined") viewer.start();
if (typeof module !== "undefined") module.exports = { color, decode, histogram, limits, quantile };
