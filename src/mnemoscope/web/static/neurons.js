// The map of neurons: layer by neuron, one pixel each; click one to see it on tune pairs.
import { call, lines, percent, showProblem } from "./asking.js";

const by = (id) => document.getElementById(id);
const map = by("map");
const path = `/api/runs/${map.dataset.run}/cells/${encodeURIComponent(map.dataset.cell)}`;
const problem = by("problem"), canvas = by("canvas");
let found, place = { layer: 0, neuron: 0 }, looking = new AbortController();

const measure = () => document.querySelector("[name=measure]:checked").value;

function colours() {
  const style = getComputedStyle(document.documentElement);
  return ["--memorized", "--generalized", "--card", "--ink"].map((name) => {
    const probe = document.createElement("span");
    probe.style.color = style.getPropertyValue(name);
    document.body.append(probe);
    const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
    probe.remove();
    return [r, g, b];
  });
}

const picture = document.createElement("canvas"); // a pixel for each neuron, drawn once for each measure

function paint() {
  const values = found[measure()];
  const layers = values.length, neurons = values[0].length;
  picture.width = neurons;
  picture.height = layers;
  const pen = picture.getContext("2d"), pixels = pen.createImageData(neurons, layers);
  const [memorized, generalized, paper] = colours();
  const sizes = values.flat().filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  const reach = measure() === "rho" ? 1 : sizes[Math.floor(0.995 * (sizes.length - 1))] || 1;
  values.forEach((row, layer) =>
    row.forEach((value, neuron) => {
      const share = value === null ? 0 : Math.min(1, Math.abs(value) / reach);
      const tone = value < 0 ? memorized : generalized;
      // Later layers stand higher, as in the report.
      const at = 4 * ((layers - 1 - layer) * neurons + neuron);
      for (const i of [0, 1, 2]) pixels.data[at + i] = paper[i] + (tone[i] - paper[i]) * share;
      pixels.data[at + 3] = 255;
    }),
  );
  pen.putImageData(pixels, 0, 0);
  const step = layers > 12 ? 5 : 1;
  by("rows").replaceChildren(
    ...values
      .map((_, layer) => Object.assign(document.createElement("span"), { textContent: layer % step ? "" : layer }))
      .reverse(),
  );
  draw();
}

function draw() {
  const { width: neurons, height: layers } = picture;
  const zoom = Math.max(1, Math.ceil(1024 / neurons));
  const high = Math.max(3, Math.min(40, Math.floor(240 / layers)));
  if (canvas.width !== neurons * zoom || canvas.height !== layers * high) {
    canvas.width = neurons * zoom;
    canvas.height = layers * high;
    canvas.style.height = `${layers * Math.max(high, 8)}px`;
  }
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.strokeStyle = `rgb(${colours()[3]})`;
  pen.lineWidth = Math.max(2, zoom / 4);
  pen.strokeRect(place.neuron * zoom, (layers - 1 - place.layer) * high, zoom, high);
}

function point(to) {
  const layers = found.nmd.length, neurons = found.nmd[0].length;
  const next = {
    layer: Math.max(0, Math.min(layers - 1, to.layer)),
    neuron: Math.max(0, Math.min(neurons - 1, to.neuron)),
  };
  if (next.layer === place.layer && next.neuron === place.neuron && by("pointed").dataset.shown) return;
  place = next;
  by("pointed").dataset.shown = "yes";
  const at = (name) => found[name][place.layer][place.neuron];
  const number = (value) => (value === null ? "not defined" : value.toPrecision(3));
  by("pointed").textContent =
    `Layer ${place.layer}, neuron ${place.neuron}: mean difference ${number(at("nmd"))}, rho ${number(at("rho"))}, ` +
    `family-wise p ${number(at("p_family_wise"))}.`;
  announce(by("pointed").textContent);
  [by("layer").value, by("number").value] = [place.layer, place.neuron];
  draw();
}

let announcing;

// Screen readers announce the neuron where the keys stop, not every one on the way.
function announce(text) {
  clearTimeout(announcing);
  announcing = setTimeout(() => (by("announced").textContent = text), 300);
}

function under(event) {
  const box = canvas.getBoundingClientRect();
  const layers = found.nmd.length, neurons = found.nmd[0].length;
  return {
    layer: layers - 1 - Math.floor(((event.clientY - box.top) / box.height) * layers),
    neuron: Math.floor(((event.clientX - box.left) / box.width) * neurons),
  };
}

async function look() {
  showProblem(problem, null);
  looking.abort(); // nothing more is done for a look that nobody waits for
  const mine = (looking = new AbortController()), { layer, neuron } = place;
  by("neuron").hidden = false;
  by("neuron-title").textContent = `Neuron ${neuron} of layer ${layer}`;
  by("working").hidden = false;
  by("found").hidden = true;
  by("progress").value = 0;
  try {
    let step;
    for await (step of lines(`${path}/neurons/${layer}/${neuron}`, {}, { signal: mine.signal }))
      by("progress").value = step.share;
    if (!step?.result) throw new Error("The look at this neuron ended early.");
    by("working").hidden = true;
    show(step.result);
  } catch (error) {
    if (mine !== looking || mine.signal.aborted) return;
    by("working").hidden = true;
    showProblem(problem, error);
  }
}

function show(seen) {
  by("found").hidden = false;
  by("drawing").innerHTML = seen.drawing;
  const all = found.nmd.length * found.nmd[0].length;
  by("status").textContent = `${by("neuron-title").textContent} is shown below the map.`;
  const number = (value) => (value === null ? "not defined" : value.toPrecision(3));
  by("ranks").textContent =
    `Of ${all.toLocaleString("en")} neurons it is number ${seen.rank_nmd} by mean difference and number ` +
    `${seen.rank_rho} by correlation. On ${seen.pairs} tune pairs it is ${number(seen.mean_generalized)} where ` +
    `the answer was generalized, ${number(seen.mean_memorized)} where it was memorized.`;
  by("alone").replaceChildren(
    ...seen.alone.map((row) => {
      const line = document.createElement("tr");
      const head = Object.assign(document.createElement("th"), { scope: "row", textContent: `${row.times} × its mean difference` });
      const cells = ["generalized", "memorized"].map((key) =>
        Object.assign(document.createElement("td"), { textContent: percent(row[key]) }),
      );
      line.append(head, ...cells);
      return line;
    }),
  );
}

const far = 1e9;
const steps = {
  ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  PageUp: [0, -64], PageDown: [0, 64], Home: [0, -far], End: [0, far],
};
canvas.addEventListener("pointermove", (event) => found && point(under(event)));
canvas.addEventListener("click", (event) => {
  if (!found) return;
  point(under(event));
  look();
});
canvas.addEventListener("keydown", (event) => {
  if (!found) return;
  if (event.key in steps) {
    const [up, right] = steps[event.key];
    point({ layer: place.layer + up, neuron: place.neuron + right });
  } else if ((event.key === "Enter" || event.key === " ") && !event.repeat) look();
  else return;
  event.preventDefault();
});
by("pick").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!found) return;
  point({ layer: Number(by("layer").value), neuron: Number(by("number").value) });
  look();
});
for (const radio of document.querySelectorAll("[name=measure]")) radio.addEventListener("change", () => found && paint());
by("cancel").addEventListener("click", () => {
  looking.abort();
  by("neuron").hidden = true;
  canvas.focus();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => found && paint());

(async () => {
  try {
    found = await call(`${path}/neurons`);
    let best = -1;
    found.nmd.forEach((row, layer) =>
      row.forEach((value, neuron) => {
        if (value !== null && Math.abs(value) > best) {
          best = Math.abs(value);
          place = { layer, neuron };
        }
      }),
    );
    by("layer").max = found.nmd.length - 1;
    by("number").max = found.nmd[0].length - 1;
    point(place);
    paint();
    by("opening").hidden = true;
  } catch (error) {
    by("opening").hidden = true;
    showProblem(problem, error);
  }
})();
