// A document and a question; the answer is coloured while it is written.
import { lines, percent, showProblem } from "./asking.js";

const by = (id) => document.getElementById(id);
const form = by("about"), answer = by("answer");
const path = `/api/runs/${form.dataset.run}/cells/${encodeURIComponent(form.dataset.cell)}/read`;
let asking = new AbortController();

function coloured(found) {
  // Places count characters, of which some are two units of a script's text.
  const letters = Array.from(found.answer), pieces = [];
  let end = 0;
  for (const part of found.parts) {
    pieces.push(letters.slice(end, part.start).join(""));
    const mark = document.createElement("span");
    mark.textContent = letters.slice(part.start, part.end).join("");
    mark.className = `from-${part.verdict === "cannot tell" ? "unknown" : part.verdict}`;
    mark.title = `${part.verdict}: document ${percent(part.document)}, memory ${percent(part.memory)}, neither ${percent(part.neither)}`;
    mark.tabIndex = 0;
    pieces.push(mark);
    end = part.end;
  }
  return [...pieces, letters.slice(end).join("")];
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  showProblem(by("problem"), null);
  asking.abort();
  const mine = (asking = new AbortController());
  answer.textContent = "Writing …";
  by("shares").textContent = "";
  try {
    const about = { ask: by("question").value, document: by("document").value };
    for await (const found of lines(path, about, { signal: mine.signal })) {
      answer.replaceChildren(...coloured(found));
      by("shares").textContent = `Names and numbers: ${found.line}.`;
    }
  } catch (error) {
    if (mine !== asking) return;
    answer.textContent = "";
    showProblem(by("problem"), error);
  }
});
