// Requests to the JSON API, and errors in one line.

export class Refused extends Error {}

async function send(path, body, options = {}) {
  const init = { ...options };
  if (body !== undefined) {
    init.method = "POST";
    init.headers = { "Content-Type": "application/json" };
    init.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => ({}));
  const { field, message } = found.error ?? { field: "server", message: `error ${answer.status}` };
  throw new Refused(`${field}: ${message}`);
}

export const call = async (path, body, options) => (await send(path, body, options)).json();

// The objects of an answer that has one a line, each when it is there.
export async function* lines(path, body, options) {
  const reader = (await send(path, body, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    yield* whole.map((line) => JSON.parse(line));
  }
}

export function showProblem(place, error) {
  if (error && error.name === "AbortError") return;
  place.hidden = !error;
  place.textContent = error ? error.message : "";
  if (error) place.scrollIntoView({ block: "nearest" });
}

export const percent = (share) => {
  if (share === null || share === undefined) return "–";
  const whole = 100 * share;
  if (whole > 0 && whole < 0.1) return "< 0.1 %";
  return `${whole < 10 || whole > 90 ? whole.toFixed(1) : whole.toFixed(0)} %`;
};
