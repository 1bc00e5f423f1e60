"""The bounds of the verification, against float64 runs of transformers' model; and that it finds what is wrong."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import GPT2Config as HuggingFaceConfig
from transformers import GPT2LMHeadModel

import tvm_attn
from tests.runtime.engines import row_logprobs
from tvm_attn.compiler.verification import BOUNDS, VERIFY_BATCH, Bounds, Check, Report, prompt_lengths, verify
from tvm_attn.config import PRESETS, GPT2Config
from tvm_attn.errors import GenerationError, VerificationError
from tvm_attn.model.checkpoint import cast_params, open_checkpoint, random_params
from tvm_attn.model.reference import Reference, RoundedReference
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.engine import CompiledEngine
from tvm_attn.runtime.logprobs import RowLogprobs

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# --- the bounds ---

TOKENS = 256
LOOSEST = 100
"""No bound may be further than this factor above the error that it allows for."""


@dataclass(frozen=True)
class Errors:
    """The worst row's NMSE, and its largest difference over its root mean square: a check may see one row only."""

    nmse: float
    max_abs: float

    @staticmethod
    def between(actual: np.ndarray, exact: np.ndarray) -> "Errors":
        difference, power = actual - exact, np.square(exact).mean(-1)
        nmse = np.square(difference).mean(-1) / power
        return Errors(float(nmse.max()), float((np.abs(difference).max(-1) / np.sqrt(power)).max()))

    def within(self, bounds: Bounds) -> bool:
        return self.nmse <= bounds.nmse and self.max_abs <= bounds.max_abs

    def justifies(self, bounds: Bounds) -> bool:
        return bounds.nmse <= LOOSEST * self.nmse and bounds.max_abs <= LOOSEST * self.max_abs


Rounding = Callable[[torch.Tensor], torch.Tensor]


def to_float16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float16).double()


def to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).double()


def to_int8(values: torch.Tensor) -> torch.Tensor:
    """Symmetric, 32 neighbours to a scale."""
    return _to_int8(values, 32)


def to_int8_rows(values: torch.Tensor) -> torch.Tensor:
    """Symmetric, a scale for each head; those of both models below have 64 dimensions."""
    return _to_int8(values, 64)


def _to_int8(values: torch.Tensor, count: int) -> torch.Tensor:
    groups = values.unflatten(-1, (-1, count))
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / scales).round() * scales).flatten(-2)


class Float64Model:
    """transformers' model in float64, in which chosen values can be rounded to a storage dtype."""

    def __init__(self, config: GPT2Config, params: dict[str, np.ndarray]) -> None:
        values: dict[str, Any] = {**config.to_dict(), "attn_implementation": "eager"}
        self.model = GPT2LMHeadModel(HuggingFaceConfig(**values)).double().eval()
        state = {f"transformer.{name}": torch.from_numpy(array.astype(np.float64)) for name, array in params.items()}
        self.model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})

    def logits(
        self, ids: np.ndarray, keys_and_values: Rounding | None = None, inputs: Rounding | None = None
    ) -> np.ndarray:
        """(T, V) of ids (T,); `inputs` are those of the linear layers and of the head."""
        hooks = []
        if keys_and_values:

            def round_keys_and_values(_layer: Any, _inputs: Any, qkv: torch.Tensor) -> torch.Tensor:
                q, kv = qkv.tensor_split([qkv.shape[-1] // 3], dim=-1)
                return torch.cat([q, keys_and_values(kv)], dim=-1)

            hooks += [b.attn.c_attn.register_forward_hook(round_keys_and_values) for b in self.model.transformer.h]
        if inputs:

            def round_inputs(_layer: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                return (inputs(arguments[0]),)

            linear = [b.get_submodule(n) for b in self.model.transformer.h for n in ("attn.c_attn", "attn.c_proj")]
            linear += [b.get_submodule(n) for b in self.model.transformer.h for n in ("mlp.c_fc", "mlp.c_proj")]
            hooks += [layer.register_forward_pre_hook(round_inputs) for layer in [*linear, self.model.lm_head]]
        with torch.inference_mode():
            logits: np.ndarray = self.model(torch.from_numpy(ids[None])).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        return logits


def random_wide() -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """Two layers of the 124M model, with a smaller vocabulary."""
    config = replace(PRESETS["gpt2"], n_layer=2, vocab_size=3000, n_positions=TOKENS)
    return config, dict(random_params(config))


@pytest.fixture(scope="module", params=["demo", "two layers of 124M"])
def model(request: pytest.FixtureRequest, demo_model_dir: Path) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    if request.param != "demo":
        return random_wide()
    checkpoint = open_checkpoint(demo_model_dir)
    return checkpoint.config, dict(checkpoint.params())


# What is rounded by design, by the name of the bounds: keys and values, and the inputs of linear layers. bfloat16 has
# two lines, since only some processors have a bfloat16 dot product.
ROUNDED: list[tuple[str, Rounding | None, Rounding | None]] = [
    ("float16", to_float16, None),
    ("bfloat16", to_bfloat16, None),
    ("bfloat16", to_bfloat16, to_bfloat16),
    ("int8 cache", to_int8_rows, None),
    ("int8", None, to_int8),
    ("int4", None, to_int8),
]


def test_every_bound_is_justified_here() -> None:
    assert set(BOUNDS) == {"float32"} | {name for name, _, _ in ROUNDED}


def test_bounds_of_float32_fit_the_reference(model: tuple[GPT2Config, dict[str, np.ndarray]]) -> None:
    """Another order of sums in float32 may be as far away as PyTorch's is from float64."""
    config, params = model
    ids = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS)
    exact = Float64Model(config, params).logits(ids)
    own = Errors.between(Reference(config, dict(cast_params(params.items(), "float32"))).logits(ids[None])[0], exact)
    assert own.within(BOUNDS["float32"])
    assert own.justifies(BOUNDS["float32"])


def test_bounds_fit_the_rounding(model: tuple[GPT2Config, dict[str, np.ndarray]]) -> None:
    """Wide enough for what is rounded by design, and no wider than that asks for."""
    config, params = model
    ids = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS)
    float64 = Float64Model(config, params)
    exact = float64.logits(ids)
    for name, keys_and_values, inputs in ROUNDED:
        errors = Errors.between(float64.logits(ids, keys_and_values, inputs), exact)
        assert errors.within(BOUNDS[name]), name
        assert errors.justifies(BOUNDS[name]), name


def test_a_coarser_storage_dtype_is_out_of_bounds(demo_model_dir: Path) -> None:
    """float32's bounds would not pass float16's keys and values, nor float16's bounds the roundings of bfloat16."""
    checkpoint = open_checkpoint(demo_model_dir)
    float64 = Float64Model(checkpoint.config, dict(checkpoint.params()))
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, TOKENS)
    exact = float64.logits(ids)
    assert not Errors.between(float64.logits(ids, to_float16), exact).within(BOUNDS["float32"])
    assert not Errors.between(float64.logits(ids, to_bfloat16, to_bfloat16), exact).within(BOUNDS["float16"])


# --- the checks ---


@pytest.fixture(scope="module")
def engine(demo_artifact: Path) -> CompiledEngine:
    return tvm_attn.load(demo_artifact, max_batch=VERIFY_BATCH).engine


class Altered:
    """An engine that passes everything on; the tests below override one thing of it."""

    def __init__(self, engine: CompiledEngine) -> None:
        self.engine = engine
        self.config, self.max_batch, self.library = engine.config, engine.max_batch, engine.library

    def prefill(self, prompts: Any, slots: Any, starts: Any = None) -> Any:
        return self.engine.prefill(prompts, slots, starts)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.engine.copy_prefix(source, target, length)

    def decode(self, token_ids: Any, slots: Any, positions: Any) -> Any:
        return self.engine.decode(token_ids, slots, positions)

    def logits(self, prompts: Any, slots: Any) -> Any:
        return self.engine.logits(prompts, slots)


class GivenLogits:
    def __init__(self, rows: np.ndarray, ids: np.ndarray | None = None) -> None:
        self.rows, self.ids = rows, rows.argmax(-1).astype(np.int32) if ids is None else ids

    def numpy(self) -> np.ndarray:
        return self.rows

    def argmax(self) -> np.ndarray:
        return self.ids

    def logprobs(self, token_ids: np.ndarray, count: int) -> RowLogprobs:
        return row_logprobs(self.rows, token_ids, count)


def failed(report: Report) -> set[str]:
    return {check.function for check in report.checks if not check.passed}


def run(demo_artifact: Path, engine: Any) -> Report:
    return verify(Artifact(demo_artifact), engine)


def test_right_library_passes(demo_artifact: Path, engine: CompiledEngine) -> None:
    told: list[str] = []
    report = verify(Artifact(demo_artifact), engine, told.append)
    report.raise_if_failed("lib")
    assert report.bounds == BOUNDS["float32"]
    assert 0 < report.reference_nmse < 1e-12
    assert {check.function for check in report.checks} == {"logits", "prefill", "decode_one", "decode"}
    assert all(check.top1 == 1.0 for check in report.checks)
    # Every function at one token, at an odd length and at the whole context or next to it, alone and in a batch.
    cases = {(check.function, check.case) for check in report.checks}
    for function in ("logits", "prefill"):
        assert {(function, f"{length} tokens") for length in (1, 7, 255, 256)} <= cases
    assert ("decode_one", "255 cached, 1 more") in cases
    assert any(function == "prefill" and case.startswith("ragged") for function, case in cases)
    assert any(function == "decode" and case.startswith("ragged") for function, case in cases)
    assert len(told) == 2 + len(report.checks)
    assert json.loads(json.dumps(report.to_dict()))["checks"][0]["passed"] is True


@pytest.mark.parametrize(
    "name", ["wpe.weight", "h.0.ln_1.bias", "h.3.attn.c_attn.bias", "h.5.mlp.c_proj.weight", "ln_f.weight"]
)
def test_scaled_parameter_is_found(
    name: str, demo_artifact: Path, engine: CompiledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library has one parameter that is 0.1 % off."""
    artifact = Artifact(demo_artifact)
    read = artifact.parameters.read

    def scaled(asked: str) -> np.ndarray:
        return read(asked) * np.float32(1.001) if asked == name else read(asked)

    monkeypatch.setattr(artifact.parameters, "read", scaled)
    report = verify(artifact, engine)
    assert failed(report) == {"logits", "prefill", "decode_one", "decode"}
    with pytest.raises(
        VerificationError, match=r"^lib\.so disagrees with PyTorch in \d+ of 18 checks; worst: "
    ) as error:
        report.raise_if_failed("lib.so")
    assert len(str(error.value).splitlines()) == 1


def test_wrong_position_in_decode_is_found(demo_artifact: Path, engine: CompiledEngine) -> None:
    class Late(Altered):
        def decode(self, token_ids: Any, slots: Any, positions: Any) -> Any:
            return self.engine.decode(token_ids, slots, positions - 1)

    assert failed(run(demo_artifact, Late(engine))) == {"decode_one", "decode"}


def test_a_part_in_a_wrong_place_is_found(demo_artifact: Path, engine: CompiledEngine) -> None:
    class Early(Altered):
        def prefill(self, prompts: Any, slots: Any, starts: Any = None) -> Any:
            return self.engine.prefill(prompts, slots, [max(start - 1, 0) for start in starts or [0] * len(slots)])

    class Short(Altered):
        def copy_prefix(self, source: int, target: int, length: int) -> None:
            self.engine.copy_prefix(source, target, length - 1)

    for altered in (Early(engine), Short(engine)):
        engine.prefill([np.full(256, 5, np.int32)], [1])
        report = run(demo_artifact, altered)
        (wrong,) = [check for check in report.checks if not check.passed]
        assert wrong.case == "256 tokens in parts, the first copied"


def test_mixed_up_slots_are_found(demo_artifact: Path, engine: CompiledEngine) -> None:
    """Nothing but a batch of several can show it."""

    class Mixed(Altered):
        def decode(self, token_ids: Any, slots: Any, positions: Any) -> Any:
            return self.engine.decode(token_ids, slots[::-1].copy(), positions)

    assert failed(run(demo_artifact, Mixed(engine))) == {"decode"}


def test_one_wrong_logit_is_found(demo_artifact: Path, engine: CompiledEngine) -> None:
    class Off(Altered):
        def logits(self, prompts: Any, slots: Any) -> Any:
            rows = [row.copy() for row in self.engine.logits(prompts, slots)]
            rows[0][-1, 1234] += 1e-3
            return rows

    report = run(demo_artifact, Off(engine))
    assert failed(report) == {"logits"}
    assert all(check.max_abs == pytest.approx(1e-3, rel=0.1) for check in report.checks if not check.passed)


def test_nan_is_found(demo_artifact: Path, engine: CompiledEngine) -> None:
    class Undefined(Altered):
        def prefill(self, prompts: Any, slots: Any, starts: Any = None) -> Any:
            logits = self.engine.prefill(prompts, slots, starts).numpy().copy()
            logits[-1, 5] = np.nan
            return GivenLogits(logits)

    report = run(demo_artifact, Undefined(engine))
    assert failed(report) == {"prefill"}
    with pytest.raises(VerificationError, match="NMSE nan"):
        report.raise_if_failed("lib.so")


def test_wrong_argmax_is_found(demo_artifact: Path, engine: CompiledEngine) -> None:
    class Second(Altered):
        def prefill(self, prompts: Any, slots: Any, starts: Any = None) -> Any:
            logits = self.engine.prefill(prompts, slots, starts).numpy()
            return GivenLogits(logits, logits.argsort(-1)[:, -2].astype(np.int32))

    with pytest.raises(VerificationError, match="argmax"):
        run(demo_artifact, Second(engine))


def test_wrong_log_probabilities_are_found(demo_artifact: Path, engine: CompiledEngine) -> None:
    class Shifted(GivenLogits):
        def logprobs(self, token_ids: np.ndarray, count: int) -> RowLogprobs:
            found = super().logprobs(token_ids, count)
            return replace(found, chosen=found.chosen + 1e-3)

    class Swapped(GivenLogits):
        def logprobs(self, token_ids: np.ndarray, count: int) -> RowLogprobs:
            found = super().logprobs(token_ids, count)
            return replace(found, ids=found.ids[:, ::-1])

    for wrong in (Shifted, Swapped):

        class Wrong(Altered):
            given = wrong

            def prefill(self, prompts: Any, slots: Any, starts: Any = None) -> Any:
                return self.given(self.engine.prefill(prompts, slots, starts).numpy())

        with pytest.raises(VerificationError, match="log-probabilities are not those"):
            run(demo_artifact, Wrong(engine))


def test_one_slot_is_enough(demo_artifact: Path) -> None:
    report = run(demo_artifact, tvm_attn.load(demo_artifact, max_batch=1).engine)
    assert not failed(report)
    assert {check.function for check in report.checks} == {"logits", "prefill", "decode_one"}


# --- what is no fault of the library ---

SMALL = GPT2Config(vocab_size=300, n_positions=40, n_embd=64, n_layer=2, n_head=2, eos_token_id=None)


def build_with(changes: dict[str, float], folder: Path, **options: Any) -> None:
    """Builds a random model with biases of one value, or weights that are multiplied, all or every 32nd channel."""
    params = dict(random_params(SMALL))
    for name, value in changes.items():
        if name.endswith("/32"):
            params[name.removesuffix("/32")][..., ::32] *= np.float32(value)
        elif name.endswith(".weight"):
            params[name] = params[name] * np.float32(value)
        else:
            params["h.1.attn.c_attn.bias"][{"q": 0, "k": 64, "v": 128}[name] :][:64] = value
    (folder / "model").mkdir()
    save_file(params, folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(SMALL.to_dict()))
    tvm_attn.build(folder / "model", target="cpu", out=folder / "out", **options)


ENDS = "and float16 ends at 65504: build it with --dtype"
OVERFLOWS = [
    ({"k": 1e5}, "float16", rf"the keys of h\.1 reach 1e\+05, {ENDS} bfloat16"),
    ({"h.1.attn.c_attn.weight": 5e5}, "float16", rf"the (keys|values) of h\.1 reach .*, {ENDS} \w+"),
    ({"h.1.attn.c_attn.weight": 300.0}, "bfloat16", r"bfloat16 is too coarse for this model: .* --dtype float32"),
]


@pytest.mark.parametrize(("changes", "dtype", "message"), OVERFLOWS)
def test_a_format_that_does_not_hold_the_model(
    changes: dict[str, float], dtype: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match=rf"disagrees with PyTorch in .*; {message}$") as error:
        build_with(changes, tmp_path, dtype=dtype)
    assert "bug" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_activations_that_8_bits_do_not_hold(tmp_path: Path) -> None:
    """Channels that nothing reads take the whole range of a scale."""
    with pytest.raises(VerificationError, match=r"int8 is too coarse for this model's activations: .* --quant$"):
        build_with({"ln_f.weight/32": 1000.0, "wte.weight/32": 0.0}, tmp_path, quant="int8")


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    build_with({"v": 1e5}, tmp_path, dtype="float16", verify=False)
    model = tvm_attn.load(tmp_path / "out")
    for call in (
        lambda: model.logits([[1, 2, 3]]),
        lambda: model.generate([1, 2, 3]),
        lambda: model.generate([[1, 2, 3], [4]], temperature=1.0, seed=0),
        lambda: list(model.stream_ids([1, 2, 3], top_k=5)),
    ):
        with pytest.raises(GenerationError, match=r"not numbers.*--dtype bfloat16 or float32"):
            call()


def test_weights_that_overflow_float32(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"PyTorch's float32 logits are not finite either"):
        build_with({"wte.weight": 1e30, "h.0.mlp.c_fc.weight": 1e38, "h.0.mlp.c_proj.weight": 1e38}, tmp_path)


def test_a_fault_of_the_library_is_called_that(demo_artifact: Path, engine: CompiledEngine) -> None:
    class Off(Altered):
        def logits(self, prompts: Any, slots: Any) -> Any:
            return [row * np.float32(1.01) for row in self.engine.logits(prompts, slots)]

    report = run(demo_artifact, Off(engine))
    assert report.cause is None
    with pytest.raises(VerificationError, match="this is a bug in tvm_attn or TVM, please report it"):
        report.raise_if_failed("lib.so")


@pytest.mark.parametrize("inputs", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("cache", ["float32", "float16", "bfloat16"])
def test_the_rounded_reference(cache: str, inputs: str, model: tuple[GPT2Config, dict[str, np.ndarray]]) -> None:
    """Against transformers' model with the same roundings, both in float64."""
    config, params = model
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 64)
    rounding: dict[str, Rounding | None] = {
        "float32": lambda values: values.float().double(),
        "float16": to_float16,
        "bfloat16": to_bfloat16,
        "int8": to_int8,
    }
    exact = Float64Model(config, params)
    expected = exact.logits(ids, rounding[cache], rounding[inputs])
    reference = RoundedReference(config, params, "float64", cache=cache, inputs=inputs)
    found, distance = reference.logits(ids[None])[0], expected - exact.logits(ids)
    assert reference.overflow is None
    # Sums in another order may round to the neighbour here and there.
    assert np.square(found - expected).sum() < 0.05 * np.square(distance).sum() + 1e-20 * np.square(expected).sum()


@pytest.mark.parametrize(
    ("context", "lengths"),
    [(1, [1]), (2, [1, 2]), (7, [1, 6, 7]), (8, [1, 7, 8]), (65, [1, 7, 64, 65]), (1024, [1, 7, 64, 1023, 1024])],
)
def test_prompt_lengths(context: int, lengths: list[int]) -> None:
    assert prompt_lengths(context) == lengths


def _check(nmse: float, passed: bool) -> Check:
    return Check("prefill", f"case {nmse}", 1.0, 1.0, nmse, 1.0, passed)


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ([_check(0.1, False), _check(0.5, False), _check(0.9, True)], "2 of 3 checks; worst: prefill, case 0.5"),
        ([_check(0.5, False), _check(float("nan"), False)], "2 of 2 checks; worst: prefill, case nan"),
    ],
)
def test_the_worst_check_is_named(checks: list[Check], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        Report(tuple(checks), BOUNDS["float32"], 0.0).raise_if_failed("lib.so")
