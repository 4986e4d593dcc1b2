"""Pushes by the real client to a Hub on this machine, during training and at its end, and back from there.

The scenarios of `hub_run.py` run in two processes, because the client reads its settings once: one uploads by LFS, the
other by xet, as the client does by default.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_llama import save_tiny_llama
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from local_hub import Failure, LocalHub
from places import PROCESSES


SCENARIOS = {False: ["refused", "end", "checkpoint", "all_checkpoints", "failing"], True: ["every_save", "adapter"]}
FULL = ["end", "checkpoint", "all_checkpoints", "failing", "every_save"]
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
ALWAYS = {".gitattributes", "README.md", "training_args.bin"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
STEPS = ["Training in progress, step 1", "Training in progress, step 2"]
WITH_CHECKPOINTS = [STEPS[0], f"{STEPS[0]}, checkpoint", STEPS[1], f"{STEPS[1]}, checkpoint"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What every scenario saw, by name, and the Hub after all of them."""
    folder = tmp_path_factory.mktemp("hub-runs")
    save_tiny_llama(folder / "base")
    hub = LocalHub(folder / "hub")
    hub.add_folder("models", "base/tiny-llama", folder / "base")
    hub.failures.append(Failure(r"POST /api/models/me/failing/commit/main .* step [23]$", [500, 500]))
    hub.failures.append(Failure(r"POST /api/models/me/every-save/commit/main .* step 1$", [500]))
    script, processes, seen = PROCESSES / "hub_run.py", {}, {}
    with hub.serving():
        for with_xet, scenarios in SCENARIOS.items():
            work = folder / ("xet" if with_xet else "lfs")
            work.mkdir()
            with (work / "output").open("w") as output:
                processes[work] = subprocess.Popen(
                    [sys.executable, str(script), str(work), *scenarios],
                    env=hub.environment(work, with_xet=with_xet), stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
        try:
            codes = {work: process.wait(timeout=300) for work, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
    for work, code in codes.items():
        assert code == 0, (work / "output").read_text()
        seen |= {path.stem: json.loads(path.read_text()) for path in work.glob("*.json")}
    return SimpleNamespace(hub=hub, seen=seen, folder=folder)


def repo_of(scenario: str) -> str:
    return f"me/{scenario.replace('_', '-')}"


def files_of(runs, scenario: str, title: str) -> set[str]:
    [commit] = [commit for commit in runs.hub.repos["models", repo_of(scenario)].commits if commit.title == title]
    return set(commit.files)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "titles"),
    [
        ("end", []),
        ("every_save", STEPS),
        ("checkpoint", WITH_CHECKPOINTS),
        ("all_checkpoints", WITH_CHECKPOINTS),
        ("adapter", STEPS),
    ],
)
def test_the_strategy_says_what_is_pushed_during_training(scenario, titles, runs):
    assert runs.seen[scenario]["during"] == ["initial commit", *titles]
    weights = ADAPTER if scenario == "adapter" else MODEL
    for title in titles:
        root = {path for path in files_of(runs, scenario, title) if "/" not in path}
        assert root == weights | TOKENIZER | ALWAYS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "folders"),
    [
        ("every_save", {}),
        ("checkpoint", {"last-checkpoint": 2}),
        ("all_checkpoints", {"checkpoint-1": 1, "checkpoint-2": 2}),
    ],
)
def test_pushed_checkpoints_are_whole(scenario, folders, runs):
    files = files_of(runs, scenario, "End of training")
    assert {path.split("/")[0] for path in files if "/" in path} == set(folders)
    for folder, step in folders.items():
        assert {f"{folder}/{name}" for name in MODEL | TOKENIZER | STATE | {"training_args.bin"}} <= files
        state = json.loads(runs.hub.read(repo_of(scenario), f"{folder}/trainer_state.json"))
        assert state["global_step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*FULL, "adapter"])
def test_what_was_trained_comes_back_bit_for_bit(scenario, runs):
    seen = runs.seen[scenario]
    assert seen["names"] and seen["differ"] == []
    expected = 21 if scenario in FULL else 8  # two layers, two projections, two matrices each
    trained = [name for name in seen["trained"] if scenario in FULL or "lora" in name]
    assert len(trained) == expected


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["end", "every_save", "adapter"])
def test_the_tokenizer_comes_back(scenario, runs):
    assert runs.seen[scenario]["text"] == "What is\n3 + 4?  é"
    assert runs.seen[scenario]["template"]


@pytest.mark.slow
def test_a_lost_run_goes_on_from_the_last_checkpoint_on_the_hub(runs):
    """The steps before are those of the lost run, timings and all; one more is trained."""
    first, resumed = runs.seen["checkpoint"]["first"], runs.seen["checkpoint"]["resumed"]
    assert [entry["step"] for entry in first] == [1, 2]
    assert resumed[:2] == first
    assert [entry["step"] for entry in resumed if "tree/nodes" in entry] == [1, 2, 3]


@pytest.mark.slow
def test_a_failing_push_loses_nothing(runs):
    """By LFS, a commit is sent once. Training goes on, and the push at the end has all that failed to arrive."""
    seen = runs.seen["failing"]
    assert seen["steps"] == 3
    assert seen["checkpoints"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert seen["during"] == ["initial commit", STEPS[0]]
    assert runs.hub.titles("me/failing") == ["initial commit", STEPS[0], "End of training"]
    assert "| Steps trained | 3 |" in runs.hub.read("me/failing", "README.md").decode()


@pytest.mark.slow
def test_a_commit_that_fails_once_is_sent_again(runs):
    """By xet, the client tries again by itself."""
    commits = [status for request, _, status in runs.hub.requests if request.startswith("POST /api/models/me/every-s")]
    assert commits.count(500) == 1
    assert runs.hub.titles("me/every-save") == ["initial commit", *STEPS, "End of training"]


@pytest.mark.slow
def test_private_repositories_are_private(runs):
    private = {name for (_, name), repo in runs.hub.repos.items() if repo.private}
    assert private == {"me/every-save"}


@pytest.mark.slow
def test_without_the_right_to_push_training_does_not_begin(runs):
    errors = runs.seen["refused"]
    assert "401" in errors["none"] and "Invalid username or password" in errors["none"]
    assert "401" in errors["wrong"] and "Invalid credentials" in errors["wrong"]
    assert "403" in errors["other"] and "under the namespace you" in errors["other"]
    assert not list(runs.folder.glob("lfs/refused-*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*FULL, "adapter"])
def test_every_pushed_card_is_ours(scenario, runs):
    """Also where peft has written one of its own, and after each push during training."""
    repo = runs.hub.repos["models", repo_of(scenario)]
    commits = [commit for commit in repo.commits if "README.md" in commit.changed]
    texts = [runs.hub.content(commit.files["README.md"]).decode() for commit in commits]
    assert len(texts) >= 2
    for text in texts:
        card = ModelCard(text)
        assert card.text.startswith(f"\n# {scenario.replace('_', '-')}\n")
        assert "was trained" in text and "with TreeRPO" in text and "None" not in text
        assert card.data.base_model == "base/tiny-llama"
        assert card.data.library_name == ("peft" if scenario == "adapter" else "transformers")
        assert card.data["base_model_relation"] == ("adapter" if scenario == "adapter" else "finetune")
        assert {"trl", "treerpo", "arxiv:2506.05183"} <= set(card.data.tags)
    if scenario != "failing":  # which was pushed without naming its data
        assert ModelCard(texts[0]).data.datasets is None
        assert ModelCard(texts[-1]).data.datasets == ["me/rows"]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["every_save", "end", "adapter"])
def test_the_cards_quick_start_runs(scenario, runs):
    """It was executed as it stands, and printed what the model said, or nothing if it ended at once."""
    assert runs.seen[scenario]["output"].endswith("\n")
    code = ModelCard(runs.hub.read(repo_of(scenario), "README.md").decode()).text
    assert ("AutoPeftModelForCausalLM" in code) == (scenario == "adapter")
    assert ('"role": "user"' in code) == (scenario != "end")


@pytest.mark.slow
def test_the_hub_is_asked_to_check_the_cards_it_gets(runs):
    """The Hub has rules of its own for metadata, which are on its side only. So this holds the client's half: what it
    asks to have checked (before each push, and by `ModelCard.validate`) is what it pushes, and its own classes read it
    back without loss."""
    for scenario in [*FULL, "adapter"]:
        content = runs.hub.read(repo_of(scenario), "README.md").decode()
        assert content in runs.hub.cards
        data = ModelCard(content).data
        assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()
        assert all(isinstance(tag, str) for tag in data.tags) and data.pipeline_tag == "text-generation"


@pytest.mark.slow
def test_no_token_leaves_for_the_storage_or_into_a_file(runs):
    """Storage is another host, and what is pushed may be public. Files in the xet store are compressed, so they are
    looked at where they were pushed from."""
    assert {user for request, user, _ in runs.hub.requests if "/lfs/" in request and ".git/" not in request} == {None}
    pushed = [runs.hub.folder / "blobs", runs.hub.folder / "objects", *runs.folder.glob("*/*/")]
    paths = [path for folder in pushed for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in paths)
    assert [path for path in paths if b"hf_of_me" in path.read_bytes()] == []


@pytest.mark.slow
def test_the_client_asks_for_nothing_that_the_local_hub_does_not_have(runs):
    assert runs.hub.unknown == []


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub", users={"hf_of_me": "me", "hf_of_you": "you"}).serving() as hub:
        yield hub


def test_the_local_hub_keeps_all_commits_and_refuses_what_the_hub_refuses(hub, tmp_path, monkeypatch):
    """Its own rules, by the real client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    mine, yours, nobody = (HfApi(hub.url, token=token) for token in ("hf_of_me", "hf_of_you", False))
    options = {"repo_id": "me/rows", "repo_type": "dataset"}
    assert mine.whoami()["name"] == "me"
    assert mine.create_repo(**options, private=True).repo_id == "me/rows"
    assert mine.create_repo(**options, exist_ok=True).repo_id == "me/rows"
    with pytest.raises(HfHubHTTPError, match="409"):
        mine.create_repo(**options)

    table = b"PAR1" + bytes(range(256)) * 400
    add = [CommitOperationAdd("data/a.txt", b"first"), CommitOperationAdd("data/train.parquet", table)]
    first = mine.create_commit(**options, operations=add, commit_message="one").oid
    change = [CommitOperationAdd("data/a.txt", b"second"), CommitOperationAdd("b/c.txt", b"c")]
    second = mine.create_commit(**options, operations=change, commit_message="two", parent_commit=first).oid
    deletion = CommitOperationDelete("data/a.txt")
    with pytest.raises(HfHubHTTPError, match="412"):
        mine.create_commit(**options, operations=[deletion], commit_message="late", parent_commit=first)
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        mine.create_commit(**options, operations=[CommitOperationDelete("gone.txt")], commit_message="gone")
    mine.delete_folder("b", **options)
    with pytest.raises(HfHubHTTPError, match="403"):
        yours.create_repo(**options)
    for other in (yours, nobody):
        with pytest.raises(RepositoryNotFoundError):
            other.repo_info(**options)
    with pytest.raises(RevisionNotFoundError):
        mine.repo_info(**options, revision="other")

    assert [commit.title for commit in mine.list_repo_commits(**options)][1:3] == ["two", "one"]
    assert set(mine.list_repo_files(**options)) == {".gitattributes", "data/a.txt", "data/train.parquet"}
    assert [entry.path for entry in mine.list_repo_tree(**options)] == ["data", ".gitattributes"]
    assert [entry.path for entry in mine.get_paths_info(paths=["data/a.txt", "no"], **options)] == ["data/a.txt"]
    fetch = {**options, "endpoint": hub.url, "token": "hf_of_me", "cache_dir": tmp_path / "cache"}
    texts = [
        Path(hf_hub_download(filename="data/a.txt", revision=oid, **fetch)).read_text() for oid in (first, second)
    ]
    assert texts == ["first", "second"]
    assert Path(hf_hub_download(filename="data/train.parquet", **fetch)).read_bytes() == table
