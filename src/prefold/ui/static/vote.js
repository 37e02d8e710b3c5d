// Votes without reloading the page. A key that is held down votes once.
const ballot = document.getElementById("ballot");
let sending = false;
document.addEventListener("keydown", (event) => { if (event.repeat && !writes(event.target)) event.stopImmediatePropagation(); }, true);
ballot.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.target.matches(".note")) { event.preventDefault(); event.target.blur(); } });
// After the last vote, look for new comparisons: answers that are being generated, or put to the vote.
setInterval(async () => {
  if (document.hidden || sending || ballot.querySelector("[name=id]")) return;
  const part = await fetchPart(location.href).catch(() => ({ ok: false }));
  if (part.ok && !sending) replacePart(ballot, part.text);
}, 3000);
ballot.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (sending) return;
  sending = true;
  const part = await fetchPart("/vote", Object.fromEntries(new FormData(event.target, event.submitter)))
    .catch(() => ({ ok: false, text: "" }));
  sending = false;
  ballot.querySelector(".refused")?.remove();
  if (!part.ok) {
    ballot.insertAdjacentHTML("afterbegin", part.text || '<p class="refused" role="alert">The server does not answer: this vote was not kept.</p>');
    return;
  }
  replacePart(ballot, part.text);
  document.getElementById("asked").focus({ preventScroll: true });
  said(document.getElementById("progress").textContent.trim());
});
