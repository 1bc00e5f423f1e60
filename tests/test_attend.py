"""The files of attention: arrays, a picture, and a page that needs nothing else."""

import json
import os
import re
import tracemalloc
import zipfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tvm_attn
from tvm_attn import attend
from tvm_attn.attention_view import View, packed, write_html, write_npz
from tvm_attn.errors import TokenizerError

LAYERS, HEADS = 3, 4


def weights_of(layer: int, length: int) -> np.ndarray:
    """Rows of random weights that add up to 1, (HEADS, T, T)."""
    logits = np.random.default_rng(layer).normal(size=(HEADS, length, length)).astype(np.float32)
    found = np.tril(np.exp(3 * logits))
    return found / found.sum(-1, keepdims=True)


class Words:
    """A tokenizer of bytes."""

    longest_token = 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def written(self, token_id: int) -> bytes:
        return bytes([token_id])


class FakeModel:
    """Has random weights, and a lens that is sure of the next byte."""

    def __init__(self) -> None:
        self.tokenizer: Words | None = Words()
        self.config = SimpleNamespace(n_layer=LAYERS, n_head=HEADS, n_positions=1024, vocab_size=256, bos_token_id=0)
        self.computed: list[int] = []

    def tokenizer_json(self) -> str | None:
        return "{}" if self.tokenizer else None

    def attention_layers(self, ids: list[int], layers: list[int], heads: list[int]) -> Iterator[np.ndarray]:
        for layer in layers:
            self.computed.append(layer)
            yield weights_of(layer, len(ids))[heads]

    def logit_lens(self, ids: list[int], top: int) -> list[list[list[tuple[int, float]]]]:
        return [[[((i + 1) % 256, 0.75), (layer, 0.125)] for i in ids] for layer in range(LAYERS + 1)]


@pytest.fixture
def model(monkeypatch) -> FakeModel:
    model = FakeModel()
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "1")  # so that it is gone after the test
    monkeypatch.delenv("TVM_USE_RUNTIME_LIB")
    monkeypatch.setattr(tvm_attn, "load", lambda *_, **__: model, raising=False)
    monkeypatch.setattr(attend, "open_artifact", lambda *_: model)
    return model


def test_arrays(model, tmp_path, capsys):
    out = tmp_path / "attention.npz"
    assert attend.main(["dist/x", "--text", "größe", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    with np.load(out) as found:
        ids = list("größe".encode())
        np.testing.assert_array_equal(found["attention"], [weights_of(layer, 7) for layer in range(LAYERS)])
        assert found["attention"].dtype == np.float32
        assert found["token_ids"].tolist() == ids
        assert found["tokens"].tolist() == ["g", "r", "�", "�", "�", "�", "e"]
        assert (found["layers"].tolist(), found["heads"].tolist()) == ([0, 1, 2], [0, 1, 2, 3])
        assert found["lens_ids"].shape == found["lens_probabilities"].shape == (LAYERS + 1, 7, 2)
        assert found["lens_ids"][2, 0].tolist() == [ids[0] + 1, 2]
        assert found["lens_probabilities"][2, 0].tolist() == [0.75, 0.125]


def test_chosen_layers_and_heads(model, tmp_path):
    out = tmp_path / "attention.npz"
    assert attend.main(["dist/x", "--ids", "5,6,7", "--out", str(out), "--layers", "1,0", "--heads", "3,1"]) == 0
    with np.load(out) as found:
        expected = [weights_of(layer, 3)[[1, 3]] for layer in (0, 1)]
        np.testing.assert_array_equal(found["attention"], expected)
        assert (found["layers"].tolist(), found["heads"].tolist()) == ([0, 1], [1, 3])
    assert model.computed == [0, 1]


def test_ids_repeat(model, tmp_path):
    """A text may have a token twice, which a list of names would not."""
    out = tmp_path / "attention.npz"
    assert attend.main(["dist/x", "--ids", "5,5,7", "--out", str(out)]) == 0
    with np.load(out) as found:
        assert found["token_ids"].tolist() == [5, 5, 7]


def test_bertviz_takes_the_arrays(model, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    head_view = pytest.importorskip("bertviz", reason="needs bertviz").head_view
    out = tmp_path / "attention.npz"
    assert attend.main(["dist/x", "--text", "Hello", "--out", str(out)]) == 0
    with np.load(out) as found:
        attention = tuple(torch.tensor(layer)[None] for layer in found["attention"])
        page = head_view(attention, found["tokens"].tolist(), html_action="return")
    assert '"left_text": ["H", "e", "l", "l", "o"]' in page.data


@pytest.mark.parametrize("arguments", [[], ["--layers", "2", "--heads", "1"], ["--layers", "0,1"]])
def test_picture(model, tmp_path, arguments):
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib")
    out = tmp_path / "attention.PNG"
    assert attend.main(["dist/x", "--text", "a $b\n_c", "--out", str(out), *arguments]) == 0
    pixels = image.imread(out)
    assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.05


def test_the_page_is_complete_and_names_no_address(model, tmp_path):
    out = tmp_path / "attention.html"
    assert attend.main(["dist/x", "--text", "</script><b>&", "--out", str(out)]) == 0
    text = out.read_text()
    assert not re.search(r"(src|href)=|@import|url\(", text)
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "connect-src" not in text and "default-src 'none'" in text
    assert text.count("</script>") == LAYERS + 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])  # type: ignore[index]
    assert "".join(data["tokens"]) == "</script><b>&"


def test_the_page_in_a_browser(model, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")
    if not os.path.exists("/usr/bin/chromium"):
        pytest.skip("needs /usr/bin/chromium, of Debian's package chromium")
    out = tmp_path / "attention.html"
    assert attend.main(["dist/x", "--text", "</b> ab\n", "--out", str(out), "--heads", "1,2"]) == 0
    said: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda failure: said.append(str(failure)))
        page.goto(out.as_uri())
        page.wait_for_selector(".detail h3")
        names = page.eval_on_selector_all(".head", "found => found.map(each => each.ariaLabel)")
        assert names == [f"Layer {layer}, head {head}" for layer in range(LAYERS) for head in (1, 2)]
        page.click("[aria-label='Layer 2, head 2']")
        page.wait_for_selector("h3:text-is('Layer 2, head 2')")
        shares = weights_of(2, 8)[2][-1]
        tokens = ["<", "/", "b", ">", "␣", "a", "b", "↵"]
        best = np.argsort(-shares, kind="stable")[:5]
        words = [f"{tokens[index]} {100 * shares[index]:.0f} %" for index in best if shares[index] >= 0.005]
        assert page.text_content(".detail .note") == f"↵ (8 of 8) attends to {', '.join(words)}"
        assert page.locator(".lens tr").count() == LAYERS + 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        browser.close()
    assert said == []


def test_json_says_what_was_written(model, tmp_path, capsys):
    out = tmp_path / "attention.npz"
    assert attend.main(["dist/x", "--text", "ab", "--out", str(out), "--layers", "2,0", "--json"]) == 0
    said, err = capsys.readouterr()
    assert json.loads(said) == {"file": str(out), "layers": [0, 2], "heads": [*range(HEADS)], "token_ids": [97, 98]}
    assert err == "" and out.exists()


def test_unusual_tokens_and_a_long_text_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")
    if not os.path.exists("/usr/bin/chromium"):
        pytest.skip("needs /usr/bin/chromium, of Debian's package chromium")
    shown = {
        "\x00": "U+0000",
        "\x1b[": "U+001B[",
        "\u2028": "U+2028",
        "\u200f": "U+200F",
        "\u202e": "U+202E",
        "\xa0": "U+00A0",
        "\ufffd": "\ufffd",
        "": "∅",
        "\"'&": "\"'&",
        "<script>x()</script>": "<script>x()</script>",
    }
    length, last = 300, 299
    tokens = ["a"] * (length - len(shown)) + [*shown]
    weights = np.zeros((1, length, length), np.float32)
    weights[:, :, 0] = 1
    weights[:, last, 0] = 0
    weights[:, last, 151] = 1
    out = tmp_path / "x.html"
    with out.open("wb") as file:
        write_html(View('"<b>\u202e', [0] * length, tokens, [0], [0], [], [weights]), [], file)
    failures: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda failure: failures.append(str(failure)))
        page.goto(out.as_uri())
        page.wait_for_selector(".detail h3")
        found = page.eval_on_selector_all(".to span", "found => found.map(each => each.textContent)")
        assert found[-len(shown) :] == [*shown.values()]
        # Three tokens a pixel, the largest of nine weights each.
        inked = page.eval_on_selector(
            ".head canvas",
            """canvas => {
                const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                return [canvas.width, canvas.height, [...pixels.keys()].filter(i => i % 4 === 3 && pixels[i] === 255)];
            }""",
        )
        expected = [row * 100 for row in range(100)] + [99 * 100 + 50]
        assert inked == [100, 100, [4 * place + 3 for place in expected]]
        browser.close()
    assert failures == []


def test_packed_weights_are_the_triangles_in_ten_thousandths():
    import base64
    import zlib

    weights = weights_of(0, 9)
    content = np.frombuffer(zlib.decompress(base64.b64decode(packed(weights))), "<u2").reshape(HEADS, -1)
    for head in range(HEADS):
        rows = [weights[head, to, from_] for to in range(9) for from_ in range(to + 1)]
        np.testing.assert_allclose(content[head] / 10000, rows, atol=0.5001e-4)


def test_memory_is_that_of_a_layer(tmp_path):
    """12 layers of 12 heads and 512 tokens, 150 MB, are written with two layers in memory."""
    length, layer = 512, np.zeros((12, 512, 512), np.float32)
    layer[:, :, 0] = 1
    view = View(
        "x", [0] * length, ["a"] * length, [*range(12)], [*range(12)], [[[(0, 1.0)]] * length], iter([layer] * 12)
    )
    tracemalloc.start()
    with open(tmp_path / "x.npz", "wb") as file:
        write_npz(view, file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3.5 * layer.nbytes
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.getinfo("attention.npy").file_size == 12 * layer.nbytes + 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--out", "x.pdf"], "must end in .html, .png, .npz"),
        (["--text", "a", "--out", "no-such-folder/x.npz"], "no such folder"),
        (["--text", "a", "--out", "x.npz", "--layers", "3"], "there is no layer 3; the model has layers 0 to 2"),
        (["--text", "a", "--out", "x.npz", "--heads", "4"], "there is no head 4; the model has heads 0 to 3"),
        (["--text", "a" * 2000, "--out", "x.npz"], "the text has 2000 characters"),
        (["--ids", "999", "--out", "x.npz"], "the token id 999"),
        (["--ids", "1,x", "--out", "x.npz"], "'1,x' is not a list of integers such as 1,2,3"),
        (["--out", "x.npz"], "one of the arguments --text --ids is required"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(model, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert attend.main(["dist/x", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True), err
    assert [*tmp_path.iterdir()] == []


def test_a_failure_keeps_the_old_file(model, monkeypatch, tmp_path):
    out = tmp_path / "x.npz"
    out.write_text("old")

    def fail(ids: list[int], *_: Any) -> Iterator[np.ndarray]:
        yield weights_of(0, len(ids))
        raise TokenizerError("no more")

    monkeypatch.setattr(model, "attention_layers", fail)
    assert attend.main(["dist/x", "--text", "a", "--out", str(out)]) == 2
    assert out.read_text() == "old" and [*tmp_path.iterdir()] == [out]


def test_text_without_a_tokenizer_is_refused(model, tmp_path, capsys):
    model.tokenizer = None
    out = str(tmp_path / "x.npz")
    assert attend.main(["dist/x", "--text", "a", "--out", out]) == 2
    assert "has no tokenizer: give token ids, as in --ids 1,2,3" in capsys.readouterr().err
    assert attend.main(["dist/x", "--ids", "1,2", "--out", out]) == 0
    with np.load(out) as found:
        assert found["tokens"].tolist() == ["1", "2"]


def test_a_real_model_against_transformers(demo_artifact, demo_model_dir, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    out, text = tmp_path / "attention.npz", "Return the name of the file.\n"
    assert attend.main([str(demo_artifact), "--text", text, "--out", str(out), "--device", "cpu"]) == 0
    reference = transformers.GPT2LMHeadModel.from_pretrained(
        demo_model_dir, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with np.load(out) as found, torch.no_grad():
        assert "".join(found["tokens"]) == text
        result = reference(torch.tensor(found["token_ids"])[None].long(), output_attentions=True)
        expected = torch.cat(result.attentions).numpy()
        np.testing.assert_allclose(found["attention"], expected, atol=2e-5)
        shares = result.logits[0].double().softmax(-1).numpy()
        best = np.take_along_axis(shares, found["lens_ids"][-1].astype(np.int64), -1)
        np.testing.assert_allclose(found["lens_probabilities"][-1], best, atol=1e-5)
        np.testing.assert_allclose(best[:, 0], shares.max(-1), atol=1e-6)
