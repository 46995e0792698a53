"""`python -m inductor_ext`: run a checkpoint, explain what would be rewritten in it, or look at the installation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. What the user can put right is one message on stderr and exit code 2."""
    args = _parser().parse_args(arguments)
    command = {"run": _run, "explain": _explain, "doctor": _doctor}[args.command]
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        return command(args)
    except BackendCompilerFailed as error:
        from inductor_ext.oracle import NoKernel

        if not isinstance(error.inner_exception, NoKernel):
            raise
        message = str(error.inner_exception)
    except (ImportError, OSError, ValueError) as error:
        message = str(error)
    print(f"inductor_ext {args.command}: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m inductor_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="load a checkpoint packed, compile it, continue a text")
    run.add_argument("--prompt", required=True, help="the text to continue")
    run.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    run.add_argument("--kernel", metavar="NAME", help="use this kernel; `doctor` lists them")
    run.add_argument("--no-compile", action="store_true", help="run the model as it is, dequantising in every layer")
    explain = commands.add_parser("explain", help="print what would be rewritten in a checkpoint, and why the rest not")
    for command in (run, explain):
        command.add_argument("path", help="a folder, or a repository on the Hugging Face hub: owner/name")
        command.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations (default: bf16)")
        command.add_argument("--device", default="cpu", help="where the model goes (default: cpu)")
    commands.add_parser("doctor", help="print versions, device and arch, and for each kernel: usable, or why not")
    return parser


def _run(args: argparse.Namespace) -> int:
    import torch

    from inductor_ext import generate, kernels, loader

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1.")
    if args.kernel is not None:
        kernels.load(args.kernel)
    folder = loader.find_folder(args.path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    input_ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    if input_ids.numel() == 0:
        raise ValueError("--prompt has no token in it; give it at least one word.")
    model = _load(args, folder)
    input_ids = input_ids.to(args.device)
    if args.no_compile:
        counted, done = "not compiled", generate.greedy(model, input_ids, args.max_new_tokens, backend=None)
    else:
        options = {} if args.kernel is None else {"w4a16.kernel": args.kernel}
        done = generate.greedy(model, input_ids, args.max_new_tokens, options=options)
        with torch.no_grad():
            counted = str(_report(model, input_ids)).splitlines()[0]
    print(tokenizer.decode(done.tokens[0], skip_special_tokens=True))
    speed = done.seconds_per_token
    rate = "too few for a rate" if speed is None else f"{1 / speed:.1f} tokens/s"
    print(f"\n{len(done.seconds)} new tokens, {rate}; {counted}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    import torch

    from inductor_ext import loader

    model = _load(args, loader.find_folder(args.path))
    with torch.no_grad():
        for tokens in (1, 16):
            print(f"Input of {tokens} token{'s' * (tokens > 1)}: ", end="")
            print(_report(model, torch.zeros(1, tokens, dtype=torch.int64, device=args.device)), end="\n\n")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from inductor_ext import doctor

    return doctor.main()


def _load(args: argparse.Namespace, folder: Any) -> Any:
    import torch

    import inductor_ext

    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    return inductor_ext.from_pretrained(folder, dtype=getattr(torch, DTYPES[args.dtype]), device=args.device)


def _report(model: Any, input_ids: Any) -> Any:
    import inductor_ext

    return inductor_ext.explain(model, input_ids)
