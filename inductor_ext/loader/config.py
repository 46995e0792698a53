"""What config.json says about a checkpoint's int4 weights: which linear layers are packed, and how each is stored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

SUPPORTED = (
    "Supported are dense decoder models and mixtures of experts with 4-bit integer weights and 16-bit activations, in"
    " these formats:"
    " compressed-tensors 'pack-quantized' (strategy group or channel), GPTQ ('gptq', 'gptq_v2') and AWQ ('gemm');"
    " and gpt-oss with its experts in MXFP4, as OpenAI ('mxfp4') or AMD Quark ('quark') stores them."
)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one linear layer is stored.

    format: "compressed-tensors", "gptq" or "awq".
    group_size: how many neighbours along K share a scale and a zero; None: all of a row.
    zeros: whether the file holds packed zeros; without them every zero is 8.
    zero_offset: what is added to a stored zero: 1 in GPTQ's first format, 0 elsewhere.
    group_index: whether the file holds the group of every k (act-order; GPTQ writes it always).
    """

    format: str
    group_size: int | None
    zeros: bool = True
    zero_offset: int = 0
    group_index: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """The linear layers that a pattern names, and their scheme (None: left dense).

    pattern: a class name, a module's full path, or "re:" and a regular expression for the start of the path.
    """

    pattern: str
    scheme: Scheme | None


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Of a checkpoint whose routed experts are MXFP4 and whose other layers are dense.

    each: every expert is stored by itself (Quark), not all of a layer in one tensor (OpenAI).
    input_scales: activations are rounded to fp8 by scales in the files.
    """

    each: bool
    input_scales: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which layers of a checkpoint are packed, and how.

    rules: exact paths come before regular expressions, those before class names; of equals, the first decides.
    ignore: patterns of layers that stay dense, whatever the rules say.
    by_name: of the layers that a rule names, those are packed for which the files hold packed tensors: GPTQ and AWQ do
    not write down which layers they skipped.
    mxfp4: how the routed experts are stored, if they are MXFP4; then there are no rules.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    by_name: bool = False
    mxfp4: Mxfp4 | None = None

    def scheme(
        self, path: str, classes: Collection[str], stored: Collection[str], in_files: str | None = None
    ) -> Scheme | None:
        """The scheme of the linear layer at `path`, or None if it is dense.

        classes: the names of its class and of that class's bases. stored: the names of all tensors in the files.
        in_files: what the files call the layer, if not as the model does; config.json may have either name.
        """
        paths = {path, in_files or path}
        if any(_matches(pattern, paths, classes) for pattern in self.ignore):
            return None
        rule = min(
            (rule for rule in self.rules if _matches(rule.pattern, paths, classes)),
            key=lambda rule: _vagueness(rule.pattern, paths),
            default=None,
        )
        if rule is None or rule.scheme is None:
            return None
        if not self.by_name:
            return rule.scheme
        held = {
            name for path in paths for name in ("qweight", "qzeros", "scales", "g_idx") if f"{path}.{name}" in stored
        }
        if held <= {"g_idx"}:
            return None
        return dataclasses.replace(rule.scheme, group_index=rule.scheme.group_index or "g_idx" in held)


def read_plan(quantization: Mapping[str, Any] | None) -> Plan:
    """The plan in config.json's `quantization_config`.

    Raises ValueError, with what was found and what is supported, if it asks for anything that cannot be loaded exactly.
    """
    if not quantization:
        raise ValueError(
            "config.json has no quantization_config, so this is not an int4 checkpoint; load it with"
            f" transformers.AutoModelForCausalLM.from_pretrained. {SUPPORTED}"
        )
    readers = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "mxfp4": lambda _: Plan((), mxfp4=Mxfp4(each=False)),
        "quark": _quark,
    }
    method = quantization.get("quant_method")
    if method not in readers:
        _refuse(f"has quant_method {method!r}")
    return readers[method](quantization)


def _compressed_tensors(quantization: Mapping[str, Any]) -> Plan:
    _refuse_unless_empty(quantization, ("kv_cache_scheme", "transform_config"))
    if (quantization.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        _refuse(f"has the sparsity_config {quantization['sparsity_config']}")
    rules = []
    for name, group in quantization.get("config_groups", {}).items():
        if not isinstance(group, Mapping):
            _refuse(f"names {name!r} without spelling it out")
        _refuse_unless_empty(group, ("input_activations", "output_activations"), where=f"config group {name!r}: ")
        found = group.get("format") or quantization.get("format")
        if found != "pack-quantized":
            _refuse(f"has format {found!r} (config group {name!r})")
        scheme = _compressed_tensors_scheme(name, group.get("weights") or {})
        rules += [Rule(pattern, scheme) for pattern in _patterns(group, "targets")]
    return Plan(tuple(rules), _patterns(quantization, "ignore"))


def _patterns(settings: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = settings.get(key) or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(pattern, str) for pattern in found):
        _refuse(f"has {key} {found!r}, which is no list of names")
    return tuple(found)


def _compressed_tensors_scheme(name: str, weights: Mapping[str, Any]) -> Scheme:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None and group_size is not None:
        strategy = "channel" if group_size == -1 else "group"
    bits, kind, dynamic = weights.get("num_bits"), weights.get("type", "int"), weights.get("dynamic", False)
    if bits != 4 or kind != "int" or strategy not in ("group", "channel") or dynamic:
        found = f"num_bits {bits}, type {kind!r}, strategy {strategy!r}, dynamic {dynamic}"
        _refuse(f"has weights with {found} (config group {name!r})")
    return Scheme(
        format="compressed-tensors",
        group_size=_group_size(group_size) if strategy == "group" else None,
        zeros=not weights.get("symmetric", True),
        # "weight" (or "static") reorders during calibration only; "group" (or "dynamic", or true) stores the index.
        group_index=weights.get("actorder") in ("group", "dynamic", True),
    )


def _gptq(quantization: Mapping[str, Any]) -> Plan:
    found = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if found not in ("gptq", "gptq_v2") or quantization.get("is_marlin_format"):
        _refuse(f"has checkpoint_format {found!r}, is_marlin_format={bool(quantization.get('is_marlin_format'))}")
    if quantization.get("pack_dtype", "int32") != "int32":
        _refuse(f"has pack_dtype {quantization['pack_dtype']!r}")
    _refuse_unless_empty(quantization, ("rotation", "adapter"))

    def scheme(settings: Mapping[str, Any]) -> Scheme:
        _require_4_bits(settings)
        return Scheme(
            format="gptq",
            group_size=_group_size(settings.get("group_size", -1)),
            zero_offset=1 if found == "gptq" else 0,
            group_index=bool(settings.get("desc_act")),
        )

    # GPTQModel's `dynamic`: "-:pattern" leaves layers dense, "+:pattern" or "pattern" gives them settings of their own.
    rules = [Rule("Linear", scheme(quantization))]
    for key, own in (quantization.get("dynamic") or {}).items():
        sign, pattern = (key[0], key[2:]) if key[:2] in ("-:", "+:") else ("+", key)
        rules.append(Rule(f"re:{pattern}", None if sign == "-" else scheme({**quantization, **own})))
    return Plan(tuple(rules), _not_converted(quantization), by_name=True)


def _awq(quantization: Mapping[str, Any]) -> Plan:
    found = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    if found != "gemm":
        _refuse(f"has version {found!r}")
    if not quantization.get("zero_point", True):
        _refuse("has zero_point false")
    settings = {
        "bits": quantization.get("bits", quantization.get("w_bit")),
        "group_size": quantization.get("group_size", quantization.get("q_group_size", 128)),
    }
    _require_4_bits(settings)
    scheme = Scheme(format="awq", group_size=_group_size(settings["group_size"]))
    return Plan((Rule("Linear", scheme),), _not_converted(quantization), by_name=True)


def _quark(quantization: Mapping[str, Any]) -> Plan:
    """AMD Quark's export of MXFP4 experts, W4A16 or W4A8. Which layers it left dense (`exclude`) the files show."""
    _refuse_unless_empty(quantization, ("layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config"))
    settings = quantization.get("global_quant_config") or {}
    _refuse_unless_empty(settings, ("output_tensors", "bias"), where="global_quant_config: ")
    for algorithm in quantization.get("algo_config") or []:
        # Rotations of activations at run time need an operation that the loaded model does not have.
        online = {key for key, value in algorithm.items() if value and (key in ("r3", "r4") or "online" in key)}
        if online:
            _refuse(f"has the algo_config {algorithm.get('name')!r} with {', '.join(sorted(online))}")
    _require_settings(
        settings.get("weight"),
        "weight",
        {"dtype": ("fp4",), "qscheme": ("per_group",), "group_size": (32,), "scale_format": ("e8m0",)},
    )
    inputs = settings.get("input_tensors")
    if inputs:
        _require_settings(
            inputs, "input_tensors", {"dtype": ("fp8_e4m3",), "qscheme": ("per_tensor",), "is_dynamic": (False, None)}
        )
    return Plan((), mxfp4=Mxfp4(each=True, input_scales=bool(inputs)))


def _require_settings(found: Any, where: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    if not isinstance(found, Mapping):
        _refuse(f"has {where} {found!r}")
    for key, values in allowed.items():
        if found.get(key) not in values:
            _refuse(f"has {where} with {key} {found.get(key)!r}")


def _matches(pattern: str, paths: Collection[str], classes: Collection[str]) -> bool:
    if pattern.startswith("re:"):
        return any(re.match(pattern.removeprefix("re:"), path) for path in paths)
    return pattern in paths or pattern in classes


def _vagueness(pattern: str, paths: Collection[str]) -> int:
    return 0 if pattern in paths else 1 if pattern.startswith("re:") else 2


def _not_converted(quantization: Mapping[str, Any]) -> tuple[str, ...]:
    # Whole names or runs of them: "gate" is a router's, and leaves an expert's "gate_proj" alone.
    parts = (part.strip(".") for part in quantization.get("modules_to_not_convert") or ())
    return tuple(rf"re:(.*\.)?{re.escape(part)}(\.|$)" for part in parts)


def _group_size(stored: Any) -> int | None:
    if stored == -1:
        return None
    if not isinstance(stored, int) or stored <= 0:
        _refuse(f"has group_size {stored!r}")
    return stored


def _require_4_bits(settings: Mapping[str, Any]) -> None:
    if settings.get("bits") != 4:
        _refuse(f"has bits {settings.get('bits')!r}")


def _refuse_unless_empty(settings: Mapping[str, Any], keys: Iterable[str], where: str = "") -> None:
    for key in keys:
        if settings.get(key):
            _refuse(f"has {where}{key} {settings[key]}")


def _refuse(found: str) -> NoReturn:
    raise ValueError(f"config.json's quantization_config {found}, which this loader cannot load. {SUPPORTED}")
