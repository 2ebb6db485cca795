// How well the visible words of a page stand out: those below WCAG 2.2's 4.5 to 1 (3 to 1 where they are large).
() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const ink = canvas.getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    ink.clearRect(0, 0, 1, 1);
    ink.fillStyle = colour;
    ink.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = ink.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const opacity = (element) => (element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1);
  const poor = [];
  let seen = 0;
  const look = (element, rect, words, colour) => {
    const [x, y] = [rect.left + Math.min(rect.width / 2, 12), rect.top + rect.height / 2];
    const stack = document.elementsFromPoint(x, y);
    if (!stack.includes(element)) return; // scrolled away inside a box, or covered
    let paper = [255, 255, 255];
    for (const layer of [...stack].reverse()) {
      const fill = rgba(getComputedStyle(layer).backgroundColor);
      paper = over([fill[0], fill[1], fill[2], fill[3] * opacity(layer)], paper);
    }
    const text = rgba(colour);
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const found = ratio(over([text[0], text[1], text[2], text[3] * opacity(element)], paper), paper);
    seen += 1;
    if (found < (large ? 3 : 4.5)) poor.push(`${found.toFixed(2)} ${words.trim().slice(0, 40)} <${element.tagName} ${element.className}>`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility({ visibilityProperty: true }) || element.closest('svg, script, style, :disabled')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    element.scrollIntoView({ block: 'center', behavior: 'instant' });
    const rect = range.getClientRects()[0];
    if (rect?.width) look(element, rect, node.textContent, getComputedStyle(element).color);
  }
  for (const element of document.querySelectorAll('input, textarea')) {
    if (!element.checkVisibility() || element.disabled) continue;
    element.scrollIntoView({ block: 'center', behavior: 'instant' });
    const shown = element.value || element.placeholder;
    const style = element.value ? getComputedStyle(element) : getComputedStyle(element, '::placeholder');
    if (shown && !['range', 'checkbox', 'radio', 'file'].includes(element.type)) look(element, element.getBoundingClientRect(), shown, style.color);
  }
  return { seen, poor };
}
