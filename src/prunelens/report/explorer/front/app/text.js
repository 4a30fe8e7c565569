"use strict";
// How names, tokens and numbers are written. Everything becomes a text node; nothing becomes HTML.
(() => {
  const P = window.prunelens;
  const MARKS = { "\n": "↵", "\r": "␍", "\t": "⇥" };
  // Controls, line separators, lone surrogates, and what would reorder or hide the text beside it.
  const UNSEEN = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;
  const JOINERS_ALONE = /^[\u200c\u200d]+$/;

  const escaped = (character) => MARKS[character]
    || `\\u{${character.codePointAt(0).toString(16).padStart(2, "0")}}`;

  // A token or a name with all that cannot be seen spelled out.
  P.visible = (text) => {
    const shown = String(text).replace(UNSEEN, escaped);
    if (shown === "") return "∅";
    return JOINERS_ALONE.test(shown) ? [...shown].map(escaped).join("") : shown;
  };

  P.number = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e6) return String(value);
    if (size >= 1e5 || (size > 0 && size < 0.001)) return value.toExponential(2);
    return size < 0.1 ? value.toPrecision(3) : size < 10 ? value.toFixed(3) : value.toPrecision(4);
  };

  // Activations and logits are written with three significant digits.
  P.brief = (value) => P.number(Number(value)).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");

  P.count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many || `${one}s`}`;

  // Kept, lost, cannot be said: never by colour alone.
  P.FATES = {
    1: { mark: "✓", word: "kept", style: "kept" },
    0: { mark: "✗", word: "lost", style: "lost" },
    "-1": { mark: "–", word: "cannot be said", style: "unsaid" },
  };
})();
