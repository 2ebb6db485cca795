// What the page does by itself: the newest question's answer is shown, results are scrolled to, arrow keys move tabs.
window.sparc = (() => {
  const tickets = {};
  const asked = {};

  // Number a question; `values` are those of its inputs, of which the last takes the number.
  const ask = (pane, values) => {
    const ticket = String((tickets[pane] ?? 0) + 1);
    tickets[pane] = Number(ticket);
    asked[pane] = values;
    return [...values.slice(0, -1), ticket];
  };

  // Let no answer to what was asked until now be shown any more.
  const forget = (pane) => {
    tickets[pane] = (tickets[pane] ?? 0) + 1;
  };

  // Return what a pane shows when an answer arrives: the answer, unless something else was asked since.
  const newest = (pane, arrived, shown, scrolled) => {
    if (!arrived.startsWith(`<div data-ticket="${tickets[pane]}">`)) return shown;
    if (scrolled) reveal(pane);
    return arrived;
  };

  // The caption that belongs to a new picture: none, where the one there was asked about with the former picture.
  const captionOfNewPicture = (pane, caption) => {
    const [formerPicture, formerCaption] = asked[pane] ?? [];
    return formerPicture && formerCaption === caption ? '' : caption;
  };

  const latentOf = (html) => /data-shown="(\d+)"/.exec(html)?.[1] ?? '';
  const hasMaps = (html) => html.includes('data-maps="yes"');

  // Return the page of a latent that is to be seen when one with or without maps arrives.
  const sameLatent = (arrived, shown, wanted) =>
    latentOf(arrived) === latentOf(shown) && hasMaps(arrived) === wanted ? arrived : shown;

  // Put an opened latent into the address, so that it can be sent on.
  const opened = (html) => {
    const address = new URL(window.location);
    address.searchParams.set('latent', latentOf(html));
    history.replaceState(null, '', address);
    reveal('latent-page');
  };

  // Scroll to where something new is shown, unless its beginning is to be seen already.
  const reveal = (id) => {
    const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
    const scroll = () => {
      const place = document.getElementById(id);
      const top = place?.getBoundingClientRect().top;
      if (place && (top < 0 || top > 0.6 * innerHeight)) {
        place.scrollIntoView({ block: 'start', behavior: calm ? 'instant' : 'smooth' });
      }
    };
    // After the page has drawn it.
    requestAnimationFrame(() => requestAnimationFrame(scroll));
  };

  const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  document.addEventListener('keydown', (event) => {
    const tab = event.target.closest?.('[role=tab]');
    if (!tab || !(event.key in STEPS)) return;
    const tabs = [...tab.closest('[role=tablist]').querySelectorAll('[role=tab]:not([disabled])')];
    const count = tabs.length;
    const next = Math.abs(STEPS[event.key]) === 1 ? (tabs.indexOf(tab) + STEPS[event.key] + count) % count : null;
    const chosen = tabs[next ?? (event.key === 'Home' ? 0 : count - 1)];
    event.preventDefault();
    chosen.click();
    chosen.focus();
  });

  return { ask, forget, newest, captionOfNewPicture, latentOf, sameLatent, opened, reveal };
})();
