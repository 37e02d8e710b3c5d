// Bokeh draws on a canvas, which no stylesheet reaches: the colours of axes follow the page by hand.
const dark = matchMedia("(prefers-color-scheme: dark)");
const page = () => getComputedStyle(document.documentElement);
const paint = (figure) => {
  const muted = page().getPropertyValue("--muted").trim(), rule = page().getPropertyValue("--rule").trim();
  for (const axis of [...figure.below, ...figure.left]) axis.major_label_text_color = muted;
  for (const axis of figure.below) axis.axis_line_color = rule;
  for (const grid of figure.center) if ("grid_line_color" in grid) grid.grid_line_color = rule;
};
const figures = [];
for (const item of JSON.parse(document.getElementById("plots").textContent)) {
  Bokeh.embed.embed_item(item).then((views) => {
    const figure = [...views][0].model;
    figures.push(figure);
    paint(figure);
  });
}
dark.addEventListener("change", () => figures.forEach(paint));
