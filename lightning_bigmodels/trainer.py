"""The Trainer of the `bigmodels` command: Lightning's, with the command's own verbs as methods."""

import json as json_format
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from typing_extensions import override

from lightning_bigmodels.batch_size import find_batch_size
from lightning_bigmodels.callbacks.explain import Explainer, explain_predictions
from lightning_bigmodels.data.check import Inspector
from lightning_bigmodels.data.check_report import check_output, summary, tally, write_report
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.export import export, unsupported
from lightning_bigmodels.exportable import Format
from lightning_bigmodels.planner import verb
from lightning_bigmodels.planner.flags import setting_of
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.strategies.checkpoint_io import read_sharded
from lightning_bigmodels.strategies.sharded_checkpoint import ShardedCheckpoints


class Trainer(pl.Trainer):
    """Lightning's Trainer: devices, precision, length of the run, callbacks, loggers."""

    @override
    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        error: Exception | None = None
        try:
            super().save_checkpoint(filepath, weights_only, storage_options)
        except (InputError, RunError) as caught:
            if isinstance(self.strategy, ShardedCheckpoints):
                raise  # on all processes
            error = caught
            # rank zero alone writes a plain file; the others have gone on to this
            self.strategy.barrier()
        if not isinstance(self.strategy, ShardedCheckpoints):
            self._raise_on_all(error)

    @override
    def _teardown(self) -> None:
        # where a save in the background ends; after an error the other processes may be gone
        if self.interrupted or isinstance(self.strategy, ShardedCheckpoints):
            super()._teardown()
            return
        error: Exception | None = None
        try:
            super()._teardown()
        except (InputError, RunError) as caught:
            error = caught
        self._raise_on_all(error)

    def _raise_on_all(self, error: Exception | None) -> None:
        """Raise the error of rank zero on all processes, which would wait for it for ever."""
        error = self.strategy.broadcast(error)
        if error is not None:
            raise error

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        output: str = "export",
        ckpt_path: str | None = None,
        formats: list[Format] | Format | None = None,
    ) -> Path:
        """Write a trained model to a folder that other programs read.

        A network of transformers or diffusers becomes a folder that these load. Any other becomes model.pt2
        (torch.export), model.onnx, weights.safetensors and description.json, with what comes before and after the
        network inside: pixels in, probabilities out. What was written is loaded back and compared before it counts.

        Args:
            model: The model to write.
            datamodule: Not used, and not set up: export needs no data.
            output: Folder to write to.
            ckpt_path: Checkpoint to load: a path, or best or last of the latest fit.
            formats: Which files: torch, onnx (with the extra onnx), weights, or some of them as [torch,weights]; null
                writes all that can hold the network and whose packages are installed.

        Returns:
            The folder.

        Raises:
            InputError: there are no trained weights to write.
        """
        if ckpt_path is None and not model.hparams.get("pretrained"):
            raise InputError(
                "export would write untrained weights; name a checkpoint: --ckpt_path best, last or a file"
            )
        model.configure_model()
        if ckpt_path is not None:
            if Path(ckpt_path).is_dir():
                checkpoint = read_sharded(Path(ckpt_path), network_only=True)
            else:
                checkpoint = torch.load(ckpt_path, weights_only=True, map_location="cpu")
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        folder = export(model, output, [formats] if isinstance(formats, str) else formats)
        for name, reason in unsupported(folder).items():
            print(f"without {name}: {reason}")
        print(f"exported to {folder}")
        return folder

    def explain(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        method: str = "grad_cam",
        target: str = "predicted",
        num_examples: int = 16,
        part: Literal["predict", "val"] = "predict",
        layer: str | None = None,
        baseline: float | None = None,
        window: int | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Show what made a classifier say so: pictures in explanations/ of the run's folder.

        Each picture is shown beside itself in gray with a heat map over it: what speaks for the class, red, and yellow
        where it counts most. The precision is that of the weights, and one device is used.

        Args:
            model: A classifier.
            datamodule: The data.
            method: grad_cam, integrated_gradients or occlusion.
            target: The class that is asked for: predicted, true, or the name of one.
            num_examples: How many examples are explained, from the first on.
            part: The examples that predict answers for, or those of validation.
            layer: Name of the layer for grad_cam; null takes the last with maps of the size of the last convolution's,
                of a ViT the norm before the last attention, of a Swin the norm before pooling.
            baseline: Gray level from 0 to 1 that stands for nothing, for the other two methods; null takes the mean
                that the network normalizes with.
            window: Side in pixels of the square that occlusion hides at a time; null takes a seventh of the picture's.
            ckpt_path: Checkpoint to load: a path, or best or last of the latest fit.

        Raises:
            InputError: there are no trained weights, the model is no classifier, or an argument does not fit.
        """
        if ckpt_path is None and not (model.hparams.get("weights") or model.hparams.get("pretrained")):
            raise InputError(
                "explain would look at untrained weights; name a checkpoint: --ckpt_path best, last or a file"
            )
        if datamodule is None:
            raise InputError("no data is named; name a recipe with --config (see: bigmodels recipes) or --data CLASS")
        explainer = Explainer(method, target, layer, baseline, window, num_examples)
        folder, number = explain_predictions(self, explainer, model, datamodule, part, ckpt_path)
        print(f"{number} explanations in {folder}")

    def prepare(
        self,
        output: str,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        num_workers: int | None = None,
        shard_bytes: int = 16 * 2**20,
    ) -> None:
        """Tokenize text once into shards that --data.shards reads, also from an object store.

        A recipe's data, or --data Text and --data.sources, say what is prepared: data.sources, data.tokenizer or
        data.vocab_size, and the fractions or sources for validation and test. Killed anywhere, the same command goes
        on. The address of an S3-compatible store is AWS_ENDPOINT_URL; credentials are found as by every AWS program.

        Args:
            output: A folder or s3://BUCKET/PREFIX; empty, or left by the same command.
            model: Not used.
            datamodule: The text.
            num_workers: Processes that tokenize; 0 is none but this one, null is one for each core.
            shard_bytes: Size of a shard; 64 of them are read at the same time.

        Raises:
            InputError: there is nothing to prepare, or the output holds something else.
        """
        if datamodule is None or not hasattr(datamodule, "write_shards"):
            name = "no data is" if datamodule is None else f"{type(datamodule).__name__} is"
            raise InputError(f"{name} given, and prepare knows Text; name a recipe with --config, or --data Text")
        cores = len(os.sched_getaffinity(0))
        datamodule.write_shards(output, shard_bytes, cores if num_workers is None else num_workers)

    def check(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        output: str | None = None,
        num_workers: int | None = None,
    ) -> None:
        """Read every file of the training, validation and test data, and tell all that is wrong with them.

        Errors are files that cannot be read, copies in training and another part (a leak), classes without training
        examples, and what else a run would refuse; with them the command ends with code 1. Warnings are copies within a
        part (of equal bytes), copies with different labels, empty documents, and classes of which one has more than ten
        times the examples of another. The first few of each kind are printed.

        Args:
            model: Not used.
            datamodule: The data, as a recipe or --data describes them.
            output: A file for the whole list, which ends in .csv or .jsonl.
            num_workers: Processes that read files; 0 is none but this one, null is one for each core.

        Raises:
            InputError: there are no such data.
            RunError: there are errors in them.
        """
        if datamodule is None or not hasattr(datamodule, "inspect"):
            name = "no data is named" if datamodule is None else f"check cannot read {type(datamodule).__name__}"
            raise InputError(f"{name}; name a recipe with --config (see: bigmodels recipes) or --data CLASS")
        check_output(output)
        inspector = Inspector(len(os.sched_getaffinity(0)) if num_workers is None else num_workers)
        datamodule.inspect(inspector)
        findings = inspector.findings()
        print("\n".join(summary(inspector, findings)))
        if output is not None:
            write_report(Path(output), findings)
        told = tally(findings) if output is None else f"{tally(findings)}, listed in {output}"
        if any(finding.level == "error" for finding in findings):
            raise RunError(f"the data have {told}; mend the errors before a run")
        print(told)

    def batch_size(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        memory: float | None = None,
        max: int | None = None,
    ) -> int:
        """Find the largest data.batch_size whose training step fits into memory on all processes.

        Steps are run on made-up batches of growing size, with devices, strategy, precision and accumulation as given,
        and the peak of each is measured. Nothing is read or written. Evaluation and generation are not counted.

        Args:
            model: The model to train.
            datamodule: Makes the batches.
            memory: GiB that a step may need on each process; null takes what is available, less a margin.
            max: Largest batch size to try; null leaves it to memory.

        Returns:
            The batch size.

        Raises:
            InputError: not even one row fits.
        """
        if datamodule is None:
            raise InputError("no data is named; name a recipe with --config (see: bigmodels recipes) or --data CLASS")
        try:
            found = find_batch_size(self, model, datamodule, memory, max)
        except InputError:
            # all processes raise it, and the first one says it for all
            if not self.is_global_zero:
                raise SystemExit(2) from None
            raise
        if self.is_global_zero:
            print(found)
        return found.batch_size

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        gpu: str = "cpu",
        gpu_table: str | None = None,
        samples: int | None = None,
        price: float | None = None,
        output: str | None = None,
        calibrate: str | None = None,
        json: bool = False,
        setting: Setting | None = None,
    ) -> verb.Answer:
        """Tell memory, time and cost of a training before it runs, and what to change where it does not fit.

        A step of the recipe is run on tensors without memory, as the first of all its processes, with strategy,
        precision and accumulation as given. No GPU, no data and no weights are needed, and nothing is read. Devices
        that are not counted, as `trainer.devices: auto`, are one.

        Args:
            model: The model to train.
            datamodule: Makes the batches.
            gpu: Name of the devices, such as h100, a100, l4 or rtx-4090; cpu is this machine, measured.
            gpu_table: A CSV file with devices of your own, with the columns of planner/hardware.csv.
            samples: Rows that the run sees on all devices, in place of the recipe's length.
            price: Price of an hour of one device.
            output: Folder for the memory over the step, as memory.png and memory.html, and plan.json.
            calibrate: Folder of a run of fit on these devices, whose measured steps correct time and memory.
            json: Whether to print JSON: bytes, seconds, operations.
            setting: In Python, how a step is run; None is as this Trainer says.

        Returns:
            The plan and what belongs to it.

        Raises:
            InputError: an option is wrong, or the step cannot be planned.
        """
        if datamodule is None:
            raise InputError("no data is named; name a recipe with --config (see: bigmodels recipes) or --data CLASS")
        setting = setting_of(self, datamodule) if setting is None else setting
        found = verb.answer(self, model, datamodule, setting, gpu, gpu_table, samples, price, output, calibrate)
        print(json_format.dumps(found.to_dict(), indent=2) if json else found)
        return found
