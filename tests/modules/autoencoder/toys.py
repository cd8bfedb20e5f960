"""What tests of autoencoders share: small networks and digits."""

import torch
from lightning.pytorch import Callback, Trainer

from lightning_bigmodels import Autoencoder, Images, VariationalAutoencoder

SMALL = {"image_size": 8, "channels": 1, "latent_dim": 4, "config": {"widths": [8, 16], "num_blocks": 1}}
KL = {
    "architecture": "autoencoder_kl",
    "latent_dim": 2,
    "config": {"block_out_channels": [4, 8], "norm_num_groups": 2},
}


def plain(**changes):
    torch.manual_seed(0)
    return Autoencoder(**{**SMALL, **changes})


def variational(**changes):
    torch.manual_seed(0)
    return VariationalAutoencoder(**{**SMALL, **changes})


def digits(**changes):
    values = {"val_fraction": 0.02, "test_fraction": 0.02, "batch_size": 16, "eval_batch_size": 5}
    same = {"source": "sklearn-digits", "image_size": 8, "channels": 1, "crop_scale": None, "horizontal_flip": 0.0}
    return Images(**{**same, **values, **changes})


def batch(number=6, **more):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (number, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return {"images": images, "labels": torch.zeros(number, dtype=torch.int64), "indices": torch.arange(number), **more}


def built(module, monkeypatch=None):
    """Return a module with its network and, for a step without a Trainer, a place to log to."""
    module.configure_model()
    if monkeypatch is not None:
        module.logged = {}
        monkeypatch.setattr(module, "log", lambda name, value, **_: module.logged.__setitem__(name, value))
        monkeypatch.setattr(module, "log_dict", lambda values, **_: module.logged.update(values))
    return module


class Losses(Callback):
    """Keep the loss of each training batch."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.values.append(float(outputs["loss"]))


def short_fit(folder, strategy, processes, build, steps=4):
    """Return losses, validation metrics and the codebook, if any, of a short fit with 16 pictures in a global batch."""
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=steps,
        callbacks=[losses],
    )
    module = build()
    trainer.fit(module, digits(batch_size=16 // processes))
    quantizer = module.network.quantizer
    codes = None if quantizer is None else quantizer.codes.clone()
    return losses.values, {name: float(value) for name, value in trainer.callback_metrics.items()}, codes
