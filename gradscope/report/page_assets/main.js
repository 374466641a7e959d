// Start, once all is defined.

for (const part of $$("[data-grow]")) part.style.flexGrow = part.dataset.grow;
startGraphs();
startTable();
startFindings();
startKeys();
addEventListener("beforeprint", () => $$(".finding > details").forEach((details) => (details.open = true)));
