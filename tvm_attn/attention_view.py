"""Attention made visible: what the page of the server and the files of `tvm-attn attend` show.

Weights are handled a layer at a time, so that 1024 tokens and 144 heads, 600 MB, need the memory of one layer.

| file | content |
|---|---|
| .html | a page with every head and the logit lens; it loads nothing from elsewhere |
| .png | every head as a small picture; needs matplotlib |
| .npz | `attention` (layers, heads, T, T) float32; `tokens`, `token_ids` (T,); `layers`, `heads`: their numbers |
|  | `lens_ids`, `lens_probabilities` (layers of the model + 1, T, k) |
"""

from __future__ import annotations

import base64
import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tvm_attn.runtime.model import Model
    from tvm_attn.runtime.tokenizer import Tokenizer

Weights = npt.NDArray[np.float32]
Lens = Sequence[Sequence[Sequence[tuple[int, float]]]]
"""For the input and after each layer, for each token, the likeliest next tokens and their probabilities, best first."""

LENS_TOP = 5
_PAGE = Path(__file__).parent / "serving" / "page"
_PICTURE = 128  # most pixels of a head's side in a PNG of several
_LABELLED = 64  # most tokens that a PNG names


@dataclass(frozen=True)
class View:
    """What a file shows.

    Attributes:
        title: of the page.
        token_ids: the T tokens.
        tokens: the same as text; ids where there is no tokenizer.
        layers, heads: the numbers of those that are shown.
        lens: see `Lens`.
        weights: of each of `layers` in turn, those of `heads`, float32 (heads, T, T).
    """

    title: str
    token_ids: list[int]
    tokens: list[str]
    layers: list[int]
    heads: list[int]
    lens: Lens
    weights: Iterable[Weights]


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token as it is shown."""
    return str(token_id) if tokenizer is None else tokenizer.written(token_id).decode("utf-8", "replace")


def lens_texts(model: Model, lens: Lens) -> list[list[list[list[Any]]]]:
    """The lens as `attention.js` reads it: [text, probability] for each guess."""
    return [
        [[[token_text(model.tokenizer, token_id), round(share, 4)] for token_id, share in best] for best in layer]
        for layer in lens
    ]


def packed(weights: Weights) -> str:
    """Weights (heads, T, T) as `attention.js` reads them.

    Base64 of zlib of each head's rows up to the diagonal, in ten-thousandths, 16 bits each, little-endian.
    """
    rows = np.tril_indices(weights.shape[-1])
    content = b"".join(np.rint(head[rows] * 10000).astype("<u2").tobytes() for head in weights)
    return base64.b64encode(zlib.compress(content, 1)).decode("ascii")


# --- files ---


def write_html(view: View, lens: Any, file: BinaryIO) -> None:
    """Writes a page; `lens` as from `lens_texts`."""
    data = {"tokens": view.tokens, "layers": view.layers, "heads": view.heads, "lens": lens}
    script = (_PAGE / "attention.js").read_text("utf-8")
    head = _HEAD.format(title=_escaped(view.title), style=(_PAGE / "page.css").read_text("utf-8"))
    file.write(head.encode())
    for layer, weights in zip(view.layers, view.weights, strict=True):
        file.write(f'<script type="text/plain" id="layer-{layer}">{packed(weights)}</script>\n'.encode())
    # In JSON "<" stands in strings only; written so, nothing in them ends the element.
    file.write(_TAIL.format(data=json.dumps(data).replace("<", "\\u003c"), script=script).encode())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>Attention</h1><p id="model">{title}</p></header>
<main class="alone"><section class="card" id="view" aria-label="Attention"></section></main>
"""
_TAIL = """<script type="application/json" id="data">{data}</script>
<script type="module">
{script}
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
show(find("view"), {{ ...data, load: async (layer) => find(`layer-${{layer}}`).textContent }});
</script>
</body>
</html>
"""


def write_npz(view: View, file: BinaryIO) -> None:
    """Writes arrays for `numpy.load`, a layer at a time."""
    length = len(view.token_ids)
    shape = (len(view.layers), len(view.heads), length, length)
    small = {
        "tokens": np.array(view.tokens),
        "token_ids": np.array(view.token_ids, np.int32),
        "layers": np.array(view.layers, np.int32),
        "heads": np.array(view.heads, np.int32),
        "lens_ids": np.array([[[i for i, _ in best] for best in layer] for layer in view.lens], np.int32),
        "lens_probabilities": np.array([[[p for _, p in best] for best in layer] for layer in view.lens], np.float32),
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("attention.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for weights in view.weights:
                member.write(weights.astype("<f4").tobytes())
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_png(view: View, file: BinaryIO) -> None:
    """Draws every head as a small picture, or one head with its tokens."""
    from matplotlib.figure import Figure

    is_one = len(view.layers) * len(view.heads) == 1
    rows = []
    for weights in view.weights:
        heads = weights if is_one else [_reduced(head) for head in weights]
        rows.append(np.hstack([np.pad(np.sqrt(head), ((0, 1), (0, 1)), constant_values=np.nan) for head in heads]))
    picture = np.vstack(rows)[:-1, :-1]
    side = (len(picture) + 1) // len(view.layers)
    size = 8.0 if is_one else 1.0
    figure = Figure(figsize=(len(view.heads) * size + 1.2, len(view.layers) * size + 1.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(picture, vmin=0, vmax=1, cmap="Blues", aspect="equal", interpolation="antialiased")
    axis.set_title("rows attend to columns", fontsize=9)
    if is_one:
        axis.set_xlabel(f"layer {view.layers[0]}, head {view.heads[0]}")
        if len(view.tokens) <= _LABELLED:
            shown = [text.replace("\n", "↵").replace(" ", "␣") for text in view.tokens]
            axis.set_xticks(range(len(shown)), shown, rotation=90, fontsize=7, parse_math=False)
            axis.set_yticks(range(len(shown)), shown, fontsize=7, parse_math=False)
    else:
        for name, numbers, ticks in (("head", view.heads, axis.set_xticks), ("layer", view.layers, axis.set_yticks)):
            places = [index * side + side / 2 - 1 for index in range(len(numbers))]
            ticks(places, [f"{name} {number}" for number in numbers], fontsize=7)
    figure.savefig(file, format="png", dpi=120)


def _reduced(head: Weights) -> Weights:
    """A matrix of at most `_PICTURE` rows and columns, each of the largest weight of those it stands for."""
    length = len(head)
    step = -(-length // _PICTURE)
    if step == 1:
        return head
    padded = np.zeros((-(-length // step) * step,) * 2, np.float32)
    padded[:length, :length] = head
    side = len(padded) // step
    reduced: Weights = padded.reshape(side, step, side, step).max((1, 3))
    return reduced
