// A conversation with two models. Messages are inserted as text, never as HTML.
const byId = (id) => document.getElementById(id);
const models = [...document.querySelectorAll("select.which")];
const turns = []; // {said, attempt, models, answers: [text, text], ended: [..], shown}
let waiting = 0, aborted = null;
const nameOf = (side) => `${models[side].dataset.name}, ${models[side].selectedOptions[0]?.text ?? ""}`;
const ready = (turn) => turn && turn.answers.every((text, side) => text && turn.ended[side]);

const show = () => {
  const last = turns.at(-1);
  byId("send").disabled = waiting > 0;
  byId("stop").disabled = waiting === 0;
  for (const id of ["retry", "edit"]) byId(id).disabled = waiting > 0 || !last;
  byId("compare").disabled = waiting > 0 || !ready(last);
  for (const select of models) select.disabled = waiting > 0;
};
const notice = (text, link) => {
  byId("notice").textContent = text;
  if (link) byId("notice").append(" ", Object.assign(document.createElement("a"), link));
};
const messagesOf = (side) => {
  const system = byId("system").value.trim(), before = turns.slice(0, -1);
  const said = before.flatMap((turn) => [["user", turn.said], ["assistant", turn.answers[side]]]);
  const every = [...(system ? [["system", system]] : []), ...said.filter(([, text]) => text), ["user", turns.at(-1).said]];
  return JSON.stringify(every.map(([role, content]) => ({ role, content })));
};
const settings = () => Object.fromEntries([...document.querySelectorAll(".setting")].map((it) => [it.name, it.value]));
const modelOf = (side) => ({ run: models[side].dataset.run, which: models[side].value });
const both = ([a, b]) => ({ run_a: a.run, which_a: a.which, run_b: b.run, which_b: b.which });

const ask = async (turn, side) => {
  const part = turn.shown.querySelectorAll(".answer")[side], text = part.querySelector(".text"), ended = part.querySelector(".ended");
  const name = nameOf(side), end = (why, answer) => { turn.answers[side] = answer; ended.textContent = why; };
  part.querySelector(".label").textContent = name;
  text.textContent = turn.answers[side] = ""; ended.textContent = "…"; turn.ended[side] = false;
  part.setAttribute("aria-busy", "true");
  try {
    const body = new URLSearchParams({ ...settings(), ...modelOf(side), messages: messagesOf(side), attempt: turn.attempt });
    const response = await fetch("/talk/answer", { method: "POST", body, signal: aborted.signal, headers: { Accept: "text/html;part" } });
    if (!response.ok) {
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      throw new Error(page.body.innerText.trim() || "The server refused.");
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", over = false;
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      const events = (rest + piece.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const values = JSON.parse(event.slice("data: ".length));
        if (values.loading) ended.textContent = "The model is being loaded …";
        if (values.text) { text.textContent += values.shown; ended.textContent = "…"; }
        if (values.error) throw new Error(values.shown);
        if ("answer" in values) {
          text.textContent = values.shown;
          end(values.stopped ? "stopped" : values.finished ? "" : "cut off at max_new_tokens", values.answer);
          turn.ended[side] = over = true;
        }
      }
    }
    if (!over) throw new Error("The server does not answer any more.");
    said(`${name}: ${text.textContent}`);
  } catch (error) {
    end(error.name === "AbortError" ? "stopped" : error.message, text.textContent.trim());
    said(`${name}: ${ended.textContent}`);
  }
  part.removeAttribute("aria-busy");
};
const answerLast = async () => {
  const turn = turns.at(-1);
  aborted = new AbortController();
  turn.models = [0, 1].map(modelOf); // kept, since others may be chosen before the vote
  waiting = 2; notice(""); show();
  await Promise.all([0, 1].map((side) => ask(turn, side).finally(() => { waiting -= 1; show(); })));
};
const forget = (from) => { for (const turn of turns.splice(from)) turn.shown.remove(); show(); };
const editFrom = (index) => {
  byId("text").value = turns[index].said;
  forget(index);
  byId("text").focus();
};

byId("composer")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || waiting) return;
  const shown = byId("turn").content.firstElementChild.cloneNode(true), turn = { said: text, attempt: 0, answers: ["", ""], ended: [false, false], shown };
  shown.querySelector(".said").textContent = text;
  shown.querySelector(".again").addEventListener("click", () => { if (!waiting) editFrom(turns.indexOf(turn)); });
  turns.push(turn);
  byId("turns").append(shown);
  byId("text").value = "";
  answerLast();
});
byId("text")?.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); byId("composer").requestSubmit(); }
});
byId("stop")?.addEventListener("click", () => {
  for (const side of [0, 1]) fetch("/talk/stop", { method: "POST", body: new URLSearchParams(modelOf(side)) }).catch(() => {});
  setTimeout(() => { if (waiting) aborted.abort(); }, 3000);
});
byId("retry")?.addEventListener("click", () => { turns.at(-1).attempt += 1; answerLast(); });
byId("edit")?.addEventListener("click", () => editFrom(turns.length - 1));
byId("new")?.addEventListener("click", () => { aborted?.abort(); forget(0); notice(""); byId("text").focus(); });
byId("compare")?.addEventListener("click", async () => {
  if (messagesOf(0) !== messagesOf(1)) return notice("The models said different things before, so their answers are not to one prompt: begin anew, and vote on the first answers.");
  const fields = { ...both(turns.at(-1).models), messages: messagesOf(0), answers: JSON.stringify(turns.at(-1).answers) };
  const part = await fetchPart("/talk/compare", fields).catch(() => ({ ok: false, text: "The server does not answer." }));
  if (!part.ok) return notice(new DOMParser().parseFromString(part.text, "text/html").body.innerText.trim());
  notice("Put to the vote.", { textContent: "Vote", href: `/vote?${new URLSearchParams(JSON.parse(part.text))}` });
});
byId("many")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const fields = { ...both([0, 1].map(modelOf)), ...settings(), ...Object.fromEntries(new FormData(event.target)) };
  if (fields.prompts === "file") fields.prompts = fields.file;
  const part = await fetchPart("/talk/ahead", fields).catch(() => ({ text: "The server does not answer." }));
  replacePart(byId("ahead"), part.text);
});
byId("ahead")?.addEventListener("click", async (event) => {
  if (event.target.id === "enough") replacePart(byId("ahead"), (await fetchPart("/talk/ahead/stop", {})).text);
});
setInterval(async () => {
  if (document.hidden || !byId("ahead")?.querySelector("[data-goes-on]")) return;
  const part = await fetchPart("/talk/ahead").catch(() => ({ ok: false }));
  if (part.ok) replacePart(byId("ahead"), part.text);
  if (part.ok && !byId("ahead").querySelector("[data-goes-on]")) said(byId("ahead").textContent.trim());
}, 2000);
if (byId("composer")) { show(); byId("text").focus(); }
