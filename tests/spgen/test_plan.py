"""Plans as values: what they say of themselves, other devices, files, and misuse of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spgen as sp
from spgen.errors import DataError, PlanError
from spgen.plan import tiles_of
from tests.kinds import KINDS, LENGTH


def call(length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_keeps_everything(kind: str, tmp_path: Path) -> None:
    q, k, v = call()
    attend = sp.attention(KINDS[kind])
    plan = attend.plan(q, k)
    plan.save(tmp_path / "plan")
    loaded = sp.Plan.load(tmp_path / "plan")
    assert loaded.key == plan.key
    assert all(torch.equal(a, b) for a, b in zip(loaded.tables, plan.tables, strict=True))
    assert torch.equal(attend(q, k, v, plan=loaded), attend(q, k, v))


@pytest.mark.parametrize(
    "options", [{"q_offset": 7}, {"q_offset": torch.tensor([7])}, {"kv_lengths": torch.tensor([90])}]
)
def test_offsets_and_lengths_are_part_of_a_file(options: dict[str, Any], tmp_path: Path) -> None:
    q, k, v = call()
    attend = sp.attention(KINDS["blocks"])
    attend.plan(q, k, **options).save(tmp_path / "plan")
    loaded = sp.Plan.load(tmp_path / "plan")
    assert torch.equal(attend(q, k, v, plan=loaded, **options), attend(q, k, v, **options))  # type: ignore[call-overload]
    with pytest.raises(PlanError, match="plan: "):
        attend(q, k, v, plan=loaded)


def test_packed_batches(tmp_path: Path) -> None:
    q, k, v = (torch.randn(20, heads, 16) for heads in (4, 2, 2))
    ends = torch.tensor([0, 7, 20], dtype=torch.int32)
    attend = sp.attention(sp.causal() & sp.columns(torch.tensor([0, 3])))
    attend.plan(q, k, cu_seqlens_q=ends, cu_seqlens_k=ends).save(tmp_path / "plan")
    loaded = sp.Plan.load(tmp_path / "plan")
    out = attend(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, plan=loaded)
    assert torch.equal(out, attend(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends))


def test_it_says_what_it_is() -> None:
    q, k, _ = call()
    plan = sp.attention(sp.causal() & sp.columns(torch.arange(40))).plan(q, k)
    text = repr(plan)
    assert "plan of causal() & columns($0: int64[K])" in text
    assert "q [1, 4, 150, 16] and k [1, 2, 150, 16], float32 on cpu" in text
    assert "int32[1, 1, 1, 40], 0.2 KB" in text
    assert plan.nbytes == sum(table.nbytes for table in plan.tables)
    assert plan.device == torch.device("cpu")


def test_the_same_device_is_no_copy() -> None:
    q, k, _ = call()
    plan = sp.attention(KINDS["blocks"]).plan(q, k)
    assert plan.to("cpu") is plan


def test_a_device_with_other_tiles_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    q, k, _ = call()
    plan = sp.attention(KINDS["blocks"]).plan(q, k)
    plan.save(tmp_path / "plan")
    monkeypatch.setattr("spgen.plan.tiles_of", lambda key: str(key.device))
    with pytest.raises(PlanError, match="devices with the tiles of cpu"):
        plan.to("meta")
    with pytest.raises(PlanError, match="tables for other tiles"):
        sp.Plan.load(tmp_path / "plan")


def test_tiles_are_those_of_the_pattern_and_the_call() -> None:
    q, k, _ = call()
    blocks, columns = (sp.attention(KINDS[kind]).plan(q, k).key for kind in ("blocks", "tokens"))
    assert tiles_of(blocks) == tiles_of(blocks)
    assert tiles_of(blocks) != tiles_of(columns)


def test_a_gpu_plan_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = call()
    attend = sp.attention(KINDS["blocks"])
    plan = attend.plan(q, k)
    sp.Plan(plan.tables, plan.key._replace(device=torch.device("cuda", 0)))
    plan.save(tmp_path / "plan")
    content = torch.load(tmp_path / "plan", weights_only=True)
    content["key"]["device"] = "cuda:0"
    torch.save(content, tmp_path / "plan")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(PlanError, match="a machine without one"):
        sp.Plan.load(tmp_path / "plan")
    assert sp.Plan.load(tmp_path / "plan", device="cpu").device == torch.device("cpu")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _of_text(path: Path) -> None:
    path.write_text("no plan")


def _of_tensors(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


def _of_objects(path: Path) -> None:
    torch.save({"format": Path}, path)


def _changed(**parts: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **parts}, path)

    return change


def _with_another_entry(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["tables"][0].view(-1)[0] += 1
    torch.save(content, path)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_truncated, "cannot be read"),
        (_of_text, "cannot be read"),
        (_of_objects, "cannot be read"),
        (_of_tensors, "no plan"),
        (_changed(version=0), "a plan of version 0"),
        (_changed(tables="none"), "missing or unknown parts"),
        (_changed(extra=1), "missing or unknown parts"),
        (_changed(tables=[torch.zeros(1, 1, 1, 1)]), "missing or unknown parts"),
        (_changed(key={"pattern": "causal()"}), "does not say what it is for"),
        (_changed(key=None), "does not say what it is for"),
        (_with_another_entry, "differ from those that were written"),
    ],
)
def test_damaged_and_foreign_files(damage: Callable[[Path], None], match: str, tmp_path: Path) -> None:
    q, k, _ = call()
    sp.attention(KINDS["blocks"]).plan(q, k).save(tmp_path / "some.plan")
    damage(tmp_path / "some.plan")
    with pytest.raises(PlanError, match=match) as caught:
        sp.Plan.load(tmp_path / "some.plan")
    assert "some.plan" in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sp.Plan.load(tmp_path / "none")
    q, k, _ = call()
    with pytest.raises(FileNotFoundError):
        sp.attention(KINDS["blocks"]).plan(q, k).save(tmp_path / "no folder" / "plan")


def test_a_failed_save_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = call()
    plan = sp.attention(KINDS["blocks"]).plan(q, k)
    plan.save(tmp_path / "plan")

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(OSError, match="no space"):
        plan.save(tmp_path / "plan")
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]
    assert sp.Plan.load(tmp_path / "plan").key == plan.key


def test_data_are_checked_when_asked() -> None:
    q, k, _ = call()
    attend = sp.attention(sp.columns(torch.tensor([3, 150])))
    attend.plan(q, k)
    with pytest.raises(DataError, match="columns: index"):
        attend.plan(q, k, check=True)


def test_plans_inside_compiled_graphs() -> None:
    """Dynamo 2.11 holds a named tuple to be other than a tuple of the same."""
    attend = sp.attention(sp.causal() & sp.columns(torch.tensor([[3, 7]])))
    k = torch.randn(1, 2, 100, 16)
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, plan=attend.plan(q, k)), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert torch.equal(compiled(k, k, k), attend(k, k, k))
