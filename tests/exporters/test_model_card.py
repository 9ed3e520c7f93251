"""The model card of a checkpoint, and its way to the hub: what it says, when it is written, and who may change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fxprune.checkpoints.checkpoint import load, save
from fxprune.cli.main import app
from fxprune.core.errors import CheckpointError, ExportError
from fxprune.exporters import hub
from fxprune.exporters.hub import push_to_hub
from fxprune.exporters.model_card import refresh_model_card
from fxprune.exporters.report_writer import write_report
from fxprune.models.manifest import read_manifest, verify_files, write_manifest
from tests.slices import SMALL, Keep, cut, cuts_of, make_model, source_of

REPORT = {
    "model": "someone/dense",
    "method": "channel",
    "params": {"dense": 1000, "slim": 800, "removed_share_all": 0.2},
    "groups": [{"name": "model.layers.0.mlp", "kind": "mlp", "layer": 0, "unit": "channel", "dense": 24, "kept": 16}],
}


def written(
    directory: Path, widths: tuple[int, int] = (16, 16), *, name: str = "someone/dense", path: Path | None = None
) -> Path:
    """A checkpoint with two MLPs of these widths."""
    model = make_model("llama", **{**SMALL, "num_hidden_layers": 2})
    tensors = cut(model.state_dict(), cuts_of(model, [Keep(mlp=range(width)) for width in widths]))
    plan = {"kept": {f"model.layers.{index}.mlp": list(range(width)) for index, width in enumerate(widths)}}
    history = [{"name": "channel", "options": {"ratio": 0.2, "calibration": "/home/someone/text.txt"}}]
    save(tensors, directory, source=source_of(model, name=name, path=path), plan=plan, history=history)
    return directory


def header_of(directory: Path) -> dict[str, Any]:
    """The YAML at the card's beginning."""
    values: dict[str, Any] = yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])
    return values


def test_the_card_says_what_the_checkpoint_is_and_how_to_load_it(tmp_path: Path) -> None:
    text = (written(tmp_path / "uniform") / "README.md").read_text()
    assert header_of(tmp_path / "uniform") == {
        "library_name": "transformers",
        "base_model": "someone/dense",
        "pipeline_tag": "text-generation",
        "tags": ["fxprune", "pruned"],
    }
    assert "# dense, pruned with fxprune" in text
    assert "AutoModelForCausalLM.from_pretrained(" in text
    assert "| model.layers.\\*.mlp.down\\_proj.weight | 2 | 32 x 24 | 32 x 16 |" in text
    assert "1,536 parameters fewer" in text  # 2 layers x 3 projections x 8 channels x 32
    assert "ratio=0.2" in text
    assert "/home/someone" not in text
    mixed = (written(tmp_path / "mixed", (8, 16)) / "README.md").read_text()
    assert "import fxprune" in mixed
    assert "import fxprune" not in text
    assert "AutoModelForCausalLM.from_pretrained(" in mixed
    assert "`save_pretrained`" in mixed
    assert "32 x 8 to 16" in mixed


def test_a_local_name_is_no_base_model_and_the_license_is_carried_over(tmp_path: Path) -> None:
    dense = tmp_path / "models" / "dense"
    dense.mkdir(parents=True)
    (dense / "README.md").write_text("---\nlicense: apache-2.0\nwidget: 1\n---\n# Dense\n")
    header = header_of(written(tmp_path / "out", name=str(dense), path=dense))
    assert header["license"] == "apache-2.0"
    assert {"base_model", "widget"}.isdisjoint(header)
    assert str(dense) not in (tmp_path / "out" / "README.md").read_text()
    (dense / "README.md").write_text("---\n: [\n---\n")  # nobody's fault but its author's
    assert "license" not in header_of(written(tmp_path / "other", name=str(dense), path=dense))


def test_figures_come_with_the_report_and_a_card_of_ones_own_stays(tmp_path: Path) -> None:
    directory = written(tmp_path / "out")
    card = directory / "README.md"
    assert "## Figures" not in card.read_text()
    write_report(REPORT, directory)
    assert "## Figures" in card.read_text()
    assert "| model.layers.0.mlp | 24 | 16 |" in card.read_text()
    load(directory)  # the card and the report are no part of what is sealed
    card.write_text("# My own card\n")
    write_report(REPORT, directory)
    assert card.read_text() == "# My own card\n"
    assert not refresh_model_card(tmp_path)


# ── The hub ───────────────────────────────────────────────────────────────────────────────────────────────────────


class FakeApi:
    """Records what would be sent."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error
        self.sent: dict[str, bytes] = {}
        self.read: Any = None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return type("Created", (), {"repo_id": repo_id})()

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        folder = Path(options["folder_path"])
        self.sent = {name: (folder / name).read_bytes() for name in options["allow_patterns"]}
        if self.read is not None:
            self.read(folder)
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})()


def test_a_whole_checkpoint_is_uploaded_with_its_card(tmp_path: Path) -> None:
    directory = written(tmp_path / "out", (8, 16))
    (directory / ".secret").write_text("mine")
    api = FakeApi()
    pushed = push_to_hub(directory, "me/slim", private=True, revision="try", api=api)
    assert [name for name, _ in api.calls] == ["create_repo", "create_branch", "upload_folder"]
    created, branch, uploaded = (options for _, options in api.calls)
    assert (created["repo_id"], created["private"], created["exist_ok"]) == ("me/slim", True, True)
    assert (branch["branch"], uploaded["revision"]) == ("try", "try")
    assert set(uploaded["allow_patterns"]) == set(pushed.files) >= {"README.md", "config.json", "fxprune.json"}
    assert ".secret" not in pushed.files
    assert pushed.url == "https://hub/commit/1"
    assert 'AutoModelForCausalLM.from_pretrained("me/slim")' in (directory / "README.md").read_text()


def test_paths_of_this_machine_are_not_uploaded(tmp_path: Path) -> None:
    home = str(tmp_path / "private" / "models" / "mine")
    directory = written(tmp_path / "out", (8, 16), name=home)
    options = {"ratio": 0.2, "calibration": f"{home}/notes.txt", "other": "C:\\Users\\me\\models\\mine"}
    record = read_manifest(directory).model_copy(update={"history": ({"name": "channel", "options": options},)})
    write_manifest(directory, record)
    (directory / "report.json").write_text(json.dumps({**REPORT, "model": home}))
    (directory / "report.md").write_text(f"#### {home}, pruned with {home}/notes.txt")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    api = FakeApi()
    api.read = verify_files  # what is downloaded has a seal and hashes that hold
    push_to_hub(directory, "me/slim", api=api)
    text = b"".join(content for name, content in api.sent.items() if not name.endswith(".safetensors")).decode()
    assert str(tmp_path) not in text
    assert "Users" not in text
    assert api.sent["report.md"] == b"#### mine, pruned with notes.txt"
    assert json.loads(api.sent["report.json"]) == {**REPORT, "model": "mine"}
    sent = json.loads(api.sent["fxprune.json"])
    assert sent["source"]["name"] == "mine"
    assert sent["history"][0]["options"] == {"ratio": 0.2, "calibration": "notes.txt", "other": "mine"}
    assert api.sent["model.safetensors"] == before["model.safetensors"]
    after = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {name for name in after if after[name] != before[name]} <= {"README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_damaged_or_foreign_is_uploaded(tmp_path: Path) -> None:
    api = FakeApi()
    directory = written(tmp_path / "out")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has SHA-256"):
        push_to_hub(directory, "me/slim", api=api)
    with pytest.raises(CheckpointError, match=r"fxprune\.json is missing"):
        push_to_hub(tmp_path, "me/slim", api=api)
    assert api.calls == []


class ConnectError(Exception):
    """What an HTTP client raises without a network: no OSError."""


def test_refusals_of_the_hub_are_typed(tmp_path: Path) -> None:
    directory = written(tmp_path / "out")
    for error in (PermissionError("no network"), ConnectError("no network")):
        with pytest.raises(ExportError, match=r"not uploaded to me/slim: \w+Error: no network; .*auth login"):
            push_to_hub(directory, "me/slim", api=FakeApi(error))


def test_the_command_pushes_only_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, api = written(tmp_path / "out"), FakeApi()
    real = push_to_hub
    monkeypatch.setattr(hub, "push_to_hub", lambda *args, **options: real(*args, **options, api=api))
    arguments = ["push", str(directory), "--repo", "me/slim", "--json", str(tmp_path / "pushed.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "pushed.json").read_text())["repo_id"] == "me/slim"
    assert dict(api.calls)["create_repo"]["private"] is False
    assert CliRunner().invoke(app, ["push", str(directory)]).exit_code == 2
