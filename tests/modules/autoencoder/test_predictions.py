"""What predict and export make of an autoencoder."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from pyarrow import parquet

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.callbacks import PredictionWriter
from lightning_bigmodels.data import Images
from lightning_bigmodels.export import export, load_exported
from tests.modules.autoencoder.toys import SMALL, batch, built, digits, plain, variational
from tests.workers import run_on


def predict(folder, processes, module, data):
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp",
        default_root_dir=folder,
        logger=False,
        callbacks=[PredictionWriter()],
        enable_progress_bar=False,
    )
    trainer.predict(module, data, return_predictions=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_codes_are_one_table_in_the_order_of_the_pictures(processes, tmp_path):
    module = variational(codebook_size=8)
    data = digits(test_fraction=0.01, eval_batch_size=4)
    (tmp_path / "predictions.part5.parquet").write_bytes(b"of a killed run")
    run_on(processes, lambda: predict(tmp_path, processes, module, data))
    table = parquet.read_table(tmp_path / "predictions.parquet")
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) % 4 != 0  # the last batch holds what counts for nothing
    assert table["index"].to_pylist() == [row["index"] for row in rows] == list(range(len(rows)))
    assert table["file"].to_pylist() == [row["file"] for row in rows]
    assert table.schema.field("latents").metadata == {b"shape": b"4,2,2"}
    built(module).eval()
    data.setup("predict")
    images = torch.cat([own["images"] for own in data.predict_dataloader()])[: len(rows)]
    with torch.no_grad():
        code, _ = module.network.encode(images)
        latents, chosen = module.network.quantize(code)
    assert torch.allclose(torch.tensor(table["latents"].to_pylist()), latents.flatten(1), atol=1e-6)
    assert torch.equal(torch.tensor(table["codes"].to_pylist()), chosen.flatten(1).int())
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.parquet", "predictions.jsonl"}


def test_the_command_says_where_the_codes_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "run.yaml").write_text(
        f"model: {{class_path: Autoencoder, init_args: {json.dumps(SMALL)}}}\n"
        "data: {class_path: Images, init_args: {source: sklearn-digits, image_size: 8, channels: 1}}\n"
        "trainer: {accelerator: cpu, logger: true, limit_predict_batches: 1, enable_progress_bar: false}\n"
    )
    assert main(["predict", "--config", "run.yaml"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("numbers ")]
    assert parquet.read_table(line.split()[1]).column_names == ["index", "file", "latents"]


def test_a_gaussian_code_is_its_mean_with_its_spread(tmp_path):
    module = variational()
    predict(tmp_path, 1, module, digits(test_fraction=0.01))
    table = parquet.read_table(tmp_path / "predictions.parquet")
    assert table.column_names == ["index", "file", "latents", "std"]
    assert min(min(row) for row in table["std"].to_pylist()) > 0


def test_reconstructions_are_pictures(tmp_path):
    predict(tmp_path, 1, plain(predicts="reconstructions"), digits(test_fraction=0.01))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert all((tmp_path / row["picture"]).is_file() for row in rows)
    assert not (tmp_path / "predictions.parquet").exists()


def test_pictures_are_made_from_nothing(tmp_path):
    data = Images(source="sklearn-digits", image_size=8, channels=1, num_generated=3, eval_batch_size=2)
    predict(tmp_path, 1, variational(), data)
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [f"{i:06}.png" for i in range(3)]


@pytest.mark.parametrize("build", [plain, lambda: variational(codebook_size=8)])
def test_both_halves_are_exported(build, tmp_path):
    module = built(build()).eval()
    export(module, tmp_path / "out", ["torch", "weights"])
    images = batch()["images"]
    with torch.no_grad():
        latents = module.encode_pictures(images)
        pictures = module.decode_latents(latents)
    found = load_exported(tmp_path / "out" / "encoder")(images)
    assert torch.allclose(found["latents"], latents, atol=1e-5)
    again = load_exported(tmp_path / "out" / "decoder")(latents)["images"]
    assert (again.int() - pictures.int()).abs().max() <= 1
    assert (tmp_path / "out" / "encoder" / "weights.safetensors").is_file()
    if module.network.quantizer is not None:
        assert torch.equal(found["codes"], module.network.quantize(module.network.encode(images)[0])[1])
