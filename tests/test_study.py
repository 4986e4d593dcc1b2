"""The study: its report from complete runs, and the committed results against what the README says of them."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import study
import study_plan
import study_report


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"
ASKED = ("delta_pass_at_1", "ci_low", "ci_high", "length_ratio", "tokens_to_parity", "snr_ratio", "seeds",
         "token_mismatch")  # fmt: skip


def write_run(path, final_score):
    """A complete run, as `compare_run` writes it."""
    metrics = {"entropy": 0.1, "frac_reward_zero_std": 0.4, "grad_norm": 1.0}
    if "treerpo" in path.name:
        metrics |= {"tree/kept_groups/depth_1": 0.5, "tree/advantage_abs/depth_1": 1.2}
    lines = [{"run": {}}]
    for share in (0, 0.5, 1):
        num_right = round(100 * (0.2 + share * (final_score - 0.2)))
        scores = [1.0] * num_right + [0.0] * (100 - num_right)
        line = {"step": int(share * 80), "tokens": share * 320_000, "seconds": share * 50, "cpu_seconds": share * 45}
        line |= {"pass_at_1": num_right / 100, "mean_length": 20.0, "mean_length_correct": 19.0, "truncated": 0.0}
        lines.append(line | {"metrics": metrics if share else {}})
    lines[-1] |= {"final": True, "problem_scores": scores}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_summary_holds_the_diagnostics_that_were_asked_for():
    names = ["tree/kept_groups/depth_2", "tree/advantage_abs/depth_1", "tree/trained_tokens", "tree/token_sharing",
             "entropy", "frac_reward_zero_std", "grad_norm"]  # fmt: skip
    assert all(map(study_report.is_diagnostic, names))
    assert not any(map(study_report.is_diagnostic, ["loss", "tree/nodes", "tree/token_sharing_training"]))


def write_snr(path, trees, pass_at_1):
    """What `gradient_snr` found."""
    numbers = {"snr_ratio": 1.1, "snr_ratio_ci": [1.0, 1.2], "pass_at_1": pass_at_1}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"treerpo": tree.name, "grpo": "grpo-8", **numbers} for tree in trees]))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study whose runs are all there; nothing is trained."""
    monkeypatch.setattr(study, "built_in", lambda name, models_dir, **options: name)
    finished = study.Study(tmp_path, num_workers=1)

    def execute(runs):
        for task, run in runs:
            is_better = run.learning_rate == 2e-4 and run.method in (study_plan.SMALL, study.GRPO[0])
            score = 0.6 + 0.1 * bool(run.method.branching) + 0.1 * is_better + 0.01 * (run.seed % 2)
            write_run(tmp_path / task / f"{run.name}.jsonl", score)

    monkeypatch.setattr(finished, "execute", execute)
    for stage in ("headline", "ablations", "lengths"):
        study.STAGES[stage](finished)
    for name in study.COMPARISONS:
        write_snr(tmp_path / name / "snr.json", [study.TREERPO], 0.2)
    for temperature, pass_at_1 in ((1.0, 0.2), (1.4, 0.02)):
        write_snr(tmp_path / "sparse" / f"snr-{temperature}.json", study.SPARSE_TREES, pass_at_1)
    return finished


def test_report_of_a_finished_study(finished, tmp_path):
    results = tmp_path / "results"
    study.write_report(finished, results)
    summary = json.loads((results / "summary.json").read_text())
    assert list(summary) == list(study.COMPARISONS)
    for name, numbers in summary.items():
        comparison = study.COMPARISONS[name]
        assert set(ASKED) <= set(numbers)
        assert numbers["chosen"]["TreeRPO"]["method"] == comparison.families["TreeRPO"][-1].name
        assert numbers["chosen"]["GRPO"] == {"method": study.GRPO[0].name, "learning_rate": 2e-4}
        assert numbers["seeds"] == len(comparison.seeds)
        assert (results / f"{name}.png").stat().st_size > 10_000
        assert len(json.loads((results / f"{name}.json").read_text())["GRPO"]) == numbers["seeds"]
    assert summary["countdown"]["delta_pass_at_1"] == pytest.approx(0.1)
    assert (results / "headline.md").read_text().count("+10.0 (") >= 2
    table = (results / "ablations.md").read_text()
    for methods in study.ABLATIONS.values():
        for method in methods:
            assert table.count(f"| {method.name} | 3 |") >= 1
    assert (results / "ablations.png").exists()
    assert (results / "snr_by_success.png").exists()


def test_report_leaves_out_what_is_not_finished(finished, tmp_path):
    for path in (tmp_path / "countdown").glob("grpo-*-test-*"):
        path.unlink()
    study.write_report(finished, tmp_path / "results")
    assert "countdown" not in json.loads((tmp_path / "results" / "summary.json").read_text())


def test_every_ablation_group_starts_with_the_reference():
    for methods in study.ABLATIONS.values():
        assert methods[0] == study.TREERPO
        assert len({method.name for method in methods}) == len(methods)


def test_tuning_and_result_share_no_seed():
    for comparison in study.HEADLINE.values():
        assert not set(comparison.tuning_seeds) & set(comparison.seeds)
        assert len(comparison.seeds) >= 5
    assert len(study.ABLATION_SEEDS) >= 3


def test_the_readme_states_the_committed_results():
    readme, summary = (ROOT / "README.md").read_text(), json.loads((RESULTS / "summary.json").read_text())
    table = (RESULTS / "headline.md").read_text()
    assert table == study.headline_table(summary)
    assert table in readme
    for name in study.HEADLINE:
        assert summary[name]["seeds"] >= 5
        assert summary[name]["token_mismatch"] < 0.02
    assert set(study.COMPARISONS) == set(summary)
    # Every ablation that the study names has its row.
    rows = (RESULTS / "ablations.md").read_text()
    for group, methods in study.ABLATIONS.items():
        for method in methods:
            assert f"| {group} | {method.name} | {len(study.ABLATION_SEEDS)} |" in rows
