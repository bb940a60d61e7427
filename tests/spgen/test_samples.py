"""Data for slots: random ones fit their role and follow the seed, files are read as data."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import spgen as sp
from spgen.data import check_data
from spgen.errors import DataError, PatternError, ToolchainError
from spgen.ir.pattern import read_short, slots
from spgen.samples import Sizes, load_data, random_data

PATTERNS = [
    "block(16, mask=$0: bool[R, C])",
    "block(16, 8, mask=$0: uint8[B, 8, R, C])",
    "block(16, indices=$0: int32[2, R, C])",
    "block(16, indices=$0: int64[1, 2, R, 3])",
    "block(16, indices=$0: int32[B, 2, NNZ], indptr=$1: int64[B, 2, P])",
    "columns($0: int32[8, K])",
    "columns($0: int32[500])",
    "diagonals($0: int64[B, 8, K])",
    "diagonals($0: int32[500])",
    "vertical_slash(columns=$0: int32[K], offsets=$1: int32[8, K])",
    "top_k($0: int32[8, R, K], rows=2, cols=16)",
    "top_k($0: int32[R, 4])",
    "n_of_m(2, 4, mask=$0: bool[8, R, C])",
    "documents($0: int32[N])",
    "documents($0: int64[4])",
    "documents($0: int64[400])",
    "permuted(causal(), q=$0: int64[N], k=$1: int32[8, N])",
    "causal() & columns($1: int32[K]) | block(8, mask=$0: bool[R, C])",
]
CALL = {"q_len": 90, "kv_len": 150}
HEADS = {"q_heads": 8, "kv_heads": 2, "batch": 3}


def drawn(text: str, density: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    node = read_short(text)
    found = random_data(node, density, seed, Sizes(HEADS["batch"], CALL["q_len"], CALL["kv_len"]))
    return tuple(found[slot.index] for slot in slots(node))


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("text", PATTERNS)
def test_random_data_fit_every_slot(text: str, density: float) -> None:
    pattern = sp.pattern(text, *drawn(text, density))
    check_data(pattern.node, pattern.data, **CALL, **HEADS)  # all values in range
    assert pattern.mask(**CALL, **HEADS).shape == (3, 8, 90, 150)


@pytest.mark.parametrize("text", PATTERNS)
def test_the_seed_decides(text: str) -> None:
    for mine, same in zip(drawn(text, 0.3, 7), drawn(text, 0.3, 7), strict=True):
        assert torch.equal(mine, same)
    different = [not torch.equal(a, b) for a, b in zip(drawn(text, 0.3, 7), drawn(text, 0.3, 8), strict=True)]
    assert any(different) or "[500]" in text or "[400]" in text  # all there are


@pytest.mark.parametrize(
    "text", [p for p in PATTERNS[:12] if "500" not in p and ", 3]" not in p and ", 4]" not in p and "slash" not in p]
)
def test_the_density_is_that_of_the_pairs(text: str) -> None:
    if "diagonals" in text:
        text = f"causal() & {text}"  # distances reach back
        wanted = 0.3 * float(sp.causal().mask(90, 150).float().mean())
    else:
        wanted = 0.3
    density = float(sp.pattern(text, *drawn(text, 0.3)).mask(**CALL, **HEADS).float().mean())
    assert density == pytest.approx(wanted, rel=0.4)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_a_density_is_a_share(density: float) -> None:
    with pytest.raises(PatternError, match=r"density: got .*\n.*allowed: a share in \(0, 1\]"):
        drawn(PATTERNS[0], density)


def test_files_of_every_kind(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    wanted = torch.arange(12).reshape(3, 4)
    torch.save(wanted, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", wanted.numpy())
    np.savez(tmp_path / "one.npz", wanted.numpy())
    np.savez(tmp_path / "two.npz", first=wanted.numpy(), second=wanted.numpy() + 1)
    safetensors.save_file({"first": wanted, "second": wanted + 1}, tmp_path / "a.safetensors")
    names = ["a.pt", "a.npy", "one.npz", "two.npz:first", "a.safetensors:first"]
    found = load_data({n: str(tmp_path / name) for n, name in enumerate(names)})
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert all(torch.equal(tensor, wanted) for tensor in found.values())


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("ran-code"),)


def test_files_that_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("junk.npy").write_text("junk")
    Path("junk.safetensors").write_text("junk")
    Path("harm.pt").write_bytes(pickle.dumps(Harmful()))
    np.save("harm.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    torch.save([1, 2], "list.pt")
    np.savez("two.npz", first=np.zeros(2), second=np.ones(2))
    for name, match in {
        "none.pt": "No such file", "a.txt": "a file of unknown kind", "junk.npy": "a file with one tensor",
        "junk.safetensors": "a file with one tensor", "harm.pt": "a file with one tensor",
        "harm.npy": "a file with one tensor", "list.pt": "got a list", "two.npz": "one of first, second",
        "two.npz:third": "(?s)the name 'third'.*one of first, second.*write two.npz:NAME",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=match) as error:
            load_data({0: name})
        assert name.partition(":")[0] in str(error.value)
    assert not Path("ran-code").exists()


def test_safetensors_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ToolchainError, match=r"(?s)safetensors.*spgen\[show\]"):
        load_data({0: str(tmp_path / "a.safetensors")})
