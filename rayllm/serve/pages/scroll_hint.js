// What is wider than its place shows at which side there is more.

const marked = new ResizeObserver((entries) => {
  for (const { target } of entries) mark("scrolls" in target.dataset ? target : target.parentElement);
});

function mark(box) {
  if (!box) return;
  const left = box.scrollLeft;
  box.classList.toggle("more-before", left > 1);
  box.classList.toggle("more-after", left + box.clientWidth < box.scrollWidth - 1);
}

/** Marks `box` with `more-before` and `more-after` as it, or its one child, grows and is scrolled. */
export function hintScrolling(box) {
  box.dataset.scrolls = "";
  box.addEventListener("scroll", () => mark(box), { passive: true });
  marked.observe(box);
  if (box.firstElementChild) marked.observe(box.firstElementChild);
  return box;
}
