"""Weights in 8 and 4 bits: what is stored, what is computed of it, and the checkpoint which holds them."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_shards.checkpoint import COMPONENTS, build_hollow, check, inspect, load_shard, stored_tensors
from model_shards.config import RELEASED, LlmConfig, ModelConfig, Quantization, load_config
from model_shards.errors import ModelError
from model_shards.init import init_checkpoint
from model_shards.kv_cache import KvCache, KvSequence, KvShape
from model_shards.llm import LanguageModel, SequenceInput
from model_shards.quantize import Bits, compare_speed, quantize_checkpoint
from model_shards.quantized import (
    QuantizedLinear,
    TensorCoreKernel,
    dequantize,
    for_tensor_cores,
    quantize,
    runs_with,
    settle,
    written_out,
)
from model_shards.split import verify_split
from stages.llm import Llm, LlmOptions
from stages.stage import Site
from tests.support.units import audio, session, unit

BITS: tuple[Bits, ...] = (8, 4)
OFF = {8: 0.02, 4: 0.2}
"""By how much the tiny LLM's results may be off, as a part of their size."""


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tiny"
    init_checkpoint(path)
    return path


@pytest.fixture(scope="module", params=BITS, ids=lambda bits: f"{bits} bits")
def small(request: pytest.FixtureRequest, whole: Path) -> tuple[Path, Bits]:
    path = whole.parent / f"{request.param}"
    quantize_checkpoint(whole, path, request.param)
    return path, request.param


def matrix(rows: int = 48, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.1 + 0.02


def layer(weight: torch.Tensor, bits: int, group_size: int = 64) -> QuantizedLinear:
    rows, columns = weight.shape
    made = QuantizedLinear(columns, rows, Quantization(bits, group_size))
    made.weight, made.weight_scale, made.weight_zero = quantize(weight, bits, group_size)
    settle(made)
    return made


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_off_by_half_a_step_at_most(bits: int):
    weight = matrix()
    codes = quantize(weight, bits, 64)
    steps = codes.scale.repeat_interleave(64 if bits == 4 else 128, dim=1)
    assert ((dequantize(codes) - weight).abs() <= steps / 2 + 1e-6).all()


def test_of_two_codes_in_a_byte_the_first_is_in_the_lower_half():
    weight = torch.tensor([[0.0, 15.0, *[7.0] * 30]])
    codes = quantize(weight, 4, 32)
    assert (int(codes.weight[0, 0]), codes.weight.shape) == (0 | 15 << 4, (1, 16))
    assert torch.equal(dequantize(codes), weight)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_nothing_stays_nothing(bits: int):
    assert dequantize(quantize(torch.zeros(2, 64), bits, 32)).abs().max() < 1e-6


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [48, 50], ids=["for the kernel", "none for the kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_computes_with_the_weights_its_codes_stand_for(bits: int, dtype: torch.dtype, rows: int):
    weight = matrix(rows).to(dtype)
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.float() @ dequantize(quantize(weight, bits, 64)).float().T
    actual = layer(weight, bits)(x)
    assert (actual.dtype, actual.shape) == (dtype, (3, 7, rows))
    off = 1e-5 if dtype == torch.float32 else 0.02
    assert (actual.float() - expected).abs().max() <= off * expected.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_the_same_in_any_company(bits: int):
    made = layer(matrix().to(torch.bfloat16), bits)
    x = torch.randn(9, 128).to(torch.bfloat16)
    alone = torch.cat([made(x[index : index + 1]) for index in range(9)])
    assert torch.allclose(made(x).float(), alone.float(), rtol=0.02, atol=1e-3)


def test_codes_and_inputs_may_lie_anywhere():
    weight, x = matrix().to(torch.bfloat16), torch.randn(5, 128).to(torch.bfloat16)
    codes = quantize(weight, 8, 64)
    moved = [torch.cat([part.new_zeros(1), part.flatten()])[1:].view(part.shape) for part in (codes.weight, x)]
    assert all(part.data_ptr() % 16 for part in moved)
    made = QuantizedLinear(128, 48, Quantization(8, 64))
    made.weight, made.weight_scale = moved[0], codes.scale
    settle(made)
    assert torch.equal(made(moved[1]), layer(weight, 8)(x))


def test_what_a_layer_no_longer_needs_is_forgotten():
    made = layer(matrix().to(torch.bfloat16), 4)
    assert made(torch.randn(128, 2).to(torch.bfloat16).T).shape == (2, 48)  # a view that is not contiguous
    assert sum(buffer.numel() for buffer in made.buffers()) == 0


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def packed_by_loops(pairs: torch.Tensor, inner_tiles: int) -> torch.Tensor:
    """torch's `_convert_weight_to_int4pack` of CUDA (aten/src/ATen/native/cuda/int4mm.cu), code by code.

    A warp holds 8 rows and 16 columns per tile: lane t has row t / 4, and columns 2 (t % 4) and the next one, those and
    the two that are 8 further. Two tiles share an int32: of the eight codes first those of even number, then the odd.
    """
    assert pairs.dtype == torch.uint8 and pairs.is_contiguous() and inner_tiles in (2, 4, 8)
    rows, columns = pairs.shape[0], 2 * pairs.shape[1]
    assert rows % 8 == 0 and columns % (16 * inner_tiles) == 0
    codes = torch.stack([pairs >> 4, pairs & 15], dim=2).flatten(1).tolist()
    out = torch.zeros(rows // 8, columns // (16 * inner_tiles), 32, inner_tiles // 2, dtype=torch.int64)
    for row_tile, column_tile, lane, two_tiles in itertools.product(*map(range, out.shape)):
        row, first = 8 * row_tile + lane // 4, 16 * (inner_tiles * column_tile + 2 * two_tiles) + 2 * (lane % 4)
        held = [codes[row][first + at] for at in (0, 1, 8, 9, 16, 17, 24, 25)]
        out[row_tile, column_tile, lane, two_tiles] = sum(
            code << (4 * place) for place, code in enumerate([*held[::2], *held[1::2]])
        )
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def multiplied_by_loops(x: torch.Tensor, packed: torch.Tensor, size: int, both: torch.Tensor) -> torch.Tensor:
    """torch's `_weight_int4pack_mm` of CUDA, of what `packed_by_loops` gives."""
    row_tiles, column_tiles, lanes, words = packed.shape
    rows, columns = 8 * row_tiles, 32 * words * column_tiles
    assert x.dtype == both.dtype == torch.bfloat16 and x.is_contiguous() and both.is_contiguous()
    assert x.shape[1] == columns and lanes == 32 and both.shape == (columns // size, rows, 2)
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for row_tile, column_tile, lane, word in itertools.product(*map(range, packed.shape)):
        value = int(packed[row_tile, column_tile, lane, word])
        row, first = 8 * row_tile + lane // 4, 16 * (2 * words * column_tile + 2 * word) + 2 * (lane % 4)
        for place, at in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
            scale, zero = both[(first + at) // size, row].double()
            weight[row, first + at] = (((value >> (4 * place)) & 15) - 8) * scale + zero
    return (x.double() @ weight.T).to(x.dtype)


BY_LOOPS = TensorCoreKernel(packed_by_loops, multiplied_by_loops)


@pytest.mark.parametrize("num_rows", [1, 64, 65], ids=lambda num: f"{num} rows")
@pytest.mark.parametrize("group_size", [32, 128])
def test_for_tensor_cores_a_layer_computes_with_the_weights_its_codes_stand_for(group_size: int, num_rows: int):
    codes = quantize(matrix(16, 256).to(torch.bfloat16), 4, group_size)
    x = torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    product = for_tensor_cores(codes, BY_LOOPS)
    expected = x.float() @ dequantize(codes).float().T
    actual = product.compute(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)
    assert "up to 64 rows" in product.runs_with


def test_what_was_packed_for_tensor_cores_is_what_torch_says_it_takes():
    pairs = quantize(matrix(16, 256).to(torch.bfloat16), 4, 128).weight
    said = torch.ops.aten._convert_weight_to_int4pack(pairs.to("meta"), 8)
    packed = packed_by_loops(pairs, 8)
    assert (said.shape, said.dtype) == (packed.shape, packed.dtype)


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_that_is_written_out_in_parts_gives_the_same(bits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model_shards.quantized._WRITTEN_AT_ONCE", 20)
    codes = quantize(matrix().to(torch.bfloat16), bits, 64)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = x.float() @ dequantize(codes).float().T
    product = written_out(codes, "as it is")
    torch.testing.assert_close(product.compute(x).float(), expected, rtol=0.02, atol=0.02)
    assert product.runs_with == "as it is"


def test_a_model_says_what_its_quantised_layers_are_computed_with():
    layers = torch.nn.Sequential(
        *(layer(matrix(rows).to(dtype), bits) for bits in (4, 4, 8) for rows, dtype in ((48, torch.bfloat16),)),
        layer(matrix(), 8),
        torch.nn.Linear(2, 2),
    )
    said = runs_with(layers)
    assert said == "torch's 4-bit kernel, torch's 8-bit kernel, quantised weights written out in torch.float32"
    assert runs_with(torch.nn.Linear(2, 2)) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 16, 64, 65, 200])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_on_a_gpu_4_bits_are_the_weights_they_stand_for(group_size: int, num_rows: int):
    codes = quantize(matrix(512, 1024).to(torch.bfloat16), 4, group_size)
    x = torch.randn(num_rows, 1024, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    made = QuantizedLinear(1024, 512, Quantization(4, group_size))
    made.weight, made.weight_scale, made.weight_zero = (part.cuda() for part in codes if part is not None)
    made.settle()
    assert "tensor-core" in made.runs_with
    expected = x.float() @ dequantize(codes).float().T
    torch.testing.assert_close(made(x.cuda()).float().cpu(), expected, rtol=0.03, atol=0.03)


@pytest.mark.gpu
def test_torch_packs_on_a_gpu_as_the_loops_do():
    pairs = quantize(matrix(16, 256).to(torch.bfloat16), 4, 128).weight
    assert torch.equal(torch._convert_weight_to_int4pack(pairs.cuda(), 8).cpu(), packed_by_loops(pairs, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu_what_has_no_kernel_is_written_out(bits: int):
    codes = quantize(matrix(48, 96), bits, 32)  # float32
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    made = QuantizedLinear(96, 48, Quantization(bits, 32))
    made.weight, made.weight_scale = codes.weight.cuda(), codes.scale.cuda()
    made.weight_zero = None if codes.zero is None else codes.zero.cuda()
    made.settle()
    torch.testing.assert_close(made(x.cuda()).cpu(), x @ dequantize(codes).T, rtol=1e-3, atol=1e-3)
    assert "not faster" in made.runs_with


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def hidden_of(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the LLM for some embeddings."""
    model = load_shard(path, "llm", dtype=dtype)
    cache = KvCache(KvShape.of(model.config), 20, 16, dtype=dtype)
    rows = torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(3)).to(dtype)
    (hidden,) = model(cache, [SequenceInput(KvSequence(), rows)])
    return model.logits(hidden).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_llm_computes_nearly_what_it_did(whole: Path, small: tuple[Path, Bits], dtype: torch.dtype):
    path, bits = small
    before, after = hidden_of(whole, torch.float32), hidden_of(path, dtype)
    off = (after - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert 0 < off < OFF[bits]


def test_the_other_components_are_as_they_were(whole: Path, small: tuple[Path, Bits]):
    for component in ("vision", "audio", "tts", "vocoder"):
        before, after = stored_tensors(whole, component), stored_tensors(small[0], component)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_is_smaller_whole_and_says_what_it_is(whole: Path, small: tuple[Path, Bits]):
    path, bits = small
    verify_split(path)
    check(path, COMPONENTS)
    sizes = [next(info for info in inspect(folder) if info.component == "llm").num_bytes for folder in (whole, path)]
    assert sizes[1] < sizes[0] * (0.8 if bits == 8 else 0.7)  # its table of embeddings is large
    assert str(load_config(path).llm.quantization) == ("8 bits" if bits == 8 else "4 bits in groups of 64")


def test_how_much_smaller_and_how_far_off_is_told(whole: Path, tmp_path: Path):
    done = quantize_checkpoint(whole, tmp_path / "out", 4)
    assert done.after_bytes < done.before_bytes
    assert 0.01 < done.relative_error < 0.2
    assert done.largest is not None
    timings = compare_speed(done.largest, done.quantization, rows=(1, 3))
    assert [timing.num_rows for timing in timings] == [1, 3]
    assert all(timing.before_s > 0 and timing.after_s > 0 for timing in timings)


def test_a_session_runs_on_it_in_the_type_which_its_kernels_know(small: tuple[Path, Bits]):
    stage = Llm.load(LlmOptions(), Site("llm", small[0]))
    assert f"torch's {small[1]}-bit kernel" in stage.runs_with
    stage.open_session(session(speech=False))
    rows = torch.randn(10, 128, generator=torch.Generator().manual_seed(1)).numpy()
    said = [chunk for index in range(12) for chunk in stage.process([unit("door", index, audio("door", index, rows))])]
    assert any(chunk.attrs.get("dtype") == "bfloat16" for chunk in said)


def changed(whole: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a checkpoint with other tensors in its main file."""
    shutil.copytree(whole, out)
    tensors = {name: tensor.clone() for name, tensor in load_file(out / "model.safetensors").items()}
    save_file(change(tensors), out / "model.safetensors")
    return out


def test_weights_in_fp8_are_not_lost(whole: Path, tmp_path: Path):
    fp8 = changed(whole, tmp_path / "fp8", lambda all: {name: t.to(torch.float8_e4m3fn) for name, t in all.items()})
    for bits in BITS:
        assert quantize_checkpoint(fp8, tmp_path / f"{bits}", bits).relative_error < OFF[bits]


def test_what_does_not_fit_its_config_is_named_and_nothing_is_written(whole: Path, tmp_path: Path):
    head = "llm.lm_head.weight"
    headless = changed(whole, tmp_path / "headless", lambda all: {name: t for name, t in all.items() if name != head})
    with pytest.raises(ModelError, match=f"1 missing: {head}"):
        quantize_checkpoint(headless, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_what_is_quantised_is_not_quantised_again(small: tuple[Path, Bits], tmp_path: Path):
    with pytest.raises(ModelError, match=r"its LLM is quantised already, .* bits.*; take the original"):
        quantize_checkpoint(small[0], tmp_path / "again", 4)
    assert not (tmp_path / "again").exists()


def test_a_checkpoint_quantised_by_another_tool_is_refused(whole: Path, tmp_path: Path):
    config = json.loads((whole / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantization_config is \{'quant_method': 'awq'\}, expected None"):
        load_config(tmp_path)


def test_a_config_of_other_bits_is_refused(whole: Path, tmp_path: Path):
    config = json.loads((whole / "config.json").read_text()) | {"quantization": {"bits": 3, "group_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantization\.bits is 3, expected 8 or 4"):
        load_config(tmp_path)


def test_codes_that_are_missing_are_named_before_anything_is_read(small: tuple[Path, Bits], tmp_path: Path):
    path = tmp_path / "copy"
    path.mkdir()
    for name in ("config.json", "shards"):
        (path / name).symlink_to(small[0] / name)
    (path / "shards").unlink()
    (path / "shards").mkdir()
    name = "llm.model.layers.0.mlp.up_proj.weight_scale"
    tensors = load_file(small[0] / "shards" / "llm.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path / "shards" / "llm.safetensors")
    with pytest.raises(ModelError, match=rf"1 missing: {name}"):
        check(path, ["llm"])


def test_the_released_checkpoint_is_under_12_gb_in_4_bits():
    llm = LlmConfig(quantization=Quantization(4, 128))
    config = ModelConfig(llm=llm, vision=RELEASED.vision)
    sizes = {
        component: sum(
            tensor.numel() * (_bytes_of_a_float(component) if tensor.is_floating_point() else 1)
            for tensor in build_hollow(component, config).state_dict().values()
        )
        for component in COMPONENTS
    }
    assert sizes["llm"] < 6e9
    assert 8.5e9 < sum(sizes.values()) < 8.6e9  # model_shards/README.md: 8.6 GB; the goal is 12


def _bytes_of_a_float(component: str) -> int:
    return 4 if component == "vocoder" else 2


def test_a_model_without_quantization_has_plain_layers_only():
    with torch.device("meta"):
        model = LanguageModel(LlmConfig(num_hidden_layers=1))
    assert not any(isinstance(part, QuantizedLinear) for part in model.modules())
