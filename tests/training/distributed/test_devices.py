"""Training on a GPU is the run of a CPU; the same bodies run on a CPU."""

import pytest
import torch
from host_reads import NoHostReads
from training_runs import rows_of, weights_of

from lightopd.training.module import StudentModule

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}


@pytest.mark.parametrize(
    "settings", [{}, {"layout": "packed"}, {"gradient_checkpointing": True}, {"compile": True}]
)
def test_a_run_follows_that_of_a_cpu(train, device, settings):
    if device == "cpu" and "compile" in settings:
        pytest.skip("a CPU's compiled runs are in student/test_compile.py")
    whole = train("cpu", accelerator="cpu")
    found = train("device", accelerator=ACCELERATORS[device], **settings)
    for one, other in zip(rows_of(found), rows_of(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)
    left, right = weights_of(found.student), weights_of(whole.student)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


def test_mixed_precision_stays_near_the_run_in_float32(train, device):
    whole = train("whole", accelerator="cpu")
    found = train("mixed", accelerator=ACCELERATORS[device], precision="bf16-mixed")
    for one, other in zip(rows_of(found), rows_of(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.05)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_micro_batches_after_the_first_step_wait_for_nothing(train, device, layout, monkeypatch):
    if device == "cpu" and layout == "packed":
        pytest.skip("flex attention has gradients on a GPU only")
    backward = StudentModule._backward

    def watched(self, *arguments, **options):
        if self.step == 0:  # kernels are compiled
            return backward(self, *arguments, **options)
        if device == "cpu":
            with NoHostReads():
                return backward(self, *arguments, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return backward(self, *arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("lightopd.training.fit.uses_gpu", lambda finetune: True)
    monkeypatch.setattr(StudentModule, "_backward", watched)
    train("out", accelerator=ACCELERATORS[device], layout=layout, steps=3)
