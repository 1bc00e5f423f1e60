"""Train the bundled demo model: a 1.5M-parameter GPT-2 on the documentation inside the Python standard library.

Every Python installation carries its own corpus: the docstrings and comments of the standard library. This script
collects that text, trains a byte-level BPE tokenizer and a small GPT-2 on it, and writes a folder in the Hugging Face
layout. It needs no network and no GPU; about half an hour on two CPU cores is enough.

    python models/train.py --out models/demo --minutes 28

Interrupted runs continue from the checkpoint in --work; a finished run is repeated only with another --seed or --work.
"""

import argparse
import ast
import io
import json
import math
import platform
import re
import sysconfig
import tempfile
import textwrap
import time
import tokenize
import zlib
from dataclasses import asdict, dataclass
from inspect import cleandoc
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

EOT = "<|endoftext|>"
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "site-packages", "dist-packages"}
LEGAL = re.compile(r"copyright|licen[sc]e|warrant|permission (to|is)|all rights reserved|-\*-|vim:|pylint|noqa", re.I)
RULE = re.compile(r"^[\W_]*$", re.M)  # a line without a letter or digit: dashes, stars, box art


# Corpus


def comment_blocks(source: str) -> list[tuple[int, str]]:
    """Comments of a file as (line, text); comments on consecutive lines at one column make one block."""
    blocks: list[tuple[int, str]] = []
    last = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start
        text = token.string.lstrip("#!:")
        if blocks and last == (row - 1, column):
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + "\n" + text)
        else:
            blocks.append((row, text))
        last = (row, column)
    return [(row, textwrap.dedent(text)) for row, text in blocks]


def docstrings(source: str) -> list[tuple[int, str]]:
    """Docstrings of a file as (line, text)."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [(node.body[0].lineno, cleandoc(text)) for node in nodes if (text := ast.get_docstring(node, clean=False))]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English: no doctest, no code, no table, no legal banner."""
    words = re.findall(r"[a-z]{2,}", paragraph)
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    lower = sum(c.islower() or c.isspace() for c in paragraph)
    if len(words) < 3 or letters < 0.8 * len(paragraph) or lower < 0.6 * len(paragraph):
        return False
    return paragraph.isascii() and ">>> " not in paragraph and not LEGAL.search(paragraph)


def clean(text: str) -> str:
    """Return the prose paragraphs of one docstring or comment block; may be empty."""
    text = RULE.sub("", text.expandtabs())
    paragraphs = ("\n".join(line.rstrip() for line in p.splitlines()) for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p.strip("\n") for p in paragraphs if is_prose(p)).strip()


def collect() -> tuple[list[str], list[str]]:
    """Training and validation documents, one per standard-library file, in the order of the paths.

    A passage that occurs in several files stays only in the first, so no validation passage is also trained on.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, validation, seen = [], [], set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts):
            continue
        with tokenize.open(path) as file:
            source = file.read()
        passages = []
        for _, text in sorted(docstrings(source) + comment_blocks(source)):
            passage = clean(text)
            if len(passage) >= 24 and passage not in seen:
                seen.add(passage)
                passages.append(passage)
        if passages:
            # The split depends only on the path: a changed file never moves between the two sides.
            held_out = zlib.crc32(name.as_posix().encode()) % 20 == 0
            (validation if held_out else train).append("\n\n".join(passages) + "\n")
    return train, validation


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """GPT-2's byte-level BPE with a smaller vocabulary; decode(encode(text)) == text for every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """One int64 stream: every document preceded by <|endoftext|>, so that the model also learns how texts begin."""
    end = tokenizer.token_to_id(EOT)
    return torch.tensor([i for e in tokenizer.encode_batch(documents) for i in (end, *e.ids)] + [end])


# Model. T: tokens, C: n_embd, H: heads, D: head_dim, V: vocabulary


@dataclass(frozen=True)
class Config:
    vocab_size: int = 2048
    n_positions: int = 256
    n_embd: int = 128
    n_head: int = 2
    n_layer: int = 6
    layer_norm_epsilon: float = 1e-5


class Block(nn.Module):
    """Pre-norm transformer block; the names of the submodules are those of the Hugging Face checkpoint."""

    def __init__(self, config: Config, dropout: float) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C, config.layer_norm_epsilon)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.ln_2 = nn.LayerNorm(C, config.layer_norm_epsilon)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.drop(self.attn["c_proj"](y))
        y = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")  # gelu_new
        return x + self.drop(self.mlp["c_proj"](y))


class GPT2(nn.Module):
    def __init__(self, config: Config, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # as in GPT-2: the layers that write to the residual stream start smaller
                residual = "c_proj" in name
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64 -> logits (B, T, V); the head is the token embedding."""
        x = self.drop(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]])
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


@torch.no_grad()
def evaluate(model: GPT2, stream: Tensor, length: int) -> float:
    """Mean loss in nats per token over consecutive windows of `length` tokens, without the incomplete last one."""
    model.eval()
    count = (len(stream) - 1) // length
    inputs, targets = stream[: count * length], stream[1 : count * length + 1]
    total = 0.0
    for x, y in zip(inputs.view(count, length).split(32), targets.view(count, length).split(32), strict=True):
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    return total / targets.numel()


# Training


def train(args: argparse.Namespace, config: Config, stream: Tensor, held_out: Tensor) -> dict:
    """Train until --steps or --minutes; returns the state of the run with the best weights in state["best"]."""
    torch.manual_seed(args.seed)
    model = GPT2(config, args.dropout)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    state = {"step": 0, "seconds": 0.0, "curve": [], "best_loss": math.inf, "best": None}

    checkpoint = args.work / f"checkpoint-{args.seed}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=1.0)
        start = time.perf_counter() - state["seconds"]
        running = state["curve"][-1][1] if state["curve"] else math.log(config.vocab_size)
        done = state["step"] >= args.steps or state["seconds"] >= 60 * args.minutes
        while not done:
            # Whichever limit is nearer drives the schedule, so that the rate always reaches its floor.
            step, seconds = state["step"], time.perf_counter() - start
            fraction = min(1.0, max(step / args.steps, seconds / (60 * args.minutes)))
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * cosine * min(1.0, (step + 1) / 200)

            # A generator per step makes a resumed run see the same windows as an uninterrupted one.
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            starts = torch.randint(len(stream) - config.n_positions, (args.batch, 1), generator=generator)
            window = stream[starts + torch.arange(config.n_positions + 1)]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(window[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running += 0.02 * (loss.item() - running)
            state["step"] += 1
            done = fraction >= 1.0 or state["step"] >= args.steps

            bar.update(task, completed=fraction)
            if done or state["step"] % 250 == 0:
                validation = evaluate(model, held_out, config.n_positions)
                state["curve"].append((state["step"], running, validation))
                if validation < state["best_loss"]:
                    best = {k: v.clone() for k, v in model.state_dict().items()}
                    state |= {"best_loss": validation, "best": best, "best_step": state["step"]}
                state["seconds"] = time.perf_counter() - start
                temporary = checkpoint.with_suffix(".tmp")
                torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
                temporary.replace(checkpoint)
                rate = state["step"] * args.batch * config.n_positions / state["seconds"]
                line = f"step {state['step']}: training {running:.3f}, validation {validation:.3f}, {rate:.0f} tokens/s"
                bar.update(task, description=line)
                bar.console.print(line)
    return state


# Export

CARD = """# Demo model

A GPT-2 of {millions:.2f} million parameters, trained from random weights on the docstrings and comments of the Python
{python} standard library, so that the compiler, its tests and its demo have a real trained model without a download.
It writes text with the look of Python documentation; what it says is not true. It is meant for nothing else.

| | |
|---|---|
| shape | {n_layer} layers, {n_head} heads, n_embd {n_embd}, {n_positions} positions, byte-level BPE of {vocab_size} |
| training text | {training_files} files, {training_characters:,} characters, {training_tokens:,} tokens |
| validation text | {validation_files} other files, {validation_characters:,} characters, {validation_tokens:,} tokens |
| training | {steps:,} steps, {tokens_seen:,} tokens, {minutes:.1f} minutes on {threads} CPU threads |
| loss, nats per token | training {training_loss:.3f}, validation {validation_loss:.3f} |
| validation | perplexity {perplexity:.1f}, {bits_per_byte:.3f} bits per byte |
| loss on `validation.txt` | {excerpt_loss:.3f} nats per token |

Losses are of the stored float16 weights, computed in float32 over consecutive windows of {n_positions} tokens.
`validation.txt` is the beginning of every validation document, joined by `<|endoftext|>`. A passage that several files
share word for word was kept once, so no validation passage was trained on; near-duplicates may have been.

`make demo` compiles it and prints a continuation of "Return the".

Made by the command below, with the standard library of the Python that runs it: another version gives another model.
Under `--minutes` the number of steps, hence the weights, also depends on the speed of the machine.

```sh
{command}
```

Licence: the training text, of which `validation.txt` is a part, comes from CPython: Copyright (c) Python Software
Foundation, PSF License Agreement (https://docs.python.org/3/license.html), which permits redistribution.
"""


def hugging_face_weights(best: dict[str, Tensor]) -> dict[str, Tensor]:
    """float16 weights under the names of transformers, whose Conv1D stores (in, out) where nn.Linear has (out, in)."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {
        f"transformer.{name}": (weight.T if name.endswith(linear) else weight).half().contiguous()
        for name, weight in best.items()
    }


def excerpt(document: str, length: int = 5_000) -> str:
    """The whole passages within the first `length` characters, so that no single file dominates validation.txt."""
    return document if len(document) <= length else document[: document.rindex("\n\n", 0, length)] + "\n"


def save(path: Path, content: str | dict) -> None:
    """Write text or JSON under a temporary name first, so that a reader never sees half a file."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)


def export(args: argparse.Namespace, config: Config, tokenizer: Tokenizer, state: dict, texts: dict) -> None:
    """Write the model folder. `texts`: name -> (documents, token stream) of the training and validation sides."""
    weights = state["best"]
    model = GPT2(config)
    model.load_state_dict({name: weight.half().float() for name, weight in weights.items()})
    end = tokenizer.token_to_id(EOT)
    excerpts = [excerpt(document) for document in texts["validation"][0]]

    record = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    for name, (documents, stream) in texts.items():
        record[f"{name}_files"] = len(documents)
        record[f"{name}_characters"] = sum(map(len, documents))  # all ASCII, so also the number of bytes
        record[f"{name}_tokens"] = len(stream)
        record[f"{name}_loss"] = evaluate(model, stream, config.n_positions)
    # Includes the nats of predicting <|endoftext|>, although it has no bytes in the text.
    nats = record["validation_loss"] * (record["validation_tokens"] - 1)
    record |= {
        "perplexity": math.exp(record["validation_loss"]),
        "bits_per_byte": nats / math.log(2) / record["validation_characters"],
        "excerpt_loss": evaluate(model, encode(tokenizer, excerpts), config.n_positions),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": state["seconds"] / 60,
        "steps": state["best_step"],
        "tokens_seen": state["best_step"] * args.batch * config.n_positions,
    }
    record |= {key: getattr(args, key) for key in ("seed", "batch", "lr", "dropout", "weight_decay", "threads")}
    command = f"python models/train.py --minutes {args.minutes:g} --seed {args.seed} --threads {args.threads}"
    card = CARD.format(**record, **asdict(config), millions=record["parameters"] / 1e6, command=command)

    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    gpt2 |= {"bos_token_id": end, "eos_token_id": end, "tie_word_embeddings": True, "torch_dtype": "float16"}
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
    temporary = args.out / "model.safetensors.tmp"
    save_file(hugging_face_weights(weights), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # save_file makes it private
    temporary.replace(args.out / "model.safetensors")
    save(args.out / "config.json", gpt2 | asdict(config) | {"n_ctx": config.n_positions})
    save(args.out / "tokenizer.json", tokenizer.to_str())
    save(args.out / "tokenizer_config.json", fast | {"model_max_length": config.n_positions})
    save(args.out / "validation.txt", EOT.join(excerpts))
    curve = [dict(zip(("step", "training", "validation"), point, strict=True)) for point in state["curve"]]
    save(args.out / "training.json", record | {"curve": curve})
    save(args.out / "README.md", card)
    print(card)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    here, cache = Path(__file__).parent, Path(tempfile.gettempdir()) / "tvm-attn-train"
    parser.add_argument("--out", type=Path, default=here / "demo", help="folder for the model")
    parser.add_argument("--work", type=Path, default=cache, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=28.0, help="stop after this time")
    parser.add_argument("--steps", type=int, default=20_000, help="stop after this many steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches")
    parser.add_argument("--batch", type=int, default=16, help="windows of n_positions tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.1, help="on embeddings and residuals, not on attention")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices and embeddings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)

    config = Config()
    training, validation = collect()
    tokenizer = train_tokenizer(training, config.vocab_size)
    texts = {
        "training": (training, encode(tokenizer, training)),
        "validation": (validation, encode(tokenizer, validation)),
    }
    for name, (documents, stream) in texts.items():
        print(f"{name}: {len(documents)} files, {sum(map(len, documents)):,} characters, {len(stream):,} tokens")
    state = train(args, config, texts["training"][1], texts["validation"][1])
    export(args, config, tokenizer, state, texts)


if __name__ == "__main__":
    main()
