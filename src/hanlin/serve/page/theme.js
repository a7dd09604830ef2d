// Runs before the page is drawn, so that a chosen theme does not flash in.
try {
  const theme = JSON.parse(localStorage.getItem("hanlin.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // none chosen
}
