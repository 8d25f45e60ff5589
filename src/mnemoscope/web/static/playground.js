// The playground: a question, and the model's answer to it, unsteered and steered.
import { call, percent, showProblem } from "./asking.js";

const by = (id) => document.getElementById(id);
const bench = by("bench");
const path = `/api/runs/${bench.dataset.run}/cells/${encodeURIComponent(bench.dataset.cell)}`;
const problem = by("problem");
let facts, pairs = [], asked = null, phrasing = 0, plain = null, asks = 0;
let answered = ""; // the question that `plain` is the answer to

const WORDS = {
  rules: { memorized: "remembered", generalized: "worked out", to_memorized: "towards remembering", to_generalized: "towards working it out" },
  documents: { memorized: "from memory", generalized: "from context", to_memorized: "to memory", to_generalized: "to context" },
};
let wordOf = { other: "neither of the two" };

function questionOnPage() {
  const same = asked && ["prompt", "memorized", "generalized"].every((key) => by(key).value === asked[key]);
  return {
    prompt: by("prompt").value,
    memorized: by("memorized").value || null,
    generalized: by("generalized").value || null,
    item: same ? asked.item : "",
    family: same ? asked.family : "",
  };
}

function fill(question) {
  asked = question;
  for (const key of ["prompt", "memorized", "generalized"]) by(key).value = question[key];
}

const toward = () => (Number(by("slider").value) < 0 ? "memorized" : "generalized");

function steeringOnPage() {
  const alpha = Math.abs(Number(by("slider").value));
  if (!isVector()) return { toward: toward(), method: by("method").value, alpha, layers: null, neurons: null };
  const chosen = [...by("layers").querySelectorAll("input:checked")].map((box) => Number(box.value));
  if (!chosen.length) throw new Error("layers: choose one at least");
  const usual = vectorNow().layers;
  const changed = chosen.length !== usual.length || chosen.some((layer) => !usual.includes(layer));
  return {
    toward: toward(),
    method: by("method").value,
    alpha,
    layers: changed ? chosen : null,
    neurons: by("neurons").value ? Number(by("neurons").value) : null,
  };
}

const vectorNow = () => facts.methods[by("method").value][toward()];
const isVector = () => vectorNow().layers.length > 0; // not words, decoding or an adapter
const bestMethod = (way) => Object.keys(facts.methods).find((name) => facts.methods[name][way].best);

function show(side, answer) {
  const card = by(side);
  card.classList.remove("is-memorized", "is-generalized", "is-other", "waiting");
  if (answer.behaviour) card.classList.add(`is-${answer.behaviour}`);
  card.classList.toggle("long", answer.said.length > 24);
  card.querySelector(".said").textContent = answer.said.trim() || "(nothing)";
  card.querySelector(".kind").textContent = answer.behaviour ? wordOf[answer.behaviour] : "continuation of the prompt";
  for (const key of ["memorized", "generalized"]) {
    const share = answer[`p_${key}`];
    card.querySelector(`.${key}-bar`).style.setProperty("--share", share ?? 0);
    card.querySelector(`[data-of="${key}"]`).textContent = percent(share);
  }
  const reading = answer.reading;
  let line = "";
  if (reading) {
    line = `P(memorized) at layer ${reading.layer}, before it answers: ${percent(reading.p_memorized)}.`;
    if (reading.unlike) line += " The prompt is unlike those the detector was fitted on: do not rely on this.";
    else if (reading.p_conflict !== null && reading.p_conflict < 0.5) line += " Memory and prompt seem to agree here.";
  }
  card.querySelector(".verdict-line").textContent = line;
  showLayers(side, reading);
}

function showLayers(side, reading) {
  const rows = by("layer-rows");
  if (!reading) {
    for (const row of rows.children) {
      const cell = row.querySelector(`[data-of="${side}"]`);
      cell.firstChild.style.setProperty("--share", 0);
      cell.lastChild.textContent = "";
    }
    return;
  }
  reading.p_memorized_by_layer.forEach((share, layer) => {
    let row = rows.children[layer];
    if (!row) {
      row = rows.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = layer;
      row.append(head);
      for (const name of ["plain", "steered"]) {
        const cell = row.insertCell();
        cell.dataset.of = name;
        const bar = Object.assign(document.createElement("span"), { className: "bar memorized-bar" });
        cell.append(bar, document.createElement("span"));
      }
    }
    row.classList.toggle("decides", layer === reading.layer);
    const cell = row.querySelector(`[data-of="${side}"]`);
    cell.firstChild.style.setProperty("--share", share);
    cell.lastChild.textContent = percent(share);
  });
}

async function ask() {
  showProblem(problem, null);
  const mine = ++asks, question = questionOnPage();
  by("plain").classList.add("waiting");
  try {
    const answer = await call(`${path}/ask`, { question });
    if (mine !== asks) return;
    [plain, answered] = [answer, JSON.stringify(question)];
    show("plain", plain);
    await steer();
  } catch (error) {
    if (mine !== asks) return;
    showProblem(problem, error);
    [plain, answered] = [null, ""];
    by("plain").classList.remove("waiting");
    for (const side of ["plain", "steered"]) show(side, NOTHING);
  }
}

const NOTHING = { behaviour: null, said: "–", p_memorized: null, p_generalized: null, reading: null };
let running = false, again = false, ticksAreOwn = false, methodIsOwn = false;

async function steer() {
  describe();
  // The slider is quicker than the model: only its latest position is asked for.
  again = true;
  if (running) return;
  running = true;
  by("steered").classList.add("waiting");
  try {
    while (again) {
      again = false;
      const question = questionOnPage();
      if (JSON.stringify(question) !== answered) {
        running = false;
        await ask(); // which comes back here
        return;
      }
      const steering = steeringOnPage();
      const answer = steering.alpha === 0 ? plain : await call(`${path}/ask`, { question, steering });
      // While the slider moves on, the latest answer is shown, as long as it belongs to the question on the page.
      if (JSON.stringify(question) !== answered || JSON.stringify(questionOnPage()) !== answered) {
        if (!again) show("steered", NOTHING); // the card shows another position of the slider
        continue;
      }
      show("steered", answer);
      if (again) {
        by("steered").classList.add("waiting");
        continue;
      }
      showProblem(problem, null);
      say(answer);
    }
  } catch (error) {
    showProblem(problem, error);
    show("steered", NOTHING); // the previous answer is of other settings
  } finally {
    running = false;
    by("steered").classList.remove("waiting");
    if (again) steer();
  }
}

function say(steered) {
  const inWords = (answer) => `${answer.said.trim() || "nothing"}${answer.behaviour ? `, ${wordOf[answer.behaviour]}` : ""}`;
  by("status").textContent = `Unsteered: ${inWords(plain)}. Steered: ${inWords(steered)}.`;
}

function describe() {
  const value = Number(by("slider").value), vector = vectorNow();
  const way = wordOf[`to_${toward()}`], lever = isVector() ? "vector" : vector.lever;
  const words = value === 0 ? "Unsteered." : `${Math.abs(value).toFixed(2)} × the run's ${lever} ${way} (${by("method").value}).`;
  by("slid").textContent = words;
  by("rephrase").disabled = !questionOnPage().item;
  by("slider").setAttribute("aria-valuetext", words);
  by("of-layers").hidden = by("neurons").parentElement.hidden = !isVector();
  by("shifts").textContent = !isVector() ? `The run's ${lever} ${way} acts as a whole.` : `The run's vector ${way}: ${vector.neurons} neurons at ${vector.site}, ${ranges(vector.layers)}, strength ${vector.strength.toPrecision(2)}.`;
}

// "layers 3, 9 to 29"
function ranges(layers) {
  const runs = [];
  for (const layer of layers) {
    const last = runs.at(-1);
    if (last && layer === last[1] + 1) last[1] = layer;
    else runs.push([layer, layer]);
  }
  const words = runs.map(([first, end]) => (first === end ? first : `${first} to ${end}`)).join(", ");
  return `${layers.length === 1 ? "layer" : "layers"} ${words}`;
}

function offerLayers(chosen = null) {
  const vector = vectorNow();
  by("layers").replaceChildren(
    ...Array.from({ length: facts.layers }, (_, layer) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", value: layer });
      box.disabled = !vector.free && !vector.layers.includes(layer);
      box.checked = chosen ? chosen.has(layer) && !box.disabled : vector.layers.includes(layer);
      label.append(box, String(layer));
      return label;
    }),
  );
}

function offerPairs() {
  by("example").replaceChildren(
    ...pairs.map((pair, number) => {
      const text = pair.memorized.prompt.replaceAll("\n", " ");
      return new Option(`${number + 1}. ${text.length > 70 ? `${text.slice(0, 70)} …` : text}`, number);
    }),
  );
}

function ranking({ estimate, low, high, n, input_only }) {
  const interval = (low ?? null) === null ? `no interval, of ${n}` : `${percent(low)} to ${percent(high)}, of ${n}`;
  return `It ranks ${percent(estimate)} (${interval}) of test prompts right (AUROC), the wording alone ${percent(input_only)}.`;
}

async function start() {
  try {
    facts = await call(path);
    wordOf = { ...wordOf, ...WORDS[facts.documents ? "documents" : "rules"] };
    for (const one of document.querySelectorAll("[data-word]")) one.textContent = wordOf[one.dataset.word];
    by("no-detector").hidden = facts.detects;
    by("ranks").hidden = (facts.auroc?.estimate ?? null) === null;
    if (!by("ranks").hidden) by("ranks").textContent = ranking(facts.auroc);
    by("by-layer").hidden = by("layer-table").hidden = !facts.detects;
    by("layer-table").classList.toggle("many", facts.layers > 12);
    for (const name in facts.methods) by("method").append(new Option(name, name));
    by("method").value = bestMethod("generalized");
    offerLayers();
    describe();
    pairs = await call(`${path}/questions?n=24`);
    offerPairs();
    if (pairs.length) fill(pairs[0].memorized);
    bench.inert = false;
    bench.removeAttribute("aria-busy");
    by("opening").hidden = true;
    if (pairs.length) await ask();
  } catch (error) {
    by("opening").hidden = true;
    showProblem(problem, error);
  }
}

by("example").addEventListener("change", () => {
  phrasing = 0;
  fill(pairs[Number(by("example").value)].memorized);
  ask();
});
by("ask").addEventListener("click", ask);
for (const id of ["prompt", "memorized", "generalized"])
  by(id).addEventListener("input", () => (by("rephrase").disabled = !questionOnPage().item));
for (const id of ["memorized", "generalized"])
  by(id).addEventListener("keydown", (event) => event.key === "Enter" && ask());
by("rephrase").addEventListener("click", async () => {
  showProblem(problem, null);
  const pair = pairs[Number(by("example").value)];
  const onPage = questionOnPage();
  try {
    // The pair's other phrasing first, since the model is known to answer it the other way; then any others.
    if (pair && onPage.prompt === pair.memorized.prompt) fill(pair.generalized);
    else fill(await call(`${path}/rephrase?seed=${++phrasing}`, onPage));
    await ask();
  } catch (error) {
    showProblem(problem, error);
  }
});
let direction = toward();
by("slider").addEventListener("input", () => {
  if (toward() !== direction) {
    direction = toward();
    const before = by("method").value;
    if (!methodIsOwn) by("method").value = bestMethod(direction);
    // Layers that the user ticked stay ticked where this direction's vector has them too.
    const ticked = [...by("layers").querySelectorAll("input:checked")].map((box) => Number(box.value));
    const kept = ticksAreOwn && before === by("method").value ? new Set(ticked) : null;
    offerLayers(kept);
    if (!by("layers").querySelector("input:checked")) offerLayers();
  }
  steer();
});
by("method").addEventListener("change", () => {
  methodIsOwn = true;
  ticksAreOwn = false;
  offerLayers();
  steer();
});
by("layers").addEventListener("change", () => {
  ticksAreOwn = true;
  steer();
});
by("neurons").addEventListener("change", steer);
start();
