"""Sparse checkpoints of the compressed-tensors library (llm-compressor, vLLM) as sparse weights.

For a layer, tensors `compressed` (the stored values, row by row), `bitmask` (uint8 [N, ceil(K / 8)], bit j % 8 of byte
j // 8 says that column j is stored) and `shape`. Format "sparse-24-bitmask": `compressed` [N, K / 2]; "sparse-bitmask":
`compressed` [count], with `row_offsets`. Float8 values come with `weight_scale`, one for the layer or for each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spgen.arguments import DTYPES
from spgen.errors import DataError, DtypeError, PatternError, ShapeError
from spgen.weights.linear import Linear
from spgen.weights.sparsify import is_linear, replaced
from spgen.weights.storage import Layout, Stored, pack

_PARTS = ("compressed", "bitmask", "shape", "row_offsets", "weight_scale")


def from_compressed_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The sparse weights of a checkpoint, by the name of their layer; `sp.Linear(stored, bias)` multiplies by one.

    2:4 weights become n_of_m(2, 4), others bitmaps. Raises DataError where bits and values do not agree, ShapeError or
    DtypeError, naming the tensor.
    """
    return {name: _stored(name, parts) for name, parts in _layers(tensors)}


def load_compressed(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """The model with a checkpoint's sparse layers and its other tensors, in place.

    `source`: a .safetensors file, a folder of such files, or tensors by name. Raises PatternError for a sparse layer
    that the model lacks, and what :func:`from_compressed_tensors` raises.
    """
    tensors = source if isinstance(source, Mapping) else _read(Path(source))
    modules = dict(model.named_modules())
    found = from_compressed_tensors(tensors)
    for name, stored in found.items():
        old = modules.get(name)
        if old is None or not is_linear(old):
            raise PatternError(
                f"checkpoint: {name}", given="a sparse layer", allowed="a model with nn.Linear of this name"
            )
        bias = tensors.get(f"{name}.bias", old.bias)
        assert bias is None or isinstance(bias, Tensor)
        model = replaced(model, old, Linear(stored, bias).train(old.training))
    rest = {
        name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0].removesuffix(".weight") not in found
    }
    model.load_state_dict(rest, strict=False)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise DataError("source", given=f"{path} without safetensors files", allowed="a folder of a checkpoint")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each sparse layer's name, and its tensors by their last name."""
    for key in tensors:
        prefix, _, last = key.rpartition(".")
        if last == "compressed":
            name = prefix.removesuffix(".weight")
            places = {part: (f"{prefix}.{part}", f"{name}.{part}") for part in _PARTS}
            parts = {
                part: next(tensors[place] for place in names if place in tensors)
                for part, names in places.items()
                if any(place in tensors for place in names)
            }
            for part in ("bitmask", "shape"):
                if part not in parts:
                    raise DataError(f"{prefix}.{part}", given="nothing", allowed=f"a tensor beside {key}")
            yield name, parts


def _stored(name: str, parts: Mapping[str, Tensor]) -> Stored:
    values, bits = parts["compressed"], parts["bitmask"]
    n, k = _shape(name, parts["shape"])
    if bits.dtype != torch.uint8 or bits.shape != (n, -(-k // 8)):
        given = f"{bits.dtype} {list(bits.shape)}"
        raise ShapeError(f"{name}.bitmask", given=given, allowed=f"uint8 [{n}, {-(-k // 8)}], a bit for each column")
    mask = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).bool().flatten(1)[:, :k]
    if int(mask.sum()) != values.numel():
        raise DataError(
            f"{name}.compressed",
            given=f"{values.numel()} values",
            allowed=f"{int(mask.sum())}, one for each bit that is set",
        )
    scales = _scales(name, values.dtype, parts.get("weight_scale"), n)
    plain = values.view(torch.int8) if scales is not None else values
    dense = plain.new_zeros(n, k)
    dense[mask] = plain.flatten()
    stored = pack(dense, mask, Layout("n_of_m", 2, 4) if values.dim() == 2 else Layout("bitmap"))
    return Stored(stored.layout, stored.shape, stored.values.view(values.dtype), stored.index, scales)


def _shape(name: str, shape: Tensor) -> tuple[int, int]:
    sizes: list[Any] = shape.flatten().tolist()
    if len(sizes) != 2:
        raise ShapeError(f"{name}.shape", given=f"{sizes}", allowed="[output features, input features]")
    return int(sizes[0]), int(sizes[1])


def _scales(name: str, dtype: torch.dtype, scale: Tensor | None, n: int) -> Tensor | None:
    """The scale of each row [N] of float8 values; None of others."""
    if dtype in DTYPES:
        return None
    if dtype != torch.float8_e4m3fn:
        allowed = f"{', '.join(DTYPES.values())} or float8_e4m3fn"
        raise DtypeError(f"{name}.compressed", given=str(dtype), allowed=allowed)
    if scale is None or scale.numel() not in (1, n):
        given = "nothing" if scale is None else f"shape {list(scale.shape)}"
        raise ShapeError(f"{name}.weight_scale", given=given, allowed=f"one scale, or one for each of {n} rows")
    return scale.detach().float().flatten().expand(n).contiguous()
