"""Moves of the page's slider, timed in the browser itself."""

from typing import Any

_MOVE = """
async (value) => {
  const slider = document.getElementById("ratio");
  const shown = () => document.getElementById("tiles").textContent;
  const before = shown();
  const start = performance.now();
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  while (shown() === before) await new Promise((done) => setTimeout(done, 0));
  await new Promise(requestAnimationFrame);
  return performance.now() - start;
}
"""


def move(page: Any, ratio: float) -> float:
    """Moves the slider to a ratio that is not the one it stands at; milliseconds until the frame after everything changed."""
    return float(page.evaluate(_MOVE, f"{ratio:.4f}"))
