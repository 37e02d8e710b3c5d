// What all pages share. All HTML comes from the server's templates, which escape what they insert.
const said = (text) => { document.getElementById("said").textContent = text; };
// Fetch a part of a page; `fields`, if given, are posted as a form.
const fetchPart = async (address, fields) => {
  const sent = fields && { method: "POST", body: new URLSearchParams(fields) };
  const response = await fetch(address, { headers: { Accept: "text/html;part" }, ...sent });
  return { ok: response.ok, text: await response.text(), leadsTo: response.redirected && response.url };
};
const atEnd = (log) => !log || log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
for (const log of document.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
// Replace the content of an element; what had the focus, was opened or ticked stays so.
const replacePart = (element, text) => {
  if (element.dataset.shown === text) return;
  const logAtEnd = atEnd(element.querySelector(".log")), scrolled = element.querySelector(".log")?.scrollTop;
  const focused = element.contains(document.activeElement) && document.activeElement.id;
  const marked = [...element.querySelectorAll("input:checked")].map((input) => input.value);
  const opened = [...element.querySelectorAll("details[open][id]")].map((details) => details.id);
  element.dataset.shown = text;
  element.innerHTML = text;
  const log = element.querySelector(".log");
  if (log) log.scrollTop = logAtEnd ? log.scrollHeight : scrolled;
  for (const id of opened) document.getElementById(id)?.setAttribute("open", "");
  for (const input of element.querySelectorAll("input[type=checkbox]")) input.checked ||= marked.includes(input.value);
  if (focused) document.getElementById(focused)?.focus();
};
// <div data-refresh="/address" data-every="2">: reloaded every so many seconds while the page is visible, until its content has data-last.
for (const element of document.querySelectorAll("[data-refresh]")) {
  const turn = async () => {
    if (!document.hidden && element.dataset.refresh) {
      const part = await fetchPart(element.dataset.refresh).catch(() => ({ ok: false }));
      const before = element.querySelector(".overline .state")?.textContent;
      if (part.ok) replacePart(element, part.text);
      const state = element.querySelector(".overline .state")?.textContent;
      if (state !== before) said(state);
      if (part.ok && element.querySelector("[data-last]")) return;
      element.classList.toggle("stale", !part.ok);
    }
    setTimeout(turn, 1000 * element.dataset.every);
  };
  setTimeout(turn, 1000 * element.dataset.every);
}
// <div data-load="/address">: content that takes the server a while, loaded after the page.
for (const element of document.querySelectorAll("[data-load]")) {
  fetchPart(element.dataset.load).then((part) => {
    if (part.ok && element.querySelector("[role=status]")) said("Loaded.");
    replacePart(element, part.text);
  }, () => { element.textContent = "The server has ended."; });
}
// <textarea data-check="/address" data-into="id">: the text is checked as it is written, and the result shown there.
for (const field of document.querySelectorAll("[data-check]")) {
  const into = document.getElementById(field.dataset.into);
  let checked, waiting, busy = false;
  const turn = async () => {
    if (busy || field.value === checked) return;
    busy = true;
    checked = field.value;
    if (!into.dataset.shown) into.textContent = "Checking …";
    into.classList.add("busy");
    const part = await fetchPart(field.dataset.check, { text: field.value }).catch(() => null);
    if (part) replacePart(into, part.text);
    said(into.querySelector("p")?.textContent ?? "");
    into.classList.remove("busy");
    busy = false;
    turn();
  };
  field.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(turn, 600); });
  if (field.value) turn();
}
// <form data-into="id">: an error is shown there, and the form keeps its content.
for (const form of document.querySelectorAll("form[data-into]")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const part = await fetchPart(form.getAttribute("action"), new FormData(form, event.submitter)).catch(() => ({ text: "The server has ended." }));
    if (part.leadsTo) location.assign(part.leadsTo);
    else replacePart(document.getElementById(form.dataset.into), part.text);
  });
}
// data-key="n" on a button, link or field: the key presses or focuses it, except while typing in a field.
const writes = (target) => target.matches("input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable]");
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (writes(event.target)) { if (event.key === "Escape") event.target.blur(); return; }
  if (document.querySelector("dialog[open]")) return;
  const target = event.key === "?" ? document.getElementById("help")
    : [...document.querySelectorAll("[data-key]")].find((it) => it.dataset.key === event.key && !it.disabled && it.offsetParent);
  if (!target) return;
  event.preventDefault();
  if (writes(target)) target.focus(); else target.click();
});
document.getElementById("help").addEventListener("click", () => {
  const dialog = document.createElement("dialog"), list = document.createElement("dl");
  const rows = [...document.querySelectorAll("[data-key]")].filter((it) => it.offsetParent)
    .map((it) => [it.dataset.key, it.getAttribute("aria-label") || it.title || it.textContent.trim() || it.name]);
  for (const [key, meaning] of [...rows, ["Esc", "leave a field"], ["?", "these keys"]]) {
    const term = document.createElement("dt"), text = document.createElement("dd"), shown = document.createElement("kbd");
    shown.textContent = key; text.textContent = meaning;
    term.append(shown); list.append(term, text);
  }
  const title = document.createElement("h2"), close = document.createElement("button");
  title.textContent = "Keys"; close.textContent = "Close";
  dialog.setAttribute("aria-label", "Keys");
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  dialog.append(title, list, close);
  document.body.append(dialog);
  dialog.showModal();
});
