"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const next = { auto: "light", light: "dark", dark: "auto" };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const now = next[root.dataset.theme || "auto"];
    root.dataset.theme = now;
    theme.textContent = `theme: ${now}`;
  });

  const list = document.getElementById("cards");
  const cards = [...list.querySelectorAll(".card")];
  if (!cards.length) return;
  const sort = document.getElementById("sort");
  const more = document.getElementById("more");
  const page = Number(list.dataset.shown);
  let shown = page;
  let key = "order";

  const gain = (card) => Number(card.dataset.gain);
  const order = (card) => Number(card.dataset.order);
  const value = {
    order: () => 0,
    gain: (card) => -gain(card),
    drop: gain,
    change: (card) => -Math.abs(gain(card)),
  };

  const draw = () => {
    cards.sort((a, b) => value[key](a) - value[key](b) || order(a) - order(b));
    list.append(...cards);
    cards.forEach((card, i) => { card.hidden = i >= shown; });
    const count = Math.min(shown, cards.length);
    document.getElementById("count").textContent = `${count} of ${cards.length} shown`;
    for (const button of more.querySelectorAll("button")) button.hidden = count === cards.length;
    for (const button of sort.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.dataset.sort === key));
  };

  sort.hidden = more.hidden = false;
  sort.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    key = button.dataset.sort;
    shown = page;
    draw();
  });
  more.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    shown = button.dataset.more === "all" ? cards.length : shown + Number(button.dataset.more);
    draw();
  });
  draw();
})();
