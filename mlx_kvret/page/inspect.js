// The page of one text: shows the data it carries.
"use strict";
(async () => {
  const root = document.getElementById("view");
  try {
    const told = JSON.parse(document.getElementById("data").textContent);
    document.title = `What ${told.model} remembers`;
    new kvret.View(root).show(await kvret.decoded(told));
  } catch (error) {
    root.textContent = `This page cannot be drawn here (${error.message}); a browser of 2023 or newer can.`;
  }
})();
