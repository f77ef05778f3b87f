"""The card of a finished run: when it is written, rewritten and uploaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

import train.record.finish
from conf.schema import CardConfig
from tests.cards import compose_run, make_summary
from train.data import hub
from train.record.card import write_card
from train.record.directory import RunDirectory, run_identity
from train.record.publish import push_to_hub, renew_card


@pytest.fixture
def finished(tmp_path):
    """Make a finished run, whose card says that no licence was chosen; return its config, plan, directory and summary."""
    config, plan = compose_run(f"runs_dir={tmp_path}")
    directory = RunDirectory(plan.run_dir)
    directory.model.mkdir(parents=True)
    summary = make_summary(plan)
    write_card(config, plan, directory, summary)
    return config, plan, directory, summary


def test_starting_a_finished_run_again_rewrites_its_card_only_if_asked(finished):
    config, plan, directory, summary = finished
    readme = directory.model / "README.md"
    readme.write_text("edited by hand")
    renew_card(config, plan, directory, summary)
    assert readme.read_text() == "edited by hand"
    config.card = CardConfig(license="mit")
    renew_card(config, plan, directory, summary)
    assert ModelCard.load(readme).data.license == "mit"


def test_a_licence_once_chosen_stays(finished):
    config, plan, directory, summary = finished
    for card in (CardConfig(license="other", license_name="house-rules"), CardConfig(hub_id="ada/tiny")):
        config.card = card
        renew_card(config, plan, directory, summary)
    data = ModelCard.load(directory.model / "README.md").data
    assert (data.license, data.license_name) == ("other", "house-rules")
    assert 'name = "ada/tiny"' in (directory.model / "README.md").read_text()


def test_the_card_is_there_before_the_run_counts_as_finished(finished, monkeypatch):
    config, plan, directory, summary = finished

    def no_card(*_: object) -> None:
        raise OSError("disk full")

    for name in ("write_sample", "read_records", "draw_report", "closing_words"):
        monkeypatch.setattr(train.record.finish, name, lambda *_: "")
    monkeypatch.setattr(train.record.finish, "write_card", no_card)
    recorder: Any = SimpleNamespace(finish=lambda summary: None)
    with pytest.raises(OSError, match="disk full"):
        train.record.finish.finish(config, plan, directory, recorder, summary)
    assert not directory.summary.exists()


def test_a_model_that_cannot_write_a_sample_is_finished_all_the_same(finished, monkeypatch, capsys):
    config, plan, directory, summary = finished

    def no_sample(*_: object) -> None:
        raise RuntimeError("probability tensor contains nan")

    for name in ("read_records", "draw_report", "closing_words", "write_card"):
        monkeypatch.setattr(train.record.finish, name, lambda *_: "")
    monkeypatch.setattr(train.record.finish, "write_sample", no_sample)
    recorder: Any = SimpleNamespace(finish=lambda summary: None)
    train.record.finish.finish(config, plan, directory, recorder, summary)
    assert directory.summary.exists()
    assert "warning: the sample could not be made: probability tensor contains nan" in capsys.readouterr().err


class FakeHub:
    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - one for all, as HfApi is made inside

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_an_upload_is_made_only_when_asked_and_then_private(finished, monkeypatch):
    directory = finished[2]
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    monkeypatch.setattr(FakeHub, "calls", [])
    push_to_hub(CardConfig(hub_id="ada/tiny"), directory.model)
    assert FakeHub.calls == []
    push_to_hub(CardConfig(hub_id="ada/tiny", push_to_hub=True), directory.model)
    hub.is_reachable.cache_clear()
    (repo, options), (_, upload) = FakeHub.calls
    assert (repo, options) == ("ada/tiny", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("ada/tiny", directory.model)


def test_without_a_network_the_upload_says_so_and_leaves_the_run_alone(finished, monkeypatch):
    directory = finished[2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = (directory.model / "README.md").read_text()
    with pytest.raises(
        ValueError, match=r"the run is finished.*not uploaded to ada/tiny.*does not answer.*rerun the same command"
    ):
        push_to_hub(CardConfig(hub_id="ada/tiny", push_to_hub=True), directory.model)
    hub.is_reachable.cache_clear()
    assert (directory.model / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"license": "Apache 2.0"}, "is not a licence identifier"),
        ({"license": "other"}, "needs card.license_name"),
        ({"license_name": "house-rules"}, "set card.license=other"),
        ({"hub_id": "tiny"}, "give OWNER/NAME"),
        ({"push_to_hub": True}, "needs card.hub_id"),
    ],
)
def test_a_card_that_cannot_be_is_refused_before_the_run(override, message):
    with pytest.raises(ValueError, match=message):
        CardConfig(**override)


def test_another_card_does_not_make_another_run():
    assert run_identity(compose_run()[0]) == run_identity(compose_run("card.license=mit")[0])
