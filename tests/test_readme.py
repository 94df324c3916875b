"""The Python of README.md runs as it stands there, block after block in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from copd_kernels import linear_logprob

README = Path(__file__).parents[1] / "README.md"


def test_kernel_examples() -> None:
    section = README.read_text().split("## Use the kernels elsewhere")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    hidden, weight, target = names["hidden"], names["weight"], names["target"]
    torch.testing.assert_close(names["logp"], linear_logprob(hidden.detach(), weight.detach(), target).logp_T)
    assert hidden.grad.abs().sum() > 0
    with torch.no_grad():
        logits = names["model"](input_ids=names["input_ids"], attention_mask=names["attention_mask"]).logits[:, :-1]
    truth = (logits / 0.7).log_softmax(-1).gather(2, names["labels"][..., None])[..., 0]
    torch.testing.assert_close(names["logps"], truth, rtol=1e-5, atol=1e-5)
    assert names["policy"].num_policy_tokens == names["mask"].sum()
    torch.testing.assert_close(names["advantages"][3:], torch.tensor([1.0, -1.0]), rtol=1e-4, atol=0)


def test_every_python_file_is_listed() -> None:
    text = README.read_text()
    root = README.parent
    files = [p for folder in ("copd_engine", "kernels", "benchmarks") for p in (root / folder).rglob("*.py")]
    missing = [str(p.relative_to(root)) for p in files if p.stat().st_size and f"`{p.relative_to(root)}`" not in text]
    assert not [name for name in missing if not name.endswith("__init__.py")]
