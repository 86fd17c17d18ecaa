"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const filter = byId("filter"), which = byId("which");
const sites = all(".site"), groups = all(".module, .part");
const initial = new Map(groups.map((group) => [group, group.open]));
let filtering = false;

function apply() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const active = words.length > 0 || which.value !== "";
  for (const site of sites) {
    const text = site.dataset.search;
    const fits = words.every((word) => text.includes(word));
    site.hidden = !fits || (which.value !== "" && !site.classList.contains(which.value));
  }
  const shown = sites.filter((site) => !site.hidden);
  const holding = new Set();
  for (const site of shown) {
    for (let up = site.parentElement; up; up = up.parentElement) holding.add(up);
  }
  for (const group of groups) {
    group.hidden = active && !holding.has(group);
    // What is found is in view; when the filter is cleared, the tree is as it was.
    if (active) group.open = true;
    else if (filtering) group.open = initial.get(group);
  }
  filtering = active;
  byId("shown").textContent = active ? `${shown.length} of ${sites.length}` : "";
  byId("nothing").hidden = shown.length > 0 || !active;
}

filter.addEventListener("input", apply);
which.addEventListener("change", apply);
byId("clear").addEventListener("click", () => { filter.value = ""; which.value = ""; apply(); });
byId("open").addEventListener("click", () => groups.forEach((group) => { group.open = true; }));
byId("close").addEventListener("click", () => {
  all("main details").forEach((details) => { details.open = false; });
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== filter) { event.preventDefault(); filter.focus(); }
  if (event.key === "Escape" && document.activeElement === filter) { filter.value = ""; apply(); }
});
// A browser may restore what was typed before the page was loaded again.
apply();
