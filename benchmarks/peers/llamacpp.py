"""llama.cpp through llama-cpp-python's C binding, on a GGUF file written from the weights."""

# mypy: disable-error-code="import-not-found, import-untyped"
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.server import serve
from benchmarks.peers.weights import Weights
from tvm_attn.benchmark.system import CachedSystem, Float32Array, Int32Array

_GGML_FLOAT32, _GGML_FLOAT16 = 0, 1


class LlamaCppSystem(CachedSystem):
    """A llama.cpp context over the given weights, with one sequence of the cache per row of a batch."""

    def __init__(self, weights: Weights, precision: str, threads: int, scratch: Path) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self.name, self.version, self.precision = "llama-cpp-python", llama_cpp.__version__, precision
        self.vocabulary, self._positions = weights.config.vocab_size, weights.config.n_positions
        self._threads = threads
        path = scratch / "model.gguf"
        write_gguf(weights, precision, path)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the GGUF file")
        self._context: Any = None
        self._sequences = 0

    def _reserve(self, sequences: int) -> None:
        """Makes a context with a full cache for each sequence."""
        if sequences == self._sequences:
            return
        lib = self._lib
        if self._context:
            lib.llama_free(self._context)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = self._positions * sequences, sequences
        parameters.n_batch = parameters.n_ubatch = max(self._positions, sequences)
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = _GGML_FLOAT32 if self.precision == "float32" else _GGML_FLOAT16
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(parameters.n_batch, 0, 1)
        self._sequences = sequences

    def prefill(self, prompts: Int32Array) -> Float32Array:
        """See `CachedSystem.prefill`; one call of llama.cpp per prompt."""
        self._reserve(len(prompts))
        self._lib.llama_memory_clear(self._memory, False)
        positions = np.arange(prompts.shape[1])
        return np.concatenate([self._run(row, positions, np.full(len(row), i)) for i, row in enumerate(prompts)])

    def decode(self, token_ids: Int32Array, context: int) -> Float32Array:
        """See `CachedSystem.decode`."""
        sequences = np.arange(len(token_ids))
        return self._run(token_ids, np.full(len(token_ids), context), sequences)

    def _run(self, token_ids: Int32Array, positions: np.ndarray, sequences: np.ndarray) -> Float32Array:
        """Logits (n, V) of the last token of each of n sequences."""
        count, batch = len(token_ids), self._batch
        last = np.append(np.diff(sequences) != 0, True)
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.token, (count,))[:] = token_ids
        np.ctypeslib.as_array(batch.pos, (count,))[:] = positions
        np.ctypeslib.as_array(batch.n_seq_id, (count,))[:] = 1
        np.ctypeslib.as_array(batch.logits, (count,))[:] = last
        for index, sequence in enumerate(sequences.tolist()):
            batch.seq_id[index][0] = sequence
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = [self._lib.llama_get_logits_ith(self._context, int(index)) for index in np.flatnonzero(last)]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])

    def numpy(self, logits: Float32Array) -> Float32Array:
        """See `CachedSystem.numpy`."""
        return logits

    def rewind(self, context: int) -> None:
        """See `CachedSystem.rewind`."""
        for sequence in range(self._sequences):
            self._lib.llama_memory_seq_rm(self._memory, sequence, context, -1)


def write_gguf(weights: Weights, precision: str, path: Path, tokenizer: str | None = None) -> None:
    """Writes the weights as a GGUF file, with the GPT-2 tokenizer of a tokenizer.json if its text is given."""
    import gguf

    config = weights.config
    if config.activation_function != "gelu_new":
        raise ValueError(f"llama.cpp's GPT-2 has gelu_new, the model {config.activation_function}")
    kind = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "q4_0": gguf.GGMLQuantizationType.Q4_0,
    }[precision]
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, json.loads(tokenizer), config.vocab_size, config.eos_token_ids)

    def add(name: str, array: np.ndarray, matrix: bool) -> None:
        array = np.ascontiguousarray(array)
        if matrix:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)

    def part(target: str, name: str) -> None:
        weight = weights.read(f"{name}.weight")
        # Linear layers are (in, out) here and (out, in) there.
        add(f"{target}.weight", weight.T, True) if weight.ndim == 2 else add(f"{target}.weight", weight, False)
        add(f"{target}.bias", weights.read(f"{name}.bias"), False)

    add("token_embd.weight", weights.read("wte.weight"), True)
    add("position_embd.weight", weights.read("wpe.weight"), False)
    part("output_norm", "ln_f")
    if not config.tie_word_embeddings:
        add("output.weight", weights.read("lm_head.weight"), True)
    for layer in range(config.n_layer):
        for target, name in (
            ("attn_norm", "ln_1"),
            ("attn_qkv", "attn.c_attn"),
            ("attn_output", "attn.c_proj"),
            ("ffn_norm", "ln_2"),
            ("ffn_up", "mlp.c_fc"),
            ("ffn_down", "mlp.c_proj"),
        ):
            part(f"blk.{layer}.{target}", f"h.{layer}.{name}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, description: dict[str, Any], size: int, ends: tuple[int, ...]) -> None:
    import gguf

    model, kinds = description["model"], gguf.TokenType
    tokens = {token_id: (token, kinds.NORMAL) for token, token_id in model["vocab"].items()}
    tokens |= {token["id"]: (token["content"], kinds.CONTROL) for token in description["added_tokens"]}
    rows = [tokens.get(token_id, (f"[unused{token_id}]", kinds.UNUSED)) for token_id in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in model["merges"]])
    writer.add_add_bos_token(False)
    if ends:
        writer.add_bos_token_id(ends[0])
        writer.add_eos_token_id(ends[0])


if __name__ == "__main__":
    serve("llamacpp", LlamaCppSystem)
