"""Lightning: manual optimisation, mixed precision, clipping, and the state in its checkpoints."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torchjd_func as jd

lightning = pytest.importorskip("pytorch_lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the trainer, about workers and logs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TwoTasks(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.kind, self.depth = nn.Linear(64, 3), nn.Linear(64, 1)
        self.rule = jd.monitored(jd.smoothed(jd.upgrad()), {"cosine": jd.measures.cosine_to_mean})
        self.rule_state: Any = None

    def training_step(self, batch, batch_idx):
        x, kind, depth = batch
        features = self.trunk(x)  # under the trainer's autocast
        losses = {
            "kind": F.cross_entropy(self.kind(features).float(), kind),
            "depth": F.mse_loss(self.depth(features)[:, 0].float(), depth),
        }
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.rule_state = jd.interop.backward_(
            losses, self, self.rule, self.rule_state, features=features
        )
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log_dict({**losses, **jd.read_measures(self.rule_state)})

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["rule"] = jd.interop.state_dict(self.rule, self.rule_state)

    def on_load_checkpoint(self, checkpoint):
        self.rule_state = jd.interop.load_state_dict(self.rule, checkpoint["rule"])


def trainer(folder, epochs, precision) -> Any:
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision=precision,
        default_root_dir=folder,
        **quiet,
    )


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 1, 6, 6, generator=generator)
    kind = torch.randint(3, (48,), generator=generator)
    return DataLoader(TensorDataset(x, kind, x.mean((1, 2, 3))), batch_size=16)


def model():
    torch.manual_seed(1)
    return TwoTasks()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_is_the_run(tmp_path, precision):
    with torch.random.fork_rng():
        whole, half, resumed = model(), model(), TwoTasks()
        long = trainer(tmp_path, 4, precision)
        long.fit(whole, data())
        first = trainer(tmp_path, 2, precision)
        first.fit(half, data())
        first.save_checkpoint(tmp_path / "middle.ckpt")
        trainer(tmp_path, 4, precision).fit(
            resumed, data(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True
        )
    assert -1 <= long.logged_metrics["cosine"] <= 1
    assert resumed.rule_state.inner.step.eq(12).all(), "counted on"
    for name, leaf in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], leaf, rtol=0, atol=0)
    assert not torch.equal(whole.kind.weight, half.kind.weight)
