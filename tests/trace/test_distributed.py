"""A distributed model traced on one of its ranks only: nothing waits for the others, and training goes on in step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

RANKS = """
import sys
import torch
from torch import distributed, nn
import gradscope

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
model = nn.parallel.DistributedDataParallel(net)
x = torch.randn(16, 4)
model(x).sum().backward()
model.zero_grad()
if rank == 0:
    session = gradscope.trace(model, x, mode="real")
    assert session.verdict == "flows", session
    assert all(each.gradient is not None for each in session.sources.values() if each.kind == "parameter")
model(x).square().sum().backward()
print(" ".join(f"{each.grad.norm().item():.6e}" for each in net.parameters()))
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
def test_one_rank_is_traced_while_the_others_are_not(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    started = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "store"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    norms = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in said]
    assert norms[0] == norms[1] != [], "the gradients of the next step are those of all ranks"


SHARDED = """
import sys
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
import gradscope
from gradscope.errors import UsageError

distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
try:
    gradscope.trace(model, torch.randn(2, 4))
except UsageError as error:
    print(error.message)
model(torch.randn(2, 4)).sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.skipif(torch.__version__ < "2.9", reason="this torch shards on accelerators only")
def test_a_sharded_model_is_refused_and_trains_on(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "store"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, "sharded by FSDP" in done.stdout) == (0, True), done.stderr


STATIC = """
import sys
import torch
from torch import distributed, nn
import gradscope
from gradscope.errors import UsageError

distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), static_graph=True)
x = torch.randn(2, 4)


def step():
    model.zero_grad()
    model(x).square().sum().backward()
    return all(parameter.grad.any() for parameter in model.parameters())


print(gradscope.trace(model, x).verdict)
try:
    gradscope.trace(model, x, mode="real")
except UsageError as error:
    print(error.message)
assert step() and step() and step()
print(gradscope.trace(model, x, mode="real").verdict)
assert step() and step()
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_static_graph_is_learned_from_the_first_step_and_not_from_a_trace(tmp_path: Path) -> None:
    script = tmp_path / "static.py"
    script.write_text(STATIC)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "store"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, refused, second = done.stdout.splitlines()
    assert (first, "static graph" in refused, second) == ("flows", True, "flows")
