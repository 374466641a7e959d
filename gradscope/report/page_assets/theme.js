// Before anything is painted: the theme that was chosen on this machine, or none and the system decides.
try {
  const chosen = localStorage.getItem("gradscope-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* a page in a frame may have no storage */ }
