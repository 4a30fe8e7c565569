"""Copy a study's figures into docs/figures, small enough for a repository.

    python tools/write_docs_figures.py runs/demo

docs/questions.md shows them. They are narrowed and their colours are cut to a palette: lines and
letters stay sharp.
"""

from __future__ import annotations

import pathlib
import sys

from PIL import Image

DOCS = pathlib.Path(__file__).parents[1] / "docs"
WIDTH = 1_500  # pixels; of four panels the letters can still be read
COLOURS = 128
LARGEST = 80_000  # bytes


def main(study: pathlib.Path) -> None:
    """Write every figure that the study has."""
    figures = sorted((study / "figures").glob("*.png"))
    if not figures:
        sys.exit(f"{study} has no figures; run the study first")
    (DOCS / "figures").mkdir(exist_ok=True)
    for figure in figures:
        target = DOCS / "figures" / figure.name
        _shrunk(Image.open(figure)).save(target, optimize=True)
        if target.stat().st_size > LARGEST:
            sys.exit(f"{target.name} has {target.stat().st_size:,} bytes; lower WIDTH or COLOURS")


def _shrunk(image: Image.Image) -> Image.Image:
    width = min(WIDTH, image.width)
    size = (width, round(image.height * width / image.width))
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    # The default merges the colours of thin lines, which are rare, with other lines'.
    return resized.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
