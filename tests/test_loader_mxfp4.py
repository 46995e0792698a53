"""gpt-oss from checkpoints with experts in MXFP4: packed, in one graph, and as exact as their activations allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import moe, set_quantization
from models import rel_l2
from mxfp4_checkpoints import INPUT, OPENAI, WEIGHT, GptOss, Rounded, quark, write_gpt_oss
from mxfp4_problems import e4m3
from safetensors.torch import load_file, save_file
from test_moe_zoo import without_inductor  # noqa: F401
from torch import Tensor
from zoo.base import fresh

import inductor_ext
from inductor_ext.loader.mxfp4 import Mxfp4Experts, QuarkExperts
from inductor_ext.loader.stream import CheckpointError

IDS = (torch.arange(24).view(2, 12) * 37 + 5) % 256
SCALES = (0.01, 0.05)
"""Some activations are beyond 448 of these."""
STRICT = {"w4a16.strict": True}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> GptOss:
    return write_gpt_oss(tmp_path_factory.mktemp("openai"))


@pytest.fixture(scope="module")
def w4a8(tmp_path_factory: pytest.TempPathFactory) -> GptOss:
    return write_gpt_oss(tmp_path_factory.mktemp("w4a8"), each=True, scales=SCALES)


def load(checkpoint: GptOss, dtype: torch.dtype = torch.float32) -> Any:
    return inductor_ext.from_pretrained(checkpoint.folder, dtype=dtype, progress=False)


def rounded(checkpoint: GptOss, scales: tuple[float, float]) -> Any:
    """The dense model in float32, but for its experts: these round to fp8, and compute in float64."""
    model = checkpoint.reference()
    for layer in model.model.layers:
        layer.mlp.experts = Rounded(layer.mlp.experts, scales, e4m3)
    return model


def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="w4a16", fullgraph=True, options=STRICT | options)


@pytest.mark.parametrize("name", ["openai", "w4a8"])
def test_the_experts_stay_packed_and_mean_what_the_files_say(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint: GptOss = request.getfixturevalue(name)
    model = load(checkpoint, torch.bfloat16)
    for path in checkpoint.packed:
        layer, _, projection = path.rpartition(".")
        experts = model.get_submodule(layer)
        assert isinstance(experts, QuarkExperts if name == "w4a8" else Mxfp4Experts)
        exact = checkpoint.dense[path].transpose(1, 2)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(experts.dequantize(projection.removesuffix("_proj"), dtype), exact.to(dtype))
        held = sum(t.nbytes for t in (*experts.parameters(), *experts.buffers()))
        assert held < 0.6 * (experts.intermediate_dim * 3 * experts.hidden_dim * experts.num_experts)
    for at, (given, scale) in enumerate(zip(("gate_up", "down"), SCALES, strict=True)):
        if name == "w4a8":
            found = getattr(model.model.layers[1].mlp.experts, f"{given}_input_scale")
            assert found == torch.tensor(SCALES[at]) and scale == SCALES[at], "the largest of the experts'"


@pytest.mark.parametrize("name", ["openai", "w4a8"])
def test_the_state_dict_has_the_files_tensors(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint: GptOss = request.getfixturevalue(name)
    model, files = load(checkpoint, torch.bfloat16), checkpoint.tensors()
    state = model.state_dict()
    assert {k: (v.dtype, v.shape) for k, v in state.items()} == {k: (v.dtype, v.shape) for k, v in files.items()}
    assert all(torch.equal(state[k], v) for k, v in files.items())
    changed = {k: torch.flip(v, [0]) if "proj" in k and v.dtype == torch.uint8 else v for k, v in files.items()}
    model.load_state_dict(changed)
    assert all(torch.equal(v, changed[k]) for k, v in model.state_dict().items())
    key = next(k for k in files if v_is_packed(files[k]))
    with pytest.raises(RuntimeError, match=r"size mismatch|is needed"):
        model.load_state_dict(changed | {key: files[key][..., :-1]})


def v_is_packed(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8


def test_gpt_oss_is_one_graph_with_every_layer_rewritten(openai: GptOss) -> None:
    model, wanted = load(openai), logits(openai.reference())
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    report = inductor_ext.explain(model, IDS)
    assert [found.op for found in report.rewritten] == ["w4a16::moe_mxfp4"] * 2
    assert [found.where for found in report.rewritten] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert (report.left_alone, report.graphs) == ([], 1)
    torch.compiler.reset()
    assert rel_l2(logits(compiled(model)), wanted) <= 1e-5


@pytest.mark.parametrize("name", ["openai", "w4a8"])
def test_half_precision_is_as_near_as_the_dense_model(
    name: str,
    request: pytest.FixtureRequest,
    without_inductor: None,  # noqa: F811
) -> None:
    """Of one layer's experts, given the same tokens and routing."""
    checkpoint: GptOss = request.getfixturevalue(name)
    model, reference = load(checkpoint, torch.bfloat16), checkpoint.reference()
    ours, exact = (m.model.layers[0].mlp.experts for m in (model, reference))
    exact = Rounded(exact, SCALES, e4m3) if name == "w4a8" else exact
    x = torch.randn(33, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.stack([torch.arange(33) % 8, (torch.arange(33) + 3) % 8], 1)
    weights = torch.rand(33, 2, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = exact(x.float(), ids, weights.float())
    assert rel_l2(compiled(ours)(x, ids, weights), wanted) <= 4e-3


# -- fp8 activations ---------------------------------------------------------------------------------------------------


def test_input_scales_in_the_checkpoint_make_it_w4a8(w4a8: GptOss, without_inductor: None) -> None:  # noqa: F811
    model, wanted = load(w4a8), logits(rounded(w4a8, SCALES))
    assert rel_l2(logits(model), wanted) <= 4e-3
    report = inductor_ext.explain(model, IDS)
    assert [found.op for found in report.rewritten] == ["w4a16::moe_gemm_a8w4"] * 2
    assert all("fp8 activations" in found.problem for found in report.rewritten)
    assert all("fp8 by the input scales of the model" in found.proof for found in report.rewritten)
    torch.compiler.reset()
    y = logits(compiled(model))
    difference = rel_l2(y, logits(w4a8.reference()))
    print(f"W4A8 is {rel_l2(y, wanted):.1e} from its float64 model, {difference:.1e} from W4A16")
    assert rel_l2(y, wanted) <= 4e-3
    assert difference > 4e-2, "there is nothing to tell them apart by"


def test_w4a8_is_never_chosen_silently(openai: GptOss, without_inductor: None) -> None:  # noqa: F811
    model = load(openai)
    plain = logits(compiled(model))
    assert rel_l2(plain, logits(openai.reference())) <= 1e-5
    torch.compiler.reset()
    fp8 = logits(compiled(model, **{"w4a16.activation": "fp8"}))
    assert rel_l2(fp8, logits(rounded(openai, (1.0, 1.0)))) <= 4e-3
    assert rel_l2(fp8, plain) > 1e-2
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"w4a16\.activation is 'int8'; it must be 'fp8' or None"):
        compiled(model, **{"w4a16.activation": "int8"})(IDS)


def half(which: str) -> Any:
    """One of both projections' inputs is rounded."""

    def change(experts: Any, own: Any) -> None:
        experts._rounded = lambda projection, x: own(projection, x) if projection == which else x

    return change


def before_the_activation(experts: Any, own: Any) -> None:
    act = experts._act
    experts._rounded = lambda projection, x: own(projection, x) if projection == "gate_up" else x
    experts._act = lambda h: act(own("down", h))


def of_twice_x(experts: Any, own: Any) -> None:
    experts._rounded = lambda projection, x: own(projection, 2 * x) / 2 if projection == "gate_up" else own("down", x)


ELSEWHERE = {
    "of x alone": (half("gate_up"), "somewhere else than right before its last projection"),
    "of h alone": (half("down"), "one of its projections only"),
    "before the activation": (before_the_activation, "somewhere else than right before its last projection"),
    "of twice x": (of_twice_x, "one of its projections only"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_rounding_elsewhere_is_left_alone(w4a8: GptOss, name: str) -> None:
    change, reason = ELSEWHERE[name]
    experts = load(w4a8).model.layers[0].mlp.experts
    change(experts, experts._rounded)
    weights, ids = torch.rand(7, 8).topk(2)
    report = inductor_ext.explain(experts, torch.randn(7, 96), ids, weights)
    assert report.rewritten == []
    assert any(reason in left.reason for left in report.left_alone)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Any:
    """A checkpoint's folder, to be changed."""

    def make(checkpoint: GptOss, quantization: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
        for name in ("config.json",):
            (tmp_path / name).write_text((checkpoint.folder / name).read_text())
        if quantization is not None:
            set_quantization(tmp_path, quantization)
        save_file(load_file(checkpoint.folder / "model.safetensors") | tensors, tmp_path / "model.safetensors")
        return tmp_path

    return make


def changed(where: str, **settings: Any) -> dict[str, Any]:
    quantization = json.loads(json.dumps(quark(True)))
    quantization["global_quant_config"][where].update(settings)
    return quantization


REFUSED = {
    "weight with dtype 'int4'": changed("weight", dtype="int4"),
    "weight with group_size 16": changed("weight", group_size=16),
    "weight with scale_format 'e4m3'": changed("weight", scale_format="e4m3"),
    "input_tensors with dtype 'fp4'": changed("input_tensors", dtype="fp4"),
    "input_tensors with is_dynamic True": changed("input_tensors", is_dynamic=True),
    "input_tensors with qscheme 'per_group'": changed("input_tensors", qscheme="per_group"),
    "layer_quant_config": quark(True) | {"layer_quant_config": {"*lm_head": {"weight": WEIGHT}}},
    "kv_cache_quant_config": quark(True) | {"kv_cache_quant_config": {"*": {"output_tensors": INPUT}}},
    "the algo_config 'rotation' with r4": quark(True) | {"algo_config": [{"name": "rotation", "r1": True, "r4": True}]},
    "weight None": quark(True) | {"global_quant_config": {}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_other_settings_of_quark_are_refused(w4a8: GptOss, copy: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"quantization_config has {said}"):
        inductor_ext.from_pretrained(copy(w4a8, REFUSED[said]), progress=False)


def test_files_that_do_not_fit_are_refused(w4a8: GptOss, openai: GptOss, copy: Any) -> None:
    path = "model.layers.1.mlp.experts"
    for value in (torch.nan, -1.0, 0.0):
        folder = copy(w4a8, **{f"{path}.2.down_proj.input_scale": torch.tensor(value)})
        with pytest.raises(CheckpointError, match=f"{path} has down_input_scales that are no positive numbers"):
            inductor_ext.from_pretrained(folder, progress=False)
    folder = copy(openai, **{f"{path}.down_proj_scales": torch.zeros(8, 96, 1, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=r"down_proj_scales is \[8, 96, 1\], the model needs \[8, 96, 2\]"):
        inductor_ext.from_pretrained(folder, progress=False)
    folder = copy(openai, quark(False))
    with pytest.raises(CheckpointError, match=r"missing: .*experts\.0\.gate_up_proj\.weight"):
        inductor_ext.from_pretrained(folder, progress=False)
    with pytest.raises(ValueError, match=r"no model\.layers\.0\.mlp\.experts\.0\.down_proj\.input_scale"):
        inductor_ext.from_pretrained(copy(openai, quark(True)), progress=False)


def test_only_gpt_oss_is_read_in_mxfp4(openai: GptOss, copy: Any) -> None:
    folder = copy(openai)
    moe("qwen3_moe").save_pretrained(folder)
    set_quantization(folder, OPENAI)
    with pytest.raises(ValueError, match="Qwen3MoeExperts is not gpt-oss's experts"):
        inductor_ext.from_pretrained(folder, progress=False)
