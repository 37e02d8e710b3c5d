// A run that was killed cannot say so: the page is then older than it should be.
const written = document.getElementById("written");
const age = () => (Date.now() - Date.parse(written.dateTime)) / 1000;
document.getElementById("stale").hidden = age() < Math.max(60, 5 * Number(written.dataset.between));
