"""`python -m inductor_ext`: run a checkpoint, explain what is rewritten in it, or look at the installation."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EXPLAINED = (1, 16)
"""Tokens in the inputs that `explain` shows: one step of decoding, and a prompt."""
ELSEWHERE = "one that need not be here, by its name: gfx1151, mi300x, sm_90, ..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. What the user can put right is told on stderr, with exit code 2."""
    args = _parser().parse_args(arguments)
    commands = {"run": _run, "explain": _explain, "doctor": _doctor}
    try:
        return commands[args.command](args)
    except Unfit as error:
        print(f"inductor_ext {args.command}: {error}", file=sys.stderr)
        return 2


class Unfit(Exception):
    """What was asked for cannot be done, and the message says why; not a mistake in the program."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m inductor_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="load a checkpoint packed, compile it, continue a text")
    run.add_argument("--prompt", required=True, help="the text to continue")
    run.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    run.add_argument("--kernel", metavar="NAME", help="use this kernel and no other; `doctor` lists them")
    run.add_argument("--no-compile", action="store_true", help="run the model as it is, dequantising in every layer")
    explain = commands.add_parser("explain", help="print what would be rewritten in a checkpoint, and why the rest not")
    for command in (run, explain):
        command.add_argument("path", help="a folder, or a repository on the Hugging Face hub: owner/name")
        command.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations (default: bf16)")
    run.add_argument("--device", default="cpu", help="where the model goes (default: cpu)")
    explain.add_argument(
        "--device",
        default="cpu",
        help=f"where the model goes (default: cpu), or {ELSEWHERE}; the model goes to the CPU",
    )
    doctor = commands.add_parser(
        "doctor", help="print versions, device and arch, and for each kernel: usable, or why not"
    )
    doctor.add_argument("--device", metavar="NAME", help=f"print instead what would run on a device, {ELSEWHERE}")
    return parser


def _run(args: argparse.Namespace) -> int:
    import torch
    from torch._dynamo.exc import BackendCompilerFailed

    from inductor_ext import explain
    from inductor_ext.generate import greedy
    from inductor_ext.oracle import NoKernel

    model, tokenizer, input_ids = _prepare_run(args)
    options = {} if args.kernel is None else {"w4a16.kernel": args.kernel}
    try:
        backend = None if args.no_compile else "w4a16"
        done = greedy(model, input_ids, args.max_new_tokens, backend=backend, options=options)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, NoKernel):
            raise Unfit(error.inner_exception) from error
        raise
    print(tokenizer.decode(done.tokens[0], skip_special_tokens=True))
    if args.no_compile:
        rewritten = "not compiled"
    else:
        with torch.no_grad():
            rewritten = str(explain(model, input_ids)).splitlines()[0]
    speed = done.seconds_per_token
    rate = "too few for a rate" if speed is None else f"{1 / speed:.1f} tokens/s"
    print(f"\n{len(done.seconds)} new tokens, {rate}; {rewritten}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from inductor_ext import doctor, preview

    if args.device is None:
        return doctor.main()
    try:
        return preview.main(args.device)
    except ValueError as error:
        raise Unfit(error) from None


def _explain(args: argparse.Namespace) -> int:
    import torch

    from inductor_ext import devices, explain, explain_for

    told: Any = explain
    if args.device in devices.KNOWN and args.device != "cpu":
        told = functools.partial(explain_for, args.device)
        args.device = "cpu"
    model = _load(args, _folder(args))
    with torch.no_grad():
        for tokens in EXPLAINED:
            report = told(model, torch.zeros(1, tokens, dtype=torch.int64, device=args.device))
            print(f"{tokens} token{'s' * (tokens > 1)}: {report}\n")
    return 0


def _prepare_run(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, the tokenizer, and the prompt's tokens [1, T]."""
    from inductor_ext import kernels

    if args.max_new_tokens < 1:
        raise Unfit(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1.")
    if args.kernel is not None:
        try:
            kernels.check_name(args.kernel)
        except ValueError as error:
            raise Unfit(error) from None
    folder = _folder(args)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Unfit(f"{folder} has no tokenizer that transformers can load: {_line(error)}") from error
    input_ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    if input_ids.numel() == 0:
        raise Unfit("--prompt has no token in it; give it at least one word.")
    return _load(args, folder), tokenizer, input_ids.to(args.device)


def _folder(args: argparse.Namespace) -> Path:
    from inductor_ext.loader import find_folder

    try:
        return find_folder(args.path)
    except (ImportError, OSError, ValueError) as error:
        raise Unfit(_line(error)) from error


def _load(args: argparse.Namespace, folder: Path) -> Any:
    import torch

    from inductor_ext import from_pretrained

    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        raise Unfit(f"--device {args.device} cannot be used here: {_line(error)}") from error
    try:
        return from_pretrained(folder, dtype=getattr(torch, DTYPES[args.dtype]), device=args.device)
    except (OSError, ValueError) as error:
        raise Unfit(error) from error  # whole: it may be a list of tensors


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
