"""Latents of pictures, made once and kept in a file, so that no epoch but the first waits for an autoencoder."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_bigmodels.data.captioned_images import CaptionedImages
from lightning_bigmodels.data.vision.captioned import CaptionedPictures
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.diffusion.text_denoisers import moments
from lightning_bigmodels.modules.diffusion.text_parts import TextParts

_BATCH = 16
_VERSION = 1  # of the file's layout


class LatentCache:
    """The moments of the latents of a part: mean and logarithm of the variance, in float16.

    The file's name is a hash of all that decides what is in it: the autoencoder's configuration and weights, each
    picture's file with its size and time of change, the shape it is made, how pixels are made. What changes makes
    another file.

    Args:
        folder: Where files are kept.
        part: The pictures.
        autoencoder: An AutoencoderKL, frozen.
    """

    def __init__(self, folder: str, part: CaptionedPictures, autoencoder: nn.Module) -> None:
        self.part = part
        self.autoencoder = autoencoder
        config = dict(autoencoder.config)  # type: ignore[arg-type]
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        channels = 2 * int(config["latent_channels"])
        self._shapes = [
            (channels, height // factor, width // factor) for height, width in map(part.size, range(len(part)))
        ]
        self._ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])
        self.path = Path(folder).expanduser() / f"latents_{self._key()}.npy"
        self._values: NDArray[np.float16] | None = None

    def moments(self, indices: Tensor) -> Tensor:
        """Return (B, 2 C, h, w) float32 of examples of one shape; zeros where one counts for nothing."""
        if self._values is None:
            self._values = np.load(self.path, mmap_mode="r")
        places = indices.tolist()
        shape = next((self._shapes[place] for place in places if place >= 0), self._shapes[0])
        found = torch.zeros(len(places), *shape)
        for row, place in zip(found, places, strict=True):
            if place >= 0:
                stop = int(self._ends[place])
                values = np.array(self._values[stop - row.numel() : stop], dtype=np.float32)
                row.copy_(torch.from_numpy(values).view(shape))
        return found

    def fill(self, data: CaptionedImages, device: torch.device) -> None:
        """Make the file, unless it is there; of several processes one makes it, and the others wait.

        Args:
            data: Whose part it is.
            device: Where the autoencoder is.

        Raises:
            InputError: what training sees of a picture changes from epoch to epoch, or a picture cannot be read.
        """
        if any(each.crop is not None or each.horizontal_flip for each in self.part.transforms):
            raise InputError(
                "latent_cache keeps one latent of each picture; set data.crop_scale to null and data.horizontal_flip "
                "to 0, or latent_cache to null"
            )
        if data.on_error != "error":
            raise InputError(
                "latent_cache needs every picture; set data.on_error to error, and remove what bigmodels check finds"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if not self.path.is_file():
                rank_zero_info(f"the latents of {len(self.part)} pictures are made once, and kept in {self.path}")
                self._write(device)

    def _write(self, device: torch.device) -> None:
        half = self.path.with_suffix(".part")
        values = np.lib.format.open_memmap(half, mode="w+", dtype=np.float16, shape=(int(self._ends[-1]),))
        for bucket in self.part.buckets.unique().tolist():
            members = (self.part.buckets == bucket).nonzero().flatten()
            for indices in members.split(_BATCH):
                batch = self.part.__getitems__(indices.tolist())
                made = moments(self.autoencoder, batch["images"].to(device).float() / 127.5 - 1)
                for place, row in zip(indices.tolist(), made.cpu().numpy().astype(np.float16), strict=True):
                    stop = int(self._ends[place])
                    values[stop - row.size : stop] = row.reshape(-1)
        values.flush()
        del values
        half.replace(self.path)

    def _key(self) -> str:
        part = self.part
        key = hashlib.blake2b(digest_size=12)
        config = {name: value for name, value in dict(self.autoencoder.config).items() if name[0] != "_"}  # type: ignore[arg-type]
        how = [vars(each)["interpolation"] for each in part.transforms]
        key.update(json.dumps([_VERSION, config, part.channels, how], sort_keys=True, default=str).encode())
        for name, weight in self.autoencoder.state_dict().items():
            key.update(name.encode())
            key.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for index in range(len(part)):
            name, size = part.name(index), part.size(index)
            try:
                status = os.stat(name)  # noqa: PTH116
                content = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:  # no file of its own: generated, or inside a data set
                content = part.digest(index)
            key.update(f"{name} {size} {content}\n".encode())
        return key.hexdigest()


class MadeUpLatents:
    """Latents of no pictures, for steps that are planned before there are any.

    Args:
        parts: What they are made for.
        image_shape: Channels, height and width of a picture.
        network: Its autoencoder would make the latents.
    """

    def __init__(self, parts: TextParts, image_shape: tuple[int, int, int], network: Any) -> None:
        self._shape = parts.example_shape(image_shape, network.autoencoder)

    def moments(self, indices: Tensor) -> Tensor:
        """Return (B, 2 C, h, w) float32 zeros."""
        channels, height, width = self._shape
        return torch.zeros(len(indices), 2 * channels, height, width)
