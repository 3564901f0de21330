"use strict";
// Values under the pointer, and pictures of one kind at the step that is chosen. The page is whole without it.
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const lines = JSON.parse(svg.dataset.points);
  const figure = svg.parentElement, box = figure.querySelector(".hover"), cross = svg.querySelector(".cross");
  const width = svg.viewBox.baseVal.width;
  const leave = () => { box.style.display = "none"; cross.style.visibility = "hidden"; };
  const show = (event) => {
    const frame = svg.getBoundingClientRect();
    const at = (event.clientX - frame.left) / frame.width * width;
    let place = null, step = null;
    for (const line of lines)
      line.x.forEach((x, i) => { if (place === null || Math.abs(x - at) < Math.abs(place - at)) { place = x; step = line.steps[i]; } });
    if (place === null) return;
    box.replaceChildren();
    const heading = document.createElement("div");
    heading.textContent = "step " + (step + 1).toLocaleString("en");
    box.append(heading);
    for (const line of lines) {
      let near = 0;
      line.x.forEach((x, i) => { if (Math.abs(x - place) < Math.abs(line.x[near] - place)) near = i; });
      const row = document.createElement("div");
      row.className = "run-" + line.colour;
      row.textContent = (lines.length > 1 ? line.name + "  " : "") + line.text[near] + (line.steps[near] === step ? "" : " (step " + (line.steps[near] + 1) + ")");
      box.append(row);
    }
    cross.setAttribute("x1", place); cross.setAttribute("x2", place);
    cross.style.visibility = "visible";
    box.style.display = "block";
    const left = place / width * frame.width + (frame.left - figure.getBoundingClientRect().left);
    box.style.left = left + 12 + box.offsetWidth > figure.clientWidth ? Math.max(4, left - 12 - box.offsetWidth) + "px" : left + 12 + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", leave);
}
for (const figure of document.querySelectorAll(".picture[data-steps]")) {
  const chosen = figure.querySelector("input"), told = figure.querySelector("output");
  const pictures = figure.querySelectorAll("img"), steps = JSON.parse(figure.dataset.steps);
  const show = () => {
    pictures.forEach((picture, i) => { picture.hidden = i !== Number(chosen.value); });
    told.textContent = "step " + steps[Number(chosen.value)].toLocaleString("en");
  };
  chosen.addEventListener("input", show);
  figure.querySelector(".steps").hidden = false;
  show();
}
document.documentElement.dataset.ready = "yes";
