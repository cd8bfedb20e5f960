import csv
import json
import os
import re
import shlex
import signal
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from lightning_bigmodels import runs
from lightning_bigmodels.__main__ import main
from lightning_bigmodels.callbacks.run_summary import _duration
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.runs import RunLogger, find_checkpoint, new_version, versions
from tests.test_cli import SHORT, TOYS

CHECKPOINT = "{class_path: ModelCheckpoint, init_args: {filename: best, monitor: val_loss, save_last: true}}"
FIT = ["fit", *TOYS, *SHORT, f"--trainer.callbacks={CHECKPOINT}"]


@pytest.fixture(autouse=True)
def clean_process(tmp_path, monkeypatch):
    """An empty folder and home, no W&B, and afterwards the environment and the signals of before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def stop(step, how="error"):
    return [
        "--trainer.callbacks+=tests.toys.Stop",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.how={how}",
    ]


def rows(path="runs/fit/version_0/metrics.csv"):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def train_steps(path="runs/fit/version_0/metrics.csv"):
    return [int(row["step"]) for row in rows(path) if row["train_loss"]]


# folders


def test_versions_count_up_by_number_not_by_letter(tmp_path):
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / "fit" / name).mkdir(parents=True)
    assert [path.name for path in versions(tmp_path, "fit")] == ["version_2", "version_10"]
    assert new_version(tmp_path, "fit") == 11
    assert new_version(tmp_path / "absent", "fit") == 0


def test_runs_that_start_at_once_get_different_folders(tmp_path):
    barrier, numbers = threading.Barrier(8), []

    def start():
        barrier.wait()
        numbers.append(new_version(tmp_path, "fit"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(8))


def test_each_run_has_a_folder_with_all_that_belongs_to_it():
    assert main(FIT) == 0
    assert main(FIT) == 0
    assert main(["validate", *TOYS, "--ckpt_path=best"]) == 0
    for run in ("runs/fit/version_0", "runs/fit/version_1"):
        names = {path.name for path in Path(run).iterdir()}
        assert names == {"checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"}
        assert {path.name for path in Path(run, "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.name for path in Path("runs/validate").iterdir()} == {"version_0"}
    assert float(rows("runs/validate/version_0/metrics.csv")[0]["val_loss"]) == pytest.approx(
        float(rows("runs/fit/version_1/metrics.csv")[-1]["val_loss"])
    )
    # nothing of ours lies outside
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_root_logger_and_dev_run_are_the_users_choice():
    assert main(["fit", *TOYS, *SHORT, "--trainer.fast_dev_run=true"]) == 0
    assert not Path("runs").exists()
    assert main([*FIT, "--trainer.logger=false"]) == 0
    assert not Path("runs/fit").exists()
    assert main([*FIT, "--trainer.default_root_dir=elsewhere"]) == 0
    assert Path("elsewhere/fit/version_0/config.yaml").is_file()
    assert main([*FIT, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]) == 0
    assert Path("logs/lightning_logs/version_0/config.yaml").is_file()


def test_only_the_first_process_makes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.rank_zero_only, "rank", 1)
    loggers = runs.make_loggers(tmp_path / "a", "fit", title="x")
    assert len(loggers) == 1
    loggers[0].log_metrics({"x": 1.0}, step=0)
    loggers[0].go_on_from(0)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(runs.rank_zero_only, "rank", 0)
    monkeypatch.setenv("NODE_RANK", "1")
    runs.make_loggers(tmp_path / "a", "fit", title="x")
    assert not (tmp_path / "a").exists()


def test_two_processes_share_one_folder():
    # with forked workers: a subprocess would import Lightning twice
    assert main([*FIT, "--trainer.strategy=ddp_fork", "--trainer.devices=2"]) == 0
    assert [path.name for path in Path("runs/fit").iterdir()] == ["version_0"]
    assert train_steps() == [0, 1]
    assert Path("runs/fit/version_0/checkpoints/last.ckpt").is_file()


# configurations


def test_the_config_in_the_folder_repeats_the_run():
    assert main([*FIT, "--model.optimizer=SGD", "--model.optimizer.lr=0.001"]) == 0
    assert main(["fit", "--config=runs/fit/version_0/config.yaml"]) == 0
    first, second = (Path("runs/fit", f"version_{n}") for n in (0, 1))
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    weights = [torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"] for run in (first, second)]
    assert torch.equal(weights[0]["layer.weight"], weights[1]["layer.weight"])


def test_a_resumed_run_keeps_a_config_that_differs():
    assert main(FIT) == 0
    assert main([*FIT, "--ckpt_path=last"]) == 0
    folder = Path("runs/fit/version_0")
    assert sorted(path.name for path in folder.glob("*config*")) == ["config.yaml"]
    assert main([*FIT, "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert yaml.safe_load((folder / "config_1.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert not list(folder.glob("*.tmp"))


# resuming


def test_last_goes_on_in_the_same_folder_and_a_file_starts_a_new_one():
    assert main(FIT) == 0
    assert main([*FIT, "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    assert [path.name for path in versions("runs", "fit")] == ["version_0"]
    assert train_steps() == list(range(8))
    assert main([*FIT, "--ckpt_path=runs/fit/version_0/checkpoints/last.ckpt", "--trainer.max_epochs=3"]) == 0
    assert train_steps("runs/fit/version_1/metrics.csv") == list(range(8, 12))
    assert main([*FIT, "--ckpt_path=best", "--trainer.max_epochs=4"]) == 0
    assert train_steps("runs/fit/version_2/metrics.csv") == list(range(12, 16))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_steps_that_are_done_again_appear_once(every):
    checkpoint = f"{{class_path: ModelCheckpoint, init_args: {{every_n_train_steps: {every}, save_last: true}}}}"
    arguments = ["fit", *TOYS, *SHORT, f"--trainer.callbacks={checkpoint}", "--trainer.max_epochs=3"]
    with pytest.raises(OSError, match="disk full"):
        main([*arguments, *stop(6)])
    assert train_steps() == list(range(5))
    assert main([*arguments, "--ckpt_path=last"]) == 0
    assert train_steps() == list(range(12))
    assert [int(row["step"]) for row in rows() if row["val_loss"]] == [3, 7, 11]


def test_a_run_killed_before_its_first_checkpoint_starts_anew_in_its_folder():
    with pytest.raises(OSError, match="disk full"):
        main([*FIT, *stop(2)])
    assert train_steps() == [0]
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        assert main([*FIT, "--ckpt_path=last"]) == 0
    assert [path.name for path in versions("runs", "fit")] == ["version_0"]
    assert train_steps() == [0, 1, 2, 3]


def test_metrics_survive_a_torn_row_and_new_columns(tmp_path):
    path = tmp_path / "fit" / "version_0" / "metrics.csv"
    logger = RunLogger(tmp_path, "fit", new_version(tmp_path, "fit"))
    for step in range(3):
        logger.log_metrics({"a": float(step)}, step=step)
        logger.save()
    with path.open("a") as file:
        file.write("3.0,")  # killed in the middle of a row
    logger = RunLogger(tmp_path, "fit", 0)
    logger.go_on_from(2)
    logger.log_metrics({"b": 7.0}, step=2)
    logger.save()
    assert rows(path) == [
        {"a": "0.0", "b": "", "step": "0"},
        {"a": "1.0", "b": "", "step": "1"},
        {"a": "", "b": "7.0", "step": "2"},
    ]


def test_best_and_last_mean_the_latest_run_that_has_checkpoints(tmp_path):
    with pytest.raises(InputError, match="train first with: bigmodels fit"):
        find_checkpoint(tmp_path, "best")
    for version, names in [(0, ["best.ckpt", "last.ckpt"]), (9, ["last.ckpt"]), (10, [])]:
        folder = tmp_path / "fit" / f"version_{version}" / "checkpoints"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
    folder = tmp_path / "fit" / "version_9" / "checkpoints"
    assert find_checkpoint(tmp_path, "last") == folder / "last.ckpt"
    (folder / "last-v1.ckpt").touch()
    os.utime(folder / "last.ckpt", (0, 0))
    assert find_checkpoint(tmp_path, "last") == folder / "last-v1.ckpt"
    with pytest.raises(InputError) as error:
        find_checkpoint(tmp_path, "best")
    assert str(error.value) == (
        f"{folder} has no best.ckpt; name one of its files with --ckpt_path: last-v1.ckpt, last.ckpt"
    )


# W&B


def wandb_records(path):
    """Yield the records of an offline run: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 and length == 0:
            position += left
            continue
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_run(path):
    history, config, run = [], {}, None
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            )
        elif kind in ("run", "config"):
            run = record.run if kind == "run" else run
            update = record.run.config.update if kind == "run" else record.config.update
            config |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in update}
    return history, config, run


def test_wandb_is_offline_without_a_key_and_resumes_under_the_same_id(monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(runs, "_has_wandb_key", lambda: False)
    assert main(FIT) == 0
    assert "wandb: " not in capfd.readouterr().err
    run_id = Path("runs/fit/version_0/wandb_id.txt").read_text().strip()
    time.sleep(1.1)  # wandb names the folder of each start by the second
    assert main([*FIT, "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    output = capfd.readouterr()
    assert "wandb: " not in output.err
    assert "WANDB_MODE" not in os.environ

    files = sorted(Path("runs/fit/version_0/wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    records = [wandb_run(path) for path in files]
    logged = [row for history, _, _ in records for row in history]
    assert [row["trainer/global_step"] for row in logged if "train_loss" in row] == list(range(8))
    for _, config, run in records:
        assert (run.run_id, run.project, run.display_name) == (run_id, "lightning-bigmodels", "ToyModel version_0")
        assert config["trainer"]["log_every_n_steps"] == 1
        assert config["model"]["class_path"] == "tests.toys.ToyModel"

    # the command in the summary names these folders
    pattern = re.search(r"wandb sync (\S+)", output.out)[1]
    assert {path.parent for path in files} == set(Path().glob(pattern))


@pytest.mark.parametrize("setting", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_wandb_can_be_disabled(setting, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE")
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert len(runs.make_loggers(tmp_path / "r", "fit", title="x")) == 1
    assert not any((tmp_path / "r" / "fit" / "version_0").iterdir())


def test_wandb_is_online_where_a_key_is(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    logger = runs.make_loggers(tmp_path / "r", "fit", title="x")[1]
    assert (logger._wandb_init["mode"], logger._wandb_init["resume"]) == ("online", "allow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = runs.make_loggers(tmp_path / "r", "fit", title="x")[1]
    assert (logger._wandb_init["mode"], logger._wandb_init["resume"]) == ("offline", None)
    assert len(runs.make_loggers(tmp_path / "r", "validate", title="x")) == 1


def test_only_a_folder_without_content_is_taken_back(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = runs.make_loggers(tmp_path, "fit", title="x")
    folder = tmp_path / "fit" / "version_0"
    (folder / "metrics.csv").write_text("step\n")
    runs.discard(loggers)
    assert {path.name for path in folder.iterdir()} == {"metrics.csv", "wandb_id.txt"}
    (folder / "metrics.csv").unlink()
    runs.discard(loggers)
    assert not folder.exists()


def test_a_key_is_looked_for_without_a_question(capfd):
    # pytest closes stdin: a question would be an error
    assert runs._has_wandb_key() is False
    assert capfd.readouterr() == ("", "")


# the summary


def summary_of(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\S.*\S  +\S", line)]
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


def test_the_summary_says_what_was_reached_and_where_it_lies(capsys):
    assert main(FIT) == 0
    summary = summary_of(capsys)
    best = float(rows()[-1]["val_loss"])
    assert re.fullmatch(r"\d+\.\d s", summary.pop("training time"))
    command = summary.pop("to multiply")
    assert summary == {
        "best val_loss": f"{best:.4f}",
        "last val_loss": f"{best:.4f}",
        "last val_bits_per_byte": "1.5000",
        "best checkpoint": "runs/fit/version_0/checkpoints/best.ckpt",
        "last checkpoint": "runs/fit/version_0/checkpoints/last.ckpt",
        "metrics": "runs/fit/version_0/metrics.csv",
    }
    assert command == (
        "bigmodels predict --config runs/fit/version_0/config.yaml --ckpt_path runs/fit/version_0/checkpoints/best.ckpt"
    )
    assert main(shlex.split(command)[1:]) == 0


def test_the_summary_names_the_config_as_it_was_given(capsys):
    Path("mine.yaml").write_text("model: ToyModel\ndata: ToyData\n")
    assert main(["fit", "--config=mine.yaml", *SHORT]) == 0
    assert "bigmodels predict --config mine.yaml --ckpt_path " in summary_of(capsys)["to multiply"]


def test_predictions_are_named(capsys):
    assert main(FIT) == 0
    assert "predictions" not in capsys.readouterr().out
    Path("runs/predict/version_0").mkdir(parents=True)
    assert main(["predict", *TOYS, *SHORT[:3], "--ckpt_path=best"]) == 0
    assert summary_of(capsys) == {"predictions": "runs/predict/version_1/predictions.jsonl"}
    assert Path("runs/predict/version_1/predictions.jsonl").is_file()


def test_durations():
    assert [_duration(s) for s in (3.14, 59.9, 61, 3599.7, 7384)] == [
        "3.1 s",
        "59.9 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 03 min",
    ]
