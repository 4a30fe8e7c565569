"use strict";
// What a latent fires on, at a glance: the text around its strongest firing, as a column of a list.
(() => {
  const P = window.prunelens;
  const [BEFORE, AFTER] = [3, 2]; // tokens

  // Rows do not wait for the text: a cell is filled when it is there, and only rows in sight have cells.
  P.glimpses = (view) => ({
    field: "glimpse", label: "fires on", help: "The text around its strongest firing.", width: 290, isUnsorted: true,
    cell: ({ i }) => {
      const cell = node("span", "glimpse");
      Promise.all([P.text(view), P.places(view)]).then(
        ([text, places]) => cell.append(...parts(text, places, i)),
        (error) => { cell.textContent = "–"; cell.title = error.message; },
      );
      return cell;
    },
  });

  // Before, the token itself, after. Contexts are in the order of latents, a latent's strongest first.
  const parts = ({ vocabulary, ids, contextTokens }, { offsets, windows, positions }, latent) => {
    const context = offsets[latent];
    if (context === offsets[latent + 1]) return ["–"];
    const window = windows[context] * contextTokens;
    const fired = window + positions[context];
    const words = (first, end) => Array.from(ids.subarray(first, end), (id) => P.visible(vocabulary[id])).join("");
    const before = node("span", "before");
    before.append(node("bdi", "token", words(Math.max(window, fired - BEFORE), fired)));
    const after = node("span", "after");
    after.append(node("bdi", "token", words(fired + 1, Math.min(window + contextTokens, fired + 1 + AFTER))));
    return [before, node("bdi", "token fired", words(fired, fired + 1)), after];
  };

  const node = (name, style, text = "") => {
    const element = document.createElement(name);
    element.className = style;
    element.textContent = text;
    return element;
  };
})();
