"use strict";
// Small parts that the pages share.
(() => {
  const P = window.prunelens;
  const { h } = window.preact;
  const { useEffect, useState } = window.preactHooks;
  P.html = window.htm.bind(h);
  const { html } = P;

  // A promise's value: {value} or {error}, neither while it is awaited. The old value of another
  // question is never shown.
  P.useLoaded = (make, inputs) => {
    const key = JSON.stringify(inputs);
    const [state, set] = useState({ key: null });
    useEffect(() => {
      let wanted = true;
      const give = (part) => { if (wanted) set({ key, ...part }); };
      make().then((value) => give({ value }), (error) => give({ error }));
      return () => { wanted = false; };
    }, [key]);
    return state.key === key ? state : {};
  };

  P.Waiting = ({ of }) => (of.error
    ? html`<p class="problem" role="alert">${of.error.message}</p>`
    : html`<p class="loading" role="status">Loading …</p>`);

  // One cell per condition: a mark and its colour, in words for who cannot see them.
  P.Strip = ({ view, latent, chosen, link }) => html`<ol class="strip" aria-label="Kept or lost under every condition">
    ${view.conditions.map((condition) => {
      const { mark, word, style } = P.FATES[condition.kept[latent]];
      const { persistence } = condition;
      const value = persistence ? P.number(persistence.values[latent]) : "";
      const isChosen = condition.id === chosen;
      return html`<li class=${`fate ${style}${isChosen ? " chosen" : ""}`}>
        <a href=${link(condition.id)} aria-current=${isChosen ? "true" : null} title=${persistence ? persistence.label : ""}>
          <span class="name">${P.visible(condition.label)}</span>
          <span class="value"><span aria-hidden="true">${mark} </span>${value}<span class="said">, ${word}</span></span>
        </a></li>`;
    })}
  </ol>`;

  P.Choice = ({ label, value, options, onChoose }) => html`<label class="choice"><span>${label}</span>
    <select aria-label=${label} value=${value} onChange=${(event) => onChoose(event.target.value)}>
      ${options.map(([key, text]) => html`<option value=${key} selected=${key === value}>${text}</option>`)}
    </select></label>`;

  // The colour that a custom property has now, light or dark.
  P.colour = (name) => {
    const probe = document.createElement("span");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const { color } = getComputedStyle(probe);
    probe.remove();
    return color;
  };
})();
