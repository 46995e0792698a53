"""`python -m inductor_ext run` and `explain`, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import Checkpoint, llama, random_checkpoint, write_compressed_tensors
from torch._dynamo.exc import BackendCompilerFailed

from inductor_ext import kernels
from inductor_ext.cli import main
from inductor_ext.generate import greedy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = llama(num_hidden_layers=1, eos_token_id=None, bos_token_id=None)
    written = write_compressed_tensors(folder, config)
    random_checkpoint.write_tokenizer(folder, config.vocab_size)
    return written


@pytest.fixture(autouse=True)
def as_in_a_new_process(without_codegen: None) -> None:
    """Without what other tests compiled: after a few recompilations of one forward, Dynamo runs it uncompiled."""
    torch.compiler.reset()


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must fail with exit code 2 says: one line on stderr, nothing on stdout."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    (said,) = [line for line in err.splitlines() if line and not line.startswith("Loading")]  # but for the progress bar
    assert not out
    return said


def test_run_continues_the_prompt_as_the_dense_model_does(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(checkpoint.folder), "--prompt", "w3 w200 w9", "--max-new-tokens", "6", "--dtype", "fp32"]
    assert main(arguments) == 0
    text, blank, summary = capsys.readouterr().out.splitlines()
    tokens = [int(word.removeprefix("w")) for word in text.split()]
    assert tokens[:3] == [3, 200, 9] and len(tokens) == 9
    assert blank == ""
    assert re.fullmatch(r"6 new tokens, [\d.]+ tokens/s; 7 of 7 int4 matmuls rewritten, in 1 graph", summary)
    assert main([*arguments, "--no-compile"]) == 0
    eager, _, summary = capsys.readouterr().out.splitlines()
    assert eager == text
    assert re.fullmatch(r"6 new tokens, [\d.]+ tokens/s; not compiled", summary)
    model, ids = checkpoint.reference(), [3, 200, 9]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokens == ids


def test_generating_leaves_the_model_as_it_was(checkpoint: Checkpoint) -> None:
    model, ids = checkpoint.reference(), torch.tensor([[3, 200, 9]])
    done = greedy(model, ids, 2, backend="eager")
    assert "forward" not in vars(model)
    assert done.tokens.shape == (1, 5) and len(done.seconds) == 2 and done.seconds_per_token is None
    with pytest.raises(BackendCompilerFailed):
        greedy(model, ids, 2, options={"w4a16.nonsense": True})
    assert "forward" not in vars(model)


def test_explain_reports_a_step_of_decoding_and_a_prompt(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(checkpoint.folder)]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\d+ tokens?): 7 of 7 int4 matmuls rewritten", out, re.MULTILINE) == ["1 token", "16 tokens"]
    assert out.count("model.layers.0.mlp.down_proj") == 2


def test_what_the_user_got_wrong_is_one_line(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint.folder)
    run = ("run", folder, "--prompt", "w1")
    assert "There is no folder" in fails(capsys, "explain", str(tmp_path / "nowhere"))
    assert "holds no config.json" in fails(capsys, "run", str(tmp_path), "--prompt", "w1")
    assert "--max-new-tokens is 0; it must be at least 1" in fails(capsys, *run, "--max-new-tokens", "0")
    assert "There is no kernel 'nope'; the kernels are" in fails(capsys, *run, "--kernel", "nope")
    assert "--device nope cannot be used here" in fails(capsys, *run, "--device", "nope")
    assert "--prompt has no token in it" in fails(capsys, "run", folder, "--prompt", " ")


def test_a_kernel_that_cannot_is_one_line_with_its_reason(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.load("reference"), "reject", lambda problem: "it does not feel like it")
    run = ("run", str(checkpoint.folder), "--prompt", "w1", "--kernel", "reference")
    assert "reference: it does not feel like it" in fails(capsys, *run)


def test_a_checkpoint_without_a_tokenizer_can_be_explained_but_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_compressed_tensors(tmp_path, llama(num_hidden_layers=1))
    assert "has no tokenizer that transformers can load" in fails(capsys, "run", str(tmp_path), "--prompt", "w1")


def test_a_checkpoint_of_another_kind_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_compressed_tensors(tmp_path, llama(num_hidden_layers=1))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "config.json has no quantization_config" in fails(capsys, "explain", str(tmp_path))


def test_the_module_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "inductor_ext", "explain", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = f"inductor_ext explain: {tmp_path} is not a checkpoint: it holds no config.json."
    assert done.stderr.splitlines()[-1] == said
